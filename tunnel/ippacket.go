package tunnel

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// IP protocol numbers, header lengths, ICMP types.
const (
	ipICMP, ipICMPv6 = 1, 58
	ipTCP, ipUDP     = 6, 17
	minIPv4, lenIPv6 = 20, 40
	lenICMP          = 8
	// leastMTU is IPv6's, in bytes (RFC 8200 §5).
	leastMTU = 1280
)

// ipHeader is what of a packet's header decides whether it passes.
type ipHeader struct {
	src, dst  netip.Addr
	hops      uint8
	icmpError bool
	bulk      bool // TCP or UDP, which learn a path's MTU
}

// parseIP reads the header of an IP packet (RFC 791 §3.1, RFC 8200 §3). Packets with wrong lengths or checksum are refused.
func parseIP(b []byte) (h ipHeader, ok bool) {
	if len(b) < minIPv4 {
		return h, false
	}
	switch b[0] >> 4 {
	case 4:
		head := int(b[0]&0xf) * 4
		if head < minIPv4 || head > len(b) || int(binary.BigEndian.Uint16(b[2:])) != len(b) || sum(0, b[:head]) != 0xffff {
			return h, false
		}
		h.src, h.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		h.hops, h.bulk = b[8], b[9] == ipTCP || b[9] == ipUDP
		if fragment := binary.BigEndian.Uint16(b[6:]) & 0x1fff; b[9] == ipICMP && fragment == 0 && len(b) > head {
			h.icmpError = slices.Contains([]byte{3, 4, 5, 11, 12}, b[head]) // RFC 1122 §3.2.2
		}
		return h, true
	case 6:
		if len(b) < lenIPv6 || int(binary.BigEndian.Uint16(b[4:]))+lenIPv6 != len(b) {
			return h, false
		}
		h.src, h.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		h.hops, h.bulk = b[7], b[6] == ipTCP || b[6] == ipUDP
		h.icmpError = b[6] == ipICMPv6 && len(b) > lenIPv6 && b[lenIPv6] < 128 // RFC 4443 §2.1
		return h, true
	}
	return h, false
}

// takeHop decrements the hop limit of a packet that parseIP took.
func takeHop(b []byte) {
	if b[0]>>4 == 6 {
		b[7]--
		return
	}
	b[8]--
	setChecksum(b, 10, 0, b[:int(b[0]&0xf)*4])
}

// packetTooBig is the ICMP error that tells a packet's sender to make smaller ones (RFC 1191 §4, RFC 4443 §3.2), nil if it must not be
// told: ICMP errors are not answered (RFC 1122 §3.2.2). It comes from where the packet was going.
func packetTooBig(b []byte, h ipHeader) []byte {
	if h.icmpError {
		return nil
	}
	if h.src.Is4() {
		quoted := b[:min(len(b), int(b[0]&0xf)*4+8)]
		p := make([]byte, minIPv4+lenICMP+len(quoted))
		p[0], p[8], p[9] = 0x45, 64, ipICMP
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		copy(p[12:], h.dst.AsSlice())
		copy(p[16:], h.src.AsSlice())
		setChecksum(p, 10, 0, p[:minIPv4])
		body := p[minIPv4:]
		body[0], body[1] = 3, 4 // destination unreachable, fragmentation needed
		binary.BigEndian.PutUint16(body[6:], leastMTU)
		copy(body[lenICMP:], quoted)
		setChecksum(body, 2, 0, body)
		return p
	}
	quoted := b[:min(len(b), leastMTU-lenIPv6-lenICMP)]
	p := make([]byte, lenIPv6+lenICMP+len(quoted))
	p[0], p[6], p[7] = 0x60, ipICMPv6, 64
	body := p[lenIPv6:]
	binary.BigEndian.PutUint16(p[4:], uint16(len(body)))
	copy(p[8:], h.dst.AsSlice())
	copy(p[24:], h.src.AsSlice())
	body[0] = 2 // packet too big
	binary.BigEndian.PutUint32(body[4:], leastMTU)
	copy(body[lenICMP:], quoted)
	pseudo := sum(uint32(len(body))+ipICMPv6, p[8:40]) // RFC 8200 §8.1
	setChecksum(body, 2, uint32(pseudo), body)
	return p
}

// setChecksum writes the Internet checksum of b, and of what start sums up, at b[at:].
func setChecksum(whole []byte, at int, start uint32, b []byte) {
	whole[at], whole[at+1] = 0, 0
	binary.BigEndian.PutUint16(whole[at:], ^sum(start, b))
}

// sum is the one's complement sum of b (RFC 1071); over a header with its right checksum it is all ones.
func sum(start uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		start += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start>>16 + start&0xffff
	}
	return uint16(start)
}

func within(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}
