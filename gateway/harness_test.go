package gateway

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var gateway1 = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}

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

// The addresses of the lab: the gateway's own, the client's, and those of resources that lie on loopback.
var (
	gatewayVirtual = []netip.Addr{netip.MustParseAddr("100.112.0.1"), netip.MustParseAddr("fd77::1")}
	clientVirtual  = []netip.Addr{netip.MustParseAddr("100.112.0.2"), netip.MustParseAddr("fd77::2")}
	loopVirtual    = []netip.Addr{netip.MustParseAddr("100.112.0.20"), netip.MustParseAddr("fd77::20")}
)

// lab is a gateway's handler behind a real session.
type lab struct {
	*handler
	session *tunnel.Session
}

// newHandler serves client1 on loopback: by virtual address, and as far as the allow list goes by the real one. client2 may reach nothing.
func newHandler(t testing.TB, z *zone, allow ...string) *handler {
	t.Helper()
	l, err := ParseAllow(allow)
	if err != nil {
		t.Fatal(err)
	}
	all := []policy.PortRange{policy.AllPorts}
	s := &policy.Snapshot{
		Org: "acme", Peers: []policy.Peer{{Node: client1, Virtual: clientVirtual}, {Node: client2}},
		Resource: []policy.Resource{
			{ID: "r1", Name: "loop", Address: "127.0.0.1", TCP: all, UDP: all, ICMP: true, Virtual: loopVirtual[:1]},
			{ID: "r2", Name: "loop6", Address: "::1", TCP: all, UDP: all, ICMP: true, Virtual: loopVirtual[1:]},
			{ID: "r3", Name: "loops", Address: "127.0.0.0/8", TCP: all, UDP: all, ICMP: true},
			{ID: "r4", Name: "lan", Address: "10.99.0.0/16", TCP: all},
			{ID: "r5", Name: "web", Address: "web.corp.example", TCP: all},
			{ID: "r6", Name: "lan6", Address: "fd99::/64", TCP: all},
		},
	}
	for _, r := range s.Resource {
		s.Rules = append(s.Rules, policy.Rule{ID: "p-" + r.ID, Name: "to-" + r.Name, Resource: r.ID, Subjects: []identity.Node{client1}})
	}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("GATEWAY_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	e := &enforcer{
		snapshot: func() (*policy.Snapshot, error) { return s, nil }, stale: func() (bool, error) { return false, nil }, allow: l, resolver: net.DefaultResolver,
	}
	h := &handler{
		log: log, enforce: e, pings: &pinger{}, metrics: newMetrics(), virtual: func() []netip.Addr { return gatewayVirtual },
		names: &names{enforce: e, servers: func() ([]string, error) { return nil, nil }},
	}
	if z != nil {
		e.resolver = z.resolver()
		h.names.servers = func() ([]string, error) { return []string{z.addr}, nil }
	}
	t.Cleanup(func() { _ = h.pings.Close() })
	return h
}

func newLab(t testing.TB, h *handler) *lab {
	t.Helper()
	ca := newTestCA(t)
	merged, err := tunnel.NewMerged(tunnel.MergedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := tunnel.Listen(merged, tunnel.ServeConfig{
		Node: gateway1, Certificate: ca.leaf(gateway1, x509.ExtKeyUsageServerAuth), Trust: ca.trust, Handler: h, Logger: h.log,
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
	l := &lab{handler: h}
	dctx, dcancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer dcancel()
	l.session, err = tunnel.Dial(dctx, tunnel.DialConfig{
		Link: near, Info: tunnel.LinkInfo{Name: "memory", Peer: gateway1}, Gateway: gateway1, Logger: h.log,
		Certificate: ca.leaf(client1, x509.ExtKeyUsageClientAuth), Trust: ca.trust,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.session.Close("test over") })
	return l
}

// dialIP opens an exchange of IP packets and ends it with the test.
func (l *lab) dialIP(t testing.TB) *tunnel.IPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := l.session.DialIP(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// clientHost is the TCP/IP of a client's host, another implementation's instance behind the exchange: what an app sees there is what counts.
func clientHost(t testing.TB, c *tunnel.IPConn) *stack.Stack {
	t.Helper()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	ep := channel.New(1024, 1280, "")
	if err := s.CreateNIC(1, ep); err != nil {
		t.Fatal(err)
	}
	for _, a := range clientVirtual {
		proto := ipv4.ProtocolNumber
		if a.Is6() {
			proto = ipv6.ProtocolNumber
		}
		pa := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := s.AddProtocolAddress(1, pa, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}, {Destination: header.IPv6EmptySubnet, NIC: 1}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			p := ep.ReadContext(ctx)
			if p == nil {
				return
			}
			v := p.ToView()
			p.DecRef()
			_, _ = c.WritePacket(v.AsSlice())
			v.Release()
		}
	})
	wg.Go(func() {
		b := make([]byte, tunnel.MaxIPPacket)
		for {
			n, err := c.ReadPacket(b)
			if err != nil {
				return
			}
			proto := ipv4.ProtocolNumber
			if b[0]>>4 == 6 {
				proto = ipv6.ProtocolNumber
			}
			p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b[:n])})
			ep.InjectInbound(proto, p)
			p.DecRef()
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = c.Close()
		wg.Wait()
		s.Destroy()
	})
	return s
}

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

// counted is what a counter stands at.
func counted(t testing.TB, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}
