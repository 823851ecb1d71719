package netstack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// maxPacket is the largest IP packet, bytes (RFC 791 section 3.1; jumbograms are not taken).
const maxPacket = 65535

// IP protocol numbers.
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoICMPv6   = 58
	protoDestOpts = 60
)

const (
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40
	tcpHeaderLen  = 20
	udpHeaderLen  = 8
	icmpHeaderLen = 8

	// maxExtensions bounds the walk over IPv6 extension headers.
	maxExtensions = 8
)

var errMalformed = errors.New("malformed packet")

// packet is what the headers of an IP packet say.
type packet struct {
	src, dst netip.Addr
	proto    uint8 // of the transport header, behind IPv6 extension headers
	l4       int   // its offset
	len      int   // of the whole packet by its own header
	ttl      uint8
	fragment bool // part of a datagram
	rest     bool // a fragment that is not the first: there is no transport header at l4
}

// parsePacket reads the headers of an IPv4 (RFC 791) or IPv6 (RFC 8200) packet. Bytes behind its length are padding.
func parsePacket(b []byte) (packet, error) {
	if len(b) < ipv4HeaderLen {
		return packet{}, errMalformed
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return packet{}, errMalformed
}

func parseIPv4(b []byte) (packet, error) {
	hl := int(b[0]&15) * 4
	p := packet{
		src: netip.AddrFrom4([4]byte(b[12:16])), dst: netip.AddrFrom4([4]byte(b[16:20])),
		proto: b[9], ttl: b[8], l4: hl, len: int(binary.BigEndian.Uint16(b[2:])),
	}
	if hl < ipv4HeaderLen || p.len < hl || p.len > len(b) {
		return packet{}, errMalformed
	}
	frag := binary.BigEndian.Uint16(b[6:])
	p.fragment = frag&0x3fff != 0 // more fragments, or an offset
	p.rest = frag&0x1fff != 0
	return p, nil
}

func parseIPv6(b []byte) (packet, error) {
	if len(b) < ipv6HeaderLen {
		return packet{}, errMalformed
	}
	p := packet{
		src: netip.AddrFrom16([16]byte(b[8:24])), dst: netip.AddrFrom16([16]byte(b[24:40])),
		proto: b[6], ttl: b[7], l4: ipv6HeaderLen, len: ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:])),
	}
	if p.len > len(b) || p.src.Is4In6() || p.dst.Is4In6() {
		return packet{}, errMalformed
	}
	for range maxExtensions {
		switch p.proto {
		case protoHopByHop, protoRouting, protoDestOpts:
			if p.l4+8 > p.len {
				return packet{}, errMalformed
			}
			p.proto, p.l4 = b[p.l4], p.l4+8+int(b[p.l4+1])*8
		case protoFragment:
			if p.l4+8 > p.len {
				return packet{}, errMalformed
			}
			frag := binary.BigEndian.Uint16(b[p.l4+2:])
			p.fragment = frag&0xfff9 != 0 // else it is an atomic fragment (RFC 6946)
			p.rest = frag&0xfff8 != 0
			p.proto, p.l4 = b[p.l4], p.l4+8
			if p.rest {
				return p, nil
			}
		default:
			return p, nil
		}
		if p.l4 > p.len {
			return packet{}, errMalformed
		}
	}
	return packet{}, errMalformed
}

// pseudoHeader is the sum over the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293 section 3.1, RFC 8200 section 8.1).
func pseudoHeader(src, dst netip.Addr, proto uint8, n int) uint16 {
	var sum uint16
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	} else {
		s, d := src.As16(), dst.As16()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	}
	return checksum.Combine(checksum.Combine(sum, uint16(n)), uint16(proto))
}

// transportValid reports whether the TCP, UDP or ICMPv6 checksum of an unfragmented packet is right. A zero UDP checksum
// over IPv4 means none (RFC 768).
func transportValid(b []byte, p packet) bool {
	t := b[p.l4:p.len]
	if p.proto == protoUDP {
		if len(t) < udpHeaderLen {
			return false
		}
		if t[6] == 0 && t[7] == 0 {
			return p.src.Is4()
		}
		if n := int(binary.BigEndian.Uint16(t[4:])); n >= udpHeaderLen && n <= len(t) {
			t = t[:n]
		}
	}
	return checksum.Checksum(t, pseudoHeader(p.src, p.dst, p.proto, len(t))) == 0xffff
}

// appendIP appends the header of a packet of n more bytes.
func appendIP(b []byte, src, dst netip.Addr, proto, ttl uint8, n int) []byte {
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		at := len(b)
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ipv4HeaderLen+n))
		b = append(b, 0, 0, 0x40, 0, ttl, proto, 0, 0) // don't fragment, so the identification may be 0 (RFC 6864 section 4.1)
		b = append(b, s[:]...)
		b = append(b, d[:]...)
		binary.BigEndian.PutUint16(b[at+10:], ^checksum.Checksum(b[at:], 0))
		return b
	}
	s, d := src.As16(), dst.As16()
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(b, proto, ttl)
	b = append(b, s[:]...)
	return append(b, d[:]...)
}
