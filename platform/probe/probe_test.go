package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pion "github.com/pion/stun/v4"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestModes: what is dialled, in every spelling.
func TestModes(t *testing.T) {
	public := []string{"8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "172.32.0.1", "100.128.0.1", "11.0.0.1"}
	private := []string{"10.0.0.1", "172.16.5.5", "192.168.1.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "198.18.0.1", "203.0.113.9", "2001:db8::1"}
	never := []string{
		"169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fe80::1%eth0", "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1",
		"100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254", "fec0::1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "::127.0.0.1",
	}
	for _, list := range []struct {
		addrs         []string
		auto, private bool
	}{{public, true, true}, {private, false, true}, {never, false, false}} {
		for _, s := range list.addrs {
			a := netip.MustParseAddr(s)
			if got := Auto.refused(a) == ""; got != list.auto {
				t.Errorf("auto dials %s: %v (%s)", s, got, Auto.refused(a))
			}
			if got := Private.refused(a) == ""; got != list.private {
				t.Errorf("private dials %s: %v (%s)", s, got, Private.refused(a))
			}
		}
	}
	if Auto.refused(netip.Addr{}) == "" {
		t.Error("no address is dialled")
	}
}

// names answers with one list of addresses after the other, the last for ever.
type names struct {
	mu      sync.Mutex
	answers [][]netip.Addr
	asked   int
}

func (n *names) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	got := n.answers[min(n.asked, len(n.answers)-1)]
	n.asked++
	return got, nil
}

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// TestRebinding: a name that leads to the Internet when it is judged and inside afterwards leads nowhere inside. Nothing is sent: the gate sees
// where it would go.
func TestRebinding(t *testing.T) {
	resolver := &names{answers: [][]netip.Addr{addrs("8.8.8.8"), addrs("127.0.0.1"), addrs("169.254.169.254", "10.0.0.7"), addrs("::ffff:127.0.0.1", "8.8.4.4", "fd00::1"), addrs("2606:4700::1111", "8.8.8.8")}}
	var mu sync.Mutex
	var dialled []netip.Addr
	p := New(Config{
		Registry: &registry.Registry{}, Log: slog.New(slog.DiscardHandler), Resolver: resolver, again: time.Millisecond,
		gate: func(at netip.AddrPort) error {
			mu.Lock()
			defer mu.Unlock()
			if !slices.Contains(dialled, at.Addr()) {
				dialled = append(dialled, at.Addr())
			}
			return errors.New("held back")
		},
	})
	target := &registry.RelayTarget{Name: "r", Host: "relay.example", Port: 5349, SSHPort: 2222, TLSPort: 8443}
	for i, want := range []struct {
		dialled []netip.Addr
		why     string
	}{
		{addrs("8.8.8.8"), ""}, // tried twice, resolved once
		{nil, "loopback address"},
		{nil, "private address"},
		{addrs("8.8.4.4"), ""},
		{addrs("8.8.8.8"), ""},
	} {
		dialled = nil
		l := p.look(t.Context(), target)
		if !slices.Equal(dialled, want.dialled) || l.why != want.why || resolver.asked != i+1 {
			t.Errorf("look %d: dialled %v, %q after %d questions; want %v, %q", i, dialled, l.why, resolver.asked, want.dialled, want.why)
		}
		if o := l.outcome(target); want.dialled == nil && (o.State != control.OutsideNotProbed || len(o.Checks) > 0) {
			t.Errorf("look %d: %+v", i, o)
		}
	}
	// Without the test's gate, the one that is there refuses what was not judged.
	if err := New(Config{Registry: &registry.Registry{}, Log: slog.New(slog.DiscardHandler)}).cfg.gate(netip.MustParseAddrPort("127.0.0.1:5349")); err == nil {
		t.Error("the gate lets loopback pass")
	}
}

// host is a host with a relay's ports, on loopback.
type host struct {
	udp, rung, ssh uint16 // udp is TLS over TCP, too
}

// open opens the ports; nil functions leave one closed (the number is taken and given back).
func open(t *testing.T, cert *tls.Certificate, udp, ssh bool) host {
	t.Helper()
	var h host
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	h.udp = uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			m := &pion.Message{Raw: slices.Clone(b[:n])}
			if m.Decode() != nil || !udp {
				continue
			}
			answer, err := pion.Build(pion.NewTransactionIDSetter(m.TransactionID), pion.BindingSuccess, &pion.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())}, pion.Fingerprint)
			if err == nil {
				_, _ = conn.WriteToUDPAddrPort(answer.Raw, from)
			}
		}
	}()
	listen := func(serve func(net.Conn)) uint16 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		must(t, err)
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		if serve == nil {
			must(t, l.Close())
			return port
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); serve(c) }()
			}
		}()
		return port
	}
	var secure func(net.Conn)
	if cert != nil {
		secure = func(c net.Conn) {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13})
			if s.Handshake() == nil {
				_, _ = s.Read(make([]byte, 1)) // until the other end goes
			}
		}
	}
	h.rung = listen(secure)
	h.ssh = listen(map[bool]func(net.Conn){true: func(c net.Conn) { fmt.Fprint(c, "SSH-2.0-Sallyway\r\n"); _, _ = c.Read(make([]byte, 1)) }}[ssh])
	// TLS on the STUN port's number.
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", h.udp))
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if secure != nil {
					secure(c)
				}
			}()
		}
	}()
	return h
}

// authority makes certificates of relays of an organization.
type authority struct {
	t    *testing.T
	root *pki.Authority
	ca   *pki.Authority
}

func newAuthority(t *testing.T, org string) *authority {
	t.Helper()
	root, err := pki.NewRoot(org, time.Now())
	must(t, err)
	ca, err := root.NewIntermediate(org, identity.Relay, time.Now())
	must(t, err)
	return &authority{t, root, ca}
}

func (a *authority) issue(n identity.Node) *tls.Certificate {
	a.t.Helper()
	key, err := identity.NewKey()
	must(a.t, err)
	leaf, err := a.ca.Leaf(n, key.Public(), time.Now(), time.Hour)
	must(a.t, err)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, a.ca.Certificate.Raw}, PrivateKey: key}
}

func (a *authority) target(n identity.Node, h host) *registry.RelayTarget {
	return &registry.RelayTarget{
		Node: n, Name: "fra-1", Host: "127.0.0.1", Port: h.udp, TLSPort: h.rung, SSHPort: h.ssh,
		Roots: []*x509.Certificate{a.root.Certificate}, Pins: []identity.KeyHash{identity.CertificateKeyHash(a.ca.Certificate)},
	}
}

func quick(reg *registry.Registry, mode Mode) Config {
	return Config{
		Registry: reg, Log: slog.New(slog.DiscardHandler), Mode: mode, Metrics: prometheus.NewRegistry(),
		interval: 50 * time.Millisecond, spread: time.Millisecond, refresh: 20 * time.Millisecond, patience: time.Second, again: time.Millisecond,
	}
}

// TestLook looks at relays that are well, half closed, closed, and somebody else's.
func TestLook(t *testing.T) {
	t.Parallel()
	me := identity.Node{Org: "default", Kind: identity.Relay, ID: identity.NewID(identity.Relay)}
	other := identity.Node{Org: "default", Kind: identity.Relay, ID: identity.NewID(identity.Relay)}
	a, rival := newAuthority(t, "default"), newAuthority(t, "rival")
	p := New(quick(&registry.Registry{}, Private))
	for name, tc := range map[string]struct {
		host   host
		state  control.OutsideState
		why    []string
		remedy string
		bad    int
	}{
		"well":              {open(t, a.issue(me), true, true), control.OutsideReached, nil, "", 0},
		"no UDP":            {open(t, a.issue(me), false, true), control.OutsidePartly, []string{"STUN", "/udp (no answer in 1s)"}, "/udp in the firewall of fra-1", 1},
		"no SSH":            {open(t, a.issue(me), true, false), control.OutsidePartly, []string{"SSH", "refused"}, "/tcp in the firewall of fra-1", 1},
		"another relay":     {open(t, a.issue(other), true, true), control.OutsidePartly, []string{"who answers is not the relay", other.ID}, "leads to the relay's own host", 2},
		"another authority": {open(t, rival.issue(identity.Node{Org: "rival", Kind: identity.Relay, ID: me.ID}), true, true), control.OutsidePartly, []string{"who answers is not the relay"}, "leads to the relay's own host", 2},
		"closed":            {open(t, nil, false, false), control.OutsideUnreached, []string{"not reached from outside at 127.0.0.1"}, "/udp", 4},
	} {
		target := a.target(me, tc.host)
		l := p.look(t.Context(), target)
		o := l.outcome(target)
		bad := 0
		for _, c := range o.Checks {
			if !c.OK {
				bad++
			}
		}
		if o.State != tc.state || bad != tc.bad || len(o.Checks) != 4 || !strings.Contains(o.Remedy, tc.remedy) || (tc.remedy == "") != (o.Remedy == "") {
			t.Errorf("%s: %+v", name, o)
		}
		for _, w := range tc.why {
			if !strings.Contains(o.Why, w) {
				t.Errorf("%s: %q lacks %q", name, o.Why, w)
			}
		}
		if tc.state == control.OutsideReached && (o.RTT <= 0 || o.Why != "") {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

// TestOwnNetwork: what fails at every relay is this platform's own fault, from three on.
func TestOwnNetwork(t *testing.T) {
	closed := errors.New("closed")
	mk := func(udp, tls error) look {
		return look{addr: netip.MustParseAddr("8.8.8.8"), checks: []check{{kind: kindSTUN, name: "STUN", port: "5349/udp", err: udp}, {kind: "TLS on 5349", name: "TLS", port: "5349/tcp", err: tls}}}
	}
	target := &registry.RelayTarget{Name: "r"}
	for name, tc := range map[string]struct {
		looks []look
		want  []control.OutsideState
	}{
		"two are no proof":      {[]look{mk(closed, nil), mk(closed, nil)}, []control.OutsideState{control.OutsidePartly, control.OutsidePartly}},
		"three without UDP":     {[]look{mk(closed, nil), mk(closed, nil), mk(closed, closed)}, []control.OutsideState{control.OutsideReached, control.OutsideReached, control.OutsideUnreached}},
		"three without a thing": {[]look{mk(closed, closed), mk(closed, closed), mk(closed, closed)}, []control.OutsideState{control.OutsideNotProbed, control.OutsideNotProbed, control.OutsideNotProbed}},
		"one of three has UDP":  {[]look{mk(closed, nil), mk(nil, nil), mk(closed, nil)}, []control.OutsideState{control.OutsidePartly, control.OutsideReached, control.OutsidePartly}},
	} {
		p := New(quick(&registry.Registry{}, Auto))
		p.forgive(tc.looks)
		for i := range tc.looks {
			if o := tc.looks[i].outcome(target); o.State != tc.want[i] {
				t.Errorf("%s: relay %d is %s, want %s", name, i, o.State, tc.want[i])
			}
		}
	}
}

// bed is a registry on a database.
func bed(t *testing.T) *registry.Registry {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	reg := &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now, URL: "https://platform.example"}
	_, err = reg.Bootstrap(t.Context())
	must(t, err)
	return reg
}

// enrolled is relay fra-1 at 127.0.0.1, with its certificate by the organization's own CA.
func enrolled(t *testing.T, reg *registry.Registry) (identity.Node, *tls.Certificate) {
	t.Helper()
	made, err := reg.CreateNode(t.Context(), "default", identity.Relay, control.CreateNode{Name: "fra-1", Host: "127.0.0.1"})
	must(t, err)
	tok, err := control.ParseToken(made.Token)
	must(t, err)
	key, err := identity.NewKey()
	must(t, err)
	csr, err := identity.Request(key, tok.Node)
	must(t, err)
	resp, err := reg.Enrol(t.Context(), "test", control.EnrolRequest{Secret: tok.Secret, Node: tok.Node, CSR: string(csr)})
	must(t, err)
	chain, err := identity.DecodeCertificates([]byte(resp.Certificates.Leaf))
	must(t, err)
	cert := &tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	reg.Board.Put(tok.Node.ID, presence.Beat{At: time.Now().Add(time.Minute), Heartbeat: control.Heartbeat{State: "ready"}})
	return tok.Node, cert
}

// TestFromOutside runs the whole: a relay that heartbeats and can not be reached becomes degraded and well again, with entries in the audit, and
// another platform on the database sees the same.
func TestFromOutside(t *testing.T) {
	t.Parallel()
	reg := bed(t)
	relay, cert := enrolled(t, reg)
	well, deaf := open(t, cert, true, true), open(t, cert, false, true)
	move := func(h host) {
		t.Helper()
		_, err := reg.UpdateNode(t.Context(), "default", identity.Relay, "fra-1", control.UpdateNode{Port: &h.udp, SSHPort: &h.ssh, TLSPort: &h.rung})
		must(t, err)
	}
	move(well)

	other := &registry.Registry{Store: reg.Store, Seal: reg.Seal, Board: new(presence.Board), Log: reg.Log, Now: time.Now}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, c := range []Config{quick(reg, Private), func() Config { c := quick(other, Private); c.Leads = func() bool { return false }; return c }()} {
		running.Go(func() { _ = New(c).Run(ctx) })
	}
	defer running.Wait()
	defer cancel()
	wait := func(what string, ok func(*control.NodeRecord) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; {
			n, err := reg.Node(t.Context(), "default", identity.Relay, "fra-1")
			must(t, err)
			there, known := other.Board.Outside(relay.ID, time.Now())
			if n.Outside != nil && known && there.State == n.Outside.State && ok(n) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not %s: %+v, %+v", what, n.Outside, there)
			}
			time.Sleep(10 * time.Millisecond) // between two looks at what is waited for
		}
	}
	wait("reached", func(n *control.NodeRecord) bool {
		return n.State == control.StateHealthy && n.Outside.State == control.OutsideReached && n.RTT > 0 && len(n.Problems) == 0
	})
	move(deaf)
	wait("degraded", func(n *control.NodeRecord) bool {
		return n.State == control.StateDegraded && n.Outside.State == control.OutsidePartly && len(n.Problems) == 1 &&
			strings.Contains(n.Problems[0], fmt.Sprintf("open %d/udp in the firewall of fra-1", deaf.udp))
	})
	move(well)
	wait("well again", func(n *control.NodeRecord) bool { return n.State == control.StateHealthy })
	cancel()
	running.Wait()
	es, err := reg.Audit(t.Context(), "default", 0, 1000)
	must(t, err)
	var seen []string
	for _, e := range es {
		if strings.HasPrefix(e.Action, "relay.") {
			seen = append(seen, e.Action)
		}
	}
	if !slices.Equal(seen, []string{"relay.unreached", "relay.reached"}) {
		t.Errorf("audit: %v", seen)
	}
	// What is old counts no more.
	if s := reg.Board.State(&store.Node{ID: relay.ID, Kind: identity.Relay, Status: store.Active, Enrolled: time.Now()}, time.Now().Add(presence.OutsideLife)); s == control.StateDegraded {
		t.Error("an old look counts")
	}
}

// TestNotProbed: in mode auto a private relay is not dialled, stays healthy, and its page says why.
func TestNotProbed(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "default")
	me := identity.Node{Org: "default", Kind: identity.Relay, ID: identity.NewID(identity.Relay)}
	cfg := quick(&registry.Registry{}, Auto)
	cfg.gate = func(at netip.AddrPort) error { t.Errorf("%v was dialled", at); return errors.New("no") }
	p := New(cfg)
	target := a.target(me, host{udp: 5349, rung: 8443, ssh: 2222})
	for _, h := range []string{"127.0.0.1", "10.10.0.1", "169.254.169.254", "fd00::7", "::1"} {
		target.Host = h
		l := p.look(t.Context(), target)
		if o := l.outcome(target); o.State != control.OutsideNotProbed || !strings.HasSuffix(o.Why, "address") {
			t.Errorf("%s: %+v", h, o)
		}
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { c := quick(nil, Off); c.Metrics = nil; done <- New(c).Run(ctx) }()
	cancel()
	must(t, <-done)
}

// TestBlink: a relay that fails one look and not the next was never lost.
func TestBlink(t *testing.T) {
	t.Parallel()
	reg := bed(t)
	relay, cert := enrolled(t, reg)
	h := open(t, cert, true, true)
	_, err := reg.UpdateNode(t.Context(), "default", identity.Relay, "fra-1", control.UpdateNode{Port: &h.udp, SSHPort: &h.ssh, TLSPort: &h.rung})
	must(t, err)
	cfg := quick(reg, Private)
	var fail bool
	var refused int
	var mu sync.Mutex
	cfg.gate = func(netip.AddrPort) error {
		mu.Lock()
		defer mu.Unlock()
		if fail && refused < 8 { // four ports, each tried twice: one look
			refused++
			return errors.New("away for a moment")
		}
		return nil
	}
	p := New(cfg)
	p.round(t.Context())
	mu.Lock()
	fail = true
	mu.Unlock()
	p.round(t.Context())
	o, ok := reg.Board.Outside(relay.ID, time.Now())
	if !ok || o.State != control.OutsideReached || refused != 8 {
		t.Errorf("%+v after %d refusals", o, refused)
	}
}

// TestReturn: what was found before a relay's present start counts no more, and a relay that returns is looked at at once, not with the next round.
func TestReturn(t *testing.T) {
	t.Parallel()
	reg := bed(t)
	relay, cert := enrolled(t, reg)
	h := open(t, cert, true, true)
	_, err := reg.UpdateNode(t.Context(), "default", identity.Relay, "fra-1", control.UpdateNode{Port: &h.udp, SSHPort: &h.ssh, TLSPort: &h.rung})
	must(t, err)
	beat := func(started time.Time) {
		reg.Board.Put(relay.ID, presence.Beat{At: time.Now(), Heartbeat: control.Heartbeat{State: "ready", Started: started}})
	}
	state := func() control.NodeState {
		t.Helper()
		n, err := reg.Node(t.Context(), "default", identity.Relay, "fra-1")
		must(t, err)
		return n.State
	}
	other, err := reg.CreateNode(t.Context(), "default", identity.Relay, control.CreateNode{Name: "ams-1", Host: "127.0.0.1"})
	must(t, err)
	beat(time.Now().Add(-time.Hour))
	must(t, reg.FoundOutside(t.Context(), map[string]control.Outside{
		relay.ID: {State: control.OutsideUnreached, At: time.Now(), Why: "not reached from outside", Remedy: "open the firewall"}, other.ID: {State: control.OutsideReached, At: time.Now()},
	}))
	if s := state(); s != control.StateDegraded {
		t.Fatalf("unreached, and %s", s)
	}
	reg.Board.Returning() // as Run does
	beat(time.Now())
	if s := state(); s != control.StateHealthy {
		t.Errorf("started anew, and %s for what was found before", s)
	}

	cfg := quick(reg, Private)
	cfg.first = time.Hour // no round comes in this test
	p := New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = p.Run(ctx) })
	defer running.Wait()
	defer cancel()
	for deadline := time.Now().Add(30 * time.Second); ; {
		if o, ok := reg.Board.Outside(relay.ID, time.Now()); ok && o.State == control.OutsideReached {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the relay that returned was not looked at")
		}
		time.Sleep(10 * time.Millisecond) // between two looks at what is waited for
	}
	if _, ok := reg.Board.Outside(other.ID, time.Now()); !ok {
		t.Error("a look at one relay made another's forgotten")
	}
}
