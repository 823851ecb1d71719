package relay

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/relay/udpio"
)

// Fairness among sources of data. A socket's queue drops blindly what comes last, so that one source that sends more than the relay can pass
// on would take from all that share its shard. When a shard's queue overflows, the shard counts for a moment who used it, and sets those
// aside that use more than their max-min fair share: the kernel queues their datagrams at one of a few other sockets, each with a goroutine
// of its own, where they compete with their like. Who sends little keeps a short queue. Nobody has a quota, nothing is locked or counted
// while no queue overflows, and a source is let back when it sends a quarter of what it sent.

const (
	// maxAside is how many sources are set aside at once: the kernel goes through a list.
	maxAside = 64
	// fairReads is how many reads lie between two looks at the queue: at most 1 MiB.
	fairReads = 16
	// fairWindow is for how long it is counted who uses a shard.
	fairWindow = 10 * time.Millisecond
	// fairLinger is how long after the last overflow a shard still counts.
	fairLinger = time.Second
	// fairCall is what a read or a write costs beside its bytes, in bytes: a datagram alone costs nearly as much as 8 KiB of them.
	fairCall = 8 << 10
	// fairSources bounds the table of a window. What goes beyond it are forged sources, of which none is over its share.
	fairSources = 1 << 14
	// asideLeast is the shortest time over which a source set aside is judged.
	asideLeast = 500 * time.Millisecond
)

// fairness is what a shard for data counts. It is the shard's goroutine's own.
type fairness struct {
	aside  *aside
	gauge  *udpio.Gauge
	reads  int
	drops  uint64 // of the queue, when last looked at
	active bool   // the queue has overflowed of late
	began  time.Time
	lost   time.Time // when the queue last overflowed
	used   map[netip.AddrPort]int64
	order  []usage // scratch
}

// usage is what a source used.
type usage struct {
	from netip.AddrPort
	cost int64
}

func newFairness(a *aside, sock *udpio.Conn) *fairness {
	return &fairness{aside: a, gauge: sock.NewGauge(), used: map[netip.AddrPort]int64{}}
}

// gone reports whether a source of what was just read has been set aside since it was queued here. What it left behind is dropped: it would
// come out of order, and it is what fills the queue.
func (f *fairness) gone(from netip.AddrPort) bool {
	return f.active && f.aside.get(from) != nil
}

// account takes note of a read of n bytes of a source that took calls writes.
func (f *fairness) account(from netip.AddrPort, n, calls int) {
	if f.active && len(f.used) < fairSources {
		f.used[from] += cost(n, calls)
	}
	if f.reads++; f.reads < fairReads {
		return
	}
	f.reads = 0
	now := time.Now()
	if f.active && now.Sub(f.began) < fairWindow {
		return
	}
	q := f.gauge.Queue()
	lost := q.Drops != f.drops
	f.drops = q.Drops
	switch {
	case lost && f.active:
		f.aside.set(f.over(), now.Sub(f.began))
		f.lost = now
	case lost:
		f.active, f.lost = true, now
	case now.Sub(f.lost) > fairLinger:
		f.active = false
	}
	f.began = now
	clear(f.used)
}

func cost(n, calls int) int64 { return int64(n) + int64(1+calls)*fairCall }

// over are the sources over their max-min fair share of what the shard has done in this window, the greatest last. The queue overflowed,
// so that each of them sent more than was read: at least a tenth, it is supposed.
func (f *fairness) over() []usage {
	f.order = f.order[:0]
	var left int64
	for from, c := range f.used {
		f.order = append(f.order, usage{from, c})
		left += c
	}
	slices.SortFunc(f.order, func(a, b usage) int { return int(a.cost - b.cost) })
	for i, u := range f.order {
		n := len(f.order) - i
		sent := u.cost + u.cost/10
		if sent <= left/int64(n) {
			left -= sent
			continue
		}
		// Where there are many of them the rest are few, and nobody is to blame.
		if n > maxAside && n > len(f.order)/2 {
			return nil
		}
		return f.order[i:]
	}
	return nil
}

// aside is the sources that are set aside.
type aside struct {
	steer func([]udpio.Pin) error // set before the sockets are read
	first int                     // index of the first socket for them in the port's group

	view atomic.Pointer[map[netip.AddrPort]*outcast] // immutable, for lookups

	mu     sync.Mutex // guards the rest
	count  []int      // by socket
	drops  []uint64   // likewise, when last judged
	judged time.Time

	dropped counter // datagrams that sources had left behind
	total   counter // times that a source was set aside
}

// outcast is a source that is set aside.
type outcast struct {
	socket int
	rate   float64      // cost per second when it was set aside
	used   atomic.Int64 // cost since it was last judged
	since  time.Time
}

// newAside spreads who is set aside over sockets, of which the first is the first'th of the port.
func newAside(first, sockets int, steer func([]udpio.Pin) error) *aside {
	a := &aside{first: first, count: make([]int, sockets), drops: make([]uint64, sockets), steer: steer}
	a.view.Store(&map[netip.AddrPort]*outcast{})
	return a
}

func (a *aside) get(from netip.AddrPort) *outcast { return (*a.view.Load())[from] }

// set sets sources aside, the last first, which used a shard for d.
func (a *aside) set(sources []usage, d time.Duration) {
	if len(sources) == 0 || d <= 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	m := maps.Clone(*a.view.Load())
	before := len(m)
	for _, u := range slices.Backward(sources) {
		if len(m) == maxAside {
			break
		}
		if m[u.from] != nil {
			continue
		}
		socket := 0
		for i, n := range a.count {
			if n < a.count[socket] {
				socket = i
			}
		}
		a.count[socket]++
		m[u.from] = &outcast{socket: socket, rate: float64(u.cost) / d.Seconds(), since: time.Now()}
		a.total.Add(1)
	}
	if len(m) > before {
		a.applyLocked(m)
	}
}

// applyLocked makes m what the kernel goes by. a.mu is held.
func (a *aside) applyLocked(m map[netip.AddrPort]*outcast) {
	pins := make([]udpio.Pin, 0, len(m))
	for from, o := range m {
		pins = append(pins, udpio.Pin{From: from, Socket: a.first + o.socket})
	}
	if a.steer(pins) != nil { // all stay where they are
		m = map[netip.AddrPort]*outcast{}
		clear(a.count)
	}
	a.view.Store(&m)
}

// judge lets those back that send little now. drops is how much each of the sockets has refused so far: a source that shares one that
// overflows sends more than is seen of it.
func (a *aside) judge(now time.Time, drops func(socket int) uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := *a.view.Load()
	last := a.judged
	d := now.Sub(last)
	if d < asideLeast {
		return
	}
	a.judged = now
	if len(old) == 0 {
		return
	}
	m := maps.Clone(old)
	full := make([]bool, len(a.drops))
	for i := range a.drops {
		n := drops(a.first + i)
		full[i], a.drops[i] = n != a.drops[i], n
	}
	for from, o := range old {
		used := float64(o.used.Swap(0)) / d.Seconds()
		if o.since.After(last) || used > o.rate/4 || (full[o.socket] && used > o.rate/64) {
			continue
		}
		delete(m, from)
		a.count[o.socket]--
	}
	if len(m) < len(old) {
		a.applyLocked(m)
	}
}
