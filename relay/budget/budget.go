// Package budget says who counts as one to a relay, and what bandwidth one has: by whatever port and transport a node and its organization
// come, they use up the same.
//
//	b := budget.New()
//	b.Set("acme", budget.Rates{Organization: 100 << 20, Node: 10 << 20})
//	share := b.Enter(node)
//	defer b.Leave(node)
//	if !share.Take(len(run), now) { … } // over the limit: drop it
package budget

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/identity"
)

// Source is who is counted as one while nobody is authenticated: an IPv4 address or an IPv6 /64, without the port.
type Source [16]byte

// SourceOf is the source that an address belongs to. An IPv4 address in IPv6 form is the same as in its own.
func SourceOf(a netip.Addr) Source {
	a = a.Unmap()
	s := Source(a.As16())
	if !a.Is4() {
		clear(s[8:])
	}
	return s
}

// bucket is a token bucket without a lock (GCRA): its whole state is when the tokens taken so far will have been paid for. The zero bucket
// has no limit.
type bucket struct {
	rate atomic.Int64 // bytes per second; 0 is no limit
	paid atomic.Int64 // Unix nanoseconds
}

// burst is how far ahead of its rate a bucket may run, and least the bytes it may always be ahead: one coalesced read.
const (
	burst = 100 * time.Millisecond
	least = 128 << 10
)

// take takes n bytes at now (Unix nanoseconds), or reports that they are over the limit.
func (b *bucket) take(n int, now int64) bool {
	rate := b.rate.Load()
	if rate <= 0 {
		return true
	}
	cost := int64(n) * int64(time.Second) / rate
	ahead := max(int64(burst), least*int64(time.Second)/rate)
	for {
		old := b.paid.Load()
		next := max(old, now) + cost
		if next-now > ahead {
			return false
		}
		if b.paid.CompareAndSwap(old, next) {
			return true
		}
	}
}

// Rates are bounds in bytes per second of what nodes send; 0 is no bound.
type Rates struct {
	Organization int64 // of all its nodes together
	Node         int64 // of each
}

// Budgets are those of every organization at a relay. Its methods may be called concurrently.
type Budgets struct {
	mu    sync.Mutex // guards what follows
	orgs  map[string]*organization
	nodes map[identity.Node]*node
}

type organization struct {
	rates  Rates
	bucket bucket
}

type node struct {
	Share
	users int
}

// Share is what a node may use, of its own and of its organization's. Its methods may be called concurrently.
type Share struct {
	own bucket
	org *bucket
}

// New has no bounds.
func New() *Budgets {
	return &Budgets{orgs: map[string]*organization{}, nodes: map[identity.Node]*node{}}
}

// Set bounds an organization and its nodes from now on.
func (b *Budgets) Set(org string, r Rates) {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.orgLocked(org)
	o.rates = r
	o.bucket.rate.Store(r.Organization)
	for n, s := range b.nodes {
		if n.Org == org {
			s.own.rate.Store(r.Node)
		}
	}
}

// orgLocked is an organization's entry. It stays: organizations are few.
func (b *Budgets) orgLocked(name string) *organization {
	o := b.orgs[name]
	if o == nil {
		o = &organization{}
		b.orgs[name] = o
	}
	return o
}

// Enter is the share of a node, the same one for all who use it at a time. Each of them calls Leave when it is done.
func (b *Budgets) Enter(n identity.Node) *Share {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.nodes[n]
	if s == nil {
		o := b.orgLocked(n.Org)
		s = &node{}
		s.org = &o.bucket
		s.own.rate.Store(o.rates.Node)
		b.nodes[n] = s
	}
	s.users++
	return &s.Share
}

// Leave ends one use. After the last one the node is forgotten.
func (b *Budgets) Leave(n identity.Node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.nodes[n]; s != nil {
		if s.users--; s.users == 0 {
			delete(b.nodes, n)
		}
	}
}

// Take takes n bytes at now (Unix nanoseconds), or reports that they are over a limit.
func (s *Share) Take(n int, now int64) bool { return s.own.take(n, now) && s.org.take(n, now) }
