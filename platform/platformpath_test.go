package platform

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/dialler"
	"sallyway/platform/probe"
	"sallyway/relay"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// serving is a gateway with its leg on one relay. It enforces the snapshot that it was last given, as gatewayd does.
type serving struct {
	tunnel.Handler // what is not asked for is not there
	node           *node
	feed           *feed
	snapshot       atomic.Pointer[policy.Snapshot]
	srv            *tunnel.Server
}

// Authorize implements tunnel.Handler.
func (s *serving) Authorize(_ context.Context, p tunnel.Peer) error {
	if _, known := s.snapshot.Load().Peer(p.Node); !known {
		return tunnel.Denied(policy.DefaultDeny, "no policy")
	}
	return nil
}

// DialTCP implements tunnel.Handler.
func (s *serving) DialTCP(ctx context.Context, p tunnel.Peer, t policy.Target) (tunnel.Conn, error) {
	if d := s.snapshot.Load().Evaluate(p.Node, t); !d.Allowed {
		return nil, tunnel.Denied(d.Rule, d.Reason)
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(t.Host, fmt.Sprint(t.Port)))
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// follow takes over the first configuration that is as wanted.
func (s *serving) follow(what string, want func(*policy.Snapshot) bool) *control.Config {
	return s.feed.wait(what, func(c *control.Config) bool {
		snap := s.node.snapshot(c)
		s.snapshot.Store(snap)
		return want(snap)
	})
}

func certificateOf(t *testing.T, n *node) func() (*tls.Certificate, error) {
	t.Helper()
	chain, err := identity.DecodeCertificates([]byte(n.enrol.Certificates.Leaf))
	must(t, err)
	cert, err := identity.TLSCertificate(chain, n.key)
	must(t, err)
	return func() (*tls.Certificate, error) { return cert, nil }
}

func verifies(trust *identity.Trust) func([]*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
		return err
	}
}

// sharedRelay runs a relay of the platform for the organizations, on loopback.
func sharedRelay(t *testing.T, l *lab, orgs ...string) *node {
	t.Helper()
	var made control.CreatedNode
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: "world", Host: "127.0.0.1"}, &made); status != 201 {
		t.Fatalf("%+v", p)
	}
	n := l.fromToken(made.Token).join()
	n.beat(control.Heartbeat{})
	cfg := relay.Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), Certificate: certificateOf(t, n), Organizations: map[string]relay.Organization{}}
	for _, org := range orgs {
		cfg.Organizations[org] = relay.Organization{}
	}
	for _, k := range n.stream().wait("its keys", always).Relay.Keys {
		cfg.Keys = append(cfg.Keys, k.Secret)
	}
	r, err := relay.New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	must(t, r.Listen(ctx))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("relay: %v", err)
		}
	})
	port, none := r.Addr().Port(), uint16(0)
	if status, p := l.do(l.admin.Token, "PATCH", "/api/v1/shared/relays/world", control.UpdateNode{Port: &port, SSHPort: &none, TLSPort: &none}, nil); status != 200 {
		t.Fatalf("%+v", p)
	}
	return n
}

// serve runs a gateway of an organization on the shared relay.
func serve(t *testing.T, l *lab, org string) *serving {
	t.Helper()
	s := &serving{node: l.createIn(org, identity.Gateway, "gw").join()}
	s.feed = s.node.stream()
	c := s.follow("a relay", func(*policy.Snapshot) bool { return true })
	if len(c.Gateway.Relays) == 0 {
		c = s.feed.wait("a relay", func(c *control.Config) bool { return len(c.Gateway.Relays) == 1 })
	}
	merged, err := tunnel.NewMerged(tunnel.MergedConfig{})
	must(t, err)
	trust := s.node.trust(identity.Client, identity.Site, identity.Platform)
	s.srv, err = tunnel.Listen(merged, tunnel.ServeConfig{
		Node: s.node.id, Certificate: certificateOf(t, s.node), Trust: func() *identity.Trust { return trust }, Handler: s, StatelessResetKey: [32]byte{1}, TokenKey: [32]byte{2},
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.srv.Run(ctx) }()
	ref := c.Gateway.Relays[0]
	roots, err := identity.DecodeCertificates([]byte(ref.Roots))
	must(t, err)
	lg, err := leg.Dial(t.Context(), leg.Config{
		Relay: ref.Node, Addrs: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(ref.Host), ref.Port)}, Verify: verifies(&identity.Trust{Roots: roots, Pins: ref.Pins}),
		Credentials: func() (string, string) { return ref.Username, ref.Password },
		OnRendezvous: func(peer identity.Node, _ netip.AddrPort, ch *leg.Channel) {
			_, _ = merged.Add(ch, tunnel.LinkInfo{Name: "world", Peer: peer})
		},
	})
	must(t, err)
	t.Cleanup(func() {
		cancel()
		<-done
		_ = lg.Close()
		_ = merged.Close()
	})
	return s
}

// hello is a server that speaks first and then repeats lines.
func hello(t *testing.T) (port uint16) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.WriteString(c, "hello\n")
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// TestPlatformPath: real sessions over a relay that two organizations share, each with its own gateway and its own service on the same address.
func TestPlatformPath(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.ProbeRelays = probe.Private })
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	sharedRelay(t, l, "default", "rival")
	us, them := serve(t, l, "default"), serve(t, l, "rival")
	port := hello(t)
	tcp := []policy.PortRange{{First: port, Last: port}}
	l.api("POST", "/resources", control.CreateResource{Name: "svc", Gateways: []string{"gw"}, Address: "127.0.0.1", TCP: tcp}, nil)
	l.inOrg("rival", "POST", "/resources", control.CreateResource{Name: "svc", Gateways: []string{"gw"}, Address: "127.0.0.1", TCP: tcp}, nil)
	l.api("POST", "/policies", control.CreatePolicy{Subject: "platform", Resource: "svc"}, nil)
	known := func(s *policy.Snapshot) bool { _, ok := s.Peer(policy.Platform(s.Org)); return ok }
	us.follow("the platform", known)

	// A dialler of the platform's, with less patience for what is idle.
	d := dialler.New(dialler.Config{View: l.srv.hub.View, Registry: l.srv.reg, Relay: l.srv.cfg.ProbeRelays.Permit, Idle: time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	stop := sync.OnceFunc(func() { cancel(); <-done })
	defer stop()
	to := fmt.Sprintf("127.0.0.1:%d", port)
	dial := func(org, to string) net.Conn {
		t.Helper()
		c, err := d.Dial(t.Context(), org, to)
		must(t, err)
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		for _, line := range []string{"hello\n", "how are you\n"} {
			if got, err := r.ReadString('\n'); got != line {
				t.Fatalf("%q, %v, want %q", got, err, line)
			}
			if line == "hello\n" {
				_, err := io.WriteString(c, "how are you\n")
				must(t, err)
			}
		}
		return c
	}

	// Several connections are one session, which goes when it is idle.
	var conns []net.Conn
	for _, to := range []string{to, fmt.Sprintf("svc.default.sallyway.internal:%d", port), to} {
		conns = append(conns, dial("default", to))
	}
	sessions := us.srv.Sessions()
	if len(sessions) != 1 || sessions[0].Peer.Node.Kind != identity.Platform || sessions[0].Peer.Node.Org != "default" {
		t.Fatalf("sessions at the gateway: %+v", sessions)
	}
	first := sessions[0].Peer
	for _, c := range conns {
		must(t, c.Close())
	}
	eventually(t, "the idle session is closed", func() bool { return len(us.srv.Sessions()) == 0 })

	// The next one is of the same node; when the gateway ends it, another one is opened.
	c := dial("default", to)
	if p := us.srv.Sessions()[0].Peer; p.Node != first.Node || p.Key != first.Key || p.Session == first.Session {
		t.Errorf("peer %+v after %+v", p, first)
	}
	us.srv.CloseWhere(func(tunnel.Peer) (string, bool) { return "the test wants it", true })
	if _, err := io.ReadAll(c); err == nil {
		t.Error("the connection outlives its session")
	}
	_ = c.Close() // it is over
	must(t, dial("default", to).Close())

	// A test's hops: a session of its own, and the resource spoke first.
	test, err := d.Test(t.Context(), "default", "svc", control.TestResource{}, nil)
	must(t, err)
	if !test.OK || len(test.Gateways) != 1 || !strings.HasSuffix(test.Gateways[0].Path, " udp") {
		t.Errorf("%+v", test)
	} else if last := test.Gateways[0].Hops[len(test.Gateways[0].Hops)-1]; last.Name != control.StepFirstByte || last.State != control.HopOK || !strings.Contains(last.Detail, "6 bytes") {
		t.Errorf("last hop %+v", last)
	}

	// Nothing of it leads into the other organization, whose policies allow nothing; with one it has a node of its own.
	if _, err := d.Dial(t.Context(), "rival", to); err == nil || !strings.Contains(err.Error(), "policy allow --from platform") {
		t.Errorf("without a policy of the other organization: %v", err)
	}
	l.inOrg("rival", "POST", "/policies", control.CreatePolicy{Subject: "platform", Resource: "svc"}, nil)
	them.follow("the platform", known)
	other := dial("rival", to)
	if p := them.srv.Sessions()[0].Peer; p.Node.Org != "rival" || p.Node.ID == first.Node.ID || p.Key == first.Key {
		t.Errorf("peer %+v in the other organization, %+v in the first", p, first)
	}

	// A gateway decides again, whatever the platform thinks.
	us.snapshot.Store(&policy.Snapshot{Org: "default"})
	us.srv.CloseWhere(func(tunnel.Peer) (string, bool) { return "the test wants it", true })
	if _, err := d.Dial(t.Context(), "default", to); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a gateway without the policy: %v", err)
	}
	us.snapshot.Store(us.node.snapshot(&us.feed.last))

	// Switched off: what is open ends, by the platform itself, too. The other organization's goes on.
	held := dial("default", to)
	l.api("PATCH", "", control.UpdateOrganization{PlatformDial: ptr(false)}, nil)
	if _, err := io.ReadAll(held); err == nil {
		t.Error("a connection goes on although it is switched off")
	}
	_ = held.Close() // it is over
	_, err = io.WriteString(other, "still there\n")
	must(t, err)
	if got, err := bufio.NewReader(other).ReadString('\n'); got != "still there\n" {
		t.Errorf("the other organization's connection: %q, %v", got, err)
	}

	// At the end nothing is left.
	stop()
	eventually(t, "no sessions", func() bool { return len(us.srv.Sessions())+len(them.srv.Sessions()) == 0 })
	if _, err := d.Dial(t.Context(), "rival", to); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	_ = other.Close() // it is over
}
