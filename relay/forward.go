package relay

import (
	"encoding/binary"
	"net/netip"

	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// channelHeader is the length of a ChannelData header: number and payload length, 16 bits each (RFC 8656 §12.4).
const channelHeader = 4

// datagrams relays the ChannelData messages at the start of b, a coalesced read of datagrams stride bytes apart, that src sent. It takes the
// datagrams of one channel that belong together and returns how many bytes that was. It rewrites b in place. via is the socket that they
// came by and leave by; nil takes that of the receiver.
func (s *Server) datagrams(src *allocation, via *udpio.Conn, b []byte, stride int, ecn datagram.ECN, now int64) int {
	if len(b) < channelHeader {
		s.count.malformed.Add(1)
		return len(b)
	}
	number, end := binary.BigEndian.Uint16(b), 0
	for end < len(b) {
		d := b[end:min(end+stride, len(b))]
		if len(d) < channelHeader || binary.BigEndian.Uint16(d) != number {
			break
		}
		n := channelHeader + int(binary.BigEndian.Uint16(d[2:]))
		if n != len(d) {
			if end > 0 {
				break
			}
			// Alone: padded to a multiple of four, which is allowed over UDP (RFC 8656 §12.5) and goes no further; or malformed.
			if n > len(d) || len(d)-n > 3 {
				s.count.malformed.Add(1)
				return len(d)
			}
			s.forward(src, via, number, d[:n], n, ecn, now)
			return len(d)
		}
		end += len(d)
	}
	if end == 0 { // too short for a header
		s.count.malformed.Add(1)
		return min(stride, len(b))
	}
	s.forward(src, via, number, b[:end], stride, ecn, now)
	return end
}

// forward relays frames, whole ChannelData messages of one number, stride bytes apart and all but the last that long. It rewrites them.
func (s *Server) forward(src *allocation, via *udpio.Conn, number uint16, frames []byte, stride int, ecn datagram.ECN, now int64) {
	ch := src.channel(number)
	if ch == nil || ch.expires.Load() <= now || src.dead.Load() {
		s.drop(src, frames, stride, &s.count.unbound)
		return
	}
	if !src.node.share.Take(len(frames), now) {
		s.drop(src, frames, stride, &s.count.overQuota)
		return
	}
	back := ch.route.Load()
	if back == nil {
		s.forwardUnpaired(src, ch, frames, stride, ecn, now)
		return
	}
	dst := back.owner
	if back.expires.Load() <= now || dst.dead.Load() {
		s.drop(src, frames, stride, &s.count.unbound)
		return
	}
	n := 0
	for off := 0; off < len(frames); off += stride {
		binary.BigEndian.PutUint16(frames[off:], back.number)
		n++
	}
	payload := uint64(len(frames) - n*channelHeader)
	src.seen.Store(now)
	src.sent.Add(payload)
	dst.got.Add(payload)
	s.count.relayed.Add(uint64(n))
	s.count.relayedBytes.Add(payload)
	s.send(dst, via, frames, stride, ecn)
}

// drop counts what is not relayed.
func (s *Server) drop(src *allocation, frames []byte, stride int, why *counter) {
	n := uint64((len(frames) + stride - 1) / stride)
	src.dropped.Add(n)
	why.Add(n)
}

// forwardUnpaired relays over a channel whose peer has none for the sender: a configured peer, or a standard client, which is given Data
// indications. Our own nodes take data over channels only.
func (s *Server) forwardUnpaired(src *allocation, ch *channel, frames []byte, stride int, ecn datagram.ECN, now int64) {
	dst, ok := s.mayReach(src, ch.peer)
	if !ok {
		s.drop(src, frames, stride, &s.count.unbound)
		return
	}
	if dst == nil {
		s.toPeer(src, ch.peer, frames, stride, channelHeader, ecn)
		return
	}
	for len(frames) > 0 {
		n := min(stride, len(frames))
		s.toAllocation(src, dst, frames[channelHeader:n], ecn, now)
		frames = frames[n:]
	}
}

// toAllocation gives dst one datagram from src: over dst's channel for src, else as a Data indication.
func (s *Server) toAllocation(src, dst *allocation, payload []byte, ecn datagram.ECN, now int64) {
	if dst.dead.Load() || !dst.permitted(src.relayed.Addr(), now) {
		src.dropped.Add(1)
		s.count.unbound.Add(1)
		return
	}
	src.sent.Add(uint64(len(payload)))
	s.toClient(dst, src.relayed, payload, len(payload), ecn, now)
}

// toClient gives a's node datagrams from a peer it has permitted, each of segment bytes but the last.
func (s *Server) toClient(a *allocation, from netip.AddrPort, data []byte, segment int, ecn datagram.ECN, now int64) {
	segment = max(segment, 1)
	ch := a.channelFor(from)
	if ch == nil || ch.expires.Load() <= now {
		if a.flags.Has(wire.FlagPlainData) {
			s.drop(a, data, segment, &s.count.unbound)
			return
		}
		for first := true; first || len(data) > 0; first = false {
			n := min(segment, len(data))
			s.dataIndication(a, from, data[:n])
			data = data[n:]
		}
		return
	}
	buf := datagram.NewBuffer()
	defer buf.Release()
	stride := segment + channelHeader
	for first := true; first || len(data) > 0; first = false {
		// As many frames as the buffer and one segmented write hold.
		out, count := buf.B[:0], 0
		for count == 0 || (len(data) > 0 && len(out)+stride <= udpio.MaxWrite) {
			n := min(segment, len(data))
			out = binary.BigEndian.AppendUint16(out, ch.number)
			out = binary.BigEndian.AppendUint16(out, uint16(n))
			out = append(out, data[:n]...)
			data = data[n:]
			count++
		}
		a.got.Add(uint64(len(out) - count*channelHeader))
		s.count.relayed.Add(uint64(count))
		s.count.relayedBytes.Add(uint64(len(out) - count*channelHeader))
		s.send(a, nil, out, stride, ecn)
	}
}

// dataIndication gives a's node one datagram (RFC 8656 §11.4).
func (s *Server) dataIndication(a *allocation, from netip.AddrPort, payload []byte) {
	m := messages.Get().(*stun.Message)
	defer messages.Put(m)
	m.Reset()
	m.Type = stun.NewType(stun.MethodData, stun.ClassIndication)
	m.WriteHeader()
	_ = m.NewTransactionID() // a nil error from crypto/rand
	if err := (xorAddr{stun.AttrXORPeerAddress, from}).AddTo(m); err != nil {
		return
	}
	if len(payload)+len(m.Raw)+channelHeader+3 > 65535 {
		s.count.malformed.Add(1)
		return
	}
	m.Add(stun.AttrData, payload)
	a.got.Add(uint64(len(payload)))
	s.count.relayed.Add(1)
	s.count.relayedBytes.Add(uint64(len(payload)))
	if a.conn != nil {
		if !a.conn.enqueue(m.Raw, nil, false) {
			s.count.queueDrops.Add(1)
			a.dropped.Add(1)
		}
		return
	}
	s.deliver(a, m.Raw)
}

// sendIndication serves Send (RFC 8656 §11.2), the slow way to a peer. An indication has no answer, so what is refused is dropped. Of
// several peer addresses or payloads the first counts.
func (s *Server) sendIndication(o *origin, m *stun.Message) {
	a := o.alloc
	if a == nil || a.dead.Load() {
		s.unknown(o)
		return
	}
	v, e1 := m.Get(stun.AttrXORPeerAddress)
	payload, e2 := m.Get(stun.AttrData)
	if e1 != nil || e2 != nil || len(unknownAttributes(m)) > 0 {
		s.count.malformed.Add(1)
		return
	}
	now := s.now().UnixNano()
	peer, ok := peerAddr(m, v)
	if !ok {
		s.count.malformed.Add(1)
		return
	}
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	dst, ok := s.mayReach(a, peer)
	if !ok {
		s.count.forbidden.Add(1)
		return
	}
	if !a.permitted(peer.Addr(), now) {
		s.count.unbound.Add(1)
		return
	}
	if !a.node.share.Take(len(payload), now) {
		s.count.overQuota.Add(1)
		return
	}
	if dst == nil {
		s.toPeer(a, peer, payload, max(len(payload), 1), 0, 0)
		return
	}
	s.toAllocation(a, dst, payload, 0, now)
}
