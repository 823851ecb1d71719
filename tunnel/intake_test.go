package tunnel

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"

	"sallyway/internal/datagram"
)

// fakeTaker is a connection that has looked at a number of bytes.
type fakeTaker struct {
	bytes atomic.Uint64
	at    atomic.Pointer[net.UDPAddr]
	ctx   context.Context
}

func (f *fakeTaker) ConnectionStats() quic.ConnectionStats {
	return quic.ConnectionStats{BytesReceived: f.bytes.Load()}
}
func (f *fakeTaker) RemoteAddr() net.Addr     { return f.at.Load() }
func (f *fakeTaker) Context() context.Context { return f.ctx }

func TestIntake(t *testing.T) {
	const size = 1000
	var conn fakeTaker
	conn.bytes.Store(77) // from before it was known
	var in intake
	in.set([]taker{&conn})
	hand := func(n int) {
		t.Helper()
		for range n {
			if in.room() == 0 {
				t.Fatal("no room")
			}
			in.hand(size)
		}
	}
	room := func(want int) {
		t.Helper()
		if got := in.room(); got != want {
			t.Fatalf("room for %d, want %d", got, want)
		}
	}
	waited := func(at time.Duration, over, stalled bool) {
		t.Helper()
		if o, s := in.waited(at); o != over || s != stalled {
			t.Fatalf("at %v: over %v, stalled %v", at, o, s)
		}
	}
	room(takeLimit)
	hand(takeLimit)
	room(0)
	if in.reached() {
		t.Fatal("nobody waits")
	}
	in.wait(0)
	conn.bytes.Add(size)
	room(1)
	waited(time.Millisecond, false, false) // there is room, but for one only
	if in.reached() {
		t.Fatal("woken for one")
	}
	conn.bytes.Add((takeAgain - 1) * size)
	if !in.reached() {
		t.Fatal("there is room and nobody is woken")
	}
	waited(2*time.Millisecond, true, false)
	room(takeAgain)

	// All that was handed over was looked at, and more that came elsewhere: no credit comes of it.
	conn.bytes.Add(1000 * size)
	room(takeLimit)
	hand(takeLimit)
	room(0)

	// The connection looks at nothing for long: it gets a little more, until QUIC's queue is full, and nothing is forgotten.
	now := time.Second
	in.wait(now)
	for trials := takeTrial; takeLimit+trials <= takeMost; trials += takeTrial {
		waited(now+takePatience-1, false, false)
		now += takePatience
		waited(now, true, false)
		hand(takeTrial)
		room(0)
		in.wait(now)
	}
	// It comes back to life and looks at all of it.
	conn.bytes.Add(takeMost * size)
	waited(now+time.Millisecond, true, false)
	room(takeLimit)

	// QUIC dropped some of it: after a trial it looks at something, but not at the rest.
	hand(takeLimit)
	room(0)
	in.wait(now)
	now += takePatience
	waited(now, true, false)
	hand(takeTrial)
	in.wait(now)
	conn.bytes.Add(takeTrial * size)
	waited(now+time.Millisecond, false, false)
	now += time.Millisecond + takePatience
	waited(now, true, true)
	room(takeLimit)

	// It looks at nothing any more, as one that was closed.
	hand(takeLimit)
	in.wait(now)
	for range (takeMost - takeLimit) / takeTrial {
		now += takePatience
		waited(now, true, false)
		hand(takeTrial)
		in.wait(now)
	}
	now += takePatience
	waited(now, true, true)
	room(takeLimit)

	// What it never counts is forgotten when nothing was handed over for long.
	in.begin(now)
	hand(takeLimit / 2)
	in.begin(now + takeIdle - 1)
	room(takeLimit / 2)
	in.begin(now + 2*takeIdle)
	room(takeLimit)

	// Without a connection there is no bound, and the next one starts anew.
	in.set(nil)
	for range 3 * takeLimit {
		hand(1)
	}
	in.set([]taker{&conn})
	room(takeLimit)
}

// A connection that looks at nothing holds up nobody else, and what it can not take waits.
func TestSlowConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		m := newMerged(t, MergedConfig{})
		slow, fast := &fakeTaker{ctx: ctx}, &fakeTaker{ctx: ctx}
		var links [2]*sink
		for i, conn := range []*fakeTaker{slow, fast} {
			links[i] = newSink()
			v, err := m.Add(links[i], LinkInfo{})
			if err != nil {
				t.Fatal(err)
			}
			conn.at.Store(net.UDPAddrFromAddrPort(v))
			m.attach(conn)
		}
		for range 30 {
			links[0].rcv.Receive(segments(20, 1200, 0, datagram.ECT0))
		}
		var got [2]int
		ms := messages(8)
		read := func() bool {
			_ = m.SetReadDeadline(time.Now().Add(time.Millisecond / 2))
			n, err := m.ReadBatch(ms, 0)
			for _, g := range ms[:n] {
				conn, i := fast, 1
				if virtualID(g.Addr.(*net.UDPAddr)) == virtualID(slow.at.Load()) {
					conn, i = slow, 0
				}
				got[i]++
				if conn == fast {
					conn.bytes.Add(uint64(g.N))
				}
			}
			return err == nil
		}
		for read() {
		}
		if got[0] != takeLimit {
			t.Fatalf("a connection that looks at nothing got %d", got[0])
		}
		for range 100 {
			links[1].rcv.Receive(segments(40, 1200, 0, datagram.ECT0))
			for read() {
			}
		}
		if got[1] != 4000 {
			t.Errorf("the other got %d of 4000", got[1])
		}
		// What it sends shows that it looked at what it had: it gets the rest at once, in order.
		slow.bytes.Add(takeLimit*1200 - 9*7)
		read1 := make(chan int)
		go func() {
			_ = m.SetReadDeadline(time.Time{})
			n, _ := m.ReadBatch(ms, 0)
			read1 <- n
		}()
		synctest.Wait()
		before := time.Now()
		_, _ = m.WriteTo([]byte{64}, slow.at.Load())
		if n := <-read1; n == 0 || time.Since(before) >= fullRecheck {
			t.Errorf("%d datagrams after %v", n, time.Since(before))
		}
		if st := m.Stats(); st.Paused == 0 || st.Stalled != 0 || st.DroppedFull != 0 {
			t.Errorf("%+v", st)
		}
		cancel()
		synctest.Wait()
		for _, p := range *m.ports.Load() {
			if p.main.in.takers.Load() != nil {
				t.Error("a connection that ended is still asked")
			}
		}
	})
}

// A session moves to a path whose connection nobody told the conn of.
func TestIntakeFollowsMoves(t *testing.T) {
	m := newMerged(t, MergedConfig{})
	a, b := newSink(), newSink()
	va, _ := m.Add(a, LinkInfo{})
	vb, _ := m.Add(b, LinkInfo{})
	conn := &fakeTaker{ctx: t.Context()}
	conn.at.Store(net.UDPAddrFromAddrPort(va))
	m.attach(conn)
	to := net.UDPAddrFromAddrPort(vb)
	conn.at.Store(to)
	b.rcv.Receive(segments(1, 1200, 0, 0))
	if _, err := m.ReadBatch(messages(8), 0); err != nil {
		t.Fatal(err)
	}
	p := m.port(to)
	if set := p.main.in.takers.Load(); set == nil || (*set)[0] != conn {
		t.Error("the connection is not known behind its new address")
	}
	if m.port(net.UDPAddrFromAddrPort(va)).main.in.takers.Load() != nil {
		t.Error("the connection is still known behind its old address")
	}
}

// Bursts of a full congestion window reach a connection at the speed of memory. QUIC's queue holds 256 packets and drops the rest without a
// word; before the bound this lost some hundred packets in either direction.
func TestNothingIsLostInside(t *testing.T) {
	for _, download := range []bool{false, true} {
		name := "upload"
		if download {
			name = "download"
		}
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			var atServer progress
			port := tcpServer(t, func(c *net.TCPConn) {
				defer c.Close()
				if download {
					stream(c)
					return
				}
				atServer.drain(c)
			})
			l := w.link("a")
			s := w.dial(l, nil)
			c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Reset()
			receiver, sender, in := &atServer, s.conn, w.merged.Stats
			if download {
				receiver, sender, in = new(progress), w.server.list()[0].conn, s.ConnStats
				go receiver.drain(c)
			} else {
				go stream(c)
			}
			// What the queue drops itself, or what a link of the test drops, is counted. A machine so busy that a connection does not run for
			// a long time may lose something for that.
			counted := func() uint64 {
				st := in()
				return (st.DroppedFull + st.DroppedLate + st.Stalled*takeMost + uint64(l.dropped.Load()+l.peer.dropped.Load())) * 1452
			}
			for range 4 {
				before := receiver.n.Load()
				eventually(t, "traffic", func() bool { return receiver.n.Load() > before+16<<20 })
			}
			q := sender.ConnectionStats() // its PacketsLost counts congestion marks, too
			t.Logf("congestion window %d KiB, %d bytes lost, %d dropped, %+v", q.CongestionWindow>>10, q.BytesLost, counted(), in())
			if q.BytesLost > counted() {
				t.Errorf("%d bytes lost on a link that loses nothing; %d dropped and counted", q.BytesLost, counted())
			}
		})
	}
}
