package tunnel

import (
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/ipv4"

	"sallyway/internal/datagram"
)

func TestStanding(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		name string
		// at and waited are what leaves the queue: when, and after how long.
		every, waited time.Duration
		n             int
		last          bool
		want          verdict // of the last one
		first         int     // which is the first not to pass, -1 for none
	}{
		{"short", ms, 4 * ms, 1000, false, pass, -1},
		{"at the bound", ms, markDelay, 1000, false, pass, -1},
		{"standing above 5 ms", ms, 6 * ms, 100, false, mark, 19},
		{"standing above 20 ms", ms, 21 * ms, 100, false, drop, 19},
		{"at the bound to drop", ms, dropDelay, 100, false, mark, 19},
		{"the only one", ms, 100 * ms, 1000, true, pass, -1},
		{"read late, three times", 100 * ms, 100 * ms, 3, false, pass, -1},
		{"a burst read at once after a long stall", 0, 300 * ms, 1000, false, pass, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var s standing
			now, first, got := time.Hour, -1, pass
			s.looked = now - tc.every
			for i := range tc.n {
				if got = s.judge(now, tc.waited, tc.last); got != pass && first < 0 {
					first = i
				}
				now += tc.every
			}
			if got != tc.want || first != tc.first {
				t.Errorf("verdict %d, the first at %d", got, first)
			}
		})
	}
	// What waited less, or a queue that empties, begins anew.
	for name, waited := range map[string]struct {
		delay time.Duration
		last  bool
	}{"short": {4 * ms, false}, "empty": {30 * ms, true}} {
		s, now := standing{looked: time.Hour}, time.Hour
		for range 30 {
			now += ms
			s.judge(now, 30*ms, false)
		}
		if s.judge(now, waited.delay, waited.last) != pass || s.judge(now+ms, 30*ms, false) != pass {
			t.Errorf("%s: the queue goes on to stand", name)
		}
	}
}

// A reader slower than what arrives: its queue is kept at 5 ms by marks where the sender understands them, and at 20 ms by drops.
func TestStandingQueue(t *testing.T) {
	for _, ecn := range []datagram.ECN{datagram.NotECT, datagram.ECT0, datagram.ECT1} {
		synctest.Test(t, func(t *testing.T) {
			m := newMerged(t, MergedConfig{})
			l := newSink()
			_, _ = m.Add(l, LinkInfo{})
			buf := []ipv4.Message{{Buffers: [][]byte{make([]byte, 1452)}, OOB: make([]byte, 128)}}
			one := func() (time.Duration, datagram.ECN) {
				n, err := m.ReadBatch(buf, 0)
				if n != 1 || err != nil {
					t.Fatal(n, err)
				}
				_, mark := parseControl(buf[0].OOB[:buf[0].NN])
				sent := time.Duration(buf[0].Buffers[0][1])<<8 | time.Duration(buf[0].Buffers[0][2])
				return time.Since(start(t)) - sent*100*time.Microsecond, mark
			}
			// 10 a millisecond arrive, 5 are read.
			longest, marked := time.Duration(0), 0
			begin := start(t)
			for i := range 5000 {
				sent := time.Since(begin) / (100 * time.Microsecond)
				l.rcv.Receive(datagram.NewBatch([]byte{64, byte(sent >> 8), byte(sent), 4}, 4, 0, ecn, nil))
				if i%2 == 1 {
					d, mark := one()
					longest = max(longest, d)
					if mark == datagram.CE {
						marked++
					}
				}
				time.Sleep(100 * time.Microsecond)
			}
			st := m.Stats()
			if longest > dropDelay+3*standingFor {
				t.Errorf("ECN %d: the longest wait was %v", ecn, longest)
			}
			if (ecn == datagram.NotECT) != (st.Marked == 0) || marked == 0 != (st.Marked == 0) || st.DroppedLate == 0 {
				t.Errorf("ECN %d: %d seen, %+v", ecn, marked, st)
			}
			if st.DroppedFull != 0 {
				t.Errorf("%d datagrams of 4 bytes filled the queue", st.DroppedFull)
			}
		})
	}
}

// start is when the bubble began.
func start(*testing.T) time.Time { return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) }

// Small arrivals share buffers: where the kernel does not coalesce, a burst is one arrival a datagram.
func TestSmallArrivalsShareBuffers(t *testing.T) {
	m := newMerged(t, MergedConfig{Queue: 16}) // 1 MiB
	l := newSink()
	_, _ = m.Add(l, LinkInfo{})
	for range 600 {
		l.rcv.Receive(segments(1, 1207, 4, datagram.ECT0))
	}
	if st := m.Stats(); st.DroppedFull != 0 {
		t.Fatalf("%+v", st)
	}
	ms := messages(8)
	for got := 0; got < 600; {
		n, err := m.ReadBatch(ms, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range ms[:n] {
			if g.N != 1200 || g.Buffers[0][0] != 0x40 || g.Buffers[0][1199] != 0x40 {
				t.Fatalf("%d bytes, % x", g.N, g.Buffers[0][:4])
			}
		}
		got += n
	}
	if m.held != 0 {
		t.Errorf("an empty queue holds %d bytes", m.held)
	}
	// The one that has most waiting loses first.
	other := newSink()
	v, _ := m.Add(other, LinkInfo{})
	for range 40 {
		l.rcv.Receive(segments(40, 1200, 4, 0))
	}
	other.rcv.Receive(segments(3, 1200, 4, 0))
	found := 0
	for {
		_ = m.SetReadDeadline(time.Now().Add(-1))
		n, err := m.ReadBatch(ms, 0)
		for _, g := range ms[:n] {
			if g.Addr.String() == v.String() {
				found++
			}
		}
		if err != nil {
			break
		}
	}
	if found != 3 {
		t.Errorf("%d of 3 datagrams of the quiet source arrived", found)
	}
}
