package udpio

import "errors"

// ByteRange is a range of first bytes of datagrams, inclusive.
type ByteRange struct{ First, Last byte }

// errSteer says that this system can not choose among the sockets of a port.
var errSteer = errors.New("this system does not choose sockets by what a datagram says")

// Steer tells the kernel which of the sockets that share c's port gets a datagram. The sockets were bound one after the other with
// Config.ReusePort, c among them. A datagram whose first byte lies in one of the ranges goes to the first socket; all others go to the
// shards sockets after it, by a hash of their source, so that the datagrams of one source stay in order.
//
// The kernel looks at the first datagram of what it has coalesced: a last datagram of another kind, shorter than those before, comes with
// them. Where Steer fails the kernel goes on to choose among all sockets by a hash.
func (c *Conn) Steer(first []ByteRange, shards int) error { return c.steer(first, shards) }

// QueueState is what a socket's receive queue holds.
type QueueState struct {
	// Used and Limit are in bytes, as the kernel counts: with its own overhead.
	Used, Limit uint32
	// Drops is how many datagrams did not get in since the socket was opened, whether for want of room or refused by a filter (Shed).
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
