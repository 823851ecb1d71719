package client

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	gateway1 = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}
	gateway2 = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-2"}
	client1  = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}
)

// memLink is one end of a link in memory: what is sent arrives at the other end from one goroutine, as from a leg.
type memLink struct {
	in   chan datagram.Batch
	peer *memLink
	rcv  atomic.Pointer[datagram.Receiver]
	done chan struct{}
}

var _ datagram.Link = (*memLink)(nil)

func newMemLinks(t testing.TB) (a, b *memLink) {
	a = &memLink{in: make(chan datagram.Batch, 4096), done: make(chan struct{})}
	b = &memLink{in: make(chan datagram.Batch, 4096), done: make(chan struct{})}
	a.peer, b.peer = b, a
	var wg sync.WaitGroup
	for _, l := range []*memLink{a, b} {
		wg.Go(func() {
			for {
				select {
				case <-l.done:
					return
				case b := <-l.in:
					if r := l.rcv.Load(); r != nil {
						(*r).Receive(b)
					} else {
						b.Release()
					}
				}
			}
		})
	}
	t.Cleanup(func() { close(a.done); close(b.done); wg.Wait() })
	return a, b
}

func (l *memLink) Send(payload []byte, segment int, ecn datagram.ECN) {
	buf := datagram.NewBuffer()
	n := copy(buf.B[:], payload)
	if segment <= 0 {
		segment = n
	}
	b := datagram.NewBatch(buf.B[:n], segment, 0, ecn, buf)
	select {
	case l.peer.in <- b:
	default:
		b.Release()
	}
}

func (l *memLink) SetReceiver(r datagram.Receiver) {
	if r == nil {
		l.rcv.Store(nil)
		return
	}
	l.rcv.Store(&r)
}

func (l *memLink) MaxPayload() int       { return 1452 }
func (l *memLink) Done() <-chan struct{} { return l.done }

// testCA is an organization's PKI.
type testCA struct {
	t        testing.TB
	root, ca *x509.Certificate
	key      crypto.Signer
	serial   int64
}

func newTestCA(t testing.TB) *testCA {
	c := &testCA{t: t}
	rootKey := c.newKey()
	c.key = c.newKey()
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	c.root = c.sign(tmpl, tmpl, rootKey.Public(), rootKey)
	c.ca = c.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "CA"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}, c.root, c.key.Public(), rootKey)
	return c
}

func (c *testCA) newKey() crypto.Signer {
	k, err := identity.NewKey()
	if err != nil {
		c.t.Fatal(err)
	}
	return k
}

func (c *testCA) sign(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	c.serial++
	tmpl.SerialNumber, tmpl.BasicConstraintsValid = big.NewInt(c.serial), true
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *testCA) leaf(n identity.Node, usage x509.ExtKeyUsage) func() (*tls.Certificate, error) {
	key := c.newKey()
	x := c.sign(&x509.Certificate{URIs: []*url.URL{n.URI()}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}}, c.ca, key.Public(), c.key)
	cert, err := identity.TLSCertificate([]*x509.Certificate{x, c.ca}, key)
	if err != nil {
		c.t.Fatal(err)
	}
	return func() (*tls.Certificate, error) { return cert, nil }
}

func (c *testCA) trust() *identity.Trust {
	return &identity.Trust{Roots: []*x509.Certificate{c.root}, Pins: []identity.KeyHash{identity.CertificateKeyHash(c.ca)}}
}

// fakeGateway is the private network: names below "corp.example" lie on loopback, some of them refuse in their own way.
type fakeGateway struct {
	mu    sync.Mutex
	asked []policy.Target
	bench map[uint16]uint16 // where the ports of trial.Host lie on loopback; set before the first flow
}

var _ tunnel.Handler = (*fakeGateway)(nil)

func (g *fakeGateway) Authorize(context.Context, tunnel.Peer) error { return nil }

func (g *fakeGateway) dial(ctx context.Context, network string, t policy.Target) (net.Conn, error) {
	g.mu.Lock()
	g.asked = append(g.asked, t)
	g.mu.Unlock()
	host := t.Host
	switch name, _, _ := strings.Cut(host, "."); name {
	case "denied":
		return nil, tunnel.Denied("no-entry", "the rule says no")
	case "refused":
		return nil, syscall.ECONNREFUSED
	case "silent":
		return nil, &tunnel.ProxyError{Type: tunnel.ConnectionTimeout, Detail: "the destination does not answer"}
	case "unroutable":
		return nil, syscall.EHOSTUNREACH
	case "absent":
		return nil, &net.DNSError{Name: host, IsNotFound: true}
	case "broken":
		return nil, io.ErrUnexpectedEOF
	}
	if !t.Addr.IsValid() {
		host = "127.0.0.1"
	}
	if trial.IsHost(t.Host) {
		if t.Port = g.bench[t.Port]; t.Port == 0 {
			return nil, tunnel.Denied(policy.DefaultDeny, "it may not measure")
		}
	}
	var d net.Dialer
	return d.DialContext(ctx, network, joinHostPort(host, t.Port))
}

func (g *fakeGateway) DialTCP(ctx context.Context, _ tunnel.Peer, t policy.Target) (tunnel.Conn, error) {
	c, err := g.dial(ctx, "tcp", t)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (g *fakeGateway) DialUDP(ctx context.Context, _ tunnel.Peer, t policy.Target) (net.Conn, error) {
	return g.dial(ctx, "udp", t)
}

func (g *fakeGateway) OpenIP(context.Context, tunnel.Peer) (*tunnel.IPService, error) {
	return nil, tunnel.Denied(policy.DefaultDeny, "no IP here")
}

// Resolve answers every A query with 10.0.3.7.
func (g *fakeGateway) Resolve(_ context.Context, _ tunnel.Peer, query []byte) ([]byte, error) {
	var q dns.Msg
	if err := q.Unpack(query); err != nil {
		return nil, err
	}
	m := new(dns.Msg).SetReply(&q)
	if rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A 10.0.3.7"); err == nil && q.Question[0].Qtype == dns.TypeA {
		m.Answer = append(m.Answer, rr)
	}
	return m.Pack()
}

// lastAsked is what the gateway was asked for last.
func (g *fakeGateway) lastAsked() policy.Target {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.asked) == 0 {
		return policy.Target{}
	}
	return g.asked[len(g.asked)-1]
}

// anyDialling lets everything below corp.example, and loopback, be reached by gateway1.
func anyDialling() *control.Dialling {
	all := []policy.PortRange{policy.AllPorts}
	by := []control.ServingGateway{{Node: gateway1}}
	return &control.Dialling{
		Range:    []netip.Prefix{netip.MustParsePrefix("100.112.0.0/12"), netip.MustParsePrefix("fd77::/48")},
		Gateways: []control.GatewayRef{{Node: gateway1, Name: "office", FQDN: "office.acme.sallyway.internal"}},
		Resources: []control.ReachableResource{
			{Resource: policy.Resource{ID: "r1", Name: "corp", Address: "*.corp.example", TCP: all, UDP: all}, FQDN: "corp.acme.sallyway.internal", Gateways: by},
			{Resource: policy.Resource{ID: "r2", Name: "lo", Address: "127.0.0.0/8", TCP: all, UDP: all}, FQDN: "lo.acme.sallyway.internal", Gateways: by},
			{Resource: policy.Resource{ID: "r3", Name: "lo6", Address: "::1", TCP: all, UDP: all}, FQDN: "lo6.acme.sallyway.internal", Gateways: by},
			{Resource: policy.Resource{ID: "r4", Name: "db", Address: "db.corp.example", TCP: all}, FQDN: "db.acme.sallyway.internal", Gateways: by},
		},
	}
}

// harness is a client with a real session to a gateway over a link in memory.
type harness struct {
	*Sessions
	gateway *fakeGateway
	session *tunnel.Session
	log     *slog.Logger
}

func newHarness(t testing.TB) *harness {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("CLIENT_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	ca := newTestCA(t)
	h := &harness{gateway: &fakeGateway{}, log: log}
	merged, err := tunnel.NewMerged(tunnel.MergedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := tunnel.Listen(merged, tunnel.ServeConfig{
		Node: gateway1, Certificate: ca.leaf(gateway1, x509.ExtKeyUsageServerAuth), Trust: ca.trust, Handler: h.gateway, Logger: log,
		StatelessResetKey: [32]byte{1}, TokenKey: [32]byte{2},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("gateway: %v", err)
		}
		_ = merged.Close()
	})
	near, far := newMemLinks(t)
	if _, err := merged.Add(far, tunnel.LinkInfo{Name: "memory", Peer: client1}); err != nil {
		t.Fatal(err)
	}
	dctx, dcancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer dcancel()
	h.session, err = tunnel.Dial(dctx, tunnel.DialConfig{
		Link: near, Info: tunnel.LinkInfo{Name: "memory", Peer: gateway1}, Gateway: gateway1, Logger: log,
		Certificate: ca.leaf(client1, x509.ExtKeyUsageClientAuth), Trust: ca.trust,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.session.Close("test over") })
	h.Sessions = NewSessions(SessionsConfig{Logger: log})
	d := anyDialling()
	h.Sessions.table.Store(newTable(d))
	h.Sessions.gateways[gateway1] = h.newLink(&d.Gateways[0], h.session)
	return h
}

// newLink is the way to a gateway; without a session it is one that never comes up.
func (h *harness) newLink(ref *control.GatewayRef, s *tunnel.Session) *gatewayLink {
	g := &gatewayLink{
		s: h.Sessions, node: ref.Node, log: h.log, cancel: func() {}, wake: make(chan struct{}, 1), events: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	g.ref.Store(ref)
	if s != nil {
		g.set(s, nil)
	}
	return g
}

// serve runs a proxy on a fresh loopback listener until the test ends and returns the listener's address.
func serve(t testing.TB, f func(context.Context, net.Listener) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Serve does not return")
		}
	})
	return l.Addr().String()
}

// tcpServer accepts on loopback, v4 or v6 as addr says, and gives every connection to f.
func tcpServer(t testing.TB, addr string, f func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { f(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// echoTCP sends back what comes and ends when the other side does.
func echoTCP(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

// udpEcho answers every datagram with itself.
func udpEcho(t testing.TB, addr string) uint16 {
	t.Helper()
	pc, err := net.ListenPacket("udp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return uint16(pc.LocalAddr().(*net.UDPAddr).Port)
}

// closedPort is a port on loopback where nobody listens.
func closedPort(t testing.TB) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}
