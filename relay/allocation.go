package relay

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// Channel numbers (RFC 8656 §12).
const (
	minChannel  = 0x4000
	maxChannel  = 0x4FFF
	channelPage = 64
)

// allocation is a node's relayed address and what it may do with it. What the data path reads is immutable or atomic.
type allocation struct {
	owner   identity.Node
	flags   wire.Flags
	relayed netip.AddrPort
	source  netip.AddrPort
	created [12]byte // transaction that made it, to tell a retransmission from a second Allocate
	udp     udpEnd
	conn    *conn       // DTLS, TCP or TLS connection of the control; nil for plain UDP
	plain   bool        // data goes to udp beside conn, not through it
	data    *udpio.Conn // by which data leaves that came otherwise than over UDP; where plain
	org     *organization
	node    *nodeState

	expires atomic.Int64 // Unix nanoseconds
	seen    atomic.Int64 // when the node was last heard, Unix nanoseconds
	dead    atomic.Bool
	pages   [(maxChannel + 1 - minChannel) / channelPage]atomic.Pointer[[channelPage]atomic.Pointer[channel]]
	sock    atomic.Pointer[relayedSocket]
	sent    atomic.Uint64 // payload bytes from the node
	got     atomic.Uint64 // payload bytes to the node
	dropped atomic.Uint64 // datagrams

	mu     sync.Mutex                  // guards the rest
	perms  map[netip.Addr]int64        // permissions: until when, Unix nanoseconds
	byPeer map[netip.AddrPort]*channel // bound channels
}

// channel is one end of a binding. Data flows over it to another allocation when that has a channel for this one.
type channel struct {
	owner   *allocation
	number  uint16
	peer    netip.AddrPort
	expires atomic.Int64            // Unix nanoseconds
	route   atomic.Pointer[channel] // the peer's channel for owner
}

// udpEnd is a client behind a UDP socket of the relay.
type udpEnd struct {
	sock *udpio.Conn
	peer udpio.Peer
}

// channel returns the binding of number, or nil.
func (a *allocation) channel(number uint16) *channel {
	if number < minChannel || number > maxChannel {
		return nil
	}
	p := a.pages[(number-minChannel)/channelPage].Load()
	if p == nil {
		return nil
	}
	return p[(number-minChannel)%channelPage].Load()
}

// setChannelLocked binds number to c; nil unbinds. a.mu is held.
func (a *allocation) setChannelLocked(number uint16, c *channel) {
	slot := &a.pages[(number-minChannel)/channelPage]
	p := slot.Load()
	if p == nil {
		p = new([channelPage]atomic.Pointer[channel])
		slot.Store(p)
	}
	p[(number-minChannel)%channelPage].Store(c)
}

// channelFor returns the binding for peer, or nil.
func (a *allocation) channelFor(peer netip.AddrPort) *channel {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.byPeer[peer]
}

// permitted reports whether a has a live permission for ip.
func (a *allocation) permitted(ip netip.Addr, now int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.perms[ip] > now
}

// permit installs or refreshes permissions for all of ips, or for none when that would exceed limit.
func (a *allocation) permit(ips []netip.Addr, limit int, now int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	fresh := 0
	for i, ip := range ips {
		if _, ok := a.perms[ip]; !ok && !contains(ips[:i], ip) {
			fresh++
		}
	}
	if fresh > 0 && len(a.perms)+fresh > limit {
		for ip, until := range a.perms {
			if until <= now {
				delete(a.perms, ip)
			}
		}
		if len(a.perms)+fresh > limit {
			return false
		}
	}
	if a.perms == nil {
		a.perms = make(map[netip.Addr]int64, 1)
	}
	for _, ip := range ips {
		a.perms[ip] = now + int64(permissionLifetime)
	}
	return true
}

func contains(list []netip.Addr, a netip.Addr) bool {
	for _, x := range list {
		if x == a {
			return true
		}
	}
	return false
}

// bindResult says what became of a ChannelBind.
type bindResult int

const (
	bound bindResult = iota
	bindConflict
	bindFull
)

// bind binds number to peer at a, and joins it with the peer's channel for a where that exists. The peer is allowed.
func (s *Server) bind(a *allocation, number uint16, peer netip.AddrPort, now int64) bindResult {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if a.dead.Load() {
		return bindConflict
	}
	a.mu.Lock()
	c, other := a.byPeer[peer], a.channel(number)
	// A binding that has run out is no conflict, even if the sweep has not come by.
	if c != nil && c.number != number && c.expires.Load() <= now {
		a.unbindLocked(c)
		c = nil
	}
	if other != nil && other.peer != peer && other.expires.Load() <= now {
		a.unbindLocked(other)
		other = nil
	}
	if (c != nil && c.number != number) || (other != nil && other.peer != peer) {
		a.mu.Unlock()
		return bindConflict
	}
	if c == nil {
		if len(a.byPeer) >= s.cfg.Limits.Channels {
			s.unbindGoneLocked(a)
		}
		if len(a.byPeer) >= s.cfg.Limits.Channels {
			a.mu.Unlock()
			return bindFull
		}
		c = &channel{owner: a, number: number, peer: peer}
		if a.byPeer == nil {
			a.byPeer = make(map[netip.AddrPort]*channel, 1)
		}
		a.byPeer[peer] = c
		c.expires.Store(now + int64(channelLifetime))
		a.setChannelLocked(number, c)
	}
	c.expires.Store(now + int64(channelLifetime))
	a.mu.Unlock()
	if b, ok := s.table.relayed.get(peer); ok && !b.dead.Load() {
		if back := b.channelFor(a.relayed); back != nil {
			c.route.Store(back)
			back.route.Store(c)
		}
	}
	return bound
}

// unbindGoneLocked removes a's channels to allocations that have ended, so that who comes and goes can not use up a's channels. a.mu is held.
func (s *Server) unbindGoneLocked(a *allocation) {
	for peer, c := range a.byPeer {
		if b, ok := s.table.relayed.get(peer); (ok && !b.dead.Load()) || a.org.hasPeer(peer) {
			continue
		}
		a.unbindLocked(c)
	}
}

// unbindLocked removes c and parts it from the peer's channel. a.mu is held.
func (a *allocation) unbindLocked(c *channel) {
	if back := c.route.Swap(nil); back != nil {
		back.route.CompareAndSwap(c, nil)
	}
	if a.byPeer[c.peer] == c {
		delete(a.byPeer, c.peer)
	}
	if a.channel(c.number) == c {
		a.setChannelLocked(c.number, nil)
	}
}

// expire removes a's bindings and permissions that have run out.
func (s *Server) expire(a *allocation, now int64) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPeer {
		if c.expires.Load() <= now {
			a.unbindLocked(c)
		}
	}
	for ip, until := range a.perms {
		if until <= now {
			delete(a.perms, ip)
		}
	}
}

// dropLostPeers removes bindings to configured peers that are configured no more.
func (s *Server) dropLostPeers(a *allocation) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPeer {
		if _, ours := s.table.relayed.get(c.peer); !ours && !a.org.hasPeer(c.peer) {
			a.unbindLocked(c)
		}
	}
}

// mayReach is the binding rule: peer is the relayed address of a live allocation that a's owner may connect to, or a configured peer of
// its organization. other is that allocation, nil for a configured peer.
func (s *Server) mayReach(a *allocation, peer netip.AddrPort) (other *allocation, ok bool) {
	if b, found := s.table.relayed.get(peer); found {
		if b.dead.Load() || !wire.MayConnect(a.owner, b.owner) {
			return nil, false
		}
		return b, true
	}
	return nil, a.org.hasPeer(peer)
}

// end removes a and everything of it. It reports whether a was alive.
func (s *Server) end(a *allocation, reason string) bool {
	s.table.mu.Lock()
	if !s.table.removeLocked(a, s.now().UnixNano()) {
		s.table.mu.Unlock()
		return false
	}
	a.dead.Store(true)
	a.mu.Lock()
	for _, c := range a.byPeer {
		a.unbindLocked(c)
	}
	a.mu.Unlock()
	left := len(s.table.all)
	sock := a.sock.Swap(nil)
	s.table.mu.Unlock()
	if sock != nil {
		sock.close()
	}
	if a.conn != nil {
		a.conn.alloc.CompareAndSwap(a, nil)
	}
	s.count.ended.Add(1)
	s.log.Info("allocation ended", "node", a.owner.String(), "reason", reason, "allocations", left)
	return true
}

// send passes ChannelData messages, stride bytes apart in frames (the last may be shorter), on to a's node. Over UDP they leave by via, or
// by a's own socket where that is nil.
func (s *Server) send(a *allocation, via *udpio.Conn, frames []byte, stride int, ecn datagram.ECN) {
	if a.conn == nil || a.plain {
		if via == nil {
			via = a.data
		}
		if err := via.Write(frames, stride, ecn, a.udp.peer); err != nil {
			s.count.writeErrors.Add(1)
			a.dropped.Add(1)
		}
		return
	}
	for len(frames) > 0 {
		n := min(stride, len(frames))
		if !a.conn.enqueue(frames[:n], nil, false) {
			s.count.queueDrops.Add(1)
			a.dropped.Add(1)
		}
		frames = frames[n:]
	}
}
