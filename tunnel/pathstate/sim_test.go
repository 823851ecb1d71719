package pathstate

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"sallyway/stun"
)

// network is one path's, between a session's owner and its peer.
type network struct {
	delay, jitter   time.Duration // one way
	loss            float64       // each way
	cutOut, cutIn   bool
	twice, overtake float64       // share of packets that come twice, or 30 ms later
	queue           time.Duration // more delay on the way out
}

// sim is a session with two networks under it, in simulated time.
type sim struct {
	t    testing.TB
	rnd  *rand.Rand
	now  time.Time
	todo events
	seq  int

	m       *Machine
	nets    [2]network
	paths   [2]*Path // nil while there is no standby
	active  int
	keys    stun.Keys
	numbers stun.Numbers
	peer    *stun.Responder
	due     int                         // which wake-up is the last one
	starve  func() (late time.Duration) // nil: the owner wakes in time
	asleep  time.Time                   // until when nothing of this process runs
	load    func(now time.Time) Load    // nil: none

	moves  []move
	died   []death
	states map[string]int
	steps  int
	sent   [2]int
	inRow  []time.Time // probes of the last second
	most   int         // in a second
}

type move struct {
	at     time.Duration
	to     int
	cause  Cause
	reason string
}

type death struct {
	at   time.Duration
	path int
}

type event struct {
	at  time.Time
	seq int
	do  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

var begin = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func newSim(t testing.TB, seed uint64, nets [2]network) *sim {
	s := &sim{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), now: begin, m: New(), nets: nets, states: map[string]int{}}
	s.keys = stun.Keys{Out: [32]byte{1}, In: [32]byte{2}}
	s.peer = stun.NewOrderedResponder(s.keys.Swap(), 0, 0)
	s.add(0)
	s.add(1)
	s.m.Roles(s.now, s.paths[0], s.paths[1])
	s.m.Busy(s.now, true)
	s.step()
	return s
}

func (s *sim) add(i int) {
	s.paths[i] = NewPath(fmt.Sprint("net-", i), 0)
	s.m.Probe(s.paths[i], stun.NewNumberedProber(s.keys, &s.numbers))
}

func (s *sim) at(t time.Time, do func()) {
	s.seq++
	heap.Push(&s.todo, event{t, s.seq, do})
}

func (s *sim) after(d time.Duration, do func()) { s.at(s.now.Add(d), do) }

// run lets time pass.
func (s *sim) run(d time.Duration) {
	end := s.now.Add(d)
	for len(s.todo) > 0 && !s.todo[0].at.After(end) {
		e := heap.Pop(&s.todo).(event)
		s.now = e.at
		e.do()
	}
	s.now = end
}

func (s *sim) elapsed() time.Duration { return s.now.Sub(begin) }

// carry takes a datagram over a network, or loses it.
func (s *sim) carry(n *network, more time.Duration, arrives func()) {
	if s.rnd.Float64() < n.loss {
		return
	}
	copies := 1
	if s.rnd.Float64() < n.twice {
		copies = 2
	}
	for range copies {
		d := n.delay + more
		if n.jitter > 0 {
			d += time.Duration(s.rnd.Int64N(int64(n.jitter)))
		}
		if s.rnd.Float64() < n.overtake {
			d += 30 * time.Millisecond
		}
		s.after(d, arrives)
	}
}

// step has the owner do what the machine says.
func (s *sim) step() {
	s.steps++
	if s.load != nil {
		s.m.Load(s.now, s.load(s.now))
	}
	actions, wait := s.m.Step(s.now)
	if wait < leastWait {
		s.t.Fatalf("%v: wait %v", s.elapsed(), wait)
	}
	for _, a := range actions {
		i := s.index(a.Path)
		switch {
		case i < 0:
		case a.Probe != nil:
			s.probe(i, a.Probe)
		case a.Cause != "":
			s.move(i, a)
		default:
			s.states[fmt.Sprint(a.Path.name, " ", a.State)]++
			if a.State == Dead {
				s.died = append(s.died, death{s.elapsed(), i})
			}
		}
	}
	s.sleep(wait)
}

func (s *sim) sleep(wait time.Duration) {
	if s.starve != nil {
		if late := s.starve(); late > 0 {
			s.asleep = s.now.Add(wait + late)
			wait += late
		}
	}
	s.due++
	due := s.due
	s.after(wait, func() {
		if due == s.due {
			s.step()
		}
	})
}

// wake has the owner step now, unless nothing of its process runs.
func (s *sim) wake() {
	if !s.now.Before(s.asleep) {
		s.due++
		s.step()
	}
}

func (s *sim) index(p *Path) int {
	for i, q := range s.paths {
		if p == q {
			return i
		}
	}
	return -1
}

func (s *sim) probe(i int, b []byte) {
	s.sent[i]++
	s.inRow = append(s.inRow, s.now)
	for s.now.Sub(s.inRow[0]) > time.Second {
		s.inRow = s.inRow[1:]
	}
	s.most = max(s.most, len(s.inRow))
	p, n := s.paths[i], &s.nets[i]
	if n.cutOut {
		return
	}
	s.carry(n, n.queue, func() {
		a, ok := s.peer.Respond(s.now, b, netip.AddrPort{})
		if !ok || n.cutIn {
			return
		}
		s.carry(n, 0, func() { s.arrive(p, a) })
	})
}

// arrive hands an answer to the machine, when this process runs.
func (s *sim) arrive(p *Path, a []byte) {
	if s.now.Before(s.asleep) {
		s.at(s.asleep.Add(time.Millisecond), func() { s.arrive(p, a) })
		return
	}
	if _, wake := s.m.Packet(s.now, p, a); wake {
		s.due++
		s.step()
	}
}

func (s *sim) move(i int, a Action) {
	if st := a.Path.state; st != Alive && st != Unknown {
		s.t.Fatalf("%v: moved to a path that is %s", s.elapsed(), st)
	}
	s.moves = append(s.moves, move{s.elapsed(), i, a.Cause, a.Reason})
	s.active = i
	s.paths[1-i] = nil
	s.m.Roles(s.now, s.paths[i], nil)
	s.after(time.Second, s.again)
}

// again makes a standby of the other network where it answers, as a session's owner does.
func (s *sim) again() {
	if i := 1 - s.active; s.paths[i] == nil {
		if s.nets[i].cutOut || s.nets[i].cutIn {
			s.after(2*time.Second, s.again)
			return
		}
		s.add(i)
		s.m.Roles(s.now, s.paths[s.active], s.paths[i])
	}
}

// cut makes a network silent.
func (s *sim) cut(i int, out, in bool) { s.nets[i].cutOut, s.nets[i].cutIn = out, in }
