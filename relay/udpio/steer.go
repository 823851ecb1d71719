package udpio

import (
	"math/rand/v2"
	"net/netip"
)

// ByteRange is a range of first bytes of datagrams, inclusive.
type ByteRange struct{ First, Last byte }

// Steering says which of the sockets that share a port gets a datagram. Make it by NewSteering.
type Steering struct {
	first      []ByteRange
	shards     int
	multiplier uint32 // secret, so that nobody picks whom to share a socket with
}

// Pin puts the datagrams of a source at a socket.
type Pin struct {
	From   netip.AddrPort
	Socket int // counted from 0, in the order in which the sockets were bound
}

// NewSteering gives datagrams whose first byte lies in one of the ranges to the first socket. All others go to the shards sockets after it,
// by a hash of their source, so that the datagrams of one source stay in order. Sockets beyond get what is pinned there.
func NewSteering(first []ByteRange, shards int) *Steering {
	return &Steering{first: first, shards: max(shards, 1), multiplier: rand.Uint32() | 1}
}

// Steer has the kernel choose by s, except that what is not for the first socket and comes from a pinned source goes to that socket. It
// replaces what was before. c is one of the sockets that share the port, which were bound one after the other with Config.ReusePort.
//
// The kernel looks at the first datagram of what it has coalesced: a last datagram of another kind, shorter than those before, comes with
// them. Where Steer fails nothing changes: at first the kernel chooses among all sockets by a hash.
func (c *Conn) Steer(s *Steering, pins []Pin) error { return c.steer(s, pins) }

// QueueState is what a socket's receive queue holds.
type QueueState struct {
	// Used and Limit are in bytes, as the kernel counts: with its own overhead.
	Used, Limit uint32
	// Drops is how many datagrams did not get in for want of room since the socket was opened.
	Drops uint64
}

// Full reports whether more than num/den of the queue is used.
func (q QueueState) Full(num, den uint64) bool { return uint64(q.Used)*den > uint64(q.Limit)*num }

// Drops returns how many datagrams did not get into this socket's receive queue, see QueueState; 0 where the system does not say.
func (c *Conn) Drops() uint64 { return c.Queue().Drops }

// Buffers returns the sizes of the kernel's socket buffers in bytes that can be used; 0 where the system does not say.
func (c *Conn) Buffers() (read, write int) { return c.buffers() }

// Queue returns the state of the receive queue; the zero QueueState where the system does not say.
func (c *Conn) Queue() QueueState { return c.NewGauge().Queue() }
