package e2e

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// TestEnrolment is about tokens and certificates that do not fit.
func TestEnrolment(t *testing.T) {
	l := newLab(t, lab.Config{})
	ctx := within(t, 5*time.Minute)
	must(l.StartPlatform(ctx))(t)
	check(t, l.Login(ctx))
	relayd, gatewayd, sallyway := must(l.Bin("relayd"))(t), must(l.Bin("gatewayd"))(t), must(l.Bin("sallyway"))(t)

	// refused runs a daemon that is to be refused: it ends by itself, with the code, and says what and what to do.
	refused := func(t *testing.T, code int, says string, h *lab.Host, args ...string) string {
		t.Helper()
		r, err := h.Run(within(t, 20*time.Second), args...)
		var exit *lab.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%v: %v, want exit code %d", args, err, code)
		}
		if r.Code != code {
			t.Errorf("exit code %d, want %d", r.Code, code)
		}
		if !regexp.MustCompile(says).MatchString(r.Stderr) {
			t.Errorf("it says:\n%swant %s", r.Stderr, says)
		}
		return r.Stderr
	}

	t.Run("used twice", func(t *testing.T) {
		n := must(l.StartNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-1", Host: l.Relay1}))(t)
		check(t, n.Stop())
		// Again on the same state: enrolment is skipped.
		mark := n.Log.Mark()
		check(t, n.Proc.Start())
		check(t, n.Proc.WaitReady(ctx, mark, "Relay server started successfully"))
		check(t, n.Stop())
		// And on another state it is refused.
		out := refused(t, 3, `(?i)(used|spent)`, l.Relay2, relayd, "start", "--token-file", copyToken(t, l.Relay2, n), "--state", l.Relay2.Path("stolen"))
		if !regexp.MustCompile(`sallyway .*relay token`).MatchString(out) {
			t.Errorf("no word on what to do:\n%s", out)
		}
		if strings.Contains(out, n.Record.Token) {
			t.Error("the token is repeated")
		}
	})
	t.Run("for another kind", func(t *testing.T) {
		n := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Gateway, Name: "gw", Host: l.Gateway}))(t)
		refused(t, 3, `(?i)gateway.*relay|relay.*gateway`, l.Gateway, relayd, "start", "--token-file", n.Token, "--state", l.Gateway.Path("s1"))
		refused(t, 3, `(?i)gateway.*client|client.*gateway`, l.Gateway, sallyway, "connect", "--token-file", n.Token, "--state", l.Gateway.Path("s2"))
		// The token is still good for what it is for.
		spec := lab.NodeSpec{Kind: identity.Relay, Name: "relay-3", Host: l.Relay2}
		r := must(l.StartNode(ctx, spec))(t)
		check(t, l.StartDaemon(n, lab.NodeSpec{Kind: identity.Gateway, Name: "gw", Host: l.Gateway}))
		check(t, n.WaitReady(ctx))
		check(t, n.Stop())
		check(t, r.Stop())
	})
	t.Run("of another node", func(t *testing.T) {
		a := must(l.StartNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-4", Host: l.Relay1}))(t)
		check(t, a.Stop())
		b := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-5", Host: l.Relay1}))(t)
		out := refused(t, 3, `relay-4`, l.Relay1, relayd, "start", "--token-file", b.Token, "--state", a.State)
		if !strings.Contains(out, "relay-5") {
			t.Errorf("not both nodes are named:\n%s", out)
		}
	})
	t.Run("re-issued", func(t *testing.T) {
		n := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-6", Host: l.Relay1}))(t)
		var again control.CreatedNode
		check(t, l.SallywayJSON(ctx, &again, "relay", "token", "relay-6"))
		check(t, lab.WriteToken(l.Relay1.Path("new.token"), again.Token, 0))
		old := n.Token
		refused(t, 3, `(?i)token`, l.Relay1, relayd, "start", "--token-file", old, "--state", l.Relay1.Path("s6"))
		n.Token = l.Relay1.Path("new.token")
		check(t, l.StartDaemon(n, lab.NodeSpec{Kind: identity.Relay, Name: "relay-6", Host: l.Relay1}))
		check(t, n.WaitReady(ctx))
		check(t, n.Stop())
	})
	t.Run("wrong secret", func(t *testing.T) {
		n := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-7", Host: l.Relay1}))(t)
		tok := must(control.ParseToken(n.Record.Token))(t)
		_, _ = rand.Read(tok.Secret) // never fails
		check(t, lab.WriteToken(n.Token, tok.String(), 0))
		out := refused(t, 3, `(?i)token`, l.Relay1, relayd, "start", "--token-file", n.Token, "--state", n.State)
		if strings.Contains(out, tok.String()) {
			t.Error("the token is repeated")
		}
	})
	t.Run("wrong CA", func(t *testing.T) {
		n := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "relay-8", Host: l.Relay1}))(t)
		tok := must(control.ParseToken(n.Record.Token))(t)
		good := tok.Pin
		pin := must(hex.DecodeString(good))(t)
		pin[0] ^= 1
		tok.Pin = hex.EncodeToString(pin)
		check(t, lab.WriteToken(n.Token, tok.String(), 0))
		refused(t, 1, `(?i)(pin|certificate|CA)`, l.Relay1, relayd, "start", "--token-file", n.Token, "--state", n.State)
		// The secret did not reach the one behind the wrong certificate: the right token still works.
		check(t, lab.WriteToken(n.Token, n.Record.Token, 0))
		check(t, l.StartDaemon(n, lab.NodeSpec{Kind: identity.Relay, Name: "relay-8", Host: l.Relay1}))
		check(t, n.WaitReady(ctx))
		check(t, n.Stop())
	})
	t.Run("damaged", func(t *testing.T) {
		path := l.Gateway.Path("damaged.token")
		check(t, lab.WriteToken(path, "swe1.AAAA", 0))
		refused(t, 3, `(?i)damaged`, l.Gateway, gatewayd, "up", "--token-file", path, "--state", l.Gateway.Path("s9"))
	})
	t.Run("audit names what was refused", func(t *testing.T) {
		r := must(l.Sallyway(ctx, "audit", "export"))(t)
		for _, want := range []string{`refused`, `enrol`} {
			if !strings.Contains(r.Stdout, want) {
				t.Errorf("the audit log does not name %q:\n%.2000s", want, r.Stdout)
			}
		}
		must(l.Sallyway(ctx, "audit", "verify"))(t)
	})
}

// TestExpiredToken has a platform whose tokens live for a second.
func TestExpiredToken(t *testing.T) {
	l := newLab(t, lab.Config{})
	ctx := within(t, time.Minute)
	must(l.StartPlatform(ctx, "--token-life", "1s"))(t)
	check(t, l.Login(ctx))
	n := must(l.CreateNode(ctx, lab.NodeSpec{Kind: identity.Relay, Name: "late", Host: l.Relay1}))(t)
	timer := time.NewTimer(time.Until(n.Record.Expires) + 200*time.Millisecond)
	<-timer.C
	r, err := l.Relay1.Run(ctx, must(l.Bin("relayd"))(t), "start", "--token-file", n.Token, "--state", n.State)
	if err == nil || r.Code != 3 || !strings.Contains(r.Stderr, "expired") || !regexp.MustCompile(`sallyway .*relay token`).MatchString(r.Stderr) {
		t.Errorf("expired token: %v\n%s", err, r.Stderr)
	}
}

func copyToken(t *testing.T, h *lab.Host, n *lab.Node) string {
	t.Helper()
	path := h.Path("copy.token")
	check(t, lab.WriteToken(path, n.Record.Token, 0))
	return path
}

// TestFreshHost: `gatewayd up` where nothing is enrolled says three things with exit code 2 and touches nothing.
func TestFreshHost(t *testing.T) {
	l := newLab(t, lab.Config{})
	state := l.Gateway.Path("fresh", "state")
	before := hostState(t, l.Gateway)
	r, err := l.Gateway.Run(within(t, 20*time.Second), must(l.Bin("gatewayd"))(t), "up", "--state", state)
	var exit *lab.ExitError
	if !errors.As(err, &exit) || exit.Code != 2 {
		t.Fatalf("%v, want exit code 2", err)
	}
	lines := strings.Split(strings.TrimRight(r.Stderr, "\n"), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], "sallyway gateway create") || !strings.Contains(lines[2], "make demo") {
		t.Errorf("it says:\n%s", r.Stderr)
	}
	if after := hostState(t, l.Gateway); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Stat(filepath.Dir(state)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state folder was made: %v", err)
	}
}

// hostState is what a program may have touched on a host.
func hostState(t *testing.T, h *lab.Host) string {
	t.Helper()
	var m lab.MachineState
	check(t, h.Do(func() (err error) {
		m, err = lab.ReadMachineState()
		return err
	}))
	return m.Links + "\n" + m.Routes + "\n" + m.Rules + "\n" + m.Firewall + "\n" + m.Resolv + "\n" + m.Sysctl
}

// TestStatusDoctorVersion: the commands that every daemon has.
func TestStatusDoctorVersion(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	ctx := within(t, time.Minute)
	for _, c := range []struct {
		n   *lab.Node
		bin string
	}{{s.RelayA, "relayd"}, {s.GatewayA, "gatewayd"}} {
		bin := must(s.Bin(c.bin))(t)
		for _, args := range [][]string{{"status", "--json"}, {"status"}, {"doctor", "--json"}, {"healthcheck"}} {
			r, err := c.n.Host.Run(ctx, append(append([]string{bin}, args...), "--state", c.n.State)...)
			if err != nil || strings.TrimSpace(r.Stdout) == "" {
				t.Errorf("%s %v: %v\n%s", c.bin, args, err, r.Stdout)
			}
		}
	}
	gatewayd := must(s.Bin("gatewayd"))(t)
	diagnose := func(parts ...string) map[string]daemon.Check {
		t.Helper()
		r, err := s.Gateway.Run(ctx, append([]string{gatewayd, "doctor", "--json", "--state", s.GatewayA.State}, parts...)...)
		var checks []daemon.Check
		if jerr := json.Unmarshal([]byte(r.Stdout), &checks); jerr != nil {
			t.Fatalf("doctor: %v, %v: %s", err, jerr, r.Stdout)
		}
		out := map[string]daemon.Check{}
		for _, c := range checks {
			out[c.Check] = c
		}
		return out
	}
	var rows map[string]daemon.Check
	check(t, lab.Until(within(t, resume), 200*time.Millisecond, func() error {
		rows = diagnose()
		if c := rows["NAT"]; c.Result != daemon.Pass { // it is measured once a relay is reached
			return fmt.Errorf("row NAT: %+v", c)
		}
		return nil
	}))
	for _, want := range []string{"DNS", "platform from here", "relay relay-1 by udp", "relay relay-2 by tls", "path MTU to relay-1", "UDP buffers", "TUN", "resources", "clock", "certificate"} {
		if c, ok := rows[want]; !ok || c.Result != daemon.Pass {
			t.Errorf("doctor's row %q: %+v", want, c)
		}
	}
	check(t, s.BlockUDP(true))
	rows = diagnose()
	if c := rows["relay relay-1 by udp"]; c.Result != daemon.Warn || !strings.Contains(c.Remedy, "UDP port 5349") {
		t.Errorf("UDP is blocked, and the doctor says %+v", c)
	}
	if c := rows["relay relay-1 by tls"]; c.Result != daemon.Pass {
		t.Errorf("UDP is blocked, and the doctor says of TLS %+v", c)
	}
	check(t, s.BlockUDP(false))
	if _, err := s.Gateway.Run(ctx, gatewayd, "down", "--state", s.GatewayA.State); err != nil {
		t.Error(err)
	}
	if code, err := s.GatewayA.Wait(ctx); err != nil || code != 0 {
		t.Errorf("after down: exit code %d, %v", code, err)
	}
	if r, err := s.Gateway.Run(ctx, "/bin/cat", "/proc/net/dev"); err != nil || strings.Contains(r.Stdout, "sally0") {
		t.Errorf("sally0 is left: %v", err)
	}
}

// TestIdleMemory: what each daemon takes with nothing to do.
func TestIdleMemory(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	for _, d := range []struct {
		p   *lab.Proc
		MiB int64
	}{{s.GatewayA.Proc, 40}, {s.RelayA.Proc, 40}, {s.PlatformD, 80}} {
		u := must(d.p.Usage())(t)
		t.Logf("%s: %d MiB", d.p.Name, u.RSS>>20)
		if u.RSS>>20 > d.MiB {
			t.Errorf("%s takes %d MiB when idle, want at most %d", d.p.Name, u.RSS>>20, d.MiB)
		}
	}
}
