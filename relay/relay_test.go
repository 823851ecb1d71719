package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

var testKey = []byte("0123456789abcdef0123456789abcdef")

func node(org string, kind identity.Kind, id string) identity.Node {
	return identity.Node{Org: org, Kind: kind, ID: id}
}

// certificate makes a self-signed certificate and writes its PEM to a file that clients can trust.
func certificate(t testing.TB) (func() (*tls.Certificate, error), string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "relay"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, identity.EncodeCertificates(leaf), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return func() (*tls.Certificate, error) { return c, nil }, file
}

// clock is a time that tests move.
type clock struct {
	mu sync.Mutex
	d  time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.d)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.d += d
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// lab is a running relay on the loopback interface.
type lab struct {
	*Server
	clock *clock
	log   *syncBuffer
	stop  func()
}

// start runs a relay with the organizations acme and other until the test ends.
func start(t testing.TB, change func(*Config)) *lab {
	t.Helper()
	l := &lab{clock: &clock{}, log: &syncBuffer{}}
	cfg := Config{
		Listen: netip.MustParseAddrPort("127.0.0.1:0"), Keys: [][]byte{testKey}, Now: l.clock.now,
		Organizations: map[string]Organization{"acme": {}, "other": {}},
		Logger:        slog.New(slog.NewTextHandler(l.log, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Server = s
	ctx, cancel := context.WithCancel(context.Background())
	if err := s.Listen(ctx); err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	l.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

// user is a credential of n under testKey.
func user(n identity.Node, flags wire.Flags) (name, password string) {
	name = wire.Username{Expiry: time.Now().Add(48 * time.Hour), Node: n, Flags: flags}.String()
	return name, wire.Password(testKey, name)
}

// tester is a bare TURN client that can say anything.
type tester struct {
	t         testing.TB
	conn      net.Conn
	stream    bool
	username  string
	password  string
	nonce     stun.Nonce
	relayed   netip.AddrPort
	waiting   [][]byte // ChannelData and indications that came while waiting for an answer
	transport byte
}

// dial connects a client of n over UDP.
func dial(t testing.TB, l *lab, n identity.Node) *tester {
	t.Helper()
	name, password := user(n, "")
	c, err := net.Dial("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	// A large receive buffer, so that a burst is not lost in the test itself.
	if _, _, err := udpio.New(c.(*net.UDPConn), udpio.Config{NoOffload: true}); err != nil {
		t.Fatal(err)
	}
	return &tester{t: t, conn: c, username: name, password: password, transport: protocolUDP}
}

// allocated connects a client of n and allocates.
func allocated(t testing.TB, l *lab, n identity.Node) *tester {
	t.Helper()
	c := dial(t, l, n)
	c.allocate()
	return c
}

// receive waits for the next message.
func (c *tester) receive(d time.Duration) ([]byte, bool) {
	c.t.Helper()
	if err := c.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		c.t.Fatal(err)
	}
	buf := make([]byte, 65536)
	if !c.stream {
		n, err := c.conn.Read(buf)
		return buf[:n], err == nil
	}
	n, err := readFull(c.conn, buf[:4])
	if err != nil {
		return nil, false
	}
	size, ok := frameSize(buf[:4])
	if !ok {
		c.t.Fatalf("not a frame: % x", buf[:n])
	}
	_, err = readFull(c.conn, buf[4:size])
	return buf[:size], err == nil
}

func readFull(c net.Conn, b []byte) (n int, err error) {
	for n < len(b) {
		k, err := c.Read(b[n:])
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (c *tester) write(b []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// once sends a request and returns its answer, or nil where none came.
func (c *tester) once(method stun.Method, attrs ...stun.Setter) *stun.Message {
	c.t.Helper()
	m, err := stun.Build(append([]stun.Setter{stun.NewType(method, stun.ClassRequest), stun.TransactionID}, attrs...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	return c.exchange(m)
}

func (c *tester) exchange(m *stun.Message) *stun.Message {
	c.t.Helper()
	c.write(m.Raw)
	end := time.Now().Add(2 * time.Second)
	for time.Now().Before(end) {
		b, ok := c.receive(time.Until(end))
		if !ok {
			return nil
		}
		r := &stun.Message{Raw: b}
		if b[0] < 4 && r.Decode() == nil && r.TransactionID == m.TransactionID {
			return r
		}
		c.waiting = append(c.waiting, b)
	}
	return nil
}

func (c *tester) key() stun.MessageIntegrity {
	return stun.NewLongTermIntegrity(c.username, wire.Realm, c.password)
}

// do sends an authenticated request, once more after a challenge, and returns the answer or nil.
func (c *tester) do(method stun.Method, attrs ...stun.Setter) *stun.Message {
	c.t.Helper()
	for try := 0; ; try++ {
		all := append([]stun.Setter{}, attrs...)
		if len(c.nonce) > 0 {
			all = append(all, stun.NewUsername(c.username), stun.NewRealm(wire.Realm), c.nonce, c.key())
		}
		r := c.once(method, all...)
		if r == nil || try == 2 {
			return r
		}
		if code := errorCode(r); code != stun.CodeUnauthorized && code != stun.CodeStaleNonce {
			return r
		}
		if len(c.nonce) > 0 && errorCode(r) == stun.CodeUnauthorized {
			return r
		}
		c.nonce = nil
		if err := c.nonce.GetFrom(r); err != nil {
			c.t.Fatalf("challenge without nonce: %v", err)
		}
	}
}

// errorCode is the error of an answer, 0 for a success, -1 for none.
func errorCode(r *stun.Message) stun.ErrorCode {
	if r == nil {
		return -1
	}
	if r.Type.Class == stun.ClassSuccessResponse {
		return 0
	}
	var e stun.ErrorCodeAttribute
	if e.GetFrom(r) != nil {
		return -2
	}
	return e.Code
}

func (c *tester) want(code stun.ErrorCode, r *stun.Message) *stun.Message {
	c.t.Helper()
	if got := errorCode(r); got != code {
		c.t.Fatalf("answer %d, want %d", got, code)
	}
	return r
}

type raw struct {
	attr  stun.AttrType
	value []byte
}

func (r raw) AddTo(m *stun.Message) error {
	m.Add(r.attr, r.value)
	return nil
}

func (c *tester) requestedTransport() stun.Setter {
	return raw{stun.AttrRequestedTransport, []byte{c.transport, 0, 0, 0}}
}

func (c *tester) tryAllocate(attrs ...stun.Setter) *stun.Message {
	c.t.Helper()
	r := c.do(stun.MethodAllocate, append([]stun.Setter{c.requestedTransport()}, attrs...)...)
	if errorCode(r) == 0 {
		if err := c.key().Check(r); err != nil {
			c.t.Fatalf("Allocate answer: %v", err)
		}
		v, err := r.Get(stun.AttrXORRelayedAddress)
		if err != nil {
			c.t.Fatal(err)
		}
		c.relayed, _ = peerAddr(r, v)
	}
	return r
}

func (c *tester) allocate() {
	c.t.Helper()
	c.want(0, c.tryAllocate())
}

func peerAttr(a netip.AddrPort) stun.Setter { return xorAddr{stun.AttrXORPeerAddress, a} }

func numberAttr(n uint16) stun.Setter {
	return raw{stun.AttrChannelNumber, []byte{byte(n >> 8), byte(n), 0, 0}}
}

func (c *tester) bind(n uint16, peer netip.AddrPort) *stun.Message {
	c.t.Helper()
	return c.do(stun.MethodChannelBind, numberAttr(n), peerAttr(peer))
}

func (c *tester) permit(peer netip.AddrPort) *stun.Message {
	c.t.Helper()
	return c.do(stun.MethodCreatePermission, peerAttr(peer))
}

func channelData(n uint16, payload string) []byte {
	b := binary.BigEndian.AppendUint16(nil, n)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(b, payload...)
}

// next returns the next message that is not an answer.
func (c *tester) next(d time.Duration) ([]byte, bool) {
	if len(c.waiting) > 0 {
		b := c.waiting[0]
		c.waiting = c.waiting[1:]
		return b, true
	}
	return c.receive(d)
}

// wantData waits for ChannelData on number n.
func (c *tester) wantData(n uint16, payload string) {
	c.t.Helper()
	b, ok := c.next(5 * time.Second)
	if !ok {
		c.t.Fatalf("no data on channel %#x, want %q", n, payload)
	}
	if want := channelData(n, payload); !bytes.HasPrefix(b, want) || len(b)-len(want) > 3 {
		c.t.Fatalf("got %d bytes % .60x, want %d bytes % .60x", len(b), b, len(want), want)
	}
}

// wantNothing waits a little and fails if anything comes.
func (c *tester) wantNothing() {
	c.t.Helper()
	if b, ok := c.next(150 * time.Millisecond); ok {
		c.t.Fatalf("got % x, want silence", b)
	}
}

// indication waits for an indication of the method.
func (c *tester) indication(method stun.Method) *stun.Message {
	c.t.Helper()
	end := time.Now().Add(5 * time.Second)
	for time.Now().Before(end) {
		b, ok := c.next(time.Until(end))
		if !ok {
			break
		}
		m := &stun.Message{Raw: b}
		if b[0] < 4 && m.Decode() == nil && m.Type == stun.NewType(method, stun.ClassIndication) {
			return m
		}
	}
	c.t.Fatalf("no indication %v", method)
	return nil
}

// until polls cond.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

var (
	gateway1 = node("acme", identity.Gateway, "g1")
	client1  = node("acme", identity.Client, "c1")
	client2  = node("acme", identity.Client, "c2")
	foreign  = node("other", identity.Gateway, "g9")
)

func TestChannelToChannel(t *testing.T) {
	l := start(t, nil)
	a, b := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4001, b.relayed))
	a.write(channelData(0x4001, "too early"))
	b.wantNothing()
	b.want(0, b.bind(0x4ABC, a.relayed))
	a.write(channelData(0x4001, "hello"))
	b.wantData(0x4ABC, "hello")
	b.write(channelData(0x4ABC, "back"))
	a.wantData(0x4001, "back")
	b.write(append(channelData(0x4ABC, "padded"), 0xEE, 0xEE)) // padding goes no further
	if m, ok := a.next(5 * time.Second); !ok || !bytes.Equal(m, channelData(0x4001, "padded")) {
		t.Errorf("padded message arrived as % x", m)
	}
}

// message describes a read of n bytes, one datagram, from a source.
func message(n int, from netip.AddrPort) udpio.Message {
	return udpio.Message{N: n, Segment: n, From: from}
}
