package relay

import (
	"container/list"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/relay/budget"
	"sallyway/relay/wire"
)

// transport is what a connection runs over.
type transport uint8

const (
	overDTLS transport = iota + 1
	overTCP
	overTLS
)

// conn is a connection of a client: DTLS, TCP or TLS. It has a bounded queue towards the client; its goroutine runs only while there is
// something to write.
type conn struct {
	s     *Server
	kind  transport
	addr  netip.AddrPort
	nc    net.Conn
	udp   udpEnd // DTLS: the datagrams underneath
	alloc atomic.Pointer[allocation]
	early int   // bytes read without an allocation; the reader's
	bare  int64 // since when without an allocation, Unix nanoseconds; the sweep's

	ended func() // DTLS, which has no reader that would notice: cleans up after close

	half *halfOpen // gives way to others until c has an allocation

	mu      sync.Mutex // guards the rest
	pending *[]byte    // messages, each padded to a multiple of four
	writing bool
	closing bool // close when pending is written
	closed  bool
}

// Limits of a connection's queue in bytes. Data beyond is dropped, so that a slow client sees loss instead of ever older data; control has
// room of its own.
const (
	maxQueued        = 256 << 10
	maxQueuedControl = maxQueued + 64<<10
	writeTimeout     = 15 * time.Second
)

var queueBuffers = sync.Pool{New: func() any {
	b := make([]byte, 0, 16<<10)
	return &b
}}

// enqueue queues one message (STUN or ChannelData) whose bytes are head and tail. It never blocks; false means that it was dropped.
func (c *conn) enqueue(head, tail []byte, control bool) bool {
	size := (len(head) + len(tail) + 3) &^ 3
	limit := maxQueued
	if control {
		limit = maxQueuedControl
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.closing {
		return false
	}
	if c.pending == nil {
		c.pending = queueBuffers.Get().(*[]byte)
	}
	q := *c.pending
	if len(q)+size > limit {
		return false
	}
	q = append(append(q, head...), tail...)
	q = append(q, make([]byte, size-len(head)-len(tail))...)
	*c.pending = q
	if !c.writing {
		c.writing = true
		c.s.wg.Go(c.drain)
	}
	return true
}

// over reports whether the connection is closed, or will be when what is queued has been written.
func (c *conn) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed || c.closing
}

// drain writes what is queued until there is nothing left.
func (c *conn) drain() {
	for {
		c.mu.Lock()
		q := c.pending
		c.pending = nil
		if q == nil || c.closed {
			c.writing = false
			closing := c.closing
			c.mu.Unlock()
			if closing {
				c.close()
			}
			return
		}
		c.mu.Unlock()
		err := c.writeAll(*q)
		if cap(*q) <= maxQueuedControl {
			*q = (*q)[:0]
			queueBuffers.Put(q)
		}
		if err != nil {
			c.close()
		}
	}
}

// writeAll writes queued messages: one per record over DTLS, and over TLS for standard clients, some of which take a record for a message;
// else in one piece.
func (c *conn) writeAll(q []byte) error {
	each := c.kind == overDTLS
	if !each {
		if err := c.nc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		if a := c.alloc.Load(); c.kind == overTLS && (a == nil || !a.flags.Has(wire.FlagPlainData)) {
			each = true
		}
	}
	for len(q) >= channelHeader {
		n, padded := len(q), len(q)
		if each {
			n = int(binary.BigEndian.Uint16(q[2:])) + channelHeader
			if q[0] < 64 {
				n += stunHeader - channelHeader
			}
			padded = min((n+3)&^3, len(q))
			if c.kind != overDTLS {
				n = padded
			}
		}
		if _, err := c.nc.Write(q[:n]); err != nil {
			return err
		}
		q = q[padded:]
	}
	return nil
}

// closeAfterFlush closes c once what is queued has been written, and takes no more. Over DTLS it leaves time for repeated indications: a
// close that comes right behind an indication may overtake it.
func (c *conn) closeAfterFlush() {
	if c.kind == overDTLS {
		time.AfterFunc(indicationInterval*(indicationRepeats+2), c.close)
		return
	}
	c.mu.Lock()
	idle := !c.writing
	c.closing = true
	c.mu.Unlock()
	if idle {
		c.close()
	}
}

// close closes c at once. Its reader then ends and cleans up; for DTLS, ended does. Telling the client (close_notify) may take a while, so that is done aside.
func (c *conn) close() {
	c.mu.Lock()
	was, nc := c.closed, c.nc
	c.closed = true
	c.mu.Unlock()
	if !was {
		c.s.wg.Go(func() {
			nc.Close()
			if c.ended != nil {
				c.ended()
			}
		})
	}
}

// finish is what a connection's reader does last, and what ended does: the allocation ends with the connection (RFC 8656 §5).
func (c *conn) finish() {
	c.close()
	if a := c.alloc.Load(); a != nil {
		c.s.end(a, "connection closed")
	}
	c.s.conns.remove(c)
}

// admits reports whether n more bytes may be read of a connection: before it has an allocation they are few.
func (c *conn) admits(n int) bool {
	if c.alloc.Load() != nil {
		c.early = 0
		return true
	}
	c.early += n
	return c.early <= maxPreAuth
}

// connections is the set of connections, with a table of half-open ones (handshakes, and TCP connections without an allocation so far) that is
// bounded as a whole and by source. When it is full, the oldest gives way: who forges sources can not keep others out, since an honest
// handshake takes a few round trips and grows old only when there are very many others.
type connections struct {
	limits Limits

	mu       sync.Mutex // guards the rest
	all      map[*conn]struct{}
	half     list.List             // of *halfOpen, oldest first
	bySource map[budget.Source]int // half-open ones
	stopped  bool
}

// halfOpen is a place in the table of half-open connections.
type halfOpen struct {
	src   budget.Source
	evict func()        // closes the connection
	place *list.Element // nil when given up; guarded by connections.mu
}

func (t *connections) init(l Limits) {
	t.limits = l
	t.all = map[*conn]struct{}{}
	t.bySource = map[budget.Source]int{}
}

// reserve takes a place for a connection of src, which evict closes, or returns nil where there is none.
func (t *connections) reserve(src budget.Source, evict func()) *halfOpen {
	t.mu.Lock()
	if t.stopped || t.bySource[src] >= t.limits.SourceHalfOpen || len(t.all) >= t.limits.Connections {
		t.mu.Unlock()
		return nil
	}
	var victim *halfOpen
	if t.half.Len() >= t.limits.HalfOpen {
		victim = t.half.Front().Value.(*halfOpen)
		t.releaseLocked(victim)
	}
	h := &halfOpen{src: src, evict: evict}
	h.place = t.half.PushBack(h)
	t.bySource[src]++
	t.mu.Unlock()
	if victim != nil {
		victim.evict()
	}
	return h
}

// releaseLocked gives a place up, if that has not happened yet.
func (t *connections) releaseLocked(h *halfOpen) {
	if h == nil || h.place == nil {
		return
	}
	t.half.Remove(h.place)
	h.place = nil
	if t.bySource[h.src]--; t.bySource[h.src] == 0 {
		delete(t.bySource, h.src)
	}
}

// release gives a place up: the handshake came to nothing, or the connection has an allocation.
func (t *connections) release(h *halfOpen) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.releaseLocked(h)
}

// add takes up a connection that has a place. When the relay is stopping it reports false.
func (t *connections) add(c *conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		t.releaseLocked(c.half)
		return false
	}
	t.all[c] = struct{}{}
	return true
}

func (t *connections) remove(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.all, c)
	t.releaseLocked(c.half)
}

func (t *connections) snapshot() []*conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*conn, 0, len(t.all))
	for c := range t.all {
		list = append(list, c)
	}
	return list
}

// closers is how many DTLS connections are closed at once when the relay stops. Each takes memory meanwhile, but not long: nothing blocks.
const closers = 64

// closeAll closes every connection, lets no more in, and gives the clients a moment to be told.
func (t *connections) closeAll() {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	var told sync.WaitGroup
	turn := make(chan struct{}, closers)
	for _, c := range t.snapshot() {
		c.mu.Lock()
		was, nc := c.closed, c.nc
		c.closed = true
		c.mu.Unlock()
		if !was {
			if c.kind != overDTLS {
				told.Go(func() { nc.Close() })
				continue
			}
			turn <- struct{}{}
			told.Go(func() {
				nc.Close()
				<-turn
			})
		}
	}
	told.Wait()
}

// closeBare closes connections that have been without an allocation for authTimeout.
func (t *connections) closeBare(now int64) {
	for _, c := range t.snapshot() {
		switch {
		case c.alloc.Load() != nil:
			c.bare = 0
		case c.bare == 0:
			c.bare = now
		case now-c.bare >= int64(authTimeout):
			c.close()
		}
	}
}
