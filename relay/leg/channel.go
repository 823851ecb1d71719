package leg

import (
	"net/netip"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// Channel is a bound channel to one peer.
type Channel struct{}

var _ datagram.Link = (*Channel)(nil)

// Send implements datagram.Link: one system call for up to 64 segments and 65 507 bytes with their headers, more for more.
func (c *Channel) Send(payload []byte, segment int, ecn datagram.ECN) {}

// SetReceiver implements datagram.Link. Receive is called from the goroutine that reads the leg.
func (c *Channel) SetReceiver(r datagram.Receiver) {}

// MaxPayload implements datagram.Link: on UDP what fits Config.MTU, on TLS 16 KiB.
func (c *Channel) MaxPayload() int { return 0 }

// Done implements datagram.Link: closed when the leg is lost, or the peer came back with another relayed address, or the relay gave
// the channel up, or Close was called.
func (c *Channel) Done() <-chan struct{} { return nil }

// Close gives the channel up; its leg stays. It may be called more than once.
func (c *Channel) Close() {}

// Peer is who the channel leads to, vouched for by the relay only: the session's TLS proves it.
func (c *Channel) Peer() identity.Node { return identity.Node{} }

// PeerAddr is the peer's relayed address.
func (c *Channel) PeerAddr() netip.AddrPort { return netip.AddrPort{} }

// Leg is the leg that the channel is on.
func (c *Channel) Leg() *Leg { return nil }
