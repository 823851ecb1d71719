package direct

import (
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// Link is a direct path that works. It ends when no probe was answered for 30 s, or its Peer is closed.
type Link struct {
	e        *Endpoint
	peer     *Peer
	addr     netip.AddrPort
	rtt      time.Duration
	tx       *udpio.Sender
	proved   atomic.Int64 // when a probe was last answered, in Unix nanoseconds
	receiver atomic.Pointer[receiver]
	done     chan struct{}
	closing  sync.Once
}

var _ datagram.Link = (*Link)(nil)

type receiver struct{ to datagram.Receiver }

// linkLocked makes a link of an address that answered.
func (e *Endpoint) linkLocked(p *Peer, r *remote) (*Link, error) {
	if e.sock == nil || p.closed {
		return nil, net.ErrClosed
	}
	if old := (*e.links.Load())[r.addr]; old != nil {
		return nil, ErrTaken
	}
	l := &Link{e: e, peer: p, addr: r.addr, rtt: r.rtt, tx: e.sock.NewSenderTo(r.addr), done: make(chan struct{})}
	l.proved.Store(r.proved.UnixNano())
	links := maps.Clone(*e.links.Load())
	links[r.addr] = l
	e.links.Store(&links)
	e.cfg.Logger.Info("direct path works", "address", r.addr, "rtt", r.rtt)
	return l, nil
}

// dropLocked ends a link.
func (e *Endpoint) dropLocked(l *Link) {
	links := maps.Clone(*e.links.Load())
	delete(links, l.addr)
	e.links.Store(&links)
	l.closing.Do(func() { close(l.done) })
}

// Addr is the other end's address.
func (l *Link) Addr() netip.AddrPort { return l.addr }

// RTT is the round-trip time that the probes found before the link was there.
func (l *Link) RTT() time.Duration { return l.rtt }

// Send implements datagram.Link.
func (l *Link) Send(payload []byte, segment int, ecn datagram.ECN) {
	n := uint64(1)
	if segment > 0 {
		n = uint64((len(payload) + segment - 1) / segment)
	}
	select {
	case <-l.done:
		l.e.unsent.Add(n)
		return
	default:
	}
	if l.tx.Send(payload, segment, ecn) != nil {
		l.e.unsent.Add(n)
		return
	}
	l.e.sent.Add(n)
}

// SetReceiver implements datagram.Link.
func (l *Link) SetReceiver(r datagram.Receiver) {
	if r == nil {
		l.receiver.Store(nil)
		return
	}
	l.receiver.Store(&receiver{r})
}

// MaxPayload implements datagram.Link.
func (l *Link) MaxPayload() int { return mtu - overhead }

// Done implements datagram.Link.
func (l *Link) Done() <-chan struct{} { return l.done }
