// Package history remembers for a day what heartbeats said of load, and what changed: sessions that moved to another relay, nodes that went
// and came back. It lives in memory: every process of a platform has its own from the moment it started, and none is written down.
//
//	rec := history.New(store, board, now)
//	go rec.Run(ctx, report)
//	points := rec.Org("acme", history.Hour, time.Now())
package history

import (
	"context"
	"slices"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// How much is remembered.
const (
	sampleEvery  = 5 * time.Second // half of what lies between two heartbeats
	indexEvery   = time.Minute     // names of nodes are read again
	maxSeries    = 4096            // relays, gateways and organizations
	maxEvents    = 1000            // of an organization
	eventsKept   = 24 * time.Hour
	maxSessions  = 65536 // whose counters are remembered
	fineStep     = 10 * time.Second
	coarseStep   = 5 * time.Minute
	fineLength   = 360 // an hour
	coarseLength = 288 // a day
)

// Span is how far back a picture looks.
type Span int

// The spans.
const (
	Hour Span = iota
	Day
)

// Length is the span in time.
func (s Span) Length() time.Duration {
	if s == Day {
		return coarseStep * coarseLength
	}
	return fineStep * fineLength
}

// Point is the mean over a step. Up is from clients to resources, Down the other way, in bytes per second.
type Point struct {
	At       time.Time // the step's start
	Up, Down float64
	Sessions float64
	Known    bool // a sample was taken
}

// EventKind is what happened.
type EventKind string

// The kinds.
const (
	Moved EventKind = "moved" // a session goes on over another relay
	State EventKind = "state" // a node's state is another
)

// Event is something that changed.
type Event struct {
	At       time.Time
	Kind     EventKind
	Node     string // name: the gateway of a session, or the node
	NodeKind identity.Kind
	Peer     string // name of the other end of a session
	From, To string // relays, or states
}

type sample struct{ up, down, sessions float32 }

type slot struct {
	step int64 // number of the step since 1970; 0 is never written
	sum  sample
	n    uint32
}

// series is two rings of steps.
type series struct {
	fine   [fineLength]slot
	coarse [coarseLength]slot
}

func (s *series) add(at time.Time, v sample) {
	put := func(ring []slot, step time.Duration) {
		n := at.UnixNano() / int64(step)
		p := &ring[n%int64(len(ring))]
		if p.step != n {
			*p = slot{step: n}
		}
		p.sum.up, p.sum.down, p.sum.sessions, p.n = p.sum.up+v.up, p.sum.down+v.down, p.sum.sessions+v.sessions, p.n+1
	}
	put(s.fine[:], fineStep)
	put(s.coarse[:], coarseStep)
}

func (s *series) points(span Span, now time.Time) []Point {
	ring, step := s.fine[:], fineStep
	if span == Day {
		ring, step = s.coarse[:], coarseStep
	}
	last := now.UnixNano() / int64(step)
	out := make([]Point, 0, len(ring))
	for n := last - int64(len(ring)) + 1; n <= last; n++ {
		p := Point{At: time.Unix(0, n*int64(step)).UTC()}
		if s := ring[n%int64(len(ring))]; s.step == n && s.n > 0 {
			k := float64(s.n)
			p.Up, p.Down, p.Sessions, p.Known = float64(s.sum.up)/k, float64(s.sum.down)/k, float64(s.sum.sessions)/k, true
		}
		out = append(out, p)
	}
	return out
}

// sessionKey tells sessions of a gateway apart.
type sessionKey struct {
	peer  string
	since int64
}

type counters struct {
	sent, recv uint64
	relay      string
}

// seen is what was last heard of a node.
type seen struct {
	at       time.Time
	sessions map[sessionKey]counters
	state    control.NodeState
	load     sample
}

// Recorder remembers. Its methods may be called concurrently.
type Recorder struct {
	store store.Store
	board *presence.Board
	now   func() time.Time

	mu      sync.Mutex
	series  map[string]*series // by node id, or org/NAME; guarded by mu
	events  map[string][]Event // by organization, oldest first; guarded by mu
	seen    map[string]*seen   // by node id; guarded by mu
	nodes   map[string]*store.Node
	indexed time.Time
}

// New makes a recorder of what a board hears.
func New(st store.Store, board *presence.Board, now func() time.Time) *Recorder {
	return &Recorder{
		store: st, board: board, now: now,
		series: make(map[string]*series), events: make(map[string][]Event), seen: make(map[string]*seen),
	}
}

// Run samples until ctx ends. report is told of what goes wrong; it is tried again.
func (r *Recorder) Run(ctx context.Context, report func(error)) {
	t := time.NewTicker(sampleEvery)
	defer t.Stop()
	for {
		if err := r.Sample(ctx); err != nil && ctx.Err() == nil {
			report(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Sample takes one look at the board. Run does it by itself.
func (r *Recorder) Sample(ctx context.Context) error {
	beats, now := r.board.All(), r.now()
	r.mu.Lock()
	stale := now.Sub(r.indexed) >= indexEvery || r.nodes == nil
	if !stale {
		for id := range beats {
			if r.nodes[id] == nil {
				stale = true
				break
			}
		}
	}
	r.mu.Unlock()
	if stale {
		if err := r.index(ctx, now); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	totals := make(map[string]sample)
	for id, n := range r.nodes {
		if n.Kind == identity.Client {
			continue
		}
		s := r.seen[id]
		if s == nil {
			s = &seen{}
			r.seen[id] = s
		}
		beat, ok := beats[id]
		if ok && beat.At.After(s.at) {
			r.heardLocked(n, s, beat)
		}
		r.stateLocked(n, s, now)
		if !ok || now.Sub(beat.At) >= presence.Timeout {
			s.load = sample{}
			continue
		}
		if t := r.seriesLocked(id); t != nil {
			t.add(now, s.load)
		}
		if n.Kind == identity.Gateway {
			t := totals[n.Org]
			t.up, t.down, t.sessions = t.up+s.load.up, t.down+s.load.down, t.sessions+s.load.sessions
			totals[n.Org] = t
		}
	}
	for org, v := range totals {
		if t := r.seriesLocked("org/" + org); t != nil {
			t.add(now, v)
		}
	}
	return nil
}

// index reads the names of nodes, and forgets nodes that are gone.
func (r *Recorder) index(ctx context.Context, now time.Time) error {
	nodes := make(map[string]*store.Node)
	err := r.store.View(ctx, func(tx store.Tx) error {
		orgs, err := tx.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range orgs {
			ns, err := tx.Nodes(ctx, o.Name, "", store.Page{})
			if err != nil {
				return err
			}
			for _, n := range ns {
				nodes[n.ID] = n
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes, r.indexed = nodes, now
	for id := range r.seen {
		if nodes[id] == nil {
			delete(r.seen, id)
			delete(r.series, id)
		}
	}
	return nil
}

func (r *Recorder) seriesLocked(key string) *series {
	s := r.series[key]
	if s == nil && len(r.series) < maxSeries {
		s = new(series)
		r.series[key] = s
	}
	return s
}

func (r *Recorder) eventLocked(org string, e Event) {
	es := append(r.events[org], e)
	if len(es) > maxEvents {
		es = slices.Delete(es, 0, len(es)-maxEvents)
	}
	r.events[org] = es
}

// heardLocked takes over a heartbeat.
func (r *Recorder) heardLocked(n *store.Node, s *seen, beat presence.Beat) {
	gap := beat.At.Sub(s.at).Seconds()
	first := s.at.IsZero()
	s.at = beat.At
	if n.Kind == identity.Relay {
		s.load = sample{down: float32(beat.Load["bytes_per_second"]), sessions: float32(beat.Load["allocations"])}
		return
	}
	s.load = sample{}
	now := make(map[sessionKey]counters, min(len(beat.Sessions), maxSessions))
	for _, v := range beat.Sessions {
		if v.Peer.Org != n.Org {
			continue
		}
		s.load.sessions++
		k := sessionKey{v.Peer.ID, v.Since.UnixNano()}
		c := counters{v.SentBytes, v.RecvBytes, v.Relay}
		if len(now) < maxSessions {
			now[k] = c
		}
		old, known := s.sessions[k]
		if first || gap <= 0 || !known && beat.At.Sub(v.Since).Seconds() > gap+fineStep.Seconds() {
			continue // what it moved before is of no known time
		}
		s.load.down += float32(float64(c.sent-min(old.sent, c.sent)) / gap)
		s.load.up += float32(float64(c.recv-min(old.recv, c.recv)) / gap)
		if known && old.relay != c.relay && old.relay != "" && c.relay != "" {
			r.eventLocked(n.Org, Event{At: beat.At, Kind: Moved, Node: n.Name, NodeKind: n.Kind, Peer: r.nameLocked(v.Peer.ID), From: r.nameLocked(old.relay), To: r.nameLocked(c.relay)})
		}
	}
	s.sessions = now
}

// nameLocked is the name of a node by its id, the text itself when it is none.
func (r *Recorder) nameLocked(id string) string {
	if n := r.nodes[id]; n != nil {
		return n.Name
	}
	return id
}

func (r *Recorder) stateLocked(n *store.Node, s *seen, now time.Time) {
	state := r.board.State(n, now)
	if s.state != "" && s.state != state {
		r.eventLocked(n.Org, Event{At: now, Kind: State, Node: n.Name, NodeKind: n.Kind, From: string(s.state), To: string(state)})
	}
	s.state = state
}

// Org returns an organization's throughput and sessions, oldest step first.
func (r *Recorder) Org(org string, span Span, now time.Time) []Point {
	return r.read("org/"+org, span, now)
}

// Node returns a node's: of a relay, Down is all that it passes on and Sessions are its allocations.
func (r *Recorder) Node(id string, span Span, now time.Time) []Point { return r.read(id, span, now) }

func (r *Recorder) read(key string, span Span, now time.Time) []Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.series[key]
	if s == nil {
		s = new(series)
	}
	return s.points(span, now)
}

// Events returns what changed in an organization in a span, newest first.
func (r *Recorder) Events(org string, span Span, now time.Time) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Event
	for _, e := range slices.Backward(r.events[org]) {
		if now.Sub(e.At) > min(span.Length(), eventsKept) {
			break
		}
		out = append(out, e)
	}
	return out
}
