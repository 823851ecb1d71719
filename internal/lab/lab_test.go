package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/lab"
)

func newLab(t *testing.T, cfg lab.Config) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	l, err := lab.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func soon(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// sends reports whether a datagram or a connection from one host reaches a socket of another.
func sends(t *testing.T, from, to *lab.Host, network string, at netip.AddrPort) bool {
	t.Helper()
	ctx := soon(t, 300*time.Millisecond)
	if network == "tcp" {
		ln, err := to.Listen(at.String())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := from.Dial(ctx, network, at.String())
		if err != nil {
			return false
		}
		c.Close()
		return true
	}
	pc, err := to.ListenUDP(at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c, err := from.Dial(ctx, network, at.String())
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	if err := pc.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, _, err = pc.ReadFrom(make([]byte, 9))
	return err == nil
}

func TestRouterLetsThroughRelayAndPlatformTrafficOnly(t *testing.T) {
	l := newLab(t, lab.Config{})
	for _, c := range []struct {
		from, to *lab.Host
		network  string
		port     uint16
		want     bool
	}{
		{l.Client, l.Relay1, "udp", 5349, true},
		{l.Client, l.Relay2, "tcp", 5349, true},
		{l.Gateway, l.Relay1, "udp", 49152, true},
		{l.Gateway, l.Relay1, "udp", 65535, true},
		{l.Gateway, l.Relay1, "tcp", 2222, true},
		{l.Client, l.Relay1, "tcp", 8443, true},
		{l.Client, l.Platform, "tcp", 443, true},
		{l.Relay1, l.Platform, "tcp", 443, true},
		{l.Platform, l.Relay1, "udp", 5349, true},
		{l.Relay1, l.Peer, "udp", 3480, true},
		{l.Client, l.Relay1, "tcp", 22, false},
		{l.Client, l.Relay1, "udp", 49151, false},
		{l.Client, l.Platform, "tcp", 80, false},
		{l.Client, l.Platform, "udp", 443, false},
		{l.Client, l.Gateway, "udp", 5349, false},
		{l.Client, l.Gateway, "tcp", 443, false},
		{l.Gateway, l.Client, "udp", 5349, false},
		{l.Relay1, l.Gateway, "udp", 5349, false},
		{l.Relay1, l.Client, "tcp", 443, false},
		{l.Platform, l.Gateway, "tcp", 443, false},
		{l.Gateway, l.Gateway2, "udp", 50000, false},
		{l.Client, l.Peer, "udp", 3480, false},
	} {
		at := netip.AddrPortFrom(l.Addr(c.to), c.port)
		if got := sends(t, c.from, c.to, c.network, at); got != c.want {
			t.Errorf("%s to %s %s/%d: %v, want %v", c.from.Name, c.to.Name, c.network, c.port, got, c.want)
		}
	}
	if sends(t, l.Client, l.Private, "tcp", netip.AddrPortFrom(lab.WebAddr, 80)) {
		t.Error("the client reaches the private network without a tunnel")
	}
	if !sends(t, l.Gateway, l.Private, "tcp", netip.AddrPortFrom(lab.WebAddr6, 80)) {
		t.Error("the gateway does not reach its private network over IPv6")
	}
	if err := l.Cut(l.Relay1); err != nil {
		t.Fatal(err)
	}
	if sends(t, l.Client, l.Relay1, "udp", netip.AddrPortFrom(l.Addr(l.Relay1), 5349)) {
		t.Error("a cut relay is reached")
	}
	if err := l.Cut(); err != nil {
		t.Fatal(err)
	}
	if !sends(t, l.Client, l.Relay1, "udp", netip.AddrPortFrom(l.Addr(l.Relay1), 5349)) {
		t.Error("a relay is not reached after the cut has ended")
	}
}

func TestNATHidesTheClient(t *testing.T) {
	l := newLab(t, lab.Config{NAT: true, MTU: 1280})
	web, err := l.Relay1.Web(netip.AddrPortFrom(l.Addr(l.Relay1), 8443).String(), "hello")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		resp, err := l.Client.HTTPClient().Get(web.URL("/from"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		from, err := netip.ParseAddrPort(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		want := netip.MustParseAddr("203.0.113.18")
		if i == 1 {
			want = netip.MustParseAddr("203.0.113.19")
		}
		if from.Addr() != want {
			t.Errorf("the relay sees %v, want %v", from.Addr(), want)
		}
		if _, err := l.MoveClient(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServices(t *testing.T) {
	l := newLab(t, lab.Config{Raw: true})
	at := func(port uint16) string { return netip.AddrPortFrom(lab.RawAddr, port).String() }
	web, err := l.Private.Web(at(80), "<h1>private</h1>")
	if err != nil {
		t.Fatal(err)
	}
	const n = 5 << 20
	resp, err := l.Client.HTTPClient().Post(web.URL("/sum"), "", lab.Pattern(n))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if want := fmt.Sprintf("%s %d\n", lab.PatternSum(n), n); err != nil || string(b) != want {
		t.Errorf("sum %q, %v, want %q", b, err, want)
	}
	half, err := l.Private.HalfClose(at(7001))
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Client.Dial(soon(t, 5*time.Second), "tcp", half.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.Copy(c, lab.Pattern(1000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), lab.PatternSum(1000)) {
		t.Errorf("after half-close: %q, %v", b, err)
	}
	echo, err := l.Private.EchoUDP(at(7))
	if err != nil {
		t.Fatal(err)
	}
	u, err := l.Client.Dial(soon(t, 5*time.Second), "udp", echo.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	sent := bytes.Repeat([]byte("u"), 1472)
	if _, err := u.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := u.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2000)
	if n, err := u.Read(got); err != nil || !bytes.Equal(got[:n], sent) {
		t.Errorf("UDP echo: %d bytes, %v", n, err)
	}
	if web.Calls() != 1 || half.Calls() != 1 || echo.Calls() != 1 {
		t.Errorf("calls %d %d %d, want one each", web.Calls(), half.Calls(), echo.Calls())
	}
}

func TestHostHasItsOwnResolvConf(t *testing.T) {
	l := newLab(t, lab.Config{})
	if err := l.Client.SetResolvers("203.0.113.17"); err != nil {
		t.Fatal(err)
	}
	r, err := l.Client.Run(soon(t, 5*time.Second), "/bin/sh", "-c", "cat /etc/resolv.conf; echo nameserver 1.2.3.4 >/etc/resolv.conf; ls -A /run; sleep 0")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(r.Stdout, "nameserver 203.0.113.17\n") {
		t.Errorf("the host reads %q", r.Stdout)
	}
	if b, _ := os.ReadFile(l.Client.ResolvConf()); string(b) != "nameserver 1.2.3.4\n" {
		t.Errorf("the host wrote %q", b)
	}
	if b, _ := os.ReadFile("/etc/resolv.conf"); strings.Contains(string(b), "1.2.3.4") {
		t.Error("the host wrote into the machine's resolv.conf")
	}
	r, err = l.Client.Run(soon(t, 5*time.Second), "/bin/sh", "-c", "echo no >&2; exit 3")
	var exit *lab.ExitError
	if !errors.As(err, &exit) || exit.Code != 3 || r.Stderr != "no\n" {
		t.Errorf("exit code 3: %v, %+v", err, r)
	}
}

func TestProcessLogStopKillRestart(t *testing.T) {
	l := newLab(t, lab.Config{})
	p, err := l.Client.Start(lab.Spec{Name: "loop", Args: []string{"/bin/sh", "-c", `trap "echo bye; exit 4" TERM; echo up; while :; do sleep 0.01; done`}})
	if err != nil {
		t.Fatal(err)
	}
	ctx := soon(t, 10*time.Second)
	if err := p.WaitReady(ctx, 0, "^up$"); err != nil {
		t.Fatal(err)
	}
	mark := p.Log.Mark()
	if err := p.Restart(); err != nil {
		t.Fatal(err)
	}
	if err := p.WaitReady(ctx, mark, "^up$"); err != nil {
		t.Fatal(err)
	}
	if len(p.Log.Since(0, "bye")) != 1 {
		t.Errorf("log of the first run:\n%s", p.Log.Tail(9))
	}
	if u, err := p.Usage(); err != nil || u.RSS == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	p.Kill()
	if code, err := p.Wait(ctx); code != -1 || err != nil {
		t.Errorf("killed: code %d, %v", code, err)
	}
	if err := p.WaitReady(ctx, p.Log.Mark(), "never"); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("waiting for a dead process: %v", err)
	}
}

// TestMachineIsTheSameAfterwards also makes two labs at once.
func TestMachineIsTheSameAfterwards(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	before, err := lab.ReadMachineState()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(before.Links, "lo ") || before.Routes == "" || before.Rules == "" {
		t.Errorf("the state lacks what every machine has: %+v", before)
	}
	a, b := newLab(t, lab.Config{NAT: true}), newLab(t, lab.Config{})
	during, err := lab.ReadMachineState()
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(during); d != "" {
		t.Errorf("while labs run:\n%s", d)
	}
	a.Close()
	b.Close()
	after, err := lab.ReadMachineState()
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(after); d != "" {
		t.Errorf("after the labs:\n%s", d)
	}
	for _, l := range []*lab.Lab{a, b} {
		if _, err := os.Stat(l.Dir()); !os.IsNotExist(err) {
			t.Errorf("folder %s is left: %v", l.Dir(), err)
		}
	}
	after.Resolv = "another"
	if before.Diff(after) == "" {
		t.Error("a change of resolv.conf is not seen")
	}
}

// TestKilledLabLeavesNothing runs itself as the process that is killed.
func TestKilledLabLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if os.Getenv("LAB_TEST_VICTIM") != "" {
		l := newLab(t, lab.Config{})
		p, err := l.Client.Start(lab.Spec{Name: "sleep", Args: []string{"sleep", "600"}})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("VICTIM %s %d\n", l.Dir(), p.PID())
		select {}
	}
	// A temp folder of its own: another test's lab would remove what the victim leaves behind before it is looked at.
	t.Setenv("TMPDIR", t.TempDir())
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledLabLeavesNothing$")
	cmd.Env = append(os.Environ(), "LAB_TEST_VICTIM=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	var pid int
	if _, err := fmt.Fscanf(out, "VICTIM %s %d\n", &dir, &pid); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	err = lab.Until(soon(t, 10*time.Second), 10*time.Millisecond, func() error {
		if unix.Kill(pid, 0) == nil {
			return errors.New("the lab's process outlives it")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "owner")); err != nil {
		t.Errorf("before the next lab: %v", err)
	}
	newLab(t, lab.Config{})
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the next lab has not removed %s: %v", dir, err)
	}
}
