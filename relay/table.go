package relay

import (
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"sallyway/internal/identity"
	"sallyway/relay/budget"
)

// shared is a map that the data path reads without a lock: each of its shards is an immutable map, copied by writers.
type shared[V any] struct {
	seed   maphash.Seed
	shards [256]struct {
		mu sync.Mutex // writers
		m  atomic.Pointer[map[netip.AddrPort]V]
	}
}

func (t *shared[V]) init() {
	t.seed = maphash.MakeSeed()
	for i := range t.shards {
		m := map[netip.AddrPort]V{}
		t.shards[i].m.Store(&m)
	}
}

func (t *shared[V]) shard(k netip.AddrPort) int {
	var b [18]byte
	ip := k.Addr().As16()
	copy(b[:], ip[:])
	b[16], b[17] = byte(k.Port()>>8), byte(k.Port())
	return int(maphash.Bytes(t.seed, b[:]) % uint64(len(t.shards)))
}

func (t *shared[V]) get(k netip.AddrPort) (V, bool) {
	v, ok := (*t.shards[t.shard(k)].m.Load())[k]
	return v, ok
}

// update replaces the value of k by what f makes of it; keep false removes it.
func (t *shared[V]) update(k netip.AddrPort, f func(old V, found bool) (v V, keep bool)) {
	s := &t.shards[t.shard(k)]
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.m.Load()
	was, found := old[k]
	v, keep := f(was, found)
	if !keep && !found {
		return
	}
	m := make(map[netip.AddrPort]V, len(old)+1)
	for key, value := range old {
		m[key] = value
	}
	delete(m, k)
	if keep {
		m[k] = v
	}
	s.m.Store(&m)
}

func (t *shared[V]) set(k netip.AddrPort, v V) {
	t.update(k, func(V, bool) (V, bool) { return v, true })
}

// nodeState is what all allocations of a node share.
type nodeState struct {
	share  *budget.Share
	asked  atomic.Int64  // rendezvous requests are paid for until then, Unix nanoseconds
	allocs []*allocation // oldest first
}

// table is the relay's allocations, by everything they are looked up by.
type table struct {
	plain   shared[*allocation] // source address → allocation whose data, and for plain UDP control, is not inside DTLS
	relayed shared[*allocation] // relayed address → allocation

	budgets *budget.Budgets

	mu               sync.Mutex // guards the rest
	all              map[*allocation]struct{}
	nodes            map[identity.Node]*nodeState
	orgCount         map[string]int
	sourceCount      map[budget.Source]int
	minPort, maxPort uint16
	usedPorts        map[uint16]bool
	quarantined      map[uint16]int64 // until when, Unix nanoseconds
}

func (t *table) init(minPort, maxPort uint16, budgets *budget.Budgets) {
	t.budgets = budgets
	t.plain.init()
	t.relayed.init()
	t.all = map[*allocation]struct{}{}
	t.nodes = map[identity.Node]*nodeState{}
	t.orgCount = map[string]int{}
	t.sourceCount = map[budget.Source]int{}
	t.minPort, t.maxPort = minPort, maxPort
	t.usedPorts = map[uint16]bool{}
	t.quarantined = map[uint16]int64{}
}

// snapshot returns the live allocations.
func (t *table) snapshot() []*allocation {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*allocation, 0, len(t.all))
	for a := range t.all {
		list = append(list, a)
	}
	return list
}

// newest returns the youngest live allocation of n, or nil.
func (t *table) newest(n identity.Node) *allocation {
	t.mu.Lock()
	defer t.mu.Unlock()
	ns := t.nodes[n]
	if ns == nil || len(ns.allocs) == 0 {
		return nil
	}
	return ns.allocs[len(ns.allocs)-1]
}

// takePortLocked reserves a random port that is neither in use nor quarantined, and that try, which may open a socket, accepts.
func (t *table) takePortLocked(now int64, try func(port uint16) bool) (uint16, bool) {
	n := int(t.maxPort) - int(t.minPort) + 1
	const attempts = 128 // ports that try refuses, as sockets of other programs, are skipped this often before giving up
	const random = 32    // tries at random, which nearly always hit; then one by one from a random start
	refused := 0
	start := rand.IntN(n)
	for i := range n + random {
		at := (start + i) % n
		if i < random {
			at = rand.IntN(n)
		}
		p := uint16(int(t.minPort) + at)
		if t.usedPorts[p] || t.quarantined[p] > now {
			continue
		}
		if !try(p) {
			if refused++; refused == attempts {
				break
			}
			continue
		}
		delete(t.quarantined, p)
		t.usedPorts[p] = true
		return p, true
	}
	return 0, false
}

// releasePorts forgets quarantines that are over, and nodes that are gone and owe nothing.
func (t *table) releasePorts(now int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p, until := range t.quarantined {
		if until <= now {
			delete(t.quarantined, p)
		}
	}
	for n, st := range t.nodes {
		t.forgetLocked(n, st, now)
	}
}

// insertLocked adds a, whose relayed port is reserved.
func (t *table) insertLocked(a *allocation) {
	t.all[a] = struct{}{}
	a.node.allocs = append(a.node.allocs, a)
	t.orgCount[a.owner.Org]++
	t.sourceCount[budget.SourceOf(a.source.Addr())]++
	t.relayed.set(a.relayed, a)
	if a.plain {
		t.plain.set(a.source, a)
	}
}

// forgetLocked drops the state of a node without allocations, unless it still owes for what it asked: ending an allocation does not pay.
func (t *table) forgetLocked(n identity.Node, st *nodeState, now int64) {
	if len(st.allocs) == 0 && st.asked.Load() <= now {
		delete(t.nodes, n)
		t.budgets.Leave(n)
	}
}

// removeLocked takes a out of the table and quarantines its port. It reports whether a was in it.
func (t *table) removeLocked(a *allocation, now int64) bool {
	if _, live := t.all[a]; !live {
		return false
	}
	delete(t.all, a)
	a.node.allocs = slices.DeleteFunc(a.node.allocs, func(x *allocation) bool { return x == a })
	t.forgetLocked(a.owner, a.node, now)
	if t.orgCount[a.owner.Org]--; t.orgCount[a.owner.Org] == 0 {
		delete(t.orgCount, a.owner.Org)
	}
	src := budget.SourceOf(a.source.Addr())
	if t.sourceCount[src]--; t.sourceCount[src] == 0 {
		delete(t.sourceCount, src)
	}
	mine := func(old *allocation, found bool) (*allocation, bool) { return old, found && old != a }
	t.relayed.update(a.relayed, mine)
	if a.plain {
		t.plain.update(a.source, mine)
	}
	delete(t.usedPorts, a.relayed.Port())
	t.quarantined[a.relayed.Port()] = now + int64(portQuarantine)
	return true
}
