package leg_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/relay"
	"sallyway/relay/leg"
	"sallyway/relay/wire"
)

var (
	relayNode   = identity.Node{Org: identity.SharedOrg, Kind: identity.Relay, ID: "r-1"}
	gatewayNode = identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}
	clientNode  = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}
	otherNode   = identity.Node{Org: "other", Kind: identity.Gateway, ID: "g-9"}

	credentialKey = []byte("an HMAC key of exactly 32 bytes!")
)

// pki is a root, a CA for relays, and the relay's certificate.
type pki struct {
	trust identity.Trust
	leaf  *tls.Certificate
}

func issue(t testing.TB, tmpl, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	tmpl.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newPKI(t testing.TB, n identity.Node) *pki {
	t.Helper()
	var keys [3]*ecdsa.PrivateKey
	for i := range keys {
		k, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = k
	}
	rootTmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	root := issue(t, rootTmpl, rootTmpl, keys[0], keys[0])
	ca := issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: "relays"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}, root, keys[1], keys[0])
	leaf := issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: n.ID}, URIs: []*url.URL{n.URI()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca, keys[2], keys[1])
	cert, err := identity.TLSCertificate([]*x509.Certificate{leaf, ca}, keys[2])
	if err != nil {
		t.Fatal(err)
	}
	return &pki{
		trust: identity.Trust{Roots: []*x509.Certificate{root}, Pins: []identity.KeyHash{identity.CertificateKeyHash(ca)}},
		leaf:  cert,
	}
}

// lab is a relay on loopback.
type lab struct {
	*relay.Server
	pki  *pki
	addr netip.AddrPort
	stop func()
}

func startRelay(t testing.TB, p *pki) *lab {
	t.Helper()
	return startRelayOn(t, p, netip.MustParseAddrPort("127.0.0.1:0"), func(f func() error) error { return f() })
}

// startRelayOn has a relay on addr of the host whose sockets are those that do's function opens.
func startRelayOn(t testing.TB, p *pki, addr netip.AddrPort, do func(func() error) error) *lab {
	t.Helper()
	s, err := relay.New(relay.Config{
		Listen: addr, Keys: [][]byte{credentialKey},
		Organizations: map[string]relay.Organization{"acme": {}, "other": {}},
		Certificate:   func() (*tls.Certificate, error) { return p.leaf, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := do(func() error { return s.Listen(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return &lab{Server: s, pki: p, addr: s.Addr(), stop: stop}
}

// credentials are valid for an hour.
func credentials(n identity.Node, flags wire.Flags) func() (string, string) {
	return func() (string, string) {
		u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: n, Flags: flags}.String()
		return u, wire.Password(credentialKey, u)
	}
}

func (l *lab) config(n identity.Node, tr leg.Transport) leg.Config {
	return leg.Config{
		Relay: relayNode, Addrs: []netip.AddrPort{l.addr}, Transport: tr,
		Verify: func(chain []*x509.Certificate) error {
			_, err := l.pki.trust.Verify(chain, x509.ExtKeyUsageServerAuth)
			return err
		},
		Credentials: credentials(n, wire.FlagPlainData),
	}
}

func dial(t testing.TB, cfg leg.Config) *leg.Leg {
	t.Helper()
	return dialFrom(t, cfg, func(f func() error) error { return f() })
}

func dialFrom(t testing.TB, cfg leg.Config, do func(func() error) error) *leg.Leg {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var l *leg.Leg
	if err := do(func() (err error) {
		l, err = leg.Dial(ctx, cfg)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// pair is a client's and a gateway's leg, connected with each other.
type pair struct {
	client, gateway *leg.Leg
	out, in         *leg.Channel // of client and gateway
}

func connect(t testing.TB, client, gateway leg.Config) pair {
	t.Helper()
	here := func(f func() error) error { return f() }
	return connectFrom(t, client, gateway, here, here)
}

func connectFrom(t testing.TB, client, gateway leg.Config, onClient, onGateway func(func() error) error) pair {
	t.Helper()
	got := make(chan *leg.Channel, 1)
	gateway.OnRendezvous = func(peer identity.Node, from netip.AddrPort, ch *leg.Channel) {
		if peer != clientNode || !from.IsValid() {
			t.Errorf("%v asked from %v", peer, from)
		}
		got <- ch
	}
	p := pair{gateway: dialFrom(t, gateway, onGateway), client: dialFrom(t, client, onClient)}
	var err error
	if p.out, err = p.client.Connect(t.Context(), gatewayNode); err != nil {
		t.Fatal(err)
	}
	select {
	case p.in = <-got:
	case <-time.After(5 * time.Second):
		t.Fatal("the gateway was not told")
	}
	if p.in.PeerAddr() != p.client.RelayedAddr() || p.out.PeerAddr() != p.gateway.RelayedAddr() {
		t.Errorf("channels to %v and %v, relayed addresses %v and %v", p.in.PeerAddr(), p.out.PeerAddr(), p.client.RelayedAddr(), p.gateway.RelayedAddr())
	}
	// Data flows when both have bound: knock until somebody opens.
	open := make(chan struct{})
	p.in.SetReceiver(receiver(func([]byte) {
		select {
		case open <- struct{}{}:
		default:
		}
	}))
	defer p.in.SetReceiver(nil)
	for deadline := time.Now().Add(5 * time.Second); ; {
		p.out.Send([]byte("knock"), 0, 0)
		select {
		case <-open:
			return p
		case <-time.After(5 * time.Millisecond):
			if time.Now().After(deadline) {
				t.Fatal("nothing arrives")
			}
		}
	}
}

// proxy is a UDP hop on the way to a relay, which a test can point elsewhere or cut.
type proxy struct {
	addr   netip.AddrPort
	close  func()
	target atomic.Pointer[netip.AddrPort] // nil drops everything
}

func startProxy(t testing.TB, target netip.AddrPort) *proxy {
	t.Helper()
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	back, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: front.LocalAddr().(*net.UDPAddr).AddrPort()}
	p.target.Store(&target)
	var client atomic.Pointer[netip.AddrPort]
	var wg sync.WaitGroup
	move := func(from, to *net.UDPConn, where func(netip.AddrPort) *netip.AddrPort) {
		b := make([]byte, 2000)
		for {
			n, src, err := from.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if dst := where(src); err == nil && dst != nil {
				_, _ = to.WriteToUDPAddrPort(b[:n], *dst)
			}
		}
	}
	wg.Go(func() {
		move(front, back, func(src netip.AddrPort) *netip.AddrPort {
			client.Store(&src)
			return p.target.Load()
		})
	})
	wg.Go(func() {
		move(back, front, func(src netip.AddrPort) *netip.AddrPort {
			if at := p.target.Load(); at == nil || *at != src {
				return nil
			}
			return client.Load()
		})
	})
	p.close = sync.OnceFunc(func() { front.Close(); back.Close(); wg.Wait() })
	t.Cleanup(p.close)
	return p
}
