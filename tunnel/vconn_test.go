package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// sink is a link that counts.
type sink struct {
	mu      sync.Mutex
	payload []byte
	segment int
	ecn     datagram.ECN
	rcv     datagram.Receiver
	done    chan struct{}
	keep    bool
}

func (s *sink) Send(p []byte, segment int, ecn datagram.ECN) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keep {
		s.payload = bytes.Clone(p)
	}
	s.segment, s.ecn = segment, ecn
}

func (s *sink) SetReceiver(r datagram.Receiver) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rcv = r
}
func (s *sink) MaxPayload() int       { return 1452 }
func (s *sink) Done() <-chan struct{} { return s.done }

func newSink() *sink { return &sink{done: make(chan struct{}), keep: true} }

func newMerged(t testing.TB, cfg MergedConfig) *Merged {
	m, err := NewMerged(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func messages(n int) []ipv4.Message {
	ms := make([]ipv4.Message, n)
	for i := range ms {
		ms[i].Buffers = [][]byte{make([]byte, 1452)}
		ms[i].OOB = make([]byte, 128)
	}
	return ms
}

// segments makes a batch of n datagrams of size bytes, the last one short, as a leg does: a header of skip bytes before each.
func segments(n, size, skip int, ecn datagram.ECN) datagram.Batch {
	buf := datagram.NewBuffer()
	end := 0
	for i := range n {
		length := size
		if i == n-1 {
			length = size - 7
		}
		d := buf.B[end : end+skip+length]
		for j := range d {
			d[j] = 0x40 | byte(i)
		}
		end += len(d)
	}
	return datagram.NewBatch(buf.B[:end], size+skip, skip, ecn, buf)
}

func TestMergedReads(t *testing.T) {
	m := newMerged(t, MergedConfig{})
	a, b := newSink(), newSink()
	va, err := m.Add(a, LinkInfo{Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	vb, _ := m.Add(b, LinkInfo{Name: "b"})
	if va == vb || va.Addr().IsUnspecified() {
		t.Fatalf("virtual addresses %v, %v", va, vb)
	}
	a.rcv.Receive(segments(13, 1200, 4, datagram.ECT0))
	b.rcv.Receive(segments(1, 100, 0, datagram.CE))
	ms := messages(8)
	var froms []net.Addr
	var sizes []int
	var marks []datagram.ECN
	for len(sizes) < 14 {
		n, err := m.ReadBatch(ms, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range ms[:n] {
			froms, sizes = append(froms, g.Addr), append(sizes, g.N)
			_, mark := parseControl(g.OOB[:g.NN])
			marks = append(marks, mark)
		}
	}
	for i := range 13 {
		want := 1200
		if i == 12 {
			want = 1193
		}
		if sizes[i] != want || froms[i].(*net.UDPAddr).AddrPort() != va || marks[i] != datagram.ECT0 {
			t.Errorf("datagram %d: %d bytes from %v, ECN %d", i, sizes[i], froms[i], marks[i])
		}
	}
	if sizes[13] != 93 || froms[13].(*net.UDPAddr).AddrPort() != vb || marks[13] != datagram.CE {
		t.Errorf("last: %d bytes from %v, ECN %d", sizes[13], froms[13], marks[13])
	}
	if froms[0] != froms[1] {
		t.Error("the address is not cached")
	}
}

func TestMergedWrites(t *testing.T) {
	m := newMerged(t, MergedConfig{})
	l := newSink()
	v, _ := m.Add(l, LinkInfo{})
	to := net.UDPAddrFromAddrPort(v)
	oob := controlFor(1200, datagram.ECT0)
	payload := make([]byte, 3000)
	if n, _, err := m.WriteMsgUDP(payload, oob, to); n != 3000 || err != nil {
		t.Fatal(n, err)
	}
	if l.segment != 1200 || l.ecn != datagram.ECT0 || len(l.payload) != 3000 {
		t.Fatalf("segment %d, ECN %d, %d bytes", l.segment, l.ecn, len(l.payload))
	}
	if _, err := m.WriteTo(payload, to); err != nil || l.segment != 0 || l.ecn != datagram.NotECT {
		t.Fatalf("segment %d, ECN %d, %v", l.segment, l.ecn, err)
	}
	// A link that ended is gone; nothing fails.
	close(l.done)
	eventually(t, "link dropped", func() bool { return m.Stats().Links == 0 })
	if _, _, err := m.WriteMsgUDP(payload, oob, to); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.WriteMsgUDP(payload, oob, &net.UDPAddr{IP: net.IPv4(1, 2, 3, 4), Port: 5}); err != nil {
		t.Fatal(err)
	}
	if st := m.Stats(); st.Sent != 4 || st.DroppedUnknown != 6 {
		t.Fatalf("%+v", st)
	}
	// The next link never gets an old address.
	if again, _ := m.Add(newSink(), LinkInfo{}); again == v {
		t.Fatal("virtual address reused")
	}
	m.Close()
	if _, _, err := m.WriteMsgUDP(payload, oob, to); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("write after close: %v", err)
	}
	if _, err := m.ReadBatch(messages(1), 0); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("read after close: %v", err)
	}
	if _, err := m.Add(newSink(), LinkInfo{}); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("add after close: %v", err)
	}
}

// controlFor is what quic-go writes for a virtual address.
func controlFor(segment uint16, ecn datagram.ECN) []byte {
	b := make([]byte, unix.CmsgSpace(2)+ecnSpace)
	putCmsgHeader(b, unix.CmsgLen(2), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], segment)
	putECN(b[unix.CmsgSpace(2):], ecn)
	return b
}

func TestQueueAndDeadline(t *testing.T) {
	m := newMerged(t, MergedConfig{Queue: 2})
	l := newSink()
	_, _ = m.Add(l, LinkInfo{})
	for range 5 {
		l.rcv.Receive(segments(3, 100, 0, 0))
	}
	if st := m.Stats(); st.DroppedFull != 9 {
		t.Fatalf("%+v", st)
	}
	ms := messages(8)
	if n, err := m.ReadBatch(ms, 0); n != 6 || err != nil {
		t.Fatal(n, err)
	}
	_ = m.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := m.ReadBatch(ms, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	_ = m.SetReadDeadline(time.Time{})
	got := make(chan error, 1)
	go func() {
		_, err := m.ReadBatch(ms, 0)
		got <- err
	}()
	_ = m.SetReadDeadline(time.Now())
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

// prober remembers what it was handed.
type prober struct{ got [][]byte }

func (p *prober) handleProbe(b []byte) { p.got = append(p.got, bytes.Clone(b)) }

func TestProbesBesideQUIC(t *testing.T) {
	m := newMerged(t, MergedConfig{})
	var p prober
	from := &source{}
	from.addr.Store(virtualAddr(9))
	// A kernel may coalesce what is of one size, whatever it is.
	data := bytes.Join([][]byte{{'h', 0x40, 1}, {'h', 0, 2}, {'h', 3, 3}, {'h', 0xc0}}, nil)
	m.receive(datagram.NewBatch(data, 3, 1, 0, nil), from, &p)
	if len(p.got) != 2 || !bytes.Equal(p.got[0], []byte{0, 2}) || !bytes.Equal(p.got[1], []byte{3, 3}) {
		t.Fatalf("probes %x", p.got)
	}
	ms := messages(8)
	n, err := m.ReadBatch(ms, 0)
	if n != 2 || err != nil || ms[0].Buffers[0][0] != 0x40 || ms[1].Buffers[0][0] != 0xc0 || ms[1].N != 1 {
		t.Fatalf("%d, %v", n, err)
	}
	m.receive(datagram.NewBatch([]byte{1, 2, 3}, 3, 0, 0, nil), from, &p)
	m.receive(datagram.NewBatch(nil, 0, 0, 0, nil), from, &p)
	if len(p.got) != 3 {
		t.Fatalf("probes %x", p.got)
	}
	_ = m.SetReadDeadline(time.Now())
	if _, err := m.ReadBatch(ms, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a probe was read: %v", err)
	}
}

func TestNoAllocationPerPacket(t *testing.T) {
	m := newMerged(t, MergedConfig{})
	l := newSink()
	l.keep = false
	v, _ := m.Add(l, LinkInfo{})
	to, oob := net.UDPAddrFromAddrPort(v), controlFor(1200, datagram.ECT0)
	payload := make([]byte, 12000)
	if n := testing.AllocsPerRun(200, func() { _, _, _ = m.WriteMsgUDP(payload, oob, to) }); n != 0 {
		t.Errorf("WriteMsgUDP allocates %v", n)
	}
	conn := &fakeTaker{ctx: t.Context()} // is asked what it looked at
	conn.at.Store(to)
	m.attach(conn)
	ms := messages(8)
	rcv := l.rcv
	if n := testing.AllocsPerRun(200, func() {
		rcv.Receive(segments(16, 1200, 4, datagram.ECT0))
		for got := 0; got < 16; {
			n, err := m.ReadBatch(ms, 0)
			if err != nil {
				t.Fatal(err)
			}
			got += n
			for _, g := range ms[:n] {
				conn.bytes.Add(uint64(g.N))
			}
		}
	}); n > 0.5 { // the pool may be emptied meanwhile
		t.Errorf("Receive and ReadBatch allocate %v", n)
	}
	raw, err := newRawSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	s := newSlot(0, raw)
	s.point(&slotLink{s: s, link: l, gone: make(chan struct{})}, true)
	if n := testing.AllocsPerRun(200, func() { _, _, _ = s.WriteMsgUDP(payload, oob, gatewayAddr) }); n != 0 {
		t.Errorf("a slot's WriteMsgUDP allocates %v", n)
	}
	s.Close()
}

// What the links do must get quic-go to segment, to mark, and to search for the path's MTU.
func TestQUICUsesOffloads(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	l := w.link("a")
	var mu sync.Mutex
	largest := 0
	look := func(b []byte) {
		mu.Lock()
		defer mu.Unlock()
		largest = max(largest, len(b))
	}
	l.onSend.Store(&look)
	s := w.dial(l, nil)
	if !s.conn.ConnectionState().GSO {
		t.Skip("this kernel has no UDP_SEGMENT")
	}
	c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 0)
		got <- err
	}()
	eventually(t, "large packets", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return largest > 1400
	})
	if l.ect.Load() == 0 || l.peer.ect.Load() == 0 {
		t.Errorf("no ECN marks: %d up, %d down", l.ect.Load(), l.peer.ect.Load())
	}
	// Congestion marks are understood on both ends: the window shrinks, nothing is lost.
	l.markCE.Store(true)
	before := c.Offsets().Read
	eventually(t, "traffic under congestion marks", func() bool { return c.Offsets().Read > before+1<<20 })
	if s.Stats().Lost != 0 && l.dropped.Load() == 0 && l.peer.dropped.Load() == 0 {
		t.Errorf("%d bytes lost", s.Stats().Lost)
	}
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestLossyLink(t *testing.T) {
	w := newWorld(t, nil)
	port := tcpServer(t, echo)
	l := w.link("a")
	l.lossOneIn.Store(50)
	l.peer.lossOneIn.Store(50)
	s := w.dial(l, nil)
	c, err := s.DialTCP(timeout(t, 10*time.Second), "127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	stop, got := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := exchange(c, stop, 0)
		got <- err
	}()
	eventually(t, "traffic", func() bool { return c.Offsets().Read > 2<<20 })
	close(stop)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestALPNMismatch(t *testing.T) {
	w := newWorld(t, nil)
	l := w.link("a")
	raw, err := newRawSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	sl := newSlot(0, raw)
	defer sl.Close()
	defer sl.tr.Close()
	sl.point(&slotLink{s: sl, link: l, mon: newMonitors(func() {}).add(l, LinkInfo{}), gone: make(chan struct{})}, true)
	cfg := w.config(l)
	tc := cfg.tls()
	tc.NextProtos = []string{"turn"}
	conn, err := sl.tr.Dial(timeout(t, 5*time.Second), gatewayAddr, tc, &quic.Config{})
	if err == nil {
		_ = conn.CloseWithError(0, "")
		t.Fatal("a peer that speaks another protocol was let in")
	}
	if e := sessionError(err); !e.Remote {
		t.Errorf("not the gateway refused: %v", err)
	}
}

// tickets counts what a server hands out to resume sessions with.
type tickets struct{ n int }

func (c *tickets) Put(string, *tls.ClientSessionState)        { c.n++ }
func (c *tickets) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

// A ticket would outlive a revocation, and 0-RTT data can be replayed.
func TestNoTicketsAndVersions(t *testing.T) {
	w := newWorld(t, nil)
	l := w.link("a")
	raw, err := newRawSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	sl := newSlot(0, raw)
	defer sl.Close()
	defer sl.tr.Close()
	sl.point(&slotLink{s: sl, link: l, mon: newMonitors(func() {}).add(l, LinkInfo{}), gone: make(chan struct{})}, true)
	cfg := w.config(l)
	for _, v := range []quic.Version{quic.Version1, quic.Version2} {
		tc, seen := cfg.tls(), &tickets{}
		tc.ClientSessionCache = seen
		conn, err := sl.tr.Dial(timeout(t, 5*time.Second), gatewayAddr, tc, &quic.Config{EnableDatagrams: true, Versions: []quic.Version{v}})
		if err != nil {
			t.Fatalf("version %v: %v", v, err)
		}
		// A ticket would come right after the handshake: an exchange later it would be here.
		h3 := (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
		rsp, err := (&http.Client{Transport: h3}).Get("https://gateway.example/")
		if err != nil {
			t.Fatal(err)
		}
		rsp.Body.Close()
		if seen.n != 0 || conn.ConnectionState().Used0RTT {
			t.Errorf("version %v: %d tickets", v, seen.n)
		}
		_ = conn.CloseWithError(0x100, "")
	}
}

func FuzzParseControl(f *testing.F) {
	f.Add(controlFor(1200, datagram.CE))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		segment, ecn := parseControl(b)
		if segment < 0 || segment > 65535 || ecn > 3 {
			t.Fatalf("%d, %d", segment, ecn)
		}
	})
}

func FuzzCapsules(f *testing.F) {
	f.Add(appendCapsule(nil, []byte("hi")))
	f.Add([]byte{0x42, 0x34, 3, 'a', 'b', 'c', 0, 2, 0, 'x'})
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		d := &datagrams{str: capsuleStream{bytes.NewReader(b)}}
		n := 0
		err := d.receiveCapsules(func(size int) []byte {
			if size > MaxUDPPayload+8 {
				t.Fatalf("asks for %d bytes", size)
			}
			return make([]byte, size)
		}, func(p []byte) { n += len(p) })
		if err == nil || n > len(b) {
			t.Fatalf("%d bytes out of %d, %v", n, len(b), err)
		}
	})
}

// capsuleStream is a stream that can only be read.
type capsuleStream struct{ *bytes.Reader }

func (capsuleStream) Write([]byte) (int, error)                           { return 0, net.ErrClosed }
func (capsuleStream) Close() error                                        { return nil }
func (capsuleStream) CancelRead(quic.StreamErrorCode)                     {}
func (capsuleStream) CancelWrite(quic.StreamErrorCode)                    {}
func (capsuleStream) SetDeadline(time.Time) error                         { return nil }
func (capsuleStream) SetReadDeadline(time.Time) error                     { return nil }
func (capsuleStream) SetWriteDeadline(time.Time) error                    { return nil }
func (capsuleStream) SendDatagram([]byte) error                           { return net.ErrClosed }
func (capsuleStream) ReceiveDatagram(ctx context.Context) ([]byte, error) { return nil, net.ErrClosed }

func FuzzParseIP(f *testing.F) {
	f.Add(ping("100.112.0.7", "10.0.3.9", 3))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 0, 58, 64}, make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, ok := parseIP(b); ok && (!h.src.IsValid() || !h.dst.IsValid()) {
			t.Fatalf("%+v", h)
		}
	})
}

func FuzzProxyStatus(f *testing.F) {
	f.Add(403, `gw; error=http_request_denied; details="no"; rule="r"`)
	f.Add(502, `gw; error="x"; rule=?1`)
	f.Fuzz(func(t *testing.T, status int, v string) {
		e := parseProxyError(status, http.Header{proxyStatusHeader: {v}})
		_ = e.Error()
		_ = errors.Is(e, ErrDenied)
	})
}
