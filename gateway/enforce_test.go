package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

var (
	client1 = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}
	client2 = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-2"}
)

// zone serves A records on loopback and counts queries.
type zone struct {
	addr    string
	queries chan string
}

func newZone(t *testing.T, records map[string]string) *zone {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	z := &zone{pc.LocalAddr().String(), make(chan string, 100)}
	started := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		z.queries <- q.Question[0].Name
		m := new(dns.Msg).SetReply(q)
		v, ok := records[strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))]
		if !ok {
			m.Rcode = dns.RcodeNameError
		} else if q.Question[0].Qtype == dns.TypeA {
			rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A " + v)
			if err != nil {
				t.Error(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() { _ = srv.Shutdown() })
	return z
}

func (z *zone) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", z.addr)
	}}
}

func newEnforcer(t *testing.T, z *zone, allow ...string) *enforcer {
	t.Helper()
	l, err := ParseAllow(allow)
	if err != nil {
		t.Fatal(err)
	}
	all := []policy.PortRange{policy.AllPorts}
	s := &policy.Snapshot{
		Org: "acme", Peers: []policy.Peer{{Node: client1}, {Node: client2}},
		Resource: []policy.Resource{
			{ID: "r1", Name: "db", Address: "db.corp.example", TCP: all, Virtual: []netip.Addr{netip.MustParseAddr("100.112.0.9")}},
			{ID: "r2", Name: "lan", Address: "10.0.3.0/24", TCP: all},
			{ID: "r3", Name: "loop", Address: "127.0.0.0/8", TCP: all},
			{ID: "r4", Name: "evil", Address: "rebind.corp.example", TCP: all},
		},
		Rules: []policy.Rule{
			{ID: "p1", Resource: "r1", Subjects: []identity.Node{client1, client2}},
			{ID: "p2", Resource: "r2", Subjects: []identity.Node{client1}},
			{ID: "p3", Resource: "r3", Subjects: []identity.Node{client1}},
			{ID: "p4", Resource: "r4", Subjects: []identity.Node{client1}},
		},
	}
	return &enforcer{
		snapshot: func() (*policy.Snapshot, error) { return s, nil }, stale: func() (bool, error) { return false, nil }, allow: l, resolver: z.resolver(),
	}
}

func TestEnforcerDecidesBeforeAndAfterResolution(t *testing.T) {
	z := newZone(t, map[string]string{"db.corp.example": "10.0.9.9", "host.corp.example": "10.0.3.7", "rebind.corp.example": "127.0.0.1"})
	e := newEnforcer(t, z)
	for _, c := range []struct {
		who  identity.Node
		host string
		to   string // empty: refused
		why  error
		says string
	}{
		{client1, "db.corp.example", "10.0.9.9", nil, ""},
		{client1, "100.112.0.9", "10.0.9.9", nil, ""}, // a virtual address stands for the resource
		{client1, "10.0.3.7", "10.0.3.7", nil, ""},
		{client1, "::ffff:10.0.3.7", "10.0.3.7", nil, ""},
		{client1, "host.corp.example", "10.0.3.7", nil, ""}, // allowed by what it resolves to
		{client2, "host.corp.example", "", tunnel.ErrDenied, "default deny"},
		{client2, "10.0.3.7", "", tunnel.ErrDenied, "default deny"},
		{client1, "10.0.4.7", "", tunnel.ErrDenied, "no resource"},
		{client1, "127.0.0.1", "", tunnel.ErrDenied, "loopback"},           // the platform allows it, the gateway does not
		{client1, "rebind.corp.example", "", tunnel.ErrDenied, "loopback"}, // checked again after resolution
		{client1, "::ffff:127.0.0.1", "", tunnel.ErrDenied, "loopback"},
		{identity.Node{Org: "evil", Kind: identity.Client, ID: "c-1"}, "db.corp.example", "", tunnel.ErrDenied, "not among"},
	} {
		d, err := e.check(t.Context(), c.who, policy.Target{Proto: policy.TCP, Host: c.host, Port: 5432})
		if c.to == "" {
			if !errors.Is(err, c.why) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v to %s: %v, want %v that says %q", c.who, c.host, err, c.why, c.says)
			}
			continue
		}
		if err != nil || len(d.addrs) != 1 || d.addrs[0].String() != c.to {
			t.Errorf("%v to %s: %+v, %v, want %s", c.who, c.host, d, err, c.to)
		}
	}
}

func TestEnforcerResolvesNothingForStrangers(t *testing.T) {
	z := newZone(t, nil)
	e := newEnforcer(t, z)
	if _, err := e.check(t.Context(), identity.Node{Org: "evil", Kind: identity.Client, ID: "c-1"}, policy.Target{Proto: policy.TCP, Host: "probe.corp.example", Port: 1}); err == nil {
		t.Error("a stranger is let through")
	}
	if _, err := e.check(t.Context(), client2, policy.Target{Proto: policy.TCP, Host: "probe.corp.example", Port: 1}); err == nil {
		t.Error("a name that no resource covers is let through")
	}
	select {
	case name := <-z.queries:
		t.Errorf("%s was looked up for a peer whom no address could be allowed", name)
	default:
	}
}

func TestAllowListBoundsThePlatform(t *testing.T) {
	e := newEnforcer(t, newZone(t, nil), "10.0.3.0/25", "127.0.0.1 5432")
	for host, ok := range map[string]bool{"10.0.3.7": true, "10.0.3.200": false, "127.0.0.1": true, "127.0.0.2": false} {
		_, err := e.check(t.Context(), client1, policy.Target{Proto: policy.TCP, Host: host, Port: 5432})
		if (err == nil) != ok {
			t.Errorf("%s: %v, want allowed %v", host, err, ok)
		}
	}
}

func TestStaleSnapshotRefusesNewFlows(t *testing.T) {
	e := newEnforcer(t, newZone(t, nil))
	e.stale = func() (bool, error) { return true, errors.New("valid until yesterday") }
	target := policy.Target{Proto: policy.TCP, Host: "10.0.3.7", Port: 1}
	if _, err := e.check(t.Context(), client1, target); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "valid until yesterday") {
		t.Errorf("%v, want a refusal that says since when", err)
	}
	e.keepGoing = true
	if _, err := e.check(t.Context(), client1, target); err != nil {
		t.Error(err)
	}
	e.snapshot = func() (*policy.Snapshot, error) { return nil, errors.New("none") }
	if _, err := e.check(t.Context(), client1, target); err == nil {
		t.Error("a gateway without policies lets through")
	}
}

func TestNamesResolveOnlyWhatPolicyCovers(t *testing.T) {
	z := newZone(t, map[string]string{"db.corp.example": "10.0.9.9"})
	host, port, err := net.SplitHostPort(z.addr)
	if err != nil {
		t.Fatal(err)
	}
	n := &names{enforce: newEnforcer(t, z), servers: func() ([]string, error) { return []string{net.JoinHostPort(host, port)}, nil }}
	ask := func(who identity.Node, name string) (*dns.Msg, error) {
		q := new(dns.Msg).SetQuestion(name, dns.TypeA)
		q.Id = 0
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		out, err := n.Resolve(ctx, who, b)
		if err != nil {
			return nil, err
		}
		m := new(dns.Msg)
		return m, m.Unpack(out)
	}
	m, err := ask(client1, "db.corp.example.")
	if err != nil || m.Id != 0 || len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "10.0.9.9" {
		t.Errorf("answer %v, %v", m, err)
	}
	if _, err := ask(client1, "other.example."); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a name that no resource covers: %v", err)
	}
	if _, err := n.Resolve(t.Context(), client1, []byte("nonsense")); err == nil {
		t.Error("nonsense is resolved")
	}
}

// What the host routes to other gateways is not reached through this one: they would see the gateway, not the peer.
func TestEnforcerIsNoWayToOtherGateways(t *testing.T) {
	z := newZone(t, map[string]string{"db.corp.example": "10.0.9.9", "rebind.corp.example": "100.112.0.77"})
	e := newEnforcer(t, z, "0.0.0.0/0")
	e.ranges = func() []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix("100.112.0.0/12")} }
	wide := *e
	s, _ := e.snapshot()
	all := *s
	all.Resource = append([]policy.Resource{{ID: "r2", Name: "wide", Address: "100.64.0.0/10", TCP: []policy.PortRange{policy.AllPorts}}}, all.Resource...)
	wide.snapshot = func() (*policy.Snapshot, error) { return &all, nil }
	for _, c := range []struct {
		e    *enforcer
		host string
	}{
		{e, "rebind.corp.example"},
		{&wide, "100.112.0.77"},
		{&wide, "::ffff:100.112.0.77"},
	} {
		d, err := c.e.check(t.Context(), client1, policy.Target{Proto: policy.TCP, Host: c.host, Port: 5432})
		if !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "another gateway") {
			t.Errorf("%s: %+v, %v", c.host, d, err)
		}
	}
	d, err := e.check(t.Context(), client1, policy.Target{Proto: policy.TCP, Host: "100.112.0.9", Port: 5432})
	if err != nil || d.addrs[0].String() != "10.0.9.9" {
		t.Errorf("a virtual address of this gateway's resource: %+v, %v", d, err)
	}
}
