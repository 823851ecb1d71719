package tunnel

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"

	"sallyway/internal/datagram"
)

// firstQUIC is the least first byte of a QUIC packet: its fixed bit is set (RFC 9000 §17.2, RFC 9443). Below are STUN's probes.
const firstQUIC = 64

// aliasMark is the first byte before a QUIC packet that is to be taken as coming on the link's other path (see port.alias).
const aliasMark = 63

// virtualPort is the port of every virtual address.
const virtualPort = 443

// virtualAddr makes the address that stands for link number id, in the discard-only prefix 100::/64 (RFC 6666): no packet with it can
// ever be on a wire.
func virtualAddr(id uint64) *net.UDPAddr {
	ip := make(net.IP, net.IPv6len)
	ip[0] = 0x01
	binary.BigEndian.PutUint64(ip[8:], id)
	return &net.UDPAddr{IP: ip, Port: virtualPort}
}

// virtualID is the inverse of virtualAddr.
func virtualID(a *net.UDPAddr) uint64 {
	if a == nil || len(a.IP) != net.IPv6len {
		return 0
	}
	return binary.BigEndian.Uint64(a.IP[8:])
}

func addrPort(a *net.UDPAddr) netip.AddrPort { return a.AddrPort() }

// vconn is the receiving half of the packet conns that QUIC gets, and what the interfaces it looks for ask of a socket. It never fails
// towards QUIC before it is closed: a read error would end every connection on it, a write error the connection. What arrives is queued by
// source; sources take turns, and one whose connection has enough to do holds up no other.
type vconn struct {
	local *net.UDPAddr
	raw   *rawSocket
	// orphaned, if not nil, is called by the reader, not often, when something came from a source whose connection is not known.
	orphaned func()

	mu       sync.Mutex // guards what follows, and the queues of the sources
	arrived  sync.Cond  // a source has something, the deadline passed, a connection made room, or the conn closed
	ready    []*source  // have something, in the order in which they are read
	full     []*source  // have something, and connections that have enough
	held     int        // bytes that all queues hold, of limit
	limit    int
	deadline time.Time
	timer    *time.Timer // for the deadline
	recheck  *time.Timer // for full
	closed   bool

	waiting atomic.Bool // full is not empty

	// What ReadBatch has begun to hand out, from whom, and how many datagrams the connection still takes; only its goroutine's, which changes
	// from with mu held.
	reading  arrival
	from     *source
	room     int
	askAgain time.Duration // when orphaned may be called next

	stats connCounters
}

// arrival is a run of datagrams and when it came.
type arrival struct {
	batch datagram.Batch
	cost  int // bytes of buffer
	at    time.Duration
}

// source is a virtual address that datagrams come from.
type source struct {
	addr atomic.Pointer[net.UDPAddr] // relabel changes a link's
	in   intake
	last atomic.Int64 // when QUIC packets last came, since epoch

	// Guarded by the vconn's mu:
	ring    []arrival // a power of two, grown as needed
	head, n int
	held    int              // bytes
	listed  bool             // in ready or full, or being read
	delay   standing         // of the queue
	shared  *datagram.Buffer // that small arrivals are copied to, up to filled
	filled  int
}

// epoch is the moment that times of arrival count from.
var epoch = time.Now().Add(-time.Hour)

func sinceEpoch() time.Duration { return time.Since(epoch) }

const (
	// fullRecheck is how often connections that have enough are asked whether they made room. What they send makes them be asked earlier.
	fullRecheck = time.Millisecond
	// orphanedEvery is the least time between two calls of orphaned.
	orphanedEvery = 100 * time.Millisecond
	// packAfter is how many arrivals may wait in a queue before small ones, of packSize bytes at most, share buffers.
	packAfter, packSize = 4, datagram.MaxBatch / 2
)

type connCounters struct {
	received, sent, droppedFull, droppedUnknown, droppedSize, probes atomic.Uint64
	marked, droppedLate, paused, stalled, rescued                    atomic.Uint64
}

func (c *vconn) init(local *net.UDPAddr, raw *rawSocket, queue int) {
	if queue <= 0 {
		queue = DefaultQueue
	}
	c.local, c.raw, c.limit = local, raw, queue*datagram.MaxBatch
	c.arrived.L = &c.mu
}

// probeHandler takes datagrams that are no QUIC. payload is valid until it returns.
type probeHandler interface{ handleProbe(payload []byte) }

// receive queues what QUIC is to get and hands every other datagram to h before it returns.
func (c *vconn) receive(b datagram.Batch, from *source, h probeHandler) {
	total := b.Count()
	if total == 0 {
		b.Release()
		return
	}
	others := 0
	for off := b.Skip; off < len(b.Data); off += b.Stride {
		if b.Data[off] < firstQUIC {
			others++
			h.handleProbe(b.Data[off:min(off-b.Skip+b.Stride, len(b.Data))])
		}
	}
	if others > 0 {
		c.stats.probes.Add(uint64(others))
		if others == total {
			b.Release()
			return
		}
	}
	now := sinceEpoch()
	from.last.Store(int64(now))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		b.Release()
		return
	}
	b, cost := from.pack(b)
	if c.held+cost > c.limit {
		// Whoever has most waiting loses its newest.
		most := from
		if c.from != nil && c.from.held > most.held {
			most = c.from
		}
		for _, list := range [2][]*source{c.ready, c.full} {
			for _, s := range list {
				if s.held > most.held {
					most = s
				}
			}
		}
		if most == from {
			c.stats.droppedFull.Add(uint64(total - others))
			b.Release()
			return
		}
		for most.n > 0 && c.held+cost > c.limit {
			last := most.popLast()
			c.held -= last.cost
			c.stats.droppedFull.Add(uint64(last.batch.Count()))
			last.batch.Release()
		}
	}
	from.push(arrival{b, cost, now})
	c.held += cost
	if !from.listed {
		from.listed = true
		c.ready = append(c.ready, from)
		if len(c.ready) == 1 {
			c.arrived.Signal()
		}
	}
}

func (s *source) push(a arrival) {
	if s.n == len(s.ring) {
		s.grow()
	}
	s.ring[(s.head+s.n)&(len(s.ring)-1)] = a
	s.n++
	s.held += a.cost
}

// unshift puts back what was popped.
func (s *source) unshift(a arrival) {
	if s.n == len(s.ring) {
		s.grow()
	}
	s.head = (s.head - 1) & (len(s.ring) - 1)
	s.ring[s.head] = a
	s.n++
	s.held += a.cost
}

func (s *source) grow() {
	ring := make([]arrival, max(2*len(s.ring), 8))
	for i := range s.n {
		ring[i] = s.ring[(s.head+i)&(len(s.ring)-1)]
	}
	s.ring, s.head = ring, 0
}

func (s *source) pop() arrival {
	a := s.ring[s.head]
	s.ring[s.head] = arrival{}
	s.head = (s.head + 1) & (len(s.ring) - 1)
	s.left(a)
	return a
}

// popLast takes the newest arrival.
func (s *source) popLast() arrival {
	at := (s.head + s.n - 1) & (len(s.ring) - 1)
	a := s.ring[at]
	s.ring[at] = arrival{}
	s.left(a)
	return a
}

func (s *source) left(a arrival) {
	s.held -= a.cost
	if s.n--; s.n == 0 {
		s.unpack()
	}
}

// pack copies b to a buffer that small arrivals share, if it is small and the queue is not short. Where the kernel does not coalesce, every
// datagram is an arrival with a buffer of its own, and the buffers of a burst would be mostly empty.
func (s *source) pack(b datagram.Batch) (datagram.Batch, int) {
	if s.n < packAfter || len(b.Data) > packSize {
		return b, datagram.MaxBatch
	}
	if s.shared == nil || len(b.Data) > len(s.shared.B)-s.filled {
		s.unpack()
		s.shared = datagram.NewBuffer()
	}
	n := copy(s.shared.B[s.filled:], b.Data)
	data := s.shared.B[s.filled : s.filled+n : s.filled+n]
	s.filled += n
	s.shared.Retain()
	packed := datagram.NewBatch(data, b.Stride, b.Skip, b.ECN, s.shared)
	b.Release()
	return packed, n
}

// unpack lets go of the shared buffer; what is in it lives on.
func (s *source) unpack() {
	if s.shared != nil {
		s.shared.Release()
	}
	s.shared, s.filled = nil, 0
}

// next makes reading the next arrival whose connection has room. It waits if wait says so, and reports whether there is one.
func (c *vconn) next(wait bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := sinceEpoch()
	if s := c.from; s != nil {
		c.from = nil
		if _, unfinished := c.reading.batch.Peek(); unfinished {
			s.unshift(c.reading)
			c.held += c.reading.cost
			c.reading = arrival{}
			s.in.wait(now)
			c.full = append(c.full, s)
			c.waiting.Store(true)
			c.stats.paused.Add(1)
		} else {
			c.relistLocked(s)
		}
	}
	for {
		if len(c.full) > 0 {
			c.refillLocked(now)
		}
		for len(c.ready) > 0 && !c.closed {
			s := c.ready[0]
			n := copy(c.ready, c.ready[1:])
			c.ready[n] = nil
			c.ready = c.ready[:n]
			if c.takeLocked(s, now) {
				return true, nil
			}
		}
		switch {
		case c.closed:
			return false, net.ErrClosed
		case !wait:
			return false, nil
		case !c.deadline.IsZero() && !time.Now().Before(c.deadline):
			return false, os.ErrDeadlineExceeded
		}
		if len(c.full) > 0 {
			if c.recheck == nil {
				c.recheck = time.AfterFunc(fullRecheck, c.wake)
			} else {
				c.recheck.Reset(fullRecheck)
			}
		}
		c.arrived.Wait()
		now = sinceEpoch()
	}
}

// relistLocked puts a source that was read back in line.
func (c *vconn) relistLocked(s *source) {
	if s.listed = s.n > 0; s.listed {
		c.ready = append(c.ready, s)
	}
}

// takeLocked makes reading the next arrival of s that has not waited too long, if its connection has room.
func (c *vconn) takeLocked(s *source, now time.Duration) bool {
	s.in.begin(now)
	if c.room = s.in.room(); c.room == 0 {
		s.in.wait(now)
		c.full = append(c.full, s)
		c.waiting.Store(true)
		c.stats.paused.Add(1)
		return false
	}
	for s.n > 0 {
		a := s.pop()
		c.held -= a.cost
		switch s.delay.judge(now, now-a.at, s.n == 0) {
		case drop:
			c.stats.droppedLate.Add(uint64(a.batch.Count()))
			a.batch.Release()
			continue
		case mark:
			if a.batch.ECN == datagram.ECT0 || a.batch.ECN == datagram.ECT1 {
				a.batch.ECN = datagram.CE
				c.stats.marked.Add(uint64(a.batch.Count()))
			}
		}
		c.reading, c.from = a, s
		return true
	}
	s.listed = false
	return false
}

// refillLocked puts sources whose connections made room back in line.
func (c *vconn) refillLocked(now time.Duration) {
	kept := c.full[:0]
	for _, s := range c.full {
		over, stalled := s.in.waited(now)
		if stalled {
			c.stats.stalled.Add(1)
			c.askAgain = min(c.askAgain, now)
		}
		if over {
			c.relistLocked(s)
		} else {
			kept = append(kept, s)
		}
	}
	clear(c.full[len(kept):])
	c.full = kept
	c.waiting.Store(len(kept) > 0)
}

// wake has the reader look again.
func (c *vconn) wake() {
	c.mu.Lock()
	c.arrived.Broadcast()
	c.mu.Unlock()
}

// wrote is told that something is sent to s: connections answer what they have looked at, so this is when they make room.
func (c *vconn) wrote(s *source) {
	if c.waiting.Load() && s.in.reached() {
		c.wake()
	}
}

// ReadBatch copies datagrams into ms and returns how many there were, at least one. It is for one goroutine.
func (c *vconn) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	got, orphan := 0, false
	for got < len(ms) {
		payload, ok := c.reading.batch.Peek()
		if ok && c.room == 0 {
			c.room = c.from.in.room()
		}
		if !ok || c.room == 0 {
			if !ok {
				c.reading.batch.Release()
			}
			more, err := c.next(got == 0)
			if err != nil && got == 0 {
				return 0, err
			}
			if !more {
				break
			}
			continue
		}
		c.reading.batch.Next()
		if payload[0] < firstQUIC {
			continue // it went to probe when it arrived
		}
		m := &ms[got]
		if len(payload) > len(m.Buffers[0]) {
			c.stats.droppedSize.Add(1)
			continue
		}
		m.N = copy(m.Buffers[0], payload)
		m.NN = putECN(m.OOB, c.reading.batch.ECN)
		m.Flags = 0
		m.Addr = c.from.addr.Load()
		c.from.in.hand(m.N)
		orphan = orphan || c.from.in.counted == nil
		c.room--
		got++
	}
	c.stats.received.Add(uint64(got))
	if orphan && c.orphaned != nil {
		if now := sinceEpoch(); now >= c.askAgain {
			c.askAgain = now + orphanedEvery
			c.orphaned()
		}
	}
	return got, nil
}

// ReadMsgUDP reads one datagram.
func (c *vconn) ReadMsgUDP(b, oob []byte) (n, oobn, flags int, addr *net.UDPAddr, err error) {
	ms := []ipv4.Message{{Buffers: [][]byte{b}, OOB: oob}}
	if _, err := c.ReadBatch(ms, 0); err != nil {
		return 0, 0, 0, nil, err
	}
	return ms[0].N, ms[0].NN, 0, ms[0].Addr.(*net.UDPAddr), nil
}

// ReadFrom reads one datagram.
func (c *vconn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, _, _, addr, err := c.ReadMsgUDP(b, nil)
	if err != nil {
		return 0, nil, err
	}
	return n, addr, nil
}

// LocalAddr is a virtual address: a *net.UDPAddr, or QUIC would not search for the path's MTU.
func (c *vconn) LocalAddr() net.Addr { return c.local }

// SyscallConn returns the private socket.
func (c *vconn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// SetReadBuffer does nothing: the legs have the socket buffers.
func (c *vconn) SetReadBuffer(int) error { return nil }

// SetWriteBuffer does nothing: the legs have the socket buffers.
func (c *vconn) SetWriteBuffer(int) error { return nil }

// SetDeadline is SetReadDeadline: writes do not wait.
func (c *vconn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline does nothing: writes do not wait.
func (c *vconn) SetWriteDeadline(time.Time) error { return nil }

// SetReadDeadline makes reads under way and future ones fail after t. The zero time is no deadline.
func (c *vconn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	c.deadline = t
	if !t.IsZero() {
		c.timer = time.AfterFunc(time.Until(t), c.wake)
	}
	return nil
}

// shut makes reads fail with net.ErrClosed and lets go of what is queued.
func (c *vconn) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	for _, list := range [2][]*source{c.ready, c.full} {
		for _, s := range list {
			for s.n > 0 {
				a := s.pop()
				a.batch.Release()
			}
		}
	}
	c.ready, c.full, c.held = nil, nil, 0
	for _, t := range [2]*time.Timer{c.timer, c.recheck} {
		if t != nil {
			t.Stop()
		}
	}
	c.arrived.Broadcast()
}

func (s *connCounters) snapshot() ConnStats {
	return ConnStats{
		Received: s.received.Load(), Sent: s.sent.Load(), DroppedFull: s.droppedFull.Load(),
		DroppedUnknown: s.droppedUnknown.Load(), DroppedSize: s.droppedSize.Load(), Probes: s.probes.Load(),
		Marked: s.marked.Load(), DroppedLate: s.droppedLate.Load(), Paused: s.paused.Load(), Stalled: s.stalled.Load(),
		Rescued: s.rescued.Load(),
	}
}

// count is how many datagrams n bytes in segments are.
func count(n, segment int) uint64 {
	if segment <= 0 || segment >= n {
		return 1
	}
	return uint64((n + segment - 1) / segment)
}
