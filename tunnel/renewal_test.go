package tunnel

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// reno is a sender with QUIC's congestion control on a path, in steps of time. It sends as much as it may, or what demand says.
type reno struct {
	rtt    time.Duration // without a queue
	rate   float64       // of the path, bytes a second
	buffer float64       // of the path, bytes
	loss   float64       // share of packets
	demand float64       // bytes a second; 0 is no limit
	delay  time.Duration // by others
	others time.Duration // the most of what others add to that at random

	window float64
	slow   bool // slow start
	stats  quic.ConnectionStats
	rng    *rand.Rand
}

const renoPacket = 1452

func (m *reno) step(d time.Duration) {
	base := m.rtt + m.delay + time.Duration(m.rng.Int64N(int64(m.others)+1)) + m.others
	rtt := max(base, time.Duration(m.window/m.rate*float64(time.Second)))
	sends := m.window / rtt.Seconds()
	limited := true
	if m.demand > 0 && m.demand < sends {
		sends, rtt, limited = m.demand, base, false
	}
	bytes := sends * d.Seconds()
	lost := false
	for range int(bytes / renoPacket) {
		lost = lost || m.rng.Float64() < m.loss
	}
	lost = lost || limited && m.window > m.rate*m.rtt.Seconds()+m.buffer
	switch {
	case lost:
		m.window, m.slow = max(0.7*m.window, 2*renoPacket), false
		m.stats.PacketsLost++
	case limited && m.slow:
		m.window += bytes
	case limited:
		m.window += renoPacket * d.Seconds() / rtt.Seconds()
	}
	least := m.stats.MinRTT
	if least == 0 || base < least {
		least = base
	}
	if rtt > least+queueless(least) && m.window >= 16*renoPacket {
		m.slow = false
	}
	m.stats.MinRTT, m.stats.SmoothedRTT, m.stats.LatestRTT = least, rtt, rtt
	m.stats.BytesSent += uint64(bytes)
	m.stats.CongestionWindow = uint64(m.window)
}

// fresh is what QUIC does on a move.
func (m *reno) fresh() { m.window, m.slow, m.stats.MinRTT = 32*1200, true, 0 }

// run lets a sender go on for a time and returns when its window was renewed.
func (m *reno) run(r *renewal, at *time.Duration, d time.Duration) (renewed []time.Duration) {
	const step = 10 * time.Millisecond
	began := time.Unix(1e9, 0)
	for end := *at + d; *at < end; *at += step {
		m.step(step)
		if now := began.Add(*at); r.sample(now, m.stats) {
			r.began(now)
			m.fresh()
			renewed = append(renewed, *at)
		}
	}
	return renewed
}

// long is a path of 100 Mbit/s and 80 ms, and a sender on it in slow start.
func long() *reno {
	m := &reno{rtt: 80 * time.Millisecond, rate: 12.5e6, buffer: 1.25e6, rng: rand.New(rand.NewPCG(1, 1))}
	m.fresh()
	return m
}

func TestRenewalOfAHeldBackSender(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.demand, m.delay = 20e3, 100*time.Millisecond
	m.stats.MinRTT = m.rtt // from before the others' queue
	if got := m.run(&r, &at, 20*time.Second); len(got) > 0 || m.slow {
		t.Fatalf("sends little: renewed at %v, slow start %v", got, m.slow)
	}
	m.demand, m.delay = 0, 0
	got := m.run(&r, &at, time.Minute)
	if len(got) != 1 || got[0] > 21*time.Second {
		t.Fatalf("renewed at %v, want once within a second", got)
	}
	if m.window < 0.9*m.rate*m.rtt.Seconds() {
		t.Fatalf("window of %.0f bytes", m.window)
	}
}

// TestRenewalOfALargeWindow holds that a window with something to lose is renewed if the path was twice as fast before.
func TestRenewalOfALargeWindow(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.run(&r, &at, 5*time.Second)
	m.stats.PacketsLost++
	m.window = 400e3
	if got := m.run(&r, &at, time.Minute); len(got) != 1 || got[0] < 8*time.Second || got[0] > 9*time.Second {
		t.Fatalf("renewed at %v, want once, 3 s after the loss", got)
	}
}

// TestRenewalOfHalfAWindow holds that slow start that ended halfway is begun again if nothing speaks against it.
func TestRenewalOfHalfAWindow(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.window, m.slow = 500e3, false
	if got := m.run(&r, &at, time.Minute); len(got) != 1 || got[0] < renewLossRounds*m.rtt || got[0] > 2*time.Second {
		t.Fatalf("renewed at %v, want once within two seconds", got)
	}
}

func TestRenewalAfterLoss(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.run(&r, &at, 5*time.Second)
	m.loss = 0.2
	if got := m.run(&r, &at, 2*time.Second); len(got) > 0 || m.window > 30*renoPacket {
		t.Fatalf("renewed at %v, window of %.0f bytes", got, m.window)
	}
	m.loss = 0
	got := m.run(&r, &at, time.Minute)
	if len(got) != 1 || got[0] < 9900*time.Millisecond || got[0] > 11*time.Second {
		t.Fatalf("renewed at %v, want once, 3 s after the last loss", got)
	}
}

func TestNoRenewal(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(m *reno)
	}{
		{"slow start and what follows", func(*reno) {}},
		{"the application is the limit", func(m *reno) { m.slow, m.demand = false, 0.6*m.window/m.rtt.Seconds() }},
		{"random loss", func(m *reno) { m.loss = 0.005 }},
		{"much random loss", func(m *reno) { m.loss = 0.02 }},
		{"a queue of its own", func(m *reno) { m.rate, m.slow = 0.2e6, false }},
		{"a queue of others", func(m *reno) { m.stats.MinRTT, m.others, m.slow = m.rtt, 30*time.Millisecond, false }},
		{"a large window, and a delay that jumps", func(m *reno) {
			m.window, m.slow, m.others, m.stats.MinRTT = 600e3, false, 20*time.Millisecond, m.rtt+20*time.Millisecond
		}},
		{"a path that shows no queue", func(m *reno) { m.buffer = 10e3 }},
		{"a short path", func(m *reno) { m.rtt, m.slow, m.demand = 3*time.Millisecond, false, 0.9*m.window/0.003 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, r, at := long(), renewal{}, time.Duration(0)
			c.change(m)
			if got := m.run(&r, &at, 2*time.Minute); len(got) > 0 {
				t.Errorf("renewed at %v", got)
			}
		})
	}
}

// TestNoRenewalInSlowStart holds that a sender that was faster before, and moved, is left to its slow start.
func TestNoRenewalInSlowStart(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.rate, m.buffer = 1250e6, 120e6
	m.run(&r, &at, 10*time.Second)
	m.fresh()
	if got := m.run(&r, &at, 10*time.Second); len(got) > 0 {
		t.Errorf("renewed at %v", got)
	}
}

// TestRenewalOnALongerPath holds that a sender whose packets go a longer way than before is not taken for one that fills a queue.
func TestRenewalOnALongerPath(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.stats.MinRTT, m.slow = m.rtt/2, false
	if got := m.run(&r, &at, time.Minute); len(got) != 1 || got[0] < 2*time.Second || got[0] > 5*time.Second {
		t.Fatalf("renewed at %v, want once within seconds", got)
	}
}

// TestRenewalGivesUp holds that a path that shows no queue and is full all the same is asked ever more seldom.
func TestRenewalGivesUp(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.rtt, m.rate, m.buffer = 300*time.Millisecond, 350e3, 5e3
	m.slow, m.stats.MinRTT = false, m.rtt
	got := m.run(&r, &at, time.Hour)
	if len(got) < 3 || len(got) > 60*60/300+6 {
		t.Fatalf("renewed at %v", got)
	}
	for i := 2; i < len(got); i++ {
		if pause, least := got[i]-got[i-1], min(renewPause<<(i-1), renewMostPause); pause < least {
			t.Errorf("pause %d of %v, want %v", i, pause, least)
		}
	}
}

func TestRenewalAfterIdle(t *testing.T) {
	m, r, at := long(), renewal{}, time.Duration(0)
	m.slow, m.demand = false, 1e3
	m.run(&r, &at, time.Second)
	at += 10 * time.Minute // nobody samples while nothing moves
	m.demand = 0
	if got := m.run(&r, &at, 10*time.Second); len(got) != 1 || got[0] > 10*time.Minute+2*time.Second {
		t.Fatalf("renewed at %v", got)
	}
}
