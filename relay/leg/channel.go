package leg

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

const (
	// channelLifetime is how long a relay keeps a channel that is not refreshed (RFC 8656 §12).
	channelLifetime = 10 * time.Minute
	// channelQuarantine is how long a number must rest after that before it may lead elsewhere (RFC 8656 §12.2).
	channelQuarantine = 5 * time.Minute
	// channelRefresh is when channels are refreshed, before jitter.
	channelRefresh = 5 * time.Minute
	// channelTick is how often channels are looked at.
	channelTick = 20 * time.Second
	// bindAtOnce bounds the ChannelBind requests that are under way for refreshes and for rendezvous, each.
	bindAtOnce = 16
	// askedQueue bounds the rendezvous that wait to be answered.
	askedQueue = 256
	// maxPerPeer is how many channels one peer may have on a leg. A peer that moves to a new allocation on the same relay does so make
	// before break, so that its older channels must live on for a while.
	maxPerPeer = 4
	// supersededTicks is after how many silent ticks a channel ends whose peer has a newer one.
	supersededTicks = 3
)

// binding is a channel number at the relay and the address it leads to. It outlives its Channel because neither number nor address may
// be bound otherwise until the relay has forgotten them.
type binding struct {
	number  uint16
	expires time.Time     // when the relay forgets it
	refresh time.Time     // when to refresh it
	busy    chan struct{} // not nil while a ChannelBind is under way, closed after it
	ch      *Channel      // nil when given up
}

// Channel is a bound channel to one peer. Its methods may be called concurrently.
type Channel struct {
	leg      *Leg
	peer     identity.Node
	addr     netip.AddrPort
	number   uint16
	receiver atomic.Pointer[datagram.Receiver]
	heard    atomic.Bool // something arrived since the last tick
	silent   int         // ticks in a row without; of keepChannels
	done     chan struct{}
	once     sync.Once
}

var _ datagram.Link = (*Channel)(nil)

// Send implements datagram.Link: one system call for up to 64 segments and 65 507 bytes with their headers, more for more; what several calls
// send meanwhile is gathered.
func (c *Channel) Send(payload []byte, segment int, ecn datagram.ECN) {
	if len(payload) == 0 {
		return
	}
	if segment <= 0 || segment > len(payload) {
		segment = len(payload)
	}
	select {
	case <-c.done:
		c.leg.unsent(uint64((len(payload)+segment-1)/segment), net.ErrClosed)
		return
	default:
	}
	c.leg.car.send(c.number, payload, segment, ecn)
}

// SetReceiver implements datagram.Link. Receive is called from the goroutine that reads the leg.
func (c *Channel) SetReceiver(r datagram.Receiver) {
	if r == nil {
		c.receiver.Store(nil)
		return
	}
	c.receiver.Store(&r)
}

// MaxPayload implements datagram.Link: on UDP what fits Config.MTU, on TLS 16 KiB.
func (c *Channel) MaxPayload() int { return c.leg.car.maxPayload() }

// Done implements datagram.Link: closed when the leg is lost, when the relay or Close gave the channel up, and when the peer has a newer
// channel on this leg and this one fell silent for a minute or is the fifth.
func (c *Channel) Done() <-chan struct{} { return c.done }

// Close gives the channel up; its leg stays. It may be called more than once.
func (c *Channel) Close() {
	c.leg.mu.Lock()
	c.leg.unbindLocked(c)
	c.leg.mu.Unlock()
	c.end()
}

// end closes Done and takes the channel from the reader.
func (c *Channel) end() {
	c.leg.table[c.number-minChannel].CompareAndSwap(c, nil)
	c.once.Do(func() { close(c.done) })
}

// Peer is who the channel leads to, vouched for by the relay only: the session's TLS proves it.
func (c *Channel) Peer() identity.Node { return c.peer }

// PeerAddr is the peer's relayed address.
func (c *Channel) PeerAddr() netip.AddrPort { return c.addr }

// Leg is the leg that the channel is on.
func (c *Channel) Leg() *Leg { return c.leg }

// errNoNumbers says that all channel numbers are in use or resting.
var errNoNumbers = errors.New("no free channel number on this leg; dial another")

// bind returns the channel to peer at addr, binding one if there is none. announce, if not nil, is called with a new channel before it
// is bound.
func (l *Leg) bind(ctx context.Context, peer identity.Node, addr netip.AddrPort, announce func(*Channel)) (*Channel, error) {
	var b *binding
	for {
		l.mu.Lock()
		if l.err != nil {
			defer l.mu.Unlock()
			return nil, l.err
		}
		b = l.bindings[addr]
		if b == nil || b.busy == nil {
			break
		}
		busy := b.busy
		l.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-l.ctx.Done():
		}
	}
	// Here l.mu is held and nobody else binds addr.
	if b != nil && b.ch != nil && b.ch.peer == peer {
		defer l.mu.Unlock()
		return b.ch, nil
	}
	fresh := b == nil
	if fresh {
		number, ok := l.freeNumberLocked()
		if !ok {
			l.mu.Unlock()
			return nil, errNoNumbers
		}
		b = &binding{number: number}
		l.bindings[addr] = b
	}
	var gone []*Channel
	if b.ch != nil { // the address went over to another peer
		gone = append(gone, b.ch)
		l.unbindLocked(b.ch)
	}
	ch := &Channel{leg: l, peer: peer, addr: addr, number: b.number, done: make(chan struct{})}
	busy := make(chan struct{})
	b.ch, b.busy = ch, busy
	l.peers[peer] = append(l.peers[peer], ch)
	if chs := l.peers[peer]; len(chs) > maxPerPeer {
		gone = append(gone, chs[0])
		l.unbindLocked(chs[0])
	}
	l.mu.Unlock()
	for _, g := range gone {
		g.end()
	}
	l.table[ch.number-minChannel].Store(ch)
	if announce != nil {
		announce(ch)
	}

	err := l.bindChannel(ctx, b, ch)

	l.mu.Lock()
	b.busy = nil
	if err != nil {
		l.unbindLocked(ch)
		var refused *Error
		if fresh && errors.As(err, &refused) {
			delete(l.bindings, addr) // the relay knows nothing of it
		}
	}
	l.mu.Unlock()
	close(busy)
	if err != nil {
		ch.end()
		return nil, err
	}
	select {
	case <-l.ctx.Done(): // it ended while the channel was made
		ch.end()
	default:
	}
	return ch, nil
}

// bindChannel sends ChannelBind (RFC 8656 §12.1), which also installs the permission.
func (l *Leg) bindChannel(ctx context.Context, b *binding, ch *Channel) error {
	l.mu.Lock()
	b.expires = time.Now().Add(channelLifetime) // if the answer is lost, the relay has it all the same
	l.mu.Unlock()
	_, err := l.request(ctx, l.patient(), "bind channel", stun.MethodChannelBind, true, channelAttr(ch.number), xorPeer(ch.addr))
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	b.expires, b.refresh = now.Add(channelLifetime), now.Add(jitter(channelRefresh))
	return err
}

// freeNumberLocked returns a channel number that is not in use and has rested.
func (l *Leg) freeNumberLocked() (uint16, bool) {
	used := make(map[uint16]bool, len(l.bindings))
	for _, b := range l.bindings {
		used[b.number] = true
	}
	for range maxChannel - minChannel + 1 {
		n := l.next
		if l.next++; l.next > maxChannel {
			l.next = minChannel
		}
		if !used[n] {
			return n, true
		}
	}
	return 0, false
}

// keepChannels refreshes channels before the relay forgets them and drops what is over.
func (l *Leg) keepChannels() {
	for l.sleep(channelTick) {
		l.dropSuperseded()
		type due struct {
			b  *binding
			ch *Channel
		}
		var dues []due
		now := time.Now()
		l.mu.Lock()
		for addr, b := range l.bindings {
			switch {
			case b.busy != nil:
			case b.ch != nil && !now.Before(b.refresh):
				dues = append(dues, due{b, b.ch})
			case b.ch == nil && now.After(b.expires.Add(channelQuarantine)):
				delete(l.bindings, addr)
			}
		}
		l.mu.Unlock()
		for part := range slices.Chunk(dues, bindAtOnce) {
			var wait sync.WaitGroup
			for _, d := range part {
				wait.Go(func() {
					if err := l.bindChannel(l.ctx, d.b, d.ch); err != nil {
						l.log.Info("channel is lost", "peer", d.ch.peer.String(), "error", err)
						d.ch.Close()
						if errors.Is(err, errNoAnswer) {
							l.suspect(err)
						}
					}
				})
			}
			wait.Wait()
		}
	}
}

// dropSuperseded ends channels whose peers have newer ones and that nothing came over for a while.
func (l *Leg) dropSuperseded() {
	var gone []*Channel
	l.mu.Lock()
	for _, chs := range l.peers {
		for i, ch := range chs {
			if ch.heard.Swap(false) || i == len(chs)-1 {
				ch.silent = 0
			} else if ch.silent++; ch.silent >= supersededTicks {
				gone = append(gone, ch)
			}
		}
	}
	for _, ch := range gone {
		l.unbindLocked(ch)
	}
	l.mu.Unlock()
	for _, ch := range gone {
		ch.end()
	}
}

// answer binds a channel back to every peer that asks for this node.
func (l *Leg) answer() {
	slots := make(chan struct{}, bindAtOnce)
	var workers sync.WaitGroup
	defer workers.Wait()
	for {
		select {
		case <-l.ctx.Done():
			return
		case in := <-l.asked:
			if l.cfg.OnRendezvous == nil {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-l.ctx.Done():
				return
			}
			workers.Go(func() {
				defer func() { <-slots }()
				_, err := l.bind(l.ctx, in.peer, in.addr, func(ch *Channel) {
					l.announcing.Lock()
					defer l.announcing.Unlock()
					l.cfg.OnRendezvous(in.peer, in.from, ch)
				})
				if err != nil && l.ctx.Err() == nil {
					l.log.Info("rendezvous failed", "peer", in.peer.String(), "error", err)
				}
			})
		}
	}
}
