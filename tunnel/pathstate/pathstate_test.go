package pathstate

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

const ms = time.Millisecond

func near(delay time.Duration) [2]network {
	return [2]network{{delay: delay / 2, jitter: ms}, {delay: delay / 2, jitter: ms}}
}

// A path that goes silent is left soon, whichever direction is cut, at whatever moment.
func TestSilentCut(t *testing.T) {
	for _, rtt := range []time.Duration{ms, 20 * ms, 80 * ms} {
		for _, c := range []struct {
			name    string
			out, in bool
		}{{"both ways", true, true}, {"out", true, false}, {"in", false, true}} {
			t.Run(fmt.Sprint(rtt, " ", c.name), func(t *testing.T) {
				var worst time.Duration
				for i := range 20 {
					s := newSim(t, uint64(i), near(rtt))
					s.run(10*time.Second + time.Duration(i)*7*ms)
					if len(s.moves) != 0 {
						t.Fatalf("moved before: %+v", s.moves)
					}
					cut := s.elapsed()
					s.cut(0, c.out, c.in)
					s.run(2 * time.Second)
					if len(s.moves) != 1 || s.moves[0].cause != CauseDead {
						t.Fatalf("moves %+v", s.moves)
					}
					worst = max(worst, s.moves[0].at-cut)
				}
				t.Logf("left after %v at most", worst)
				if worst > 280*ms+3*max(rtt-40*ms, 0) {
					t.Errorf("left after %v", worst)
				}
			})
		}
	}
}

// While much moves the active path is probed more often, and its death is noticed sooner.
func TestSilentCutOfAStream(t *testing.T) {
	var sum time.Duration
	const runs = 20
	for i := range runs {
		s := newSim(t, uint64(i), near(5*ms))
		s.load = steady(10000, 0)
		s.run(10*time.Second + time.Duration(i)*7*ms)
		cut := s.elapsed()
		s.cut(0, true, true)
		s.run(time.Second)
		if len(s.moves) != 1 {
			t.Fatalf("moves %+v", s.moves)
		}
		sum += s.moves[0].at - cut
	}
	if mean := sum / runs; mean > 190*ms {
		t.Errorf("left after %v on average", mean)
	}
}

// A doubt with a reason is decided sooner than silence.
func TestDoubt(t *testing.T) {
	s := newSim(t, 1, near(2*ms))
	s.run(5 * time.Second)
	s.m.Doubt(s.paths[0])
	s.step()
	s.run(time.Second)
	if len(s.moves) != 0 || s.paths[0].state != Alive {
		t.Fatalf("a doubt alone moved it: %+v, %s", s.moves, s.paths[0].state)
	}
	at := s.elapsed()
	s.cut(0, true, true)
	s.m.Doubt(s.paths[0])
	s.step()
	s.run(time.Second)
	if len(s.moves) != 1 || s.moves[0].at-at > 120*ms {
		t.Fatalf("moves %+v, doubted at %v", s.moves, at)
	}
}

func TestGone(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.run(5 * time.Second)
	at := s.elapsed()
	s.m.Gone(s.now, s.paths[0])
	s.step()
	if len(s.moves) != 1 || s.moves[0].at != at || s.moves[0].cause != CauseGone {
		t.Fatalf("moves %+v", s.moves)
	}
}

// Where nothing is heard at all it may be this host: it takes longer, but paths die, and come back.
func TestNothingHeard(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.run(5 * time.Second)
	cut := s.elapsed()
	s.cut(0, true, true)
	s.cut(1, true, true)
	s.run(300 * ms)
	if len(s.died) != 0 {
		t.Fatalf("died %+v", s.died)
	}
	s.run(time.Second)
	if len(s.died) != 2 || s.died[1].at-cut > 700*ms {
		t.Fatalf("died %+v, cut at %v", s.died, cut)
	}
	if len(s.moves) != 0 {
		t.Fatalf("moved to a dead path: %+v", s.moves)
	}
	before := s.sent
	s.run(10 * time.Second)
	for i, n := range s.sent {
		if n -= before[i]; n < 95 || n > 105 {
			t.Errorf("%d probes to a dead path in 10 s", n)
		}
	}
	s.cut(1, false, false)
	s.run(2 * time.Second)
	if len(s.moves) != 1 || s.moves[0].to != 1 {
		t.Fatalf("moves %+v", s.moves)
	}
}

// Answers that were under way when a path died, or were held back, do not revive it.
func TestHeldBackAnswer(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.run(5 * time.Second)
	s.cut(0, false, true)
	p := s.paths[0]
	var held [][]byte
	probe := p.prober.Probe(s.m.clock.virtual, 0)
	a, ok := s.peer.Respond(s.now, probe, netip.AddrPort{})
	if !ok {
		t.Fatal("no answer")
	}
	held = append(held, a)
	s.m.standby, s.paths[1] = nil, nil // so that the session stays
	s.run(2 * time.Second)
	if p.state != Dead {
		t.Fatalf("the path is %s", p.state)
	}
	for range 3 {
		for _, a := range held {
			s.m.Packet(s.now, p, a)
		}
		s.run(100 * ms)
		if p.state != Dead {
			t.Fatalf("a held-back answer made it %s", p.state)
		}
	}
	s.cut(0, false, false)
	s.run(1200 * ms)
	if p.state != Alive {
		t.Fatalf("the path is %s", p.state)
	}
}

// An owner that is woken late, with everything else of its process, sees no death; and one whose path dies meanwhile still does.
func TestStarved(t *testing.T) {
	for seed := range uint64(10) {
		s := newSim(t, seed, near(10*ms))
		s.starve = func() time.Duration {
			if s.rnd.IntN(4) == 0 {
				return time.Duration(s.rnd.Int64N(int64(300 * ms)))
			}
			return 0
		}
		s.run(5 * time.Minute)
		if len(s.moves) != 0 || len(s.died) != 0 {
			t.Fatalf("seed %d: moves %+v, died %+v", seed, s.moves, s.died)
		}
		cut := s.elapsed()
		s.cut(0, true, true)
		s.run(5 * time.Second)
		if len(s.moves) != 1 || s.moves[0].at-cut > 4*time.Second {
			t.Fatalf("seed %d: cut at %v, moves %+v", seed, cut, s.moves)
		}
	}
}

// The owner sleeps for an hour, as on a laptop whose lid is closed.
func TestSuspended(t *testing.T) {
	s := newSim(t, 1, near(10*ms))
	s.run(5 * time.Second)
	slept := false
	s.starve = func() time.Duration {
		if slept {
			return 0
		}
		slept = true
		return time.Hour
	}
	s.run(70 * time.Minute)
	if !slept || len(s.moves) != 0 || len(s.died) != 0 {
		t.Fatalf("slept %v, moves %+v, died %+v", slept, s.moves, s.died)
	}
}

// Half an hour of a saturated session: the queue of its own comes and goes on the active path, 2 % are lost on both.
func TestSaturated(t *testing.T) {
	for seed := range uint64(2) {
		s := newSim(t, seed, near(20*ms))
		for i := range s.nets {
			s.nets[i].loss = 0.01 // each way
		}
		var sent uint64
		var last time.Time
		s.load = func(now time.Time) Load {
			if !last.IsZero() {
				sent += uint64(now.Sub(last).Seconds() * 1000)
			}
			last = now
			return Load{Sent: sent, Received: sent / 20, Lost: sent / 100, Bytes: sent * 1200}
		}
		var saw func()
		saw = func() {
			n := &s.nets[s.active]
			if n.queue += 10 * ms; n.queue > 300*ms {
				n.queue = 0
			}
			s.nets[1-s.active].queue = 0
			s.after(500*ms, saw)
		}
		saw()
		s.run(30 * time.Minute)
		if len(s.moves) > 1 {
			t.Errorf("seed %d: %d moves in half an hour: %+v", seed, len(s.moves), s.moves)
		}
	}
}

// No needless death where few probes are lost at random, for hours.
func TestRandomLoss(t *testing.T) {
	for seed := range uint64(2) {
		s := newSim(t, seed, near(30*ms))
		s.nets[0].loss, s.nets[1].loss = 0.01, 0.01
		s.run(time.Hour)
		if len(s.moves) != 0 || len(s.died) != 0 {
			t.Errorf("seed %d: moves %+v, died %+v", seed, s.moves, s.died)
		}
	}
}

func TestProbesAreBounded(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.run(time.Minute)
	if n := s.sent[0]; n < 590 || n > 620 {
		t.Errorf("%d probes in a busy minute", n)
	}
	s.m.Busy(s.now, false)
	before, steps := s.sent[0], s.steps
	s.run(10 * time.Minute)
	if n := s.sent[0] - before; n < 38 || n > 42 {
		t.Errorf("%d probes in ten idle minutes", n)
	}
	if n := s.steps - steps; n > 200 {
		t.Errorf("%d steps in ten idle minutes", n)
	}
	// Whoever doubts without end gets no more than one each 20 ms.
	before = s.sent[0]
	for range 1000 {
		s.m.Doubt(s.paths[0])
		s.m.Doubt(s.paths[1])
		s.step()
		s.run(ms)
	}
	if n := s.sent[0] - before; n > 55 {
		t.Errorf("%d probes in a second of doubts", n)
	}
}
