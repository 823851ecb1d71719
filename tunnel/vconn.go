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
// towards QUIC before it is closed: a read error would end every connection on it, a write error the connection.
type vconn struct {
	local *net.UDPAddr
	raw   *rawSocket

	mu       sync.Mutex // guards what follows
	arrived  sync.Cond  // there is a batch, the deadline passed, or the conn closed
	ring     []arrival
	head, n  int
	deadline time.Time
	timer    *time.Timer
	closed   bool

	reading arrival // what ReadBatch has begun to hand out; only its goroutine's

	stats connCounters
}

// arrival is a run of datagrams and the virtual address it came from.
type arrival struct {
	batch datagram.Batch
	from  *net.UDPAddr
}

type connCounters struct {
	received, sent, droppedFull, droppedUnknown, droppedSize, probes atomic.Uint64
}

func (c *vconn) init(local *net.UDPAddr, raw *rawSocket, queue int) {
	if queue <= 0 {
		queue = DefaultQueue
	}
	c.local, c.raw, c.ring = local, raw, make([]arrival, queue)
	c.arrived.L = &c.mu
}

// probeHandler takes datagrams that are no QUIC. payload is valid until it returns.
type probeHandler interface{ handleProbe(payload []byte) }

// receive queues what QUIC is to get and hands every other datagram to h before it returns.
func (c *vconn) receive(b datagram.Batch, from *net.UDPAddr, h probeHandler) {
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
	c.mu.Lock()
	if c.closed || c.n == len(c.ring) {
		c.mu.Unlock()
		c.stats.droppedFull.Add(uint64(total - others))
		b.Release()
		return
	}
	c.ring[(c.head+c.n)%len(c.ring)] = arrival{b, from}
	c.n++
	if c.n == 1 {
		c.arrived.Signal()
	}
	c.mu.Unlock()
}

// next makes reading the next arrival. It waits if wait says so, and reports whether there is one.
func (c *vconn) next(wait bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n == 0 {
		switch {
		case c.closed:
			return false, net.ErrClosed
		case !wait:
			return false, nil
		case !c.deadline.IsZero() && !time.Now().Before(c.deadline):
			return false, os.ErrDeadlineExceeded
		}
		c.arrived.Wait()
	}
	if c.closed {
		return false, net.ErrClosed
	}
	c.reading = c.ring[c.head]
	c.ring[c.head] = arrival{}
	c.head = (c.head + 1) % len(c.ring)
	c.n--
	return true, nil
}

// ReadBatch copies datagrams into ms and returns how many there were, at least one. It is for one goroutine.
func (c *vconn) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	got := 0
	for got < len(ms) {
		payload, ok := c.reading.batch.Next()
		if !ok {
			c.reading.batch.Release()
			more, err := c.next(got == 0)
			if err != nil && got == 0 {
				return 0, err
			}
			if !more {
				break
			}
			continue
		}
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
		m.Addr = c.reading.from
		got++
	}
	c.stats.received.Add(uint64(got))
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
		c.timer = time.AfterFunc(time.Until(t), func() {
			c.mu.Lock()
			c.arrived.Broadcast()
			c.mu.Unlock()
		})
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
	for ; c.n > 0; c.n-- {
		c.ring[c.head].batch.Release()
		c.head = (c.head + 1) % len(c.ring)
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.arrived.Broadcast()
}

func (s *connCounters) snapshot() ConnStats {
	return ConnStats{
		Received: s.received.Load(), Sent: s.sent.Load(), DroppedFull: s.droppedFull.Load(),
		DroppedUnknown: s.droppedUnknown.Load(), DroppedSize: s.droppedSize.Load(), Probes: s.probes.Load(),
	}
}

// count is how many datagrams n bytes in segments are.
func count(n, segment int) uint64 {
	if segment <= 0 || segment >= n {
		return 1
	}
	return uint64((n + segment - 1) / segment)
}
