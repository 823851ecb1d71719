package relay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// fastClient is an allocation whose node reads and writes in runs.
type fastClient struct {
	*tester
	sock *udpio.Conn
}

func fast(t testing.TB, l *lab, n identity.Node) *fastClient {
	t.Helper()
	c := allocated(t, l, n)
	sock, _, err := udpio.New(c.conn.(*net.UDPConn), udpio.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return &fastClient{tester: c, sock: sock}
}

// pair is a client and a gateway with channels 0x4001 and 0x4002 for each other.
func pair(t testing.TB, l *lab) (a, g *fastClient) {
	t.Helper()
	a, g = fast(t, l, client1), fast(t, l, gateway1)
	a.want(0, a.bind(0x4001, g.relayed))
	g.want(0, g.bind(0x4002, a.relayed))
	return a, g
}

// frames makes n ChannelData messages of size payload bytes each; the last has tail.
func frames(number uint16, n, size, tail int) []byte {
	var b []byte
	for i := range n {
		k := size
		if i == n-1 {
			k = tail
		}
		b = append(b, channelData(number, string(bytes.Repeat([]byte{byte(i)}, k)))...)
	}
	return b
}

func TestRunsStayTogetherAndKeepECN(t *testing.T) {
	l := start(t, nil)
	a, g := pair(t, l)
	if !a.sock.GSO() || !g.sock.GRO() {
		t.Skip("this kernel has no UDP segmentation offload")
	}
	for _, ecn := range []datagram.ECN{datagram.NotECT, datagram.ECT0, datagram.ECT1, datagram.CE} {
		sent := frames(0x4001, 44, 1452, 700)
		if err := a.sock.Write(sent, 1456, ecn, udpio.Peer{}); err != nil {
			t.Fatal(err)
		}
		if err := g.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, udpio.MaxRead)
		m, err := g.sock.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if want := frames(0x4002, 44, 1452, 700); !bytes.Equal(buf[:m.N], want) || m.Segment != 1456 || m.ECN != ecn {
			t.Errorf("got %d bytes in segments of %d, ECN %d; want %d of 1456, ECN %d", m.N, m.Segment, m.ECN, len(want), ecn)
		}
	}
	if n := l.count.relayed.Load(); n != 4*44 {
		t.Errorf("%d datagrams counted", n)
	}
}

// TestWithoutOffload relays on a system without GRO and GSO: the same bytes, one datagram at a time.
func TestWithoutOffload(t *testing.T) {
	t.Setenv("SALLYWAY_NO_GSO", "1")
	l := start(t, nil)
	a, g := pair(t, l)
	if err := a.sock.Write(frames(0x4001, 44, 1452, 700), 1456, datagram.ECT0, udpio.Peer{}); err != nil {
		t.Fatal(err)
	}
	if err := g.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	want, buf := frames(0x4002, 44, 1452, 700), make([]byte, udpio.MaxRead)
	for len(want) > 0 {
		m, err := g.sock.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if n := min(1456, len(want)); m.N != n || !bytes.Equal(buf[:n], want[:n]) || m.ECN != datagram.ECT0 {
			t.Fatalf("got %d bytes with ECN %d, want %d", m.N, m.ECN, n)
		}
		want = want[m.N:]
	}
}

// TestMixedRun gives one coalesced read datagrams of several channels, lengths and kinds.
func TestMixedRun(t *testing.T) {
	l := start(t, nil)
	a, g := allocated(t, l, client1), allocated(t, l, gateway1)
	a.want(0, a.bind(0x4001, g.relayed))
	g.want(0, g.bind(0x4002, a.relayed))
	g2 := allocated(t, l, node("acme", identity.Gateway, "g2"))
	a.want(0, a.bind(0x4003, g2.relayed))
	g2.want(0, g2.bind(0x4004, a.relayed))
	var run []byte
	add := func(d []byte) { run = append(run, append(d, make([]byte, 24-len(d))...)...) }
	add(channelData(0x4001, "twenty bytes exactly"))
	add(channelData(0x4001, "another twenty bytes"))
	add(channelData(0x4003, "elsewhere, 20 bytes."))
	add(channelData(0x4001, "padded by 1 byte..."))
	add(channelData(0x4001, "too short"))            // more than three bytes of padding: malformed
	add(channelData(0x4009, "not bound, 20 bytes.")) // dropped
	add([]byte{0x40, 0x01, 0xFF, 0xFF})              // length beyond the datagram
	add(stun.MustBuild(stun.BindingRequest, stun.TransactionID).Raw)
	add([]byte{200})
	run = append(run, channelData(0x4001, "tail")...)
	m := message(24, a.local())
	m.N = len(run)
	malformed := l.count.malformed.Load()
	l.shards[0].handle(run, m)
	for _, want := range []string{"twenty bytes exactly", "another twenty bytes", "padded by 1 byte...", "tail"} {
		g.wantData(0x4002, want)
	}
	g2.wantData(0x4004, "elsewhere, 20 bytes.")
	g.wantNothing()
	if n := l.count.malformed.Load() - malformed; n != 4 { // too short, beyond, the padded Binding, 200
		t.Errorf("%d malformed, want 4", n)
	}
}

func TestForwardDoesNotAllocate(t *testing.T) {
	l := start(t, nil)
	a, _ := pair(t, l)
	run := frames(0x4001, 44, 1452, 700)
	buf := make([]byte, len(run))
	m := message(1456, a.local())
	m.N = len(run)
	m.ECN = datagram.ECT0
	if n := testing.AllocsPerRun(200, func() {
		copy(buf, run)
		l.shards[0].handle(buf, m)
	}); n != 0 {
		t.Errorf("%v allocations per run of 44 datagrams, want 0", n)
	}
	if l.count.relayed.Load() == 0 || l.count.unbound.Load() != 0 {
		t.Error("nothing was relayed")
	}
}

func BenchmarkForward(b *testing.B) {
	l := start(b, nil)
	a, _ := pair(b, l)
	run := frames(0x4001, 44, 1452, 1452)
	buf := make([]byte, len(run))
	m := message(1456, a.local())
	m.N = len(run)
	b.SetBytes(int64(44 * 1452))
	b.ReportAllocs()
	for b.Loop() {
		copy(buf, run)
		l.shards[0].handle(buf, m)
	}
}

// BenchmarkRelay sends runs of 44 datagrams from a client through the relay to a gateway, all in this process, and counts what arrives.
func BenchmarkRelay(b *testing.B) {
	l := start(b, nil)
	a, g := pair(b, l)
	run := frames(0x4001, 44, 1452, 1452)
	arrived := make(chan int, 1)
	go func() {
		buf, n := make([]byte, udpio.MaxRead), 0
		for {
			_ = g.conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			m, err := g.sock.Read(buf)
			if err != nil {
				arrived <- n
				return
			}
			n += m.N
		}
	}()
	b.ReportAllocs()
	began := time.Now()
	for b.Loop() {
		if err := a.sock.Write(run, 1456, 0, udpio.Peer{}); err != nil {
			b.Fatal(err)
		}
	}
	d := time.Since(began).Seconds()
	b.ReportMetric(float64(<-arrived)*8/1e9/d, "Gbit/s")
}

// TestIdleAllocationsAreSmall makes ten thousand and looks at the heap and the goroutines.
func TestIdleAllocationsAreSmall(t *testing.T) {
	const n = 10_000
	l := start(t, func(c *Config) { c.Limits.SourceAllocations, c.Limits.NodeAllocations = n, 10 })
	allocated(t, l, gateway1)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before, goroutines := heap(), runtime.NumGoroutine()
	for i := range n {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 5000)
		u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: node("acme", identity.Client, fmt.Sprintf("c%d", i))}
		o := &origin{udp: udpEnd{sock: l.shards[0].sock, peer: udpio.Peer{Addr: from}}, addr: from}
		a, code := l.newAllocation(o, [12]byte{byte(i)}, u, time.Hour, false)
		if code != 0 {
			t.Fatalf("allocation %d: %d", i, code)
		}
		gw := l.table.newest(gateway1)
		if !a.permit([]netip.Addr{gw.relayed.Addr()}, 64, l.now().UnixNano()) || l.bind(a, 0x4000, gw.relayed, l.now().UnixNano()) != bound {
			t.Fatal("not bound")
		}
	}
	used := heap() - before
	t.Logf("%d allocations, each with a permission and a channel: %.1f MiB, %d bytes each", n, float64(used)/(1<<20), used/n)
	if used > 60<<20 {
		t.Errorf("%d MiB for %d idle allocations", used>>20, n)
	}
	if g := runtime.NumGoroutine() - goroutines; g > 5 {
		t.Errorf("%d goroutines more", g)
	}
	began := time.Now()
	l.sweep()
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("a sweep takes %v", d)
	}
}

// FuzzDatagram gives a relay with a live pair any datagrams of any source.
func FuzzDatagram(f *testing.F) {
	cert, _ := certificate(f)
	l := start(f, func(c *Config) { c.Certificate = cert })
	a, _ := pair(f, l)
	own := a.local()
	f.Add(channelData(0x4001, "x"), 5, true)
	f.Add(frames(0x4001, 3, 20, 7), 24, true)
	f.Add(stun.MustBuild(stun.BindingRequest, stun.TransactionID, stun.Fingerprint).Raw, 28, false)
	f.Add(stun.MustBuild(stun.NewType(stun.MethodAllocate, stun.ClassRequest), stun.TransactionID, stun.NewUsername("u"), stun.NewRealm("r"),
		stun.NewNonce("0123456789abcdef"), stun.MessageIntegrity("k")).Raw, 100, false)
	f.Add(sendTo(f, a.relayed, "data"), 60, true)
	f.Add([]byte{22, 0xFE, 0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}, 14, false)
	f.Add([]byte{0x40}, 1, true)
	f.Fuzz(func(t *testing.T, b []byte, segment int, known bool) {
		if len(b) == 0 || len(b) > udpio.MaxRead {
			return
		}
		m := message(len(b), netip.MustParseAddrPort("127.0.0.8:9"))
		if segment > 0 && segment < len(b) {
			m.Segment = segment
		}
		if known {
			m.From = own
		}
		l.shards[0].handle(bytes.Clone(b), m)
	})
}

// FuzzControl gives the control of an authenticated client any message, signed so that it gets past the door.
func FuzzControl(f *testing.F) {
	l := start(f, nil)
	a := allocated(f, l, client1)
	al := l.table.newest(client1)
	for _, method := range []stun.Method{
		stun.MethodAllocate, stun.MethodRefresh, stun.MethodCreatePermission, stun.MethodChannelBind, stun.MethodSend, stun.MethodConnect, wire.MethodRendezvous,
	} {
		f.Add(uint16(method), []byte{})
		f.Add(uint16(method), stun.MustBuild(stun.BindingRequest, peerAttr(a.relayed), numberAttr(0x4000), wire.Node(gateway1), a.requestedTransport(),
			lifetime(time.Minute), raw{stun.AttrData, []byte("x")}).Raw[stunHeader:])
	}
	f.Fuzz(func(t *testing.T, method uint16, attrs []byte) {
		nonce := stun.NewNonce(l.nonces.issue(a.local(), l.now()))
		m, err := stun.Build(stun.NewType(stun.Method(method&0xFFF), stun.ClassRequest), stun.TransactionID)
		if err != nil || len(attrs) > 60000 {
			return
		}
		m.Raw = append(m.Raw, attrs...)
		m.Length = uint32(len(attrs))
		m.WriteLength()
		for _, s := range []stun.Setter{stun.NewUsername(a.username), stun.NewRealm(wire.Realm), nonce, a.key()} {
			if s.AddTo(m) != nil {
				return
			}
		}
		if al.dead.Load() { // ended by a Refresh
			o := &origin{udp: udpEnd{sock: l.shards[0].sock, peer: udpio.Peer{Addr: a.local()}}, addr: a.local()}
			al, _ = l.newAllocation(o, [12]byte{}, wire.Username{Expiry: time.Now().Add(time.Hour), Node: client1}, time.Hour, false)
		}
		l.shards[0].handle(m.Raw, message(len(m.Raw), a.local()))
	})
}

// FuzzStream cuts a stream at any place and compares with what comes out of it in one piece.
func FuzzStream(f *testing.F) {
	l := start(f, nil)
	f.Add(append(channelData(0x4001, "abcd"), channelData(0x4001, "efgh")...), 3)
	f.Add(stun.MustBuild(stun.BindingRequest, stun.TransactionID).Raw, 10)
	f.Add([]byte{0x40, 1, 0xFF, 0xFF}, 2)
	f.Add([]byte{0, 1, 0, 3, 0, 0, 0, 0}, 2)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		addr := netip.MustParseAddrPort("192.0.2.1:5")
		whole, parts := &conn{s: l.Server, kind: overTCP, addr: addr, closed: true}, &conn{s: l.Server, kind: overTCP, addr: addr, closed: true}
		usedWhole, _, okWhole := whole.consume(bytes.Clone(b))
		cut = min(max(cut, 0), len(b))
		first := bytes.Clone(b[:cut])
		used, need, ok := parts.consume(first)
		if used > cut || (ok && need < channelHeader) || need > datagram.MaxBatch {
			t.Fatalf("used %d of %d, need %d", used, cut, need)
		}
		if ok {
			rest, _, okRest := parts.consume(bytes.Clone(b[used:]))
			used, ok = used+rest, okRest
		}
		if used != usedWhole || ok != okWhole {
			t.Errorf("cut at %d: used %d, %v; whole: %d, %v", cut, used, ok, usedWhole, okWhole)
		}
	})
}

// TestQueueIsBounded lets data pile up towards a client that does not read.
func TestQueueIsBounded(t *testing.T) {
	l := start(t, nil)
	slow, g := tcpDial(t, l, client1, false), allocated(t, l, gateway1)
	slow.allocate()
	slow.want(0, slow.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4000, slow.relayed))
	frame := channelData(0x4000, string(make([]byte, 1200)))
	for range 20000 { // 24 MB
		l.shards[0].handle(bytes.Clone(frame), message(len(frame), g.local()))
	}
	if l.count.queueDrops.Load() == 0 {
		t.Error("nothing was dropped")
	}
	c := l.table.newest(client1).conn
	c.mu.Lock()
	queued := 0
	if c.pending != nil {
		queued = len(*c.pending)
	}
	c.mu.Unlock()
	if queued > maxQueued {
		t.Errorf("%d bytes queued, limit %d", queued, maxQueued)
	}
	// Once it reads, control gets through.
	slow.want(0, slow.do(stun.MethodRefresh))
}

// TestStreamRuns sends frames of all lengths in pieces of all lengths.
func TestStreamRuns(t *testing.T) {
	l := start(t, nil)
	a, g := tcpDial(t, l, client1, false), allocated(t, l, gateway1)
	a.allocate()
	a.want(0, a.bind(0x4000, g.relayed))
	g.want(0, g.bind(0x4001, a.relayed))
	var stream []byte
	var want []string
	for i := range 200 {
		n := 1200
		if i%7 == 0 {
			n = rand.IntN(60)
		}
		if i == 100 {
			n = 40000 // larger than the read buffer
		}
		p := string(bytes.Repeat([]byte{byte(i)}, n))
		want = append(want, p)
		stream = append(stream, channelData(0x4000, p)...)
		stream = append(stream, make([]byte, -n&3)...)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for len(stream) > 0 {
			n := min(1+rand.IntN(5000), len(stream))
			if _, err := a.conn.Write(stream[:n]); err != nil {
				return
			}
			stream = stream[n:]
		}
	}()
	for _, p := range want {
		g.wantData(0x4001, p)
	}
	<-done
	// What is no message ends the connection, and with it the allocation.
	a.write([]byte{0x80, 0, 0, 0, 0, 0, 0, 0})
	until(t, "the allocation ends with its connection", func() bool { return l.table.newest(client1) == nil })
}
