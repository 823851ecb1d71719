package lab_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// echoed sends datagrams to an echo server and returns how many come back.
func echoed(t *testing.T, from *lab.Host, at netip.AddrPort, n int) (back int) {
	t.Helper()
	c, err := from.Dial(soon(t, time.Second), "udp", at.String())
	if err != nil {
		return 0 // no route, as while a cable is out
	}
	defer c.Close()
	for i := range n {
		_, _ = c.Write([]byte{byte(i)}) // it may be refused
	}
	if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 9); ; back++ {
		if _, err := c.Read(b); err != nil {
			return back // nothing more in time
		}
	}
}

func TestImpair(t *testing.T) {
	l := newLab(t, lab.Config{})
	at := netip.AddrPortFrom(l.Addr(l.Relay1), 5349)
	server, err := l.Relay1.EchoUDP(at.String())
	if err != nil {
		t.Fatal(err)
	}
	const n = 200
	for _, c := range []struct{ to, from, leastIn, mostIn, leastBack, mostBack int }{
		{0, 0, n, n, n, n},
		{100, 0, 0, 0, 0, 0},
		{0, 100, n, n, 0, 0},
		{30, 0, n / 2, n * 85 / 100, n / 2, n * 85 / 100},
		{0, 0, n, n, n, n},
	} {
		if err := l.Impair(l.Relay1, c.to, c.from); err != nil {
			t.Fatal(err)
		}
		before := server.Calls()
		back := echoed(t, l.Client, at, n)
		if in := int(server.Calls() - before); in < c.leastIn || in > c.mostIn || back < c.leastBack || back > c.mostBack {
			t.Errorf("%d %% to and %d %% from: %d of %d arrive, %d come back", c.to, c.from, in, n, back)
		}
	}
}

func TestUnplug(t *testing.T) {
	l := newLab(t, lab.Config{})
	v4 := netip.AddrPortFrom(l.Addr(l.Relay1), 5349)
	v6 := netip.MustParseAddrPort("[2001:db8:3::2]:5349")
	for _, at := range []netip.AddrPort{v4, v6} {
		if _, err := l.Relay1.EchoUDP(at.String()); err != nil {
			t.Fatal(err)
		}
	}
	// Neighbours are looked for in the first seconds of a link.
	reached := func(want int) {
		t.Helper()
		for _, at := range []netip.AddrPort{v4, v6} {
			err := lab.Until(soon(t, 5*time.Second), 10*time.Millisecond, func() error {
				if got := echoed(t, l.Client, at, 1); got != want {
					return fmt.Errorf("%v: %d answers, want %d", at, got, want)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	reached(1)
	for range 2 {
		plug, err := l.Relay1.Unplug()
		if err != nil {
			t.Fatal(err)
		}
		reached(0)
		if err := plug(); err != nil {
			t.Fatal(err)
		}
		reached(1)
	}
}

func TestKillAllKillsWhatHasASessionOfItsOwn(t *testing.T) {
	l := newLab(t, lab.Config{})
	child := t.TempDir() + "/child"
	p, err := l.Client.Start(lab.Spec{Name: "parent", Args: []string{"sh", "-c", "setsid sh -c 'echo $$ > " + child + "; echo up; exec sleep 600' & wait"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitReady(soon(t, 5*time.Second), 0, "up"); err != nil {
		t.Fatal(err)
	}
	pid := number(t, child)
	p.KillAll()
	err = lab.Until(soon(t, 5*time.Second), 10*time.Millisecond, func() error { return gone(pid) })
	if err != nil {
		t.Error(err)
	}
}

// number reads a file that holds one.
func number(t *testing.T, path string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// gone fails while a process lives. One that nobody has waited for is dead, too.
func gone(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	if rest := b[bytes.LastIndexByte(b, ')')+1:]; bytes.HasPrefix(rest, []byte(" Z")) {
		return nil
	}
	return fmt.Errorf("process %d lives", pid)
}
