package direct

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pion "github.com/pion/stun/v4"
	"go.uber.org/goleak"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
	"sallyway/stun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// relay answers Binding requests on a loopback address.
func relay(t *testing.T, at netip.Addr) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: at.AsSlice()})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		conn.Close()
		wg.Wait()
	})
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			var m pion.Message
			if pion.Decode(b[:n], &m) != nil {
				continue
			}
			a, err := pion.Build(pion.NewTransactionIDSetter(m.TransactionID), pion.BindingSuccess,
				&pion.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())})
			if err == nil {
				_, _ = conn.WriteToUDPAddrPort(a.Raw, from)
			}
		}
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// endpoint runs an endpoint on loopback.
func endpoint(t *testing.T, cfg Config) *Endpoint {
	t.Helper()
	if !cfg.listen.IsValid() {
		cfg.listen = netip.MustParseAddrPort("127.0.0.1:0")
	}
	if cfg.Servers == nil {
		server := relay(t, cfg.listen.Addr())
		cfg.Servers = func() []netip.AddrPort { return []netip.AddrPort{server} }
	}
	cfg.loopback = true
	e := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = e.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	until(t, func() bool { e.mu.Lock(); defer e.mu.Unlock(); return e.running })
	return e
}

func until(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen in 10 s")
		}
	}
}

// end is one end of a punched pair.
type end struct {
	e    *Endpoint
	p    *Peer
	own  []netip.AddrPort
	link chan *Link
	fail chan error
}

func open(t *testing.T, e *Endpoint, keys stun.Keys, asking bool) *end {
	t.Helper()
	x := &end{e: e, link: make(chan *Link, MaxCandidates), fail: make(chan error, 1)}
	var err error
	x.p, x.own, err = e.Open(t.Context(), PeerConfig{
		Keys: keys, Asking: asking, OnLink: func(l *Link) { x.link <- l }, OnFail: func(err error) { x.fail <- err },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(x.own) == 0 {
		t.Fatal("no candidates")
	}
	return x
}

func (x *end) linked(t *testing.T) *Link {
	t.Helper()
	select {
	case l := <-x.link:
		return l
	case err := <-x.fail:
		t.Fatal(err)
	case <-time.After(10 * time.Second):
		t.Fatal("no link")
	}
	return nil
}

func testKeys(n byte) stun.Keys { return stun.Keys{Out: [32]byte{n, 1}, In: [32]byte{n, 2}} }

// joined are two ends with a link.
func joined(t *testing.T) (a, b *end, la, lb *Link) {
	t.Helper()
	keys := testKeys(7)
	a, b = open(t, endpoint(t, Config{}), keys, true), open(t, endpoint(t, Config{}), keys.Swap(), false)
	b.p.Punch(a.own)
	if b.e.Stats().Probed == 0 {
		t.Error("no probe has left when Punch returns")
	}
	a.p.Punch(b.own)
	return a, b, a.linked(t), b.linked(t)
}

// sink keeps what a link delivers.
type sink struct {
	mu  sync.Mutex
	all [][]byte
	ecn datagram.ECN
}

func (s *sink) Receive(b datagram.Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ecn = b.ECN
	for p, ok := b.Next(); ok; p, ok = b.Next() {
		s.all = append(s.all, bytes.Clone(p))
	}
	b.Release()
}

func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

func TestLink(t *testing.T) {
	a, b, la, lb := joined(t)
	if la.Addr() != b.own[0] || lb.Addr() != a.own[0] || la.RTT() <= 0 {
		t.Errorf("links to %v in %v and %v", la.Addr(), la.RTT(), lb.Addr())
	}
	var got sink
	lb.SetReceiver(&got)
	run := bytes.Repeat([]byte{0x40}, 40*1200+300)
	for i := range run {
		if i%1200 != 0 {
			run[i] = byte(i)
		}
	}
	la.Send(run, 1200, datagram.ECT0)
	until(t, func() bool { return got.count() == 41 })
	got.mu.Lock()
	if !bytes.Equal(bytes.Join(got.all, nil), run) || got.ecn != datagram.ECT0 {
		t.Errorf("ECN %v, or other bytes arrived than were sent", got.ecn)
	}
	got.mu.Unlock()
	// Whoever uses the link probes it with the same keys: the other socket answers, and what is answered comes here.
	prober := stun.NewProber(testKeys(7))
	var answers sink
	la.SetReceiver(&answers)
	la.Send(prober.Probe(time.Now(), 0), 0, datagram.NotECT)
	until(t, func() bool { return answers.count() == 1 })
	if _, ok := prober.Handle(time.Now(), answers.all[0]); !ok {
		t.Error("the answer is not one")
	}
	if got.count() != 41 {
		t.Error("a probe was passed on to whoever reads QUIC")
	}
	// A run in which a probe follows QUIC in one read.
	mixed := append(bytes.Repeat([]byte{0x50}, 2400), prober.Probe(time.Now(), 0)...)
	la.Send(mixed, 1200, datagram.NotECT)
	until(t, func() bool { return answers.count() == 2 && got.count() == 43 })
	if n := testing.AllocsPerRun(100, func() { la.Send(run[:12000], 1200, datagram.ECT0) }); n > 0 {
		t.Errorf("%v allocations to send", n)
	}
	a.p.Close()
	a.p.Close()
	<-la.Done()
	la.Send(run, 1200, datagram.NotECT)
	if st := a.e.Stats(); st.Links != 0 || st.Peers != 0 || st.Unsent < 41 {
		t.Errorf("after Close: %+v", st)
	}
}

// TestAdmission: the socket passes QUIC only from an address that answered a probe within 30 s, and whoever has no keys hears nothing.
func TestAdmission(t *testing.T) {
	_, b, la, lb := joined(t)
	var got sink
	lb.SetReceiver(&got)
	stranger, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(b.own[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	quic := bytes.Repeat([]byte{0xC3}, 1200)
	forged := stun.NewProber(testKeys(9)).Probe(time.Now(), 0)
	foreign := append([]byte{1, 1}, stun.NewProber(testKeys(9)).Probe(time.Now(), 100)[2:]...)
	binding, err := pion.Build(pion.TransactionID, pion.BindingRequest)
	if err != nil {
		t.Fatal(err)
	}
	sent := 0
	before := b.e.Stats().Dropped
	for _, x := range [][]byte{quic, forged, foreign, binding.Raw, {0}, {63, 0xC3}, make([]byte, 1400), stun.NewProber(testKeys(7)).Probe(time.Now(), 0)[:39]} {
		for range 20 {
			if _, err := stranger.Write(x); err == nil {
				sent++
			}
		}
	}
	until(t, func() bool { return b.e.Stats().Dropped-before == uint64(sent) })
	if n := got.count(); n != 0 {
		t.Errorf("%d datagrams of a stranger were passed on", n)
	}
	_ = stranger.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := stranger.Read(make([]byte, 2000)); err == nil {
		t.Errorf("the stranger got %d bytes", n)
	}
	la.Send(quic, 0, datagram.NotECT)
	until(t, func() bool { return got.count() == 1 })
	// 30 s without an answered probe.
	lb.proved.Store(time.Now().Add(-Admission).UnixNano())
	before = b.e.Stats().Dropped
	la.Send(quic, 0, datagram.NotECT)
	until(t, func() bool { return b.e.Stats().Dropped > before })
	if got.count() != 1 {
		t.Error("QUIC was taken from an address that proved itself more than 30 s ago")
	}
	b.e.stepSoon()
	<-lb.Done()
}

// TestAnswersAreLimited: valid probes, played back from another port of a host that was named, get 50 answers at once and then 100 a second,
// none larger than the probe.
func TestAnswersAreLimited(t *testing.T) {
	_, b, _, _ := joined(t)
	replay, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(b.own[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer replay.Close()
	recorded := stun.NewProber(testKeys(7)).Probe(time.Now(), 0)
	began := time.Now()
	const n = 2000
	for range n {
		_, _ = replay.Write(recorded)
	}
	buf := make([]byte, 2000)
	answers, in, own := 0, 0, 0
	for {
		_ = replay.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		k, err := replay.Read(buf)
		if err != nil {
			break
		}
		if stun.IsRequest(buf) {
			own++
		} else {
			answers++
		}
		in += k
	}
	if most := hostBurst + int(time.Since(began).Seconds()*stun.DefaultRate) + 1; answers == 0 || answers > most {
		t.Errorf("%d answers, want 1 to %d", answers, most)
	}
	if in > n*len(recorded) {
		t.Errorf("%d bytes out for %d in", in, n*len(recorded))
	}
	if own > answers+tries {
		t.Errorf("%d probes of this end's for %d answers", own, answers)
	}
}

// TestUnreachable: nothing answers, which is told once.
func TestUnreachable(t *testing.T) {
	a := open(t, endpoint(t, Config{}), testKeys(3), true)
	silent, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	a.p.Punch([]netip.AddrPort{silent.LocalAddr().(*net.UDPAddr).AddrPort()})
	select {
	case err := <-a.fail:
		if !errors.Is(err, ErrUnreachable) {
			t.Error(err)
		}
	case <-a.link:
		t.Error("a link to nobody")
	case <-time.After(10 * time.Second):
		t.Error("it was not told")
	}
	if st := a.e.Stats(); st.Probed != tries {
		t.Errorf("%d probes, want %d", st.Probed, tries)
	}
	b := open(t, a.e, testKeys(4), true)
	b.p.Punch([]netip.AddrPort{netip.MustParseAddrPort("224.0.0.1:5000"), netip.MustParseAddrPort("10.0.0.1:5000")})
	if err := <-b.fail; !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
	if st := a.e.Stats(); st.Probed != tries {
		t.Errorf("probes to an address that is not usable: %+v", st)
	}
}

// TestSocket: there is one only while somebody may use it; its peers are limited.
func TestSocket(t *testing.T) {
	e := endpoint(t, Config{MaxPeers: 2, linger: time.Millisecond})
	if e.Stats().Open {
		t.Error("a socket before anybody asked")
	}
	a, b := open(t, e, testKeys(1), true), open(t, e, testKeys(2), false)
	if a.own[0] != b.own[0] {
		t.Errorf("two sockets: %v and %v", a.own, b.own)
	}
	if _, _, err := e.Open(t.Context(), PeerConfig{}); !errors.Is(err, ErrLimit) {
		t.Errorf("a third peer: %v", err)
	}
	a.p.Close()
	b.p.Close()
	until(t, func() bool { return !e.Stats().Open })
	c := open(t, e, testKeys(1), true)
	if c.own[0] == a.own[0] {
		t.Log("the same port again")
	}
	// Addresses that this host's own tunnel leads to are not told.
	e2 := endpoint(t, Config{})
	e2.cfg.loopback = false
	e2.cfg.Refuse = func(netip.Addr) bool { return true }
	if _, _, err := e2.Open(t.Context(), PeerConfig{}); !errors.Is(err, ErrNoCandidates) {
		t.Errorf("without an address to tell: %v", err)
	}
	if st := e2.Stats(); st.Peers != 0 {
		t.Errorf("a peer stays behind: %+v", st)
	}
}

// TestRestart: an end that asks anew under other keys, from the same address, gets its link when the other end has forgotten the former.
func TestRestart(t *testing.T) {
	a, b, _, lb := joined(t)
	a.p.Close()
	keys := testKeys(8)
	a2, b2 := open(t, a.e, keys, true), open(t, b.e, keys.Swap(), false)
	b.p.Close()
	<-lb.Done()
	b2.p.Punch(a2.own)
	a2.p.Punch(b2.own)
	la, l := a2.linked(t), b2.linked(t)
	var got sink
	l.SetReceiver(&got)
	la.Send([]byte{0x40, 1}, 0, datagram.NotECT)
	until(t, func() bool { return got.count() == 1 })
}

func FuzzReceive(f *testing.F) {
	f.Add(stun.NewProber(testKeys(1)).Probe(time.Now(), 0), 40)
	f.Add([]byte{0x40, 0, 0, 1, 1, 0x21, 0x12, 0xA4, 0x42}, 3)
	f.Add(make([]byte, 100), 20)
	f.Fuzz(func(t *testing.T, b []byte, segment int) {
		if len(b) == 0 || len(b) > datagram.MaxBatch {
			return
		}
		if segment <= 0 || segment > len(b) {
			segment = len(b)
		}
		e := New(Config{})
		from := netip.AddrPortFrom(clientIP, 40000)
		asker, err := stun.NewAsker([]netip.AddrPort{from})
		if err != nil {
			t.Fatal(err)
		}
		e.asker = asker
		passed := 0
		p := &Peer{e: e, cfg: PeerConfig{OnLink: func(*Link) { passed++ }}, checks: newChecks(testKeys(5), false)}
		e.peers[p] = struct{}{}
		p.Punch([]netip.AddrPort{from})
		buf := datagram.NewBuffer()
		m := udpio.Message{N: copy(buf.B[:], b), Segment: segment, From: from}
		e.receive(time.Now(), m, buf)
		buf.Release()
		if passed > 0 || e.received.Load() > 0 || e.answered.Load() > 0 || len(asker.Bindings()) > 0 {
			t.Fatal("bytes without keys were taken for something")
		}
	})
}

// TestPeersOfOneHost: two nodes behind one address have a path each. Two sessions between the same two sockets have one between them: the
// first keeps it, and the second is told.
func TestPeersOfOneHost(t *testing.T) {
	g := endpoint(t, Config{})
	join := func(e *Endpoint, n byte) (a, b *end) {
		keys := testKeys(n)
		a, b = open(t, e, keys, true), open(t, g, keys.Swap(), false)
		b.p.Punch(a.own)
		a.p.Punch(b.own)
		return a, b
	}
	first := endpoint(t, Config{})
	a1, b1 := join(first, 1)
	a2, b2 := join(endpoint(t, Config{}), 2)
	var got1, got2 sink
	l1 := a1.linked(t)
	b1.linked(t).SetReceiver(&got1)
	b2l := b2.linked(t)
	b2l.SetReceiver(&got2)
	l1.Send([]byte{0x40, 1}, 0, datagram.NotECT)
	a2.linked(t).Send([]byte{0x40, 2}, 0, datagram.NotECT)
	until(t, func() bool { return got1.count() == 1 && got2.count() == 1 })
	if got1.all[0][1] != 1 || got2.all[0][1] != 2 {
		t.Error("what one node sent arrived as another's")
	}
	a3, _ := join(first, 3)
	select {
	case err := <-a3.fail:
		if !errors.Is(err, ErrTaken) {
			t.Error(err)
		}
	case <-a3.link:
		t.Error("two links to one address")
	case <-time.After(10 * time.Second):
		t.Error("it was not told")
	}
	l1.Send([]byte{0x40, 1}, 0, datagram.NotECT)
	until(t, func() bool { return got1.count() == 2 })
}

// TestPrivateCandidates: the addresses of the host's interfaces are told with the organization's leave alone.
func TestPrivateCandidates(t *testing.T) {
	own := open(t, endpoint(t, Config{}), testKeys(1), true).own
	if len(own) != 1 {
		t.Errorf("%v, want what the relay saw", own)
	}
	e := endpoint(t, Config{Private: func() bool { return true }})
	own = open(t, e, testKeys(1), true).own
	want := 1
	for _, a := range hostAddrs() {
		if Usable(netip.AddrPortFrom(a, 40000), true) {
			want++
		}
	}
	if len(own) != min(want, MaxCandidates) {
		t.Errorf("%v, want %d", own, want)
	}
	for _, a := range own {
		if a.Port() != own[0].Port() {
			t.Errorf("%v is of another socket than %v", a, own[0])
		}
	}
}

// TestIPv6: a link over IPv6 carries runs with their ECN field; where relays are asked over both families, both are told, and one that the
// other end does not have costs nothing.
func TestIPv6(t *testing.T) {
	v4, v6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	r4, r6 := relay(t, v4), relay(t, v6)
	both := func() []netip.AddrPort { return []netip.AddrPort{r4, r6} }
	a := open(t, endpoint(t, Config{listen: netip.MustParseAddrPort("[::]:0"), Servers: both}), testKeys(8), true)
	b := open(t, endpoint(t, Config{listen: netip.MustParseAddrPort("[::1]:0")}), testKeys(8).Swap(), false)
	if len(a.own) != 2 || a.own[0].Addr() == a.own[1].Addr() || len(b.own) != 1 || b.own[0].Addr() != v6 {
		t.Fatalf("candidates %v and %v", a.own, b.own)
	}
	b.p.Punch(a.own)
	a.p.Punch(b.own)
	la, lb := a.linked(t), b.linked(t)
	if la.Addr() != b.own[0] || lb.Addr().Addr() != v6 || !slices.Contains(a.own, lb.Addr()) {
		t.Errorf("links to %v and %v", la.Addr(), lb.Addr())
	}
	var got sink
	lb.SetReceiver(&got)
	run := bytes.Repeat([]byte{0x40}, 10*1200+300)
	la.Send(run, 1200, datagram.ECT0)
	until(t, func() bool { return got.count() == 11 })
	got.mu.Lock()
	defer got.mu.Unlock()
	if !bytes.Equal(bytes.Join(got.all, nil), run) || got.ecn != datagram.ECT0 {
		t.Errorf("ECN %v, or other bytes arrived than were sent", got.ecn)
	}
}

// TestNetworkChanged: where relays saw the socket is asked anew after a change of the host's addresses, and not before.
func TestNetworkChanged(t *testing.T) {
	var asked atomic.Int32
	server := relay(t, netip.MustParseAddr("127.0.0.1"))
	e := endpoint(t, Config{Servers: func() []netip.AddrPort { asked.Add(1); return []netip.AddrPort{server} }})
	open(t, e, testKeys(1), true)
	open(t, e, testKeys(2), true)
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times within %v", n, reuse)
	}
	e.NetworkChanged()
	open(t, e, testKeys(3), true)
	if n := asked.Load(); n != 2 {
		t.Errorf("asked %d times, want once more", n)
	}
}
