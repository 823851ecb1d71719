package tunnel

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"sallyway/internal/identity"
)

// The attacks in this file are made by peers that hold a good certificate: whoever has none does not get so far (TestIdentityFailsClosed).

// dialTLS dials the gateway with quic-go alone over a link, with a TLS config of the test's.
func dialTLS(t *testing.T, w *world, l *fakeLink, cfg *tls.Config) *quic.Conn {
	t.Helper()
	raw, err := newRawSocket()
	if err != nil {
		t.Fatal(err)
	}
	sl := newSlot(0, raw)
	sl.point(&slotLink{s: sl, link: l, mon: newMonitors(func() {}).add(l, LinkInfo{}), gone: make(chan struct{})}, true)
	t.Cleanup(func() {
		sl.tr.Close()
		sl.Close()
		raw.Close()
	})
	// DialEarly sends 0-RTT where it has a ticket that allows it.
	conn, err := sl.tr.DialEarly(timeout(t, 5*time.Second), gatewayAddr, cfg, &quic.Config{EnableDatagrams: true, Versions: []quic.Version{quic.Version1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseWithError(0x100, "") })
	select {
	case <-conn.HandshakeComplete():
	case <-time.After(5 * time.Second):
		t.Fatal("no handshake")
	}
	return conn
}

// TestNoTicketsAndNo0RTT asks for resumption as a client can: a ticket would outlive a revocation, and 0-RTT can be replayed.
func TestNoTicketsAndNo0RTT(t *testing.T) {
	w := newWorld(t, nil)
	l := w.link("a")
	dial := w.config(l)
	cfg := dial.tls()
	cache := &countingCache{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	cfg.SessionTicketsDisabled, cfg.ClientSessionCache = false, cache
	for range 2 {
		conn := dialTLS(t, w, l, cfg)
		// The server's first stream is opened after what TLS sends behind the handshake: tickets would be here.
		str, err := conn.AcceptUniStream(timeout(t, 5*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := str.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		st := conn.ConnectionState()
		if st.TLS.DidResume || st.Used0RTT || st.TLS.Version != tls.VersionTLS13 {
			t.Errorf("resumed %v, 0-RTT %v, version %#x", st.TLS.DidResume, st.Used0RTT, st.TLS.Version)
		}
		_ = conn.CloseWithError(0x100, "")
	}
	if n := cache.puts.Load(); n != 0 {
		t.Errorf("the gateway gave %d session tickets", n)
	}
	if qc := quicConfig(time.Second, time.Second); qc.Allow0RTT {
		t.Error("0-RTT is allowed")
	}
}

type countingCache struct {
	tls.ClientSessionCache
	puts atomic.Int64
}

func (c *countingCache) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		c.puts.Add(1)
	}
	c.ClientSessionCache.Put(key, s)
}

// TestDeniedKeyInAnotherCertificate denies a key and comes back with a fresh certificate for it, in which every byte that may differ does.
func TestDeniedKeyInAnotherCertificate(t *testing.T) {
	w := newWorld(t, nil)
	w.dial(w.link("before"), nil).Close("")
	again := w.ca.leaf(w.client, x509.ExtKeyUsageClientAuth)
	key := newKey(t)
	leafFor := func() *tls.Certificate {
		c := sign(t, again.Leaf, w.ca.ca, key.Public(), w.ca.key)
		cert, err := identity.TLSCertificate([]*x509.Certificate{c, w.ca.ca}, key)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	one, two := leafFor(), leafFor()
	if bytes.Equal(one.Leaf.Raw, two.Leaf.Raw) {
		t.Fatal("the two certificates do not differ")
	}
	w.dial(w.link("one"), func(c *DialConfig) { c.Certificate = always(one) }).Close("")
	w.mu.Lock()
	tr := *w.trust
	tr.Denied = []identity.KeyHash{identity.CertificateKeyHash(one.Leaf)}
	w.trust = &tr
	w.mu.Unlock()
	for name, cert := range map[string]*tls.Certificate{"the same certificate": one, "another for the key": two} {
		cfg := w.config(w.link(name))
		cfg.Certificate = always(cert)
		if s, err := Dial(timeout(t, 5*time.Second), cfg); err == nil {
			s.Close("")
			t.Errorf("%s passes", name)
		}
	}
	w.dial(w.link("bystander"), nil).Close("")
}

// TestUnprovenDiallerDrawsThreeTimesAtMost lets a dialler whom no answer reaches send its Initials (RFC 9000 §8.1).
func TestUnprovenDiallerDrawsThreeTimesAtMost(t *testing.T) {
	w := newWorld(t, func(c *ServeConfig) { c.Limits.Handshakes = 1000 }) // no Retry: the harder case
	c, g := newLinkPair(t)
	var in, out atomic.Int64
	count := func(n *atomic.Int64) *func([]byte) {
		f := func(b []byte) { n.Add(int64(len(b))) }
		return &f
	}
	c.onSend.Store(count(&in))
	g.onSend.Store(count(&out))
	g.blackhole.Store(true)
	if _, err := w.merged.Add(g, LinkInfo{}); err != nil {
		t.Fatal(err)
	}
	cfg := w.config(c)
	if s, err := Dial(timeout(t, 1500*time.Millisecond), cfg); err == nil {
		s.Close("")
		t.Fatal("a session without a way back")
	}
	if in.Load() == 0 || out.Load() == 0 || out.Load() > 3*in.Load() {
		t.Errorf("%d bytes in, %d out", in.Load(), out.Load())
	}
	t.Logf("%d bytes in, %d out", in.Load(), out.Load())
}

// TestStrangersDrawNothing sends what is no QUIC of ours: other versions (no Version Negotiation), short headers of no session, garbage,
// probes without a key.
func TestStrangersDrawNothing(t *testing.T) {
	w := newWorld(t, func(c *ServeConfig) { c.StatelessResetKey = [32]byte{} })
	c, g := newLinkPair(t)
	var out atomic.Int64
	f := func([]byte) { out.Add(1) }
	g.onSend.Store(&f)
	if _, err := w.merged.Add(g, LinkInfo{}); err != nil {
		t.Fatal(err)
	}
	random := func(first byte, n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		b[0] = first
		return b
	}
	version := random(0xc3, 1200)
	binary.BigEndian.PutUint32(version[1:], 0x1a2a3a4a)
	version[5] = 8
	for range 50 {
		for _, b := range [][]byte{version, random(0x40, 40), random(0xff, 1200), random(0x00, 100), random(0x01, 20), random(0xc3, 5), {0xc3}} {
			c.Send(b, 0, 0)
		}
	}
	s := w.dial(w.link("good"), nil) // all of it has been looked at when this one, which comes later, is served
	s.Close("")
	if n := out.Load(); n != 0 {
		t.Errorf("%d answers to strangers", n)
	}
}

// intruder puts packets of its own making into a connection whose keys it has: a peer that does not follow the protocol.
type intruder struct {
	t    *testing.T
	aead cipher.AEAD
	iv   []byte
	hp   cipher.Block
	dcid []byte
	pn   uint32
}

// newIntruder opens a connection on l and takes its keys. From then on nothing from the gateway comes through.
func newIntruder(t *testing.T, w *world, l *fakeLink) (*intruder, *quic.Conn) {
	t.Helper()
	dial := w.config(l)
	cfg := dial.tls()
	var keys lockedBuffer
	cfg.KeyLogWriter = &keys
	var mu sync.Mutex
	var dcid []byte
	look := func(b []byte) {
		if b[0]&0xc0 == 0x40 && len(b) > 1+connectionIDLength { // a short header, RFC 9000 §17.3.1
			mu.Lock()
			dcid = bytes.Clone(b[1 : 1+connectionIDLength])
			mu.Unlock()
		}
	}
	l.onSend.Store(&look)
	conn := dialTLS(t, w, l, cfg)
	eventually(t, "a packet with a short header", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return dcid != nil
	})
	eventually(t, "the session", func() bool { return len(w.server.Sessions()) > 0 })
	if s := conn.ConnectionState().TLS.CipherSuite; s != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("cipher suite %#x was chosen: this processor has no AES, and the test knows that one alone", s)
	}
	_, line, ok := strings.Cut(keys.String(), "CLIENT_TRAFFIC_SECRET_0 ")
	if !ok {
		t.Fatal("no secret in the key log")
	}
	secret, err := hex.DecodeString(strings.TrimSpace(strings.Fields(line)[1]))
	if err != nil {
		t.Fatal(err)
	}
	expand := func(label string, n int) []byte { // RFC 8446 §7.1, RFC 9001 §5.1
		label = "tls13 " + label
		info := append(binary.BigEndian.AppendUint16(nil, uint16(n)), byte(len(label)))
		k, err := hkdf.Expand(sha256.New, secret, string(append(append(info, label...), 0)), n)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	block, err := aes.NewCipher(expand("quic key", 16))
	if err != nil {
		t.Fatal(err)
	}
	x := &intruder{t: t, iv: expand("quic iv", 12), pn: 1 << 20}
	if x.aead, err = cipher.NewGCM(block); err != nil {
		t.Fatal(err)
	}
	if x.hp, err = aes.NewCipher(expand("quic hp", 16)); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	x.dcid = dcid
	l.onSend.Store(nil)
	l.peer.blackhole.Store(true) // the real client would end a connection in which it is acknowledged what it has not sent
	return x, conn
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// packet seals frames into a packet with a short header (RFC 9001 §5.3, §5.4).
func (x *intruder) packet(frames []byte) []byte {
	x.pn++
	head := append([]byte{0x43}, x.dcid...)
	head = binary.BigEndian.AppendUint32(head, x.pn)
	nonce := bytes.Clone(x.iv)
	for i := range 4 {
		nonce[8+i] ^= byte(x.pn >> (24 - 8*i))
	}
	p := x.aead.Seal(bytes.Clone(head), nonce, frames, head)
	var mask [16]byte
	at := 1 + len(x.dcid)
	x.hp.Encrypt(mask[:], p[at+4:at+20])
	p[0] ^= mask[0] & 0x1f
	for i := range 4 {
		p[at+i] ^= mask[1+i]
	}
	return p
}

// flood sends n packets of frames in runs, over one link after the other, as fast as the gateway reads them.
func (x *intruder) flood(w *world, links []*fakeLink, n int, frames func(i int) []byte) {
	x.t.Helper()
	for i := 0; i < n; {
		var run []byte
		size := 0
		for range 40 {
			p := x.packet(frames(i))
			if size != 0 && len(p) != size {
				x.t.Fatalf("packets of %d and %d bytes in a run", size, len(p))
			}
			size = len(p)
			run = append(run, p...)
			i++
		}
		before := w.merged.Stats().Received
		links[i/40%len(links)].Send(run, size, 0)
		eventually(x.t, "the gateway reads", func() bool { return w.merged.Stats().Received >= before+40 })
	}
}

// heap is the live heap in bytes.
func heap() int64 {
	runtime.GC()
	runtime.GC() // pools give back what they hold after the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// varint is a variable-length integer of four bytes (RFC 9000 §16).
func varint(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)|0x80000000) }

// TestFramesFlood has a peer flood the gateway with frames that ask for answers, and acknowledge nothing, so that the answers pile up where
// they are not bounded (the class of CVE-2023-49295 and CVE-2024-22189). The gateway must stay small and serve others.
func TestFramesFlood(t *testing.T) {
	port := tcpServerFor(t)
	for _, tc := range []struct {
		name    string
		packets int
		paths   int // over how many links it comes
		frames  func(i int) []byte
	}{
		{"PATH_CHALLENGE", 6000, 8, func(i int) []byte { // 0x1a and eight bytes
			var b []byte
			for j := range 130 {
				b = append(b, 0x1a)
				b = binary.BigEndian.AppendUint64(b, uint64(i)<<32|uint64(j))
			}
			return b
		}},
		{"NEW_CONNECTION_ID that retires all before it", 20_000, 1, func(i int) []byte {
			var b []byte
			for j := range 30 {
				seq := 10 + i*30 + j
				b = append(b, 0x18)
				b = append(append(b, varint(seq)...), varint(seq)...)
				b = append(b, 8)
				b = binary.BigEndian.AppendUint64(b, uint64(seq)|1<<62)
				b = append(b, binary.BigEndian.AppendUint64(make([]byte, 8), uint64(seq))...)
			}
			return b
		}},
		{"PING", 6000, 1, func(int) []byte { return append(bytes.Repeat([]byte{1}, 600), make([]byte, 500)...) }},
		{"MAX_STREAM_DATA of streams that are not", 6000, 1, func(i int) []byte {
			var b []byte
			for j := range 100 {
				b = append(append(append(b, 0x11), varint((i*100+j)*4)...), varint(1<<20)...)
			}
			return b
		}},
		{"STREAM openings beyond the limit", 6000, 1, func(i int) []byte {
			var b []byte
			for j := range 100 {
				b = append(append(b, 0x0a), varint((i*100+j)*4)...) // with a length
				b = append(b, 1, 'x')
			}
			return b
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, nil)
			bystander := w.dial(w.link("bystander"), nil)
			l := w.link("intruder")
			x, _ := newIntruder(t, w, l)
			links := []*fakeLink{l}
			for len(links) < tc.paths {
				links = append(links, w.link("elsewhere"))
			}
			before := heap()
			x.flood(w, links, tc.packets, tc.frames)
			const most = 8 << 20 // unbounded, the answers would take twice that
			if grown := heap() - before; grown > most {
				t.Errorf("%d packets cost %d MiB", tc.packets, grown>>20)
			} else {
				t.Logf("%d packets, heap %+d KiB", tc.packets, grown>>10)
			}
			c, err := bystander.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
			if err != nil {
				t.Fatalf("another session: %v", err)
			}
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			c.Close()
			w.dial(w.link("new"), nil).Close("")
			// The intruder was heard all along: its session has been ended for what it did, or it can end it.
			l.Send(x.packet(closeFrame), 0, 0)
			eventually(t, "the end of the intruder's session", func() bool { return len(w.server.Sessions()) == 1 })
		})
	}
}

// closeFrame is CONNECTION_CLOSE of an application (RFC 9000 §19.19), code 0x100, no reason, padded.
var closeFrame = append([]byte{0x1d, 0x41, 0x00, 0}, make([]byte, 20)...)

// TestAcknowledgedProbes has a peer show up at ever new addresses and acknowledge packets that the gateway sent there and elsewhere (the
// class of CVE-2025-29785): the gateway may end that connection and nothing else.
func TestAcknowledgedProbes(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServerFor(t)
	bystander := w.dial(w.link("bystander"), nil)
	first := w.link("intruder")
	x, _ := newIntruder(t, w, first)
	links := []*fakeLink{first}
	for range 8 {
		links = append(links, w.link("elsewhere"))
	}
	ack := func(largest, count int) []byte { // RFC 9000 §19.3: largest, delay, ranges, first range
		b := append([]byte{0x02}, varint(largest)...)
		b = append(append(b, 0, 0), varint(min(count, largest))...)
		return append(b, make([]byte, 20)...)
	}
	for round := range 40 {
		for _, l := range links {
			l.Send(x.packet(append([]byte{1}, make([]byte, 60)...)), 0, 0) // PING: not a probing packet, so the path is tried
			l.Send(x.packet(ack(round, 0)), 0, 0)
			l.Send(x.packet(ack(round, round)), 0, 0)
		}
	}
	before := w.merged.Stats().Received
	c, err := bystander.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if w.merged.Stats().Received < before+1 {
		t.Error("nothing was read")
	}
	w.dial(w.link("new"), nil).Close("")
}

func tcpServerFor(t *testing.T) uint16 { return tcpServer(t, echo) }

// TestRevocationIsQuick measures how long a revoked peer can still use flows that are open.
func TestRevocationIsQuick(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServerFor(t)
	var flows []*Stream
	for range 5 {
		s := w.dial(w.link("a"), nil)
		c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
		if err != nil {
			t.Fatal(err)
		}
		flows = append(flows, c)
	}
	began := time.Now()
	w.server.CloseWhere(func(Peer) (string, bool) { return "revoked", true })
	for _, c := range flows {
		if _, err := io.ReadFull(c, make([]byte, 1)); !errors.Is(err, ErrNoSession) {
			t.Errorf("flow ended with %v", err)
		}
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %v", d)
	}
	if n := len(w.server.Sessions()); n != 0 {
		eventually(t, "no session", func() bool { return len(w.server.Sessions()) == 0 })
	}
}
