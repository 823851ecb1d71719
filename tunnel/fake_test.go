package tunnel

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// fakeLink is an end of a link in memory. What is sent arrives at the other end from one goroutine, as from a leg.
type fakeLink struct {
	peer *fakeLink
	in   chan datagram.Batch
	rcv  atomic.Pointer[datagram.Receiver]
	done chan struct{}
	once sync.Once
	wg   sync.WaitGroup

	// Faults, settable at any time: what this end sends is affected.
	blackhole atomic.Bool
	lossOneIn atomic.Int64 // 0 is none
	mtu       atomic.Int64 // payload; larger is dropped
	markCE    atomic.Bool  // what was sent as ECT arrives as CE
	maxSize   int          // what MaxPayload says

	sent, dropped, ect atomic.Int64
	pending            atomic.Int64 // what is to arrive at this end
	onSend             atomic.Pointer[func(payload []byte)]
}

// newLinkPair makes two joined ends that end with the test.
func newLinkPair(t testing.TB) (a, b *fakeLink) {
	mk := func() *fakeLink {
		return &fakeLink{in: make(chan datagram.Batch, 1024), done: make(chan struct{}), maxSize: 1452}
	}
	a, b = mk(), mk()
	a.peer, b.peer = b, a
	for _, l := range []*fakeLink{a, b} {
		l.wg.Add(1)
		go l.deliver()
	}
	t.Cleanup(func() {
		// What was sent arrives first: a session's last word, for one.
		for _, l := range []*fakeLink{a, b} {
			select {
			case <-l.done:
				continue
			default:
			}
			eventually(t, "link empty", func() bool { return l.pending.Load() == 0 })
		}
		a.end()
		b.end()
	})
	return a, b
}

func (l *fakeLink) deliver() {
	defer l.wg.Done()
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
			l.pending.Add(-1)
		}
	}
}

func (l *fakeLink) end() {
	l.once.Do(func() { close(l.done) })
	l.wg.Wait()
}

func (l *fakeLink) Send(payload []byte, segment int, ecn datagram.ECN) {
	if segment <= 0 || segment > len(payload) {
		segment = len(payload)
	}
	if f := l.onSend.Load(); f != nil {
		for b := payload; len(b) > 0; b = b[min(segment, len(b)):] {
			(*f)(b[:min(segment, len(b))])
		}
	}
	n := (len(payload) + segment - 1) / segment
	l.sent.Add(int64(n))
	if ecn != datagram.NotECT {
		l.ect.Add(int64(n))
		if l.markCE.Load() {
			ecn = datagram.CE
		}
	}
	if l.blackhole.Load() {
		l.dropped.Add(int64(n))
		return
	}
	loss, mtu := l.lossOneIn.Load(), int(l.mtu.Load())
	if mtu > 0 && min(segment, len(payload)) > mtu {
		l.dropped.Add(int64(n))
		return
	}
	if loss > 0 { // one by one
		for b := payload; len(b) > 0; b = b[min(segment, len(b)):] {
			if mrand.Int64N(loss) == 0 {
				l.dropped.Add(1)
				continue
			}
			l.push(b[:min(segment, len(b))], min(segment, len(b)), ecn)
		}
		return
	}
	l.push(payload, segment, ecn)
}

func (l *fakeLink) push(payload []byte, segment int, ecn datagram.ECN) {
	buf := datagram.NewBuffer()
	n := copy(buf.B[:], payload)
	b := datagram.NewBatch(buf.B[:n], segment, 0, ecn, buf)
	l.peer.pending.Add(1)
	select {
	case l.peer.in <- b:
		return
	default:
		l.dropped.Add(int64(b.Count()))
	}
	l.peer.pending.Add(-1)
	b.Release()
}

func (l *fakeLink) SetReceiver(r datagram.Receiver) {
	if r == nil {
		l.rcv.Store(nil)
		return
	}
	l.rcv.Store(&r)
}
func (l *fakeLink) MaxPayload() int       { return l.maxSize }
func (l *fakeLink) Done() <-chan struct{} { return l.done }

// cut makes a link lose everything both ways.
func cut(l *fakeLink, off bool) {
	l.blackhole.Store(off)
	l.peer.blackhole.Store(off)
}

// testCA is an organization's PKI.
type testCA struct {
	t    testing.TB
	org  string
	root *x509.Certificate
	ca   *x509.Certificate
	key  crypto.Signer
}

var serial atomic.Int64

func newTestCA(t testing.TB, org string) *testCA {
	rootKey, caKey := newKey(t), newKey(t)
	tmpl := func(cn string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: cn}, IsCA: true, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
		}
	}
	rt := tmpl(org + " root")
	root := sign(t, rt, rt, rootKey.Public(), rootKey)
	ca := sign(t, tmpl(org+" CA"), root, caKey.Public(), rootKey)
	return &testCA{t: t, org: org, root: root, ca: ca, key: caKey}
}

func newKey(t testing.TB) crypto.Signer {
	k, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// leaf issues a certificate for n with the extended key usages.
func (ca *testCA) leaf(n identity.Node, usage ...x509.ExtKeyUsage) *tls.Certificate {
	key := newKey(ca.t)
	c := sign(ca.t, &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: n.ID}, URIs: []*url.URL{n.URI()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage,
	}, ca.ca, key.Public(), ca.key)
	cert, err := identity.TLSCertificate([]*x509.Certificate{c, ca.ca}, key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert
}

func (ca *testCA) trust() *identity.Trust {
	return &identity.Trust{Roots: []*x509.Certificate{ca.root}, Pins: []identity.KeyHash{identity.CertificateKeyHash(ca.ca)}}
}

func always[T any](v T) func() (T, error) { return func() (T, error) { return v, nil } }

// testHandler is a gateway that reaches loopback. Functions that are nil do the usual.
type testHandler struct {
	authorize func(Peer) error
	dialTCP   func(ctx context.Context, t policy.Target) (Conn, error)
	dialUDP   func(ctx context.Context, t policy.Target) (net.Conn, error)
	openIP    func(Peer) (*IPService, error)
	resolve   func(query []byte) ([]byte, error)
}

func (h *testHandler) Authorize(_ context.Context, p Peer) error {
	if h.authorize != nil {
		return h.authorize(p)
	}
	return nil
}

func (h *testHandler) DialTCP(ctx context.Context, _ Peer, t policy.Target) (Conn, error) {
	if h.dialTCP != nil {
		return h.dialTCP(ctx, t)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(t.Addr, t.Port).String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (h *testHandler) DialUDP(ctx context.Context, _ Peer, t policy.Target) (net.Conn, error) {
	if h.dialUDP != nil {
		return h.dialUDP(ctx, t)
	}
	var d net.Dialer
	return d.DialContext(ctx, "udp", netip.AddrPortFrom(t.Addr, t.Port).String())
}

func (h *testHandler) OpenIP(_ context.Context, p Peer) (*IPService, error) {
	if h.openIP != nil {
		return h.openIP(p)
	}
	return nil, Denied(policy.DefaultDeny, "no IP here")
}

func (h *testHandler) Resolve(_ context.Context, _ Peer, query []byte) ([]byte, error) {
	if h.resolve != nil {
		return h.resolve(query)
	}
	return nil, &ProxyError{Type: DNSError, Detail: "no resolver"}
}

// world is a gateway that serves, and what it takes to dial it.
type world struct {
	t       testing.TB
	ca      *testCA
	gateway identity.Node
	client  identity.Node
	merged  *Merged
	server  *Server
	handler *testHandler
	serve   ServeConfig
	cert    *tls.Certificate // the client's

	mu    sync.Mutex
	trust *identity.Trust // the gateway's
}

func newWorld(t testing.TB, change func(*ServeConfig)) *world {
	return newWorldFunc(t, func(_ *world, c *ServeConfig) {
		if change != nil {
			change(c)
		}
	})
}

func newWorldFunc(t testing.TB, change func(*world, *ServeConfig)) *world {
	w := &world{
		t: t, ca: newTestCA(t, "acme"), handler: &testHandler{},
		gateway: identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-one"},
		client:  identity.Node{Org: "acme", Kind: identity.Client, ID: "c-one"},
	}
	w.trust = w.ca.trust()
	w.cert = w.ca.leaf(w.client, x509.ExtKeyUsageClientAuth)
	var err error
	if w.merged, err = NewMerged(MergedConfig{}); err != nil {
		t.Fatal(err)
	}
	w.serve = ServeConfig{
		Node: w.gateway, Certificate: always(w.ca.leaf(w.gateway, x509.ExtKeyUsageServerAuth)), Handler: w.handler,
		Trust: func() *identity.Trust {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.trust
		},
		StatelessResetKey: [32]byte{1}, TokenKey: [32]byte{2}, Logger: testLogger(t),
	}
	change(w, &w.serve)
	if w.server, err = Listen(w.merged, w.serve); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- w.server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		w.merged.Close()
	})
	return w
}

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("TUNNEL_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// link makes a link to the gateway and returns the client's end.
func (w *world) link(name string) *fakeLink {
	c, g := newLinkPair(w.t)
	if _, err := w.merged.Add(g, LinkInfo{Name: name, Peer: w.client}); err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) config(l *fakeLink) DialConfig {
	return DialConfig{
		Link: l, Info: LinkInfo{Name: "first"}, Gateway: w.gateway, Certificate: always(w.cert), Trust: w.ca.trust, Logger: testLogger(w.t),
	}
}

func (w *world) dial(l *fakeLink, change func(*DialConfig)) *Session {
	w.t.Helper()
	cfg := w.config(l)
	if change != nil {
		change(&cfg)
	}
	s, err := Dial(timeout(w.t, 10*time.Second), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close("test over") })
	return s
}

func timeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// echoServer accepts on loopback and gives every conn to f.
func tcpServer(t testing.TB, f func(*net.TCPConn)) uint16 {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []*net.TCPConn
	wg.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() { f(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close() // a gateway that did not hear of its session's end would keep it
		}
		mu.Unlock()
		wg.Wait()
	})
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

func echo(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// eventually waits for f.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if f() {
			return
		}
		time.Sleep(2 * time.Millisecond) // a poll, not a wait
	}
	t.Fatalf("timed out: %s", what)
}

// logBuffer keeps what is logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *logBuffer) contains(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), s)
}
