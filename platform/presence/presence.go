// Package presence knows which nodes are there: the newest heartbeat of each, kept in memory.
package presence

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/store"
)

// Timeout is the age of the newest heartbeat at which a node counts as unreachable: three intervals.
const Timeout = 3 * control.HeartbeatInterval

// States that a node tells of itself (control.Heartbeat.State).
const (
	SaysDegraded = "degraded"
	SaysDraining = "draining"
)

// Beat is a node's newest heartbeat and when it came.
type Beat struct {
	At time.Time
	control.Heartbeat
}

// Board holds the beats, and what was found of relays from outside. The zero value is empty and usable; methods may be called concurrently.
type Board struct {
	mu      sync.Mutex
	beats   map[string]Beat            // by node id; guarded by mu
	outside map[string]control.Outside // by relay id; guarded by mu; the map is replaced, never changed
	began   map[string]time.Time       // of beats: when the node's present start was, by the platform's clock where that is known; guarded by mu

	returned map[string]struct{} // relays that were heard anew since they were last taken; guarded by mu; nil while nobody wants them
	anew     chan struct{}       // made by Returning; guarded by mu
}

// OutsideLife is how long what was found from outside counts: whoever looks does so every half minute.
const OutsideLife = 3 * time.Minute

// SetOutside replaces what was found from outside. The board keeps the map.
func (b *Board) SetOutside(found map[string]control.Outside) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.outside = found
}

// Outside is what was found of a relay from outside, false when it was not tried lately, or not since it was started.
func (b *Board) Outside(id string, now time.Time) (control.Outside, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	o, ok := b.outside[id]
	return o, ok && now.Sub(o.At) < OutsideLife && !o.At.Before(b.began[id])
}

// Returning tells when relays are heard for the first time, after a start of theirs, or after a silence: TakeReturned then says which. From the
// first call on they are kept, so whoever calls takes them.
func (b *Board) Returning() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.returned == nil {
		b.returned, b.anew = make(map[string]struct{}), make(chan struct{}, 1)
	}
	return b.anew
}

// TakeReturned are the ids of the relays that returned since it was last called, sorted.
func (b *Board) TakeReturned() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	ids := slices.Sorted(maps.Keys(b.returned))
	clear(b.returned)
	return ids
}

// Doubt is why a relay may be of no use although its heartbeats arrive, and what helps; "" is none.
func (b *Board) Doubt(id string, now time.Time) (why, remedy string) {
	if o, ok := b.Outside(id, now); ok && (o.State == control.OutsideUnreached || o.State == control.OutsidePartly) {
		return o.Why, o.Remedy
	}
	return "", ""
}

// Put records a heartbeat.
func (b *Board) Put(id string, beat Beat) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.beats == nil {
		b.beats, b.began = make(map[string]Beat), make(map[string]time.Time)
	}
	before, known := b.beats[id]
	b.beats[id] = beat
	started := !before.Started.Equal(beat.Started)
	switch {
	case !known && beat.Started.Before(beat.At):
		b.began[id] = beat.Started
	case !known, started:
		b.began[id] = beat.At // not later, and no clock but ours says so
	}
	if b.returned != nil && strings.HasPrefix(id, relayPrefix) && (!known || started || beat.At.Sub(before.At) >= Timeout) {
		b.returned[id] = struct{}{}
		select {
		case b.anew <- struct{}{}:
		default: // told already
		}
	}
}

// relayPrefix begins the ids of relays (identity.NewID).
const relayPrefix = "r-"

// Get returns a node's newest heartbeat.
func (b *Board) Get(id string) (Beat, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	beat, ok := b.beats[id]
	return beat, ok
}

// Drop forgets a node.
func (b *Board) Drop(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.beats, id)
	delete(b.began, id)
	delete(b.returned, id)
}

// Passed reports whether some node's newest heartbeat reached one of ages after from and by to: whether silence may have changed
// anything in that time.
func (b *Board) Passed(from, to time.Time, ages ...time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, beat := range b.beats {
		if Reached(beat.At, from, to, ages...) {
			return true
		}
	}
	return false
}

// Reached reports whether something that happened at at reached one of ages after from and by to.
func Reached(at, from, to time.Time, ages ...time.Duration) bool {
	for _, age := range ages {
		if t := at.Add(age); t.After(from) && !t.After(to) {
			return true
		}
	}
	return false
}

// LastSeen is when the node was last heard: its newest heartbeat or what the database remembers.
func (b *Board) LastSeen(n *store.Node) time.Time {
	if beat, ok := b.Get(n.ID); ok && beat.At.After(n.LastSeen) {
		return beat.At
	}
	return n.LastSeen
}

// State is what the platform knows of a node's life: what it says, and of a relay also what was found from outside.
func (b *Board) State(n *store.Node, now time.Time) control.NodeState {
	s := b.Said(n, now)
	if s == control.StateHealthy && n.Kind == identity.Relay {
		if why, _ := b.Doubt(n.ID, now); why != "" {
			return control.StateDegraded
		}
	}
	return s
}

// Said is a node's life by its heartbeats and by what administrators decided.
func (b *Board) Said(n *store.Node, now time.Time) control.NodeState {
	switch {
	case n.Status == store.Disabled:
		return control.StateDisabled
	case n.Status == store.Revoked:
		return control.StateRevoked
	case n.Enrolled.IsZero():
		return control.StatePending
	}
	beat, ok := b.Get(n.ID)
	switch {
	case !ok && now.Sub(n.LastSeen) < Timeout && !n.Draining:
		return control.StateHealthy // the platform has just started
	case !ok || now.Sub(beat.At) >= Timeout:
		return control.StateUnreachable
	case n.Draining || beat.State == SaysDraining:
		return control.StateDraining
	case beat.State == SaysDegraded || len(beat.Problems) > 0:
		return control.StateDegraded
	}
	return control.StateHealthy
}

// All is a copy of the newest beats, by node id.
func (b *Board) All() map[string]Beat {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.beats)
}
