package netstack

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// broadcast is the limited broadcast address.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Reason is why a flow is rejected.
type Reason int

// Reasons.
const (
	// Refused: the destination said no. A TCP reset, or port unreachable for UDP.
	Refused Reason = iota + 1
	// Unreachable: nothing answers there. Host (IPv6: address) unreachable.
	Unreachable
	// NetUnreachable: there is no way there. Net unreachable (IPv6: no route).
	NetUnreachable
	// AdminProhibited: policy says no. Communication administratively prohibited.
	AdminProhibited
	// Silent: filtered. The app sees its own timeout.
	Silent
)

// String is the name of the reason.
func (r Reason) String() string {
	switch r {
	case Refused:
		return "refused"
	case Unreachable:
		return "unreachable"
	case NetUnreachable:
		return "network unreachable"
	case AdminProhibited:
		return "administratively prohibited"
	case Silent:
		return "silent"
	}
	return fmt.Sprintf("Reason(%d)", int(r))
}

// ICMP types and codes (RFC 792, RFC 1812 section 5.2.7.1) and those of ICMPv6 (RFC 4443, RFC 4861).
const (
	icmp4EchoReply    = 0
	icmp4Unreachable  = 3
	icmp4SourceQuench = 4
	icmp4Redirect     = 5
	icmp4Echo         = 8
	icmp4TimeExceeded = 11
	icmp4ParamProblem = 12

	icmp4CodeNet    = 0
	icmp4CodeHost   = 1
	icmp4CodePort   = 3
	icmp4CodeTooBig = 4
	icmp4CodeAdmin  = 13

	icmp6Unreachable = 1
	icmp6TooBig      = 2
	icmp6LastError   = 127 // below 128 are errors
	icmp6Echo        = 128
	icmp6EchoReply   = 129
	icmp6FirstND     = 130 // multicast listener, router and neighbour discovery, redirect
	icmp6LastND      = 137

	icmp6CodeNoRoute = 0
	icmp6CodeAdmin   = 1
	icmp6CodeAddress = 3
	icmp6CodePort    = 4

	// maxError4 is as much as an ICMP error should be, bytes (RFC 1812 section 4.3.2.3); ICMPv6: the minimum MTU.
	maxError4 = 576
	maxError6 = 1280
)

type icmpClass int

const (
	icmpOther icmpClass = iota
	icmpEchoRequest
	icmpError
	icmpNeighbour
)

// icmpKind says what kind of message one of type t is.
func icmpKind(p packet, t uint8) icmpClass {
	if p.proto == protoICMPv6 {
		switch {
		case t == icmp6Echo:
			return icmpEchoRequest
		case t <= icmp6LastError:
			return icmpError
		case t >= icmp6FirstND && t <= icmp6LastND:
			return icmpNeighbour
		}
		return icmpOther
	}
	switch t {
	case icmp4Echo:
		return icmpEchoRequest
	case icmp4Unreachable, icmp4TimeExceeded, icmp4ParamProblem:
		return icmpError
	case icmp4SourceQuench, icmp4Redirect: // obsolete (RFC 6633), and there is nothing to redirect to
		return icmpNeighbour
	}
	return icmpOther
}

// parseQuoted reads the packet that an ICMP error quotes, which is usually cut short.
func parseQuoted(b []byte) (packet, error) {
	switch {
	case len(b) >= ipv4HeaderLen && b[0]>>4 == 4:
		return packet{
			proto: b[9], src: netip.AddrFrom4([4]byte(b[12:16])), dst: netip.AddrFrom4([4]byte(b[16:20])),
			l4: int(b[0]&15) * 4, len: len(b), rest: binary.BigEndian.Uint16(b[6:])&0x1fff != 0,
		}, nil
	case len(b) >= ipv6HeaderLen && b[0]>>4 == 6:
		return packet{
			proto: b[6], src: netip.AddrFrom16([16]byte(b[8:24])), dst: netip.AddrFrom16([16]byte(b[24:40])),
			l4: ipv6HeaderLen, len: len(b),
		}, nil
	}
	return packet{}, errMalformed
}

// Echo is an ICMP (RFC 792) or ICMPv6 (RFC 4443 section 4) echo request or reply.
type Echo struct {
	Src, Dst netip.Addr // of one family, which says which ICMP
	Reply    bool
	ID, Seq  uint16
	TTL      uint8  // or hop limit; 0 is sent as 64
	Data     []byte // what comes back; of ParseEcho, a part of the packet
}

// ParseEcho reads an IP packet that is an unfragmented echo message with a right checksum; anything else is an error.
func ParseEcho(pkt []byte) (Echo, error) {
	p, err := parsePacket(pkt)
	if err != nil {
		return Echo{}, err
	}
	if p.fragment || p.len-p.l4 < icmpHeaderLen {
		return Echo{}, fmt.Errorf("not a whole echo message: %w", errMalformed)
	}
	m := pkt[p.l4:p.len]
	e := Echo{
		Src: p.src, Dst: p.dst, TTL: p.ttl,
		ID: binary.BigEndian.Uint16(m[4:]), Seq: binary.BigEndian.Uint16(m[6:]), Data: m[icmpHeaderLen:],
	}
	var sum uint16
	switch {
	case p.proto == protoICMP && p.src.Is4() && (m[0] == icmp4Echo || m[0] == icmp4EchoReply):
		e.Reply = m[0] == icmp4EchoReply
	case p.proto == protoICMPv6 && p.src.Is6() && (m[0] == icmp6Echo || m[0] == icmp6EchoReply):
		e.Reply = m[0] == icmp6EchoReply
		sum = pseudoHeader(p.src, p.dst, protoICMPv6, len(m))
	default:
		return Echo{}, fmt.Errorf("not an echo message: %w", errMalformed)
	}
	if m[1] != 0 || checksum.Checksum(m, sum) != 0xffff {
		return Echo{}, fmt.Errorf("echo message with a wrong checksum: %w", errMalformed)
	}
	return e, nil
}

// Answer is the reply to a request: addresses swapped, the same data.
func (e Echo) Answer() Echo {
	e.Src, e.Dst, e.Reply, e.TTL = e.Dst, e.Src, true, 0
	return e
}

// AppendPacket appends the message as a whole IP packet with its checksums. Src and Dst must be of one family.
func (e Echo) AppendPacket(b []byte) []byte {
	ttl := e.TTL
	if ttl == 0 {
		ttl = defaultTTL
	}
	n := icmpHeaderLen + len(e.Data)
	proto, typ := uint8(protoICMP), byte(icmp4Echo)
	switch {
	case e.Src.Is4() && e.Reply:
		typ = icmp4EchoReply
	case !e.Src.Is4() && e.Reply:
		proto, typ = protoICMPv6, icmp6EchoReply
	case !e.Src.Is4():
		proto, typ = protoICMPv6, icmp6Echo
	}
	b = appendIP(b, e.Src, e.Dst, proto, ttl, n)
	at := len(b)
	b = append(b, typ, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, e.ID)
	b = binary.BigEndian.AppendUint16(b, e.Seq)
	b = append(b, e.Data...)
	putICMPChecksum(b[at:], e.Src, e.Dst)
	return b
}

func putICMPChecksum(m []byte, src, dst netip.Addr) {
	var sum uint16
	if !src.Is4() {
		sum = pseudoHeader(src, dst, protoICMPv6, len(m))
	}
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, sum))
}

// AppendUnreachable appends the ICMP error that tells the sender of orig, an IP packet or the start of one, of r. src is
// the sender of the error. Nothing is appended for Silent, and where RFC 1122 section 3.2.2 and RFC 4443 section 2.4 forbid
// an error: about an ICMP error, a fragment that is not the first, multicast.
func AppendUnreachable(b, orig []byte, src netip.Addr, r Reason) []byte {
	var code4, code6 byte
	switch r {
	case Refused:
		code4, code6 = icmp4CodePort, icmp6CodePort
	case Unreachable:
		code4, code6 = icmp4CodeHost, icmp6CodeAddress
	case NetUnreachable:
		code4, code6 = icmp4CodeNet, icmp6CodeNoRoute
	case AdminProhibited:
		code4, code6 = icmp4CodeAdmin, icmp6CodeAdmin
	default:
		return b
	}
	return appendError(b, orig, src, [2]byte{icmp4Unreachable, code4}, [2]byte{icmp6Unreachable, code6}, 0)
}

// AppendTooBig appends the ICMP error about orig that says that only mtu bytes pass: fragmentation needed (RFC 1191 section
// 4) or ICMPv6 packet too big (RFC 4443 section 3.2). Nothing is appended where an error is forbidden, as above.
func AppendTooBig(b, orig []byte, src netip.Addr, mtu int) []byte {
	return appendError(b, orig, src, [2]byte{icmp4Unreachable, icmp4CodeTooBig}, [2]byte{icmp6TooBig, 0}, uint32(mtu))
}

// appendError appends an ICMP error of a type and code for each family, with 32 more bits of header.
func appendError(b, orig []byte, src netip.Addr, v4, v6 [2]byte, info uint32) []byte {
	p, err := parseQuoted(orig)
	if err != nil || p.rest || p.src.IsMulticast() || p.src.IsUnspecified() || p.src.IsLoopback() || p.dst.IsMulticast() ||
		p.dst == broadcast || src.Is4() != p.src.Is4() {
		return b
	}
	if (p.proto == protoICMP || p.proto == protoICMPv6) && (p.l4 >= len(orig) || icmpKind(p, orig[p.l4]) == icmpError) {
		return b
	}
	typ, proto, limit := v4, uint8(protoICMP), maxError4-ipv4HeaderLen
	if !p.src.Is4() {
		typ, proto, limit = v6, protoICMPv6, maxError6-ipv6HeaderLen
	}
	orig = orig[:min(len(orig), limit-icmpHeaderLen)]
	b = appendIP(b, src, p.src, proto, defaultTTL, icmpHeaderLen+len(orig))
	at := len(b)
	b = append(b, typ[0], typ[1], 0, 0)
	b = binary.BigEndian.AppendUint32(b, info)
	b = append(b, orig...)
	putICMPChecksum(b[at:], src, p.src)
	return b
}
