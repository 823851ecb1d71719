package fallback

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"sallyway/relay/budget"
)

// gateBuckets is the size of the table of rates. Sources that meet in a bucket share it: they may be limited early, never late.
const gateBuckets = 4096

// gate bounds connections that are not authenticated: their rate by source, and how many there are at a time. Its size is fixed.
type gate struct {
	limits Limits
	now    func() time.Time
	seed   maphash.Seed

	mu      sync.Mutex // guards what follows
	paid    [gateBuckets]int64
	sources map[budget.Source]int // half-open connections; at most limits.HalfOpen
	oldest  *place                // a list, oldest first
	newest  *place
	places  int
}

// place is one half-open connection's.
type place struct {
	g          *gate
	src        budget.Source
	evict      func()
	prev, next *place
	gone       bool
}

func newGate(l Limits, now func() time.Time) *gate {
	return &gate{limits: l, now: now, seed: maphash.MakeSeed(), sources: map[budget.Source]int{}}
}

// enter takes a place for a connection from a, which evict closes when another one needs it; nil is no place.
func (g *gate) enter(a netip.Addr, evict func()) *place {
	src := budget.SourceOf(a)
	g.mu.Lock()
	if !g.paysLocked(src) || g.sources[src] >= g.limits.HalfOpenSource {
		g.mu.Unlock()
		return nil
	}
	var out *place
	if g.places >= g.limits.HalfOpen {
		out = g.oldest
		g.removeLocked(out)
	}
	p := &place{g: g, src: src, evict: evict, prev: g.newest}
	if g.newest != nil {
		g.newest.next = p
	} else {
		g.oldest = p
	}
	g.newest = p
	g.places++
	g.sources[src]++
	g.mu.Unlock()
	if out != nil {
		out.evict()
	}
	return p
}

// paysLocked takes a token of the source's bucket.
func (g *gate) paysLocked(src budget.Source) bool {
	every := int64(float64(time.Second) / g.limits.Rate)
	b := &g.paid[maphash.Bytes(g.seed, src[:])%gateBuckets]
	now := g.now().UnixNano()
	next := max(*b, now) + every
	if next-now > 2*int64(time.Second) {
		return false
	}
	*b = next
	return true
}

func (g *gate) removeLocked(p *place) {
	if p.gone {
		return
	}
	p.gone = true
	if p.prev != nil {
		p.prev.next = p.next
	} else {
		g.oldest = p.next
	}
	if p.next != nil {
		p.next.prev = p.prev
	} else {
		g.newest = p.prev
	}
	p.prev, p.next = nil, nil
	g.places--
	if g.sources[p.src]--; g.sources[p.src] == 0 {
		delete(g.sources, p.src)
	}
}

// leave gives the place back: the connection is authenticated, or closed. It may be called more than once.
func (p *place) leave() {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	p.g.removeLocked(p)
}
