// Package leg is a node's own connection to a relay: a TURN allocation (RFC 8656) and the channels on it, each of which is a
// datagram.Link to one peer.
//
//	UDP   control  STUN in DTLS                          data  ChannelData beside it on the same 5-tuple, or in DTLS
//	TLS   control  STUN in TLS over TCP                  data  ChannelData in it, padded to four bytes (RFC 8656 §12.5)
//
// ChannelData is two bytes of channel number (0x4000–0x4FFF), two bytes of length, payload. What the first byte of a UDP datagram
// says (RFC 7983 §7): 0–3 STUN, 20–63 DTLS, 64–79 ChannelData.
//
//	l, err := leg.Dial(ctx, leg.Config{Addrs: addrs, Relay: node, Verify: verify, Credentials: creds})
//	ch, err := l.Connect(ctx, gateway)      // rendezvous: the gateway's leg gets to know of us through its OnRendezvous
//	ch.SetReceiver(r)
//	ch.Send(payload, 1452, datagram.ECT0)   // never fails, never blocks
//	<-l.Done()                              // lost, and l.Err() says why: dial another
//
// A leg refreshes its allocation and its channels by itself, finds out when the relay is gone, and never comes back: whoever owns it
// dials the next one.
package leg

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"syscall"
	"time"

	"sallyway/internal/identity"
)

// Transport is how a leg reaches its relay.
type Transport string

// The transports. UDP is the fast one; TLS passes where only TCP does.
const (
	UDP Transport = "udp"
	TLS Transport = "tls"
)

// Defaults of Config.
const (
	// DefaultLifetime is the allocation's lifetime to ask for (RFC 8656 §7.2).
	DefaultLifetime = 10 * time.Minute
	// DefaultKeepalive is how long control may be silent: shorter than the 30 s after which NATs forget a UDP mapping.
	DefaultKeepalive = 15 * time.Second
	// DefaultMTU is Ethernet's, in bytes of IP packet.
	DefaultMTU = 1500
	// DefaultQueue bounds what waits in a TLS leg to be written, in bytes: 20 ms of 100 Mbit/s. What comes when it is full is dropped.
	DefaultQueue = 256 << 10
	// DefaultAttempt bounds the attempt on one of the relay's addresses when there are more.
	DefaultAttempt = 3 * time.Second
)

// Config says which relay to dial, how, and as whom.
type Config struct {
	// Relay is the identity which the relay's certificate must prove.
	Relay identity.Node
	// Addrs are the relay's addresses, tried in this order.
	Addrs []netip.AddrPort
	// Transport is how to reach it; "" is UDP.
	Transport Transport
	// Verify checks the chain (leaf first) that the relay showed, by identity.Trust. That its leaf names Relay is checked here.
	Verify func(chain []*x509.Certificate) error
	// Credentials returns the TURN user name and password. It is called for every authenticated request, so that a renewed
	// credential takes effect at the next Refresh; it must not block.
	Credentials func() (username, password string)
	// OnRendezvous takes the channel to a peer that asked to be connected with this node, and the address it is seen at by the
	// relay. It is called from one goroutine of the leg, once per channel and before anything is read from it; set a receiver
	// before returning. Nil means that nobody can ask for this node on this leg: the peer's request is not answered by a channel.
	// It must not call Close.
	OnRendezvous func(peer identity.Node, from netip.AddrPort, ch *Channel)
	// Control is called on every socket before it connects, for SO_MARK and binding; nil is nothing (see net.Dialer.Control).
	Control func(network, address string, c syscall.RawConn) error
	// Lifetime is the allocation's lifetime to ask for; 0 is DefaultLifetime. The relay may grant less.
	Lifetime time.Duration
	// Keepalive is the longest silence on control; 0 is DefaultKeepalive.
	Keepalive time.Duration
	// MTU of the path to the relay in bytes of IP packet; 0 is DefaultMTU. UDP channels derive MaxPayload from it.
	MTU int
	// Queue bounds in bytes what waits to be written on a TLS leg; 0 is DefaultQueue.
	Queue int
	// Logger takes the leg's changes of state; nil discards them. No secret is ever logged.
	Logger *slog.Logger
	// Metrics are counted in addition to the leg's own Stats, shared by the legs of a process; nil is none.
	Metrics *Metrics
}

// validate fills the defaults in and says what is wrong.
func (c *Config) validate() error {
	if err := c.Relay.Validate(); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	switch c.Transport {
	case "":
		c.Transport = UDP
	case UDP, TLS:
	default:
		return fmt.Errorf("unknown transport %q, want %q or %q", c.Transport, UDP, TLS)
	}
	switch {
	case len(c.Addrs) == 0:
		return fmt.Errorf("no address of relay %v", c.Relay)
	case c.Verify == nil:
		return errors.New("no Verify: a relay's certificate must be checked")
	case c.Credentials == nil:
		return errors.New("no Credentials")
	case c.Lifetime < 0 || c.Keepalive < 0 || c.MTU < 0 || c.Queue < 0:
		return errors.New("negative lifetime, keepalive, MTU or queue")
	}
	if c.Lifetime == 0 {
		c.Lifetime = DefaultLifetime
	}
	if c.Keepalive == 0 {
		c.Keepalive = DefaultKeepalive
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Queue == 0 {
		c.Queue = DefaultQueue
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = new(Metrics)
	}
	return nil
}

// Leg is an allocation on a relay. Its methods may be called concurrently.
type Leg struct{}

// Dial connects to the relay, checks who it is and allocates. The leg it returns runs until Close or until it is lost. ctx bounds
// dialling only. What the relay refused is an *Error.
func Dial(ctx context.Context, cfg Config) (*Leg, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("dial relay: %w", err)
	}
	return nil, errors.ErrUnsupported
}

// Connect asks the relay to connect this leg with node and binds a channel to it. An existing live channel to the same relayed address
// is returned as it is; one to an older address of node is closed (its Done is) and replaced. What the relay refused is an *Error:
// 404 says that node has no allocation on this relay now, 403 that the pair may not talk.
func (l *Leg) Connect(ctx context.Context, node identity.Node) (*Channel, error) {
	return nil, errors.ErrUnsupported
}

// Done is closed when the leg is lost or closed; Err then says why.
func (l *Leg) Done() <-chan struct{} { return nil }

// Err is nil while the leg lives, net.ErrClosed after Close, else why it was lost.
func (l *Leg) Err() error { return nil }

// Draining is closed when the relay asks its nodes to move: dial elsewhere first, then Close.
func (l *Leg) Draining() <-chan struct{} { return nil }

// Suspect has the leg check at once whether its relay still knows it; if not, Done is closed about 60 ms plus a few round trips later.
// Path probes that go unanswered are a reason to call it.
func (l *Leg) Suspect() {}

// Close ends the allocation, closes every channel, and waits for the leg's goroutines. It may be called more than once.
func (l *Leg) Close() error { return nil }

// Relay is who the leg leads to.
func (l *Leg) Relay() identity.Node { return identity.Node{} }

// Transport is how the leg reaches its relay.
func (l *Leg) Transport() Transport { return "" }

// RemoteAddr is the relay's address that answered.
func (l *Leg) RemoteAddr() netip.AddrPort { return netip.AddrPort{} }

// LocalAddr is the leg's socket's own address.
func (l *Leg) LocalAddr() netip.AddrPort { return netip.AddrPort{} }

// ReflexiveAddr is where the relay sees this leg come from.
func (l *Leg) ReflexiveAddr() netip.AddrPort { return netip.AddrPort{} }

// RelayedAddr is the allocation's address on the relay.
func (l *Leg) RelayedAddr() netip.AddrPort { return netip.AddrPort{} }

// Stats is a snapshot of what the leg has counted.
func (l *Leg) Stats() Stats { return Stats{} }
