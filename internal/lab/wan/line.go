package wan

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	maxPacket = 65535    // bytes of an IP packet
	maxHeld   = 64 << 20 // bytes of packets on the way: 1 Gbit/s for half a second
	never     = time.Duration(math.MaxInt64)
)

// line decides which packets arrive, and when. It has no clock: times are given, since its start. It is not safe for
// concurrent use.
type line struct {
	d     Direction
	head  int // bytes of vnet header
	split bool
	rng   *rand.Rand

	free  time.Duration // when the sender has sent everything
	last  time.Duration // when the last packet arrives that keeps the order
	seq   uint64        // of packets that are due at the same time
	held  int           // bytes in queue
	queue packets
	count Count
}

func newLine(d Direction, head int, split bool, seed, stream uint64) *line {
	return &line{d: d.withDefaults(), head: head, split: split, rng: rand.New(rand.NewPCG(seed, stream))} //nolint:gosec // repeatable on purpose
}

// set changes what the line does to packets that are not yet on it. They wait for no rate that is not theirs.
func (l *line) set(d Direction) {
	l.d = d.withDefaults()
	l.free = 0
}

// admit puts a packet on the line, or drops it or parts of it. It copies frame.
func (l *line) admit(now time.Duration, frame []byte) {
	if len(frame) <= l.head {
		return
	}
	s := parse(frame, l.head)
	start := -1 // of the run of segments that stay together
	var end time.Duration
	for i := range s.n {
		sent, ok := l.send(now, s.size(i))
		if !ok {
			if start >= 0 {
				l.push(end, &s, start, i)
				start = -1
			}
			continue
		}
		end = sent
		if start < 0 {
			start = i
		}
		if l.split {
			l.push(end, &s, start, i+1)
			start = -1
		}
	}
	if start >= 0 {
		l.push(end, &s, start, s.n)
	}
}

// send sends a packet of size bytes and returns when it has left; false is that it does not arrive.
func (l *line) send(now time.Duration, size int) (time.Duration, bool) {
	if l.d.MTU > 0 && size > l.d.MTU {
		l.count.MTUDrops++
		return 0, false
	}
	if l.held > maxHeld {
		l.count.QueueDrops++
		return 0, false
	}
	sent := now
	if l.d.Rate > 0 {
		backlog := max(0, l.free-now)
		if int64(float64(backlog)/float64(time.Second)*float64(l.d.Rate)/8)+int64(size) > int64(l.d.Queue) {
			l.count.QueueDrops++
			return 0, false
		}
		sent = max(now, l.free) + time.Duration(int64(size)*8*int64(time.Second)/l.d.Rate)
		l.free = sent
	}
	if l.d.Loss > 0 && l.rng.Float64() < l.d.Loss {
		l.count.Lost++
		return 0, false
	}
	return sent, true
}

// push puts segments from to to, which have left at sent, on the way.
func (l *line) push(sent time.Duration, s *segments, from, to int) {
	at := sent + l.d.Delay
	if l.d.Jitter > 0 {
		at += time.Duration(l.rng.Int64N(int64(l.d.Jitter) + 1))
	}
	at = max(at, l.last)
	if l.d.Reorder > 0 && l.rng.Float64() < l.d.Reorder {
		at += l.d.ReorderBy
		l.count.Reordered += uint64(to - from)
	} else {
		l.last = at
	}
	p := newPacket(l.head + s.off + maxPayload(s, from, to))
	p.frame = s.cut(p.frame, from, to)
	p.at, p.seq, p.packets, p.bytes = at, l.seq, to-from, 0
	for i := from; i < to; i++ {
		p.bytes += s.size(i)
	}
	l.seq++
	l.held += len(p.frame)
	heap.Push(&l.queue, p)
}

func maxPayload(s *segments, from, to int) int {
	if s.n == 1 {
		return len(s.frame) - s.head - s.off
	}
	return (to - from) * s.gso
}

// next is when the first packet is due; never without one.
func (l *line) next() time.Duration {
	if len(l.queue) == 0 {
		return never
	}
	return l.queue[0].at
}

// due appends the packets that have arrived by now to ps, in order. The caller releases them.
func (l *line) due(now time.Duration, ps []*packet) []*packet {
	for l.next() <= now {
		p := heap.Pop(&l.queue).(*packet)
		l.held -= len(p.frame)
		l.count.Passed += uint64(p.packets)
		l.count.Bytes += uint64(p.bytes)
		ps = append(ps, p)
	}
	return ps
}

// packet is one on the way: a frame with its header, perhaps several packets of the link in one.
type packet struct {
	at      time.Duration
	seq     uint64
	packets int
	bytes   int // of all of them, as the link sees them
	frame   []byte
	pool    *sync.Pool
}

// pools keep packets by the size of their buffers, so that a small one does not hold 64 KiB.
var pools = [...]struct {
	size int
	pool *sync.Pool
}{{2 << 10, new(sync.Pool)}, {20 << 10, new(sync.Pool)}, {vnetLen + maxPacket, new(sync.Pool)}}

// newPacket returns one with an empty frame that has room for size bytes.
func newPacket(size int) *packet {
	for _, c := range pools {
		if size > c.size {
			continue
		}
		if p, ok := c.pool.Get().(*packet); ok {
			p.frame = p.frame[:0]
			return p
		}
		return &packet{frame: make([]byte, 0, c.size), pool: c.pool}
	}
	return &packet{frame: make([]byte, 0, size)}
}

func (p *packet) release() {
	if p.pool != nil {
		p.pool.Put(p)
	}
}

// packets is a heap by time.
type packets []*packet

func (q packets) Len() int { return len(q) }
func (q packets) Less(i, j int) bool {
	if q[i].at != q[j].at {
		return q[i].at < q[j].at
	}
	return q[i].seq < q[j].seq
}
func (q packets) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *packets) Push(x any)   { *q = append(*q, x.(*packet)) }
func (q *packets) Pop() any {
	old := *q
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return p
}
