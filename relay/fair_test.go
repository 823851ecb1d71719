package relay

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

func source4(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 5000)
}

// TestOverTheShare looks at who is taken to send too much of a shard whose queue overflows.
func TestOverTheShare(t *testing.T) {
	many := func(n int, each int64) (out []int64) {
		for range n {
			out = append(out, each)
		}
		return out
	}
	for name, tc := range map[string]struct {
		used []int64
		over []int64
	}{
		"nobody":                      {nil, nil},
		"one alone":                   {[]int64{1000}, []int64{1000}},
		"one of two":                  {[]int64{10, 1000}, []int64{1000}},
		"all alike":                   {[]int64{500, 500}, []int64{500, 500}},
		"three floods":                {[]int64{10, 900, 20, 1000, 950}, []int64{900, 950, 1000}},
		"each more than the next":     {[]int64{100, 200, 400}, []int64{400}},
		"one among very many":         {append(many(1000, 10), 5000), []int64{5000}},
		"very many, and few small":    {append(many(1000, 500), 10), nil},
		"more than fit, but the less": {append(many(100, 500), many(300, 1)...), many(100, 500)},
	} {
		f := fairness{used: map[netip.AddrPort]int64{}}
		for i, c := range tc.used {
			f.used[source4(i)] = c
		}
		var got []int64
		for _, u := range f.over() {
			got = append(got, u.cost)
		}
		if !slices.Equal(got, tc.over) {
			t.Errorf("%s: %v, want %v", name, got, tc.over)
		}
	}
}

// TestAside sets sources aside and lets them back.
func TestAside(t *testing.T) {
	const sockets = 4
	var pins []udpio.Pin
	a := newAside(3, sockets, func(p []udpio.Pin) error { pins = p; return nil })
	var all []usage
	for i := range 100 {
		all = append(all, usage{source4(i), int64(1000 + i)})
	}
	a.set(all[:1], time.Second)
	a.set(all, time.Second)
	if len(pins) != maxAside || a.get(all[0].from) == nil || a.get(all[99].from) == nil || a.get(all[1].from) != nil {
		t.Errorf("%d are set aside, the greatest %v, the least %v", len(pins), a.get(all[99].from), a.get(all[1].from))
	}
	by := map[int]int{}
	for _, p := range pins {
		by[p.Socket]++
	}
	for i := range sockets {
		if by[3+i] != maxAside/sockets {
			t.Errorf("by socket: %v", by)
		}
	}
	none := func(int) uint64 { return 0 }
	now := time.Now().Add(time.Second)
	a.judge(now, none) // says nothing about the time before
	for from, o := range *a.view.Load() {
		if from != all[99].from {
			o.used.Add(1000)
		}
	}
	a.judge(now.Add(time.Second), none)
	if len(pins) != maxAside-1 || a.get(all[99].from) != nil {
		t.Errorf("%d are set aside, and who sends nothing: %v", len(pins), a.get(all[99].from))
	}
	a.judge(now.Add(time.Second+asideLeast/2), none) // too short a time
	if len(pins) != maxAside-1 {
		t.Errorf("%d are left aside", len(pins))
	}
	a.judge(now.Add(3*time.Second), none)
	if len(pins) != 0 || slices.Max(a.count) != 0 || slices.Min(a.count) != 0 {
		t.Errorf("%d are left aside, by socket %v", len(pins), a.count)
	}
}

// TestAccountDoesNotAllocate counts reads of a shard that is full.
func TestAccountDoesNotAllocate(t *testing.T) {
	l := start(t, nil)
	f := newFairness(l.aside, l.shards[0].sock)
	f.active, f.lost = true, time.Now().Add(time.Hour)
	for i := range 1000 {
		f.used[source4(i)]++
	}
	clear(f.used)
	i := 0
	if n := testing.AllocsPerRun(5000, func() {
		f.account(source4(i%1000), 1400, 1)
		i++
	}); n != 0 {
		t.Errorf("%v allocations per read", n)
	}
}

// lossBesideFlood sends a datagram every millisecond from one allocation while another floods the same shard, and returns the part that is lost.
func lossBesideFlood(t *testing.T, unfair bool) (lost float64) {
	t.Helper()
	const datagrams = 1000
	l := start(t, func(c *Config) { c.Shards, c.unfair = 1, unfair })
	a, g := pair(t, l)
	f, run := flooder(t, l, "flood")
	flooded(t, run, floodSize+channelHeader, f)
	until(t, "the queue overflows", func() bool { data, _ := l.queueDrops(); return data > 0 })
	if !unfair {
		until(t, "the flood is set aside", func() bool { return l.aside.get(f.local()) != nil })
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	arrived := make(chan int)
	var sent atomic.Bool
	go func() {
		buf, n := make([]byte, udpio.MaxRead), 0
		for {
			_ = g.conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			last := sent.Load()
			m, err := g.sock.Read(buf)
			if err != nil && last {
				arrived <- n
				return
			}
			if err != nil {
				continue
			}
			n += (m.N + m.Segment - 1) / m.Segment
		}
	}()
	d := channelData(0x4001, "a modest one")
	for range datagrams {
		<-tick.C
		if err := a.sock.Write(d, 0, datagram.ECT0, udpio.Peer{}); err != nil {
			t.Fatal(err)
		}
	}
	sent.Store(true)
	n := <-arrived
	drops, _ := l.queueDrops()
	t.Logf("unfair %v: %d of %d arrived; %d relayed, %d refused by queues", unfair, n, datagrams, l.Snapshot().Datagrams, drops)
	return 1 - float64(n)/datagrams
}

// TestFloodTakesNothingFromOthers puts a flooding allocation next to one that sends little.
func TestFloodTakesNothingFromOthers(t *testing.T) {
	without := lossBesideFlood(t, true)
	with := lossBesideFlood(t, false)
	if without < 0.02 {
		t.Errorf("without fairness %.1f %% is lost: this is no flood", 100*without)
	}
	if with > 0.01 {
		t.Errorf("%.1f %% is lost", 100*with)
	}
}
