package pathstate

import (
	"strings"
	"testing"
	"time"
)

// steady is a load of so many packets a second, of which a share is lost, and to which something comes back.
func steady(packets float64, lost float64) func(now time.Time) Load {
	return func(now time.Time) Load {
		n := now.Sub(begin).Seconds() * packets
		return Load{Sent: uint64(n), Lost: uint64(n * lost), Received: uint64(n / 2), Bytes: uint64(n * 1000)}
	}
}

func TestLeftForLoss(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.run(20 * time.Second)
	at := s.elapsed()
	s.nets[0].loss = 0.17 // each way: 31 % in all
	s.run(15 * time.Second)
	if len(s.moves) != 1 || s.moves[0].cause != CauseLoss && s.moves[0].cause != CauseDead || s.moves[0].at-at > 10*time.Second {
		t.Fatalf("moves %+v, bad since %v", s.moves, at)
	}
	if s.moves[0].cause == CauseLoss && (!strings.HasPrefix(s.moves[0].reason, "left net-0: ") || !strings.HasSuffix(s.moves[0].reason, " % of probes lost, net-1 0 %")) {
		t.Errorf("reason %q", s.moves[0].reason)
	}
}

// The session goes back to a path when it is good again, not before, and waits longer each time that it has to leave it.
func TestBackWhenGoodAgain(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	var bad bool
	var turn func()
	turn = func() {
		bad = !bad
		s.nets[0].loss = 0
		if bad {
			s.nets[0].loss = 0.12
		}
		s.after(30*time.Second, turn)
	}
	s.run(20 * time.Second)
	turn()
	s.run(time.Hour)
	var left []time.Duration
	for i, m := range s.moves {
		switch {
		case m.to == 1 && (m.cause == CauseLoss || m.cause == CauseDead):
			left = append(left, m.at)
		case m.to != 0 || m.cause != CauseBack:
			t.Errorf("move %d: %+v", i, m)
		}
	}
	if len(left) < 4 || len(left) > 25 {
		t.Fatalf("left %d times in an hour: %+v", len(left), s.moves)
	}
	if first, last := left[1]-left[0], left[len(left)-1]-left[len(left)-2]; last < 2*first {
		t.Errorf("left again after %v, then %v", first, last)
	}
	if h := s.m.quality.held["net-0"]; h == nil {
		t.Error("no penalty")
	}
}

func TestLeftForRoundTrip(t *testing.T) {
	for name, c := range map[string]struct {
		load  func(time.Time) Load
		delay [2]time.Duration
		moves int
	}{
		"much longer, few bytes":              {steady(1, 0), [2]time.Duration{100 * ms, 10 * ms}, 1},
		"much longer, but as long as twice":   {steady(1, 0), [2]time.Duration{100 * ms, 60 * ms}, 0},
		"twice, but not much":                 {steady(1, 0), [2]time.Duration{30 * ms, 10 * ms}, 0},
		"may be a queue of its own":           {steady(2000, 0), [2]time.Duration{100 * ms, 10 * ms}, 0},
		"both, as when the access has it all": {steady(1, 0), [2]time.Duration{150 * ms, 145 * ms}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, 1, near(20*ms))
			s.load = c.load
			s.run(20 * time.Second)
			for i, d := range c.delay {
				s.nets[i].delay = d
			}
			s.run(40 * time.Second)
			if len(s.moves) != c.moves {
				t.Fatalf("moves %+v", s.moves)
			}
			if c.moves > 0 && (s.moves[0].cause != CauseRTT || !strings.HasPrefix(s.moves[0].reason, "left net-0: round trip ")) {
				t.Errorf("moves %+v", s.moves)
			}
		})
	}
}

func TestLeftForMovingNoData(t *testing.T) {
	for name, c := range map[string]struct {
		load  func(in time.Duration) Load // in is the time since it began to be so
		moves int
	}{
		"nothing comes back": {func(in time.Duration) Load {
			return Load{Sent: uint64(in/(100*ms)) + 10, Received: 100}
		}, 1},
		"nothing is sent":       {func(time.Duration) Load { return Load{Sent: 10, Received: 100} }, 0},
		"acknowledgements come": {func(in time.Duration) Load { return Load{Sent: uint64(in/ms) + 10, Received: uint64(in / (500 * ms))} }, 0},
		"most packets are lost": {func(in time.Duration) Load {
			return Load{Sent: uint64(in / ms), Lost: uint64(in / (3 * ms)), Received: uint64(in / (10 * ms))}
		}, 1},
		"a burst is lost": {func(in time.Duration) Load {
			return Load{Sent: uint64(in / ms), Lost: min(uint64(in/ms), 2000), Received: uint64(in / (10 * ms))}
		}, 0},
		"what was lost arrives after all": {func(in time.Duration) Load {
			return Load{Sent: uint64(in / ms), Lost: 1000 - min(uint64(in/ms), 1000), Received: uint64(in / (10 * ms))}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, 1, near(20*ms))
			since := begin.Add(20 * time.Second)
			s.load = func(now time.Time) Load {
				if now.Before(since) {
					return Load{}
				}
				return c.load(now.Sub(since))
			}
			s.run(50 * time.Second)
			if c.moves == 0 && len(s.moves) == 0 {
				return
			}
			if len(s.moves) < 1 || c.moves == 0 || s.moves[0].cause != CauseStalled || s.moves[0].at > 35*time.Second {
				t.Fatalf("moves %+v", s.moves)
			}
		})
	}
}

// A path of lower rank is gone to when it has been good for a while.
func TestRank(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.paths[0].rank = 2
	s.paths[1].rank = 1
	s.run(8 * time.Second)
	if len(s.moves) != 0 {
		t.Fatalf("moved at once: %+v", s.moves)
	}
	s.run(12 * time.Second)
	if len(s.moves) != 1 || s.moves[0].cause != CauseRung || s.moves[0].reason != "net-1 is a better rung than net-0, and was good for 10s" {
		t.Fatalf("moves %+v", s.moves)
	}
}

// An idle session's few probes say nothing of how good its paths are.
func TestIdleIsNotJudged(t *testing.T) {
	s := newSim(t, 1, near(20*ms))
	s.m.Busy(s.now, false)
	s.nets[0].delay = 400 * ms
	s.nets[0].loss = 0.1
	s.run(time.Hour)
	for _, m := range s.moves {
		if m.cause != CauseDead {
			t.Errorf("moved: %+v", m)
		}
	}
}

func TestPenalties(t *testing.T) {
	q := quality{held: map[string]*penalty{}}
	at := begin
	var holds []time.Duration
	for range 8 {
		q.leave(at, NewPath("a", 0), CauseLoss)
		holds = append(holds, q.held["a"].until.Sub(at))
		at = q.held["a"].until
	}
	for i, h := range holds {
		if want := min(10*time.Second<<i, 5*time.Minute); h != want {
			t.Errorf("hold %d is %v, want %v", i, h, want)
		}
	}
	q.leave(at.Add(2*time.Hour), NewPath("a", 0), CauseRTT)
	if h := q.held["a"]; h.until.Sub(h.left) != holdLeast {
		t.Errorf("%v held after hours", h.until.Sub(h.left))
	}
	q.leave(at, NewPath("b", 0), CauseDead)
	if q.held["b"] != nil {
		t.Error("a path that died is held")
	}
	for i := range 1000 {
		q.leave(at.Add(time.Duration(i)*time.Second), NewPath(strings.Repeat("x", i), 0), CauseLoss)
	}
	if len(q.held) > mostHeld {
		t.Errorf("%d paths are held", len(q.held))
	}
}
