package pathstate

import (
	"testing"
	"time"
)

// FuzzPaths lets a random life happen to two paths, told by the bytes: cuts in one direction or both, flapping, loss, delay, jitter, overtaking
// and doubled packets, an owner that starves, a host that sleeps, a clock that goes back, doubts. Whatever it is, these hold:
//
//   - the session never moves to a path that is not alive, and leaves a dead one for one that is alive within a bound;
//   - nothing moves while no more than 2 % are lost and delays are the same;
//   - probes and steps are bounded, moves too;
//   - when all is well again for half a minute, both paths are alive, and the active one answers.
func FuzzPaths(f *testing.F) {
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, life []byte) { live(t, life) })
}

// seeds are lives that happened to real paths.
var seeds = [][]byte{
	{},
	{opCut, 0, 3, opWait, 20, opHeal, 0, 0, opWait, 40},                                          // a relay that comes back
	{opCut, 0, 1, opWait, 5, opCut, 1, 2, opWait, 60},                                            // one way each
	{opCut, 0, 3, opCut, 1, 3, opWait, 50, opHeal, 1, 0, opWait, 30},                             // both, and one comes back
	{opLoss, 0, 60, opWait, 100, opHeal, 0, 0, opWait, 250, opWait, 250},                         // a bad path, and a good one again
	{opFlap, 0, 10, opWait, 200, opWait, 200},                                                    // flapping
	{opFlap, 0, 3, opFlap, 1, 7, opWait, 250, opWait, 250},                                       // both
	{opDelay, 0, 120, opWait, 100, opDelay, 1, 200, opWait, 100},                                 // slow paths
	{opStarve, 200, opWait, 100, opCut, 0, 3, opWait, 50},                                        // a starving owner
	{opSleep, 255, opWait, 20, opSleep, 10, opWait, 3, opCut, 0, 3, opWait, 60},                  // a host that sleeps
	{opBack, 100, opWait, 10, opBack, 255, opWait, 20},                                           // a clock that goes back
	{opMess, 0, 255, opMess, 1, 255, opJitter, 0, 80, opJitter, 1, 80, opWait, 200, opWait, 100}, // reordered and doubled
	{opDoubt, 0, opDoubt, 1, opWait, 1, opDoubt, 0, opCut, 0, 3, opWait, 9},
	{opIdle, 1, opWait, 250, opCut, 0, 3, opWait, 250, opIdle, 0, opWait, 30},
	{opGone, 0, opWait, 10, opGone, 1, opWait, 30},
	{opLoss, 0, 4, opLoss, 1, 4, opWait, 250, opWait, 250},
}

const (
	opWait = iota
	opCut
	opHeal
	opLoss
	opFlap
	opDelay
	opStarve
	opSleep
	opBack
	opMess
	opJitter
	opDoubt
	opIdle
	opGone
	ops
)

// live plays a life.
func live(t *testing.T, life []byte) {
	if len(life) > 200 {
		life = life[:200]
	}
	s := newSim(t, uint64(len(life)), near(20*ms))
	calm := true // nothing happened yet that is a reason to move
	next := func() int {
		if len(life) == 0 {
			return 0
		}
		b := life[0]
		life = life[1:]
		return int(b)
	}
	var flaps [2]int
	pass := func(d time.Duration) {
		// The session is on a dead path beside one that is alive for no longer than it takes to ask for a move again.
		for d > 0 {
			s.run(min(d, retryMove))
			d -= retryMove
			a, b := s.paths[s.active], s.paths[1-s.active]
			if b != nil && a.state == Dead && b.state == Alive && !s.now.Before(s.asleep) && s.now.Sub(b.since) > 2*retryMove && s.now.Sub(a.since) > 2*retryMove {
				t.Fatalf("%v: on a dead path beside one that is alive", s.elapsed())
			}
		}
	}
	for len(life) > 0 && s.elapsed() < 20*time.Minute {
		switch op := next() % ops; op {
		case opWait:
			pass(time.Duration(next()) * 100 * ms)
		case opCut:
			i, how := next()%2, next()
			s.cut(i, how&1 != 0, how&2 != 0)
			calm = calm && how&3 == 0
		case opHeal:
			i := next() % 2
			flaps[i] = 0
			s.nets[i] = near(20 * ms)[0]
		case opLoss:
			n := &s.nets[next()%2]
			n.loss = float64(next()) / 400
			calm = calm && n.loss <= 0.01
		case opFlap:
			i, every := next()%2, time.Duration(next()+1)*50*ms
			flaps[i]++
			turn := flaps[i]
			var flap func()
			flap = func() {
				if flaps[i] == turn && s.elapsed() < 25*time.Minute {
					s.cut(i, !s.nets[i].cutOut, !s.nets[i].cutIn)
					s.after(every, flap)
				}
			}
			flap()
			calm = false
		case opDelay:
			s.nets[next()%2].delay = time.Duration(next()) * 2 * ms
			calm = false
		case opStarve:
			most := next()
			s.starve = func() time.Duration {
				if most == 0 || s.rnd.IntN(3) > 0 {
					return 0
				}
				return time.Duration(s.rnd.IntN(most)+1) * 2 * ms
			}
		case opSleep:
			d := time.Duration(next()) * time.Second
			before := s.starve
			s.starve = func() time.Duration {
				s.starve = before
				return d
			}
			pass(d / 4)
		case opBack:
			// The machine is told a time that lies before the last one.
			s.m.advance(s.now.Add(-time.Duration(next()) * time.Second))
		case opMess:
			n, b := &s.nets[next()%2], float64(next())/255
			n.twice, n.overtake = b, b/2
			calm = false
		case opJitter:
			s.nets[next()%2].jitter = time.Duration(next()+1) * ms
			calm = false
		case opDoubt:
			if p := s.paths[next()%2]; p != nil {
				s.m.Doubt(p)
				s.wake()
			}
		case opIdle:
			if busy := next()%2 == 0; !s.now.Before(s.asleep) {
				s.m.Busy(s.now, busy)
				s.wake()
			}
		case opGone:
			i := next() % 2
			if p := s.paths[i]; p != nil && i != s.active {
				s.m.Gone(s.now, p)
				s.paths[i] = nil
				s.m.Roles(s.now, s.paths[s.active], nil)
				s.after(time.Second, s.again)
			}
		}
		if calm && len(s.moves) > 0 {
			t.Fatalf("moved without a reason: %+v", s.moves)
		}
	}
	if most := 2 * 51; s.most > most {
		t.Fatalf("%d probes in a second, want %d at most", s.most, most)
	}
	if most := 200 + int(s.elapsed()/ms)/5; s.steps > most {
		t.Fatalf("%d steps in %v", s.steps, s.elapsed())
	}
	// A move takes a death, of which there are few a second, or seconds of badness.
	if most := 2 + int(s.elapsed()/(200*ms)); len(s.moves) > most {
		t.Fatalf("%d moves in %v", len(s.moves), s.elapsed())
	}
	s.starve, s.asleep, flaps = nil, s.now, [2]int{}
	s.nets = near(20 * ms)
	s.m.Busy(s.now, true)
	s.due++
	s.step()
	s.run(time.Minute)
	for i, p := range s.paths {
		if p == nil || p.state != Alive {
			t.Fatalf("path %d after a minute without trouble: %+v", i, p)
		}
	}
	before := len(s.moves)
	cut := s.elapsed()
	s.cut(s.active, true, true)
	s.run(5 * time.Second)
	if len(s.moves) != before+1 || s.moves[before].at-cut > 400*ms {
		t.Fatalf("cut at %v, moves %+v", cut, s.moves[before:])
	}
}

// TestRandomLives is a short walk through what FuzzPaths looks for, the same each time.
func TestRandomLives(t *testing.T) {
	n := 60
	if testing.Short() {
		n = 20
	}
	for seed := range n {
		x := uint32(seed)*2654435761 + 1
		life := make([]byte, 20+seed%60)
		for i := range life {
			x = x*1664525 + 1013904223
			life[i] = byte(x >> 24)
		}
		live(t, life)
		if t.Failed() {
			t.Fatalf("life %v", life)
		}
	}
}
