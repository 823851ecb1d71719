package fallback

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/budget"
	"sallyway/relay/reverse"
)

// TestClientCertificates: who is joined with a gateway by TLS, and that everybody else sees one and the same thing.
func TestClientCertificates(t *testing.T) {
	w := newWorld(t, nil)
	g1, b1 := w.acme.node(identity.Gateway, "g-1"), w.beta.node(identity.Gateway, "b-1")
	w.gateway(g1, w.acme.sshIdentity(g1, nil, nil))
	w.gateway(b1, w.beta.sshIdentity(b1, nil, nil))
	now := time.Now()
	client := w.acme.node(identity.Client, "c-1")
	good := w.acme.leaf(client, now)
	twin := newOrg(t, "acme") // another organization of the same name, as somebody else's platform could have
	for _, c := range []struct {
		name    string
		gateway identity.Node
		cert    *tls.Certificate
		ok      bool
	}{
		{"client", g1, good, true},
		{"site", g1, w.acme.leaf(w.acme.node(identity.Site, "g-2"), now), true},
		{"platform", g1, w.acme.leaf(w.acme.node(identity.Platform, "p-1"), now), true},
		{"client of the other one", b1, w.beta.leaf(w.beta.node(identity.Client, "c-1"), now), true},
		{"no certificate", g1, new(tls.Certificate), false},
		{"gateway's certificate", g1, w.acme.leaf(w.acme.node(identity.Gateway, "g-2"), now), false},
		{"relay's certificate", g1, w.acme.leaf(w.acme.node(identity.Relay, "r-2"), now), false},
		{"other organization's client", g1, w.beta.leaf(w.beta.node(identity.Client, "c-1"), now), false},
		{"to the other organization's gateway", b1, good, false},
		{"same name, other root", g1, twin.leaf(client, now), false},
		{"expired", g1, w.acme.leaf(client, now.Add(-2*time.Hour)), false},
		{"not yet valid", g1, w.acme.leaf(client, now.Add(2*time.Hour)), false},
		{"unknown gateway", w.acme.node(identity.Gateway, "g-9"), good, false},
		{"organization not served", identity.Node{Org: "gamma", Kind: identity.Gateway, ID: "g-1"}, good, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := w.dial(c.gateway, c.cert)
			switch {
			case c.ok && err != nil:
				t.Error(err)
			case !c.ok && !errors.Is(err, reverse.ErrRefused):
				t.Errorf("%v, want %v", err, reverse.ErrRefused)
			}
		})
	}
	waitFor(t, "who is refused is gone", func() bool { return w.Links() <= 4 })
}

// TestServerNames: the name that a client sends leads to one gateway, or nowhere.
func TestServerNames(t *testing.T) {
	for _, c := range []struct {
		name, gateway string
	}{
		{"g-1.acme.sallyway", "acme/gateway/g-1"},
		{"", ""},
		{"sallyway", ""},
		{"acme.sallyway", ""},
		{"g-1.acme.sallyway.", ""},
		{"g-1.acme.example", ""},
		{"G-1.acme.sallyway", ""},
		{"x.g-1.acme.sallyway", ""},
		{"g-1.platform.shared.sallyway", ""},
		{"../g-1.acme.sallyway", ""},
		{strings.Repeat("a", 64) + ".acme.sallyway", ""},
	} {
		n, err := parseServerName(c.name)
		if (err == nil) != (c.gateway != "") || (err == nil && n.String() != c.gateway) {
			t.Errorf("%q: %v, %v", c.name, n, err)
		}
	}
}

// TestOpenSSLCompletesAHandshake: what the documents tell people to try when they can not reach a relay.
func TestOpenSSLCompletesAHandshake(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("openssl is not installed")
		}
		t.Skip("openssl is not installed")
	}
	w := newWorld(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, args := range [][]string{nil, {"-servername", "g-1.acme.sallyway"}, {"-noservername"}} {
		cmd := exec.CommandContext(ctx, openssl, append([]string{"s_client", "-connect", w.tlsAddr.String(), "-ign_eof"}, args...)...)
		out, _ := cmd.CombinedOutput() // its exit code tells nothing
		for _, want := range []string{"TLSv1.3", "spiffe", "closed"} {
			if want == "spiffe" {
				want = "CN = " + w.relay.ID
			}
			if !strings.Contains(string(out), want) {
				t.Errorf("%v: %q is not in\n%s", args, want, out)
			}
		}
	}
	// Older than 1.3 is no handshake.
	out, _ := exec.CommandContext(ctx, openssl, "s_client", "-connect", w.tlsAddr.String(), "-tls1_2").CombinedOutput()
	if !strings.Contains(string(out), "alert protocol version") {
		t.Errorf("TLS 1.2:\n%s", out)
	}
}

// TestBrokenFrames: a client or gateway that breaks the framing loses its link, and nobody else does.
func TestBrokenFrames(t *testing.T) {
	w := newWorld(t, nil)
	n := w.acme.node(identity.Gateway, "g-1")
	g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	cert := w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now())
	good, err := w.dial(n, cert)
	if err != nil {
		t.Fatal(err)
	}
	down := <-g.links
	raw, err := tls.Dial("tcp", w.tlsAddr.String(), &tls.Config{
		InsecureSkipVerify: true, ServerName: n.ServerName(), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	ready := make([]byte, 3)
	if _, err := io.ReadFull(raw, ready); err != nil || !bytes.Equal(ready, []byte{0, 0, byte(reverse.ControlReady)}) {
		t.Fatalf("% x, %v", ready, err)
	}
	// A ping is answered, an unknown control frame is no error.
	if _, err := raw.Write([]byte{0, 0, 99, 0, 0, byte(reverse.ControlPing)}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(raw, ready); err != nil || ready[2] != byte(reverse.ControlPong) {
		t.Fatalf("% x, %v", ready, err)
	}
	if _, err := raw.Write([]byte{0xff, 0xff, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Read(ready); err == nil {
		t.Error("a frame that is too large passes")
	}
	good.Send([]byte("still here"), 0, datagram.NotECT)
	waitFor(t, "the other link works", func() bool { return down.got.count() == 1 })
}

// TestSlowHandshakes: who sends nothing, or a byte now and then, has its place for as long as a handshake may take, and no longer; and
// meanwhile everybody else gets in.
func TestSlowHandshakes(t *testing.T) {
	const grace = 300 * time.Millisecond
	w := newWorld(t, func(c *Config) {
		c.SSHGrace, c.TLSGrace = grace, grace
		c.Limits.HalfOpen = 8
	})
	for name, addr := range map[string]string{"ssh": w.sshAddr.String(), "tls": w.tlsAddr.String()} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			drip := map[string]string{"ssh": "SSH-2.0-slow", "tls": "\x16\x03\x01\x02\x00"}[name]
			go func() {
				for i := range drip {
					if _, err := c.Write([]byte{drip[i]}); err != nil {
						return
					}
				}
			}()
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			_, err = io.Copy(io.Discard, c)
			if d := time.Since(begin); d < grace/2 || d > 20*grace || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("closed after %v: %v", d, err)
			}
		})
	}
	// All places taken by the idle: the oldest makes room for who means it.
	var idle []net.Conn
	for range 12 {
		c, err := net.Dial("tcp", w.tlsAddr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	n := w.acme.node(identity.Gateway, "g-1")
	w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	if _, err := w.dial(n, w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now())); err != nil {
		t.Error(err)
	}
	if len(idle) == 0 {
		t.Error("nobody was idle")
	}
}

// TestGate: the bounds on who is not known yet.
func TestGate(t *testing.T) {
	now := time.Unix(1000, 0)
	limits := Limits{HalfOpen: 3, HalfOpenSource: 2, Rate: 2}
	g := newGate(limits, func() time.Time { return now })
	addr := func(i byte) netip.Addr { return addrOf(192, 0, 2, i) }
	evicted := ""
	enter := func(i byte, name string) *place { return g.enter(addr(i), func() { evicted += name }) }
	a, b := enter(1, "a"), enter(1, "b")
	if a == nil || b == nil || enter(1, "x") != nil {
		t.Error("a source has more places than it may")
	}
	c := enter(2, "c")
	if c == nil || evicted != "" {
		t.Errorf("evicted %q", evicted)
	}
	if enter(3, "d") == nil || evicted != "a" {
		t.Errorf("evicted %q, want the oldest", evicted)
	}
	a.leave() // it was evicted: nothing happens
	b.leave()
	b.leave()
	if g.places != 2 || len(g.sources) != 2 {
		t.Errorf("%d places, %d sources", g.places, len(g.sources))
	}
	// Two a second, four at once.
	g = newGate(Limits{HalfOpen: 100, HalfOpenSource: 100, Rate: 2}, func() time.Time { return now })
	in := 0
	for range 10 {
		if enter(1, "") != nil {
			in++
		}
	}
	now = now.Add(time.Second)
	for range 10 {
		if enter(1, "") != nil {
			in++
		}
	}
	if in != 6 {
		t.Errorf("%d connections in a second, want 4 and 2", in)
	}
	if g.enter(addrOf(198, 51, 100, 1), func() {}) == nil {
		t.Error("another source is limited")
	}
	// An IPv6 /64 is one source.
	if budget.SourceOf(addrFrom("2001:db8::1")) != budget.SourceOf(addrFrom("2001:db8::ffff:2")) || budget.SourceOf(addrFrom("2001:db8:0:1::1")) == budget.SourceOf(addrFrom("2001:db8::1")) ||
		budget.SourceOf(addrFrom("::ffff:192.0.2.1")) != budget.SourceOf(addr(1)) {
		t.Error("sources")
	}
}

// TestLimits: how many gateways, and how many connections of a node.
func TestLimits(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Gateways, c.Limits.NodeConnections, c.Limits.Connections = 1, 2, 3 })
	g1, g2 := w.acme.node(identity.Gateway, "g-1"), w.acme.node(identity.Gateway, "g-2")
	w.gateway(g1, w.acme.sshIdentity(g1, nil, nil))
	second := w.tunnel(g2, w.acme.sshIdentity(g2, nil, nil))
	waitFor(t, "the second gateway is refused", func() bool { return second.Status().Error != "" })
	if len(w.connections(g2)) != 0 {
		t.Error("a second gateway")
	}
	dial := func(id string) error {
		_, err := w.dial(g1, w.acme.leaf(w.acme.node(identity.Client, id), time.Now()))
		return err
	}
	for i, c := range []struct {
		id string
		ok bool
	}{{"c-1", true}, {"c-1", true}, {"c-1", false}, {"c-2", true}, {"c-2", false}} {
		if err := dial(c.id); (err == nil) != c.ok {
			t.Errorf("%d, %s: %v", i, c.id, err)
		}
	}
}

// TestBandwidth: an organization's budget bounds what its links carry.
func TestBandwidth(t *testing.T) {
	w := newWorld(t, nil)
	acme := w.acme.served()
	acme.Rates.Organization = 400 << 10
	if err := w.SetOrganizations(map[string]Organization{"acme": acme}, nil); err != nil {
		t.Fatal(err)
	}
	n := w.acme.node(identity.Gateway, "g-1")
	g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	up, err := w.dial(n, w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	down := <-g.links
	down.got.mu.Lock()
	down.got.keep = false
	down.got.mu.Unlock()
	begin, b := time.Now(), make([]byte, 40*1200)
	for time.Since(begin) < time.Second {
		up.Send(b, 1200, datagram.NotECT)
		time.Sleep(time.Millisecond) // a sender's pace
	}
	down.got.mu.Lock()
	got := down.got.bytes
	down.got.mu.Unlock()
	// A second's worth and the burst; without a bound it would be 40 MB.
	if got == 0 || got > 2<<20 {
		t.Errorf("%d bytes in a second of 400 KiB", got)
	}
}

// TestOneBudget: what a node sends by another rung of the relay it does not send by this one.
func TestOneBudget(t *testing.T) {
	b := budget.New()
	w := newWorld(t, func(c *Config) { c.Budgets = b })
	acme := w.acme.served()
	acme.Rates.Node = 100 << 10
	if err := w.SetOrganizations(map[string]Organization{"acme": acme}, nil); err != nil {
		t.Fatal(err)
	}
	n, client := w.acme.node(identity.Gateway, "g-1"), w.acme.node(identity.Client, "c-1")
	g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	up, err := w.dial(n, w.acme.leaf(client, time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	down := <-g.links
	elsewhere := b.Enter(client)
	defer b.Leave(client)
	future := time.Now().Add(time.Hour).UnixNano() // so that the share is used up for the whole test, whatever its pace
	for elsewhere.Take(64<<10, future) {
	}
	up.Send(make([]byte, 20*1200), 1200, datagram.NotECT)
	deadline := time.Now().Add(10 * time.Second)
	for w.count.overBudget.Load() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the client sends more than it has left")
		}
		time.Sleep(time.Millisecond)
	}
	if got := w.count.up.Load(); got != 0 {
		t.Errorf("%d bytes passed", got)
	}
	// The gateway has a share of its own.
	down.Send(make([]byte, 20*1200), 1200, datagram.NotECT)
	for w.count.down.Load() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the gateway's share is used up by the client")
		}
		time.Sleep(time.Millisecond)
	}
}
