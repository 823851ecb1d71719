package tunnel

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// ecnSpace is how much room appendECN needs.
var ecnSpace = unix.CmsgSpace(4)

// putECN writes the control message that says with which ECN field a datagram came, as a kernel would for an IPv6 socket, and returns its
// length; 0 if oob is too short.
func putECN(oob []byte, ecn datagram.ECN) int {
	if len(oob) < ecnSpace {
		return 0
	}
	clear(oob[:ecnSpace])
	putCmsgHeader(oob, unix.CmsgLen(4), unix.IPPROTO_IPV6, unix.IPV6_TCLASS)
	binary.NativeEndian.PutUint32(oob[unix.CmsgLen(0):], uint32(ecn))
	return ecnSpace
}

func putCmsgHeader(b []byte, length int, level, typ int32) {
	if unix.SizeofCmsghdr == 16 {
		binary.NativeEndian.PutUint64(b, uint64(length))
		binary.NativeEndian.PutUint32(b[8:], uint32(level))
		binary.NativeEndian.PutUint32(b[12:], uint32(typ))
		return
	}
	binary.NativeEndian.PutUint32(b, uint32(length))
	binary.NativeEndian.PutUint32(b[4:], uint32(level))
	binary.NativeEndian.PutUint32(b[8:], uint32(typ))
}

// parseControl reads what a sender asks for: the size of segments (0: one datagram) and the ECN field. What it does not know, or what is
// malformed, it ignores.
func parseControl(oob []byte) (segment int, ecn datagram.ECN) {
	for len(oob) >= unix.SizeofCmsghdr {
		var length uint64
		var level, typ uint32
		if unix.SizeofCmsghdr == 16 {
			length = binary.NativeEndian.Uint64(oob)
			level, typ = binary.NativeEndian.Uint32(oob[8:]), binary.NativeEndian.Uint32(oob[12:])
		} else {
			length = uint64(binary.NativeEndian.Uint32(oob))
			level, typ = binary.NativeEndian.Uint32(oob[4:]), binary.NativeEndian.Uint32(oob[8:])
		}
		head := unix.CmsgLen(0)
		if length < uint64(head) || length > uint64(len(oob)) {
			return segment, ecn
		}
		data := oob[head:length]
		switch {
		case level == unix.IPPROTO_UDP && typ == unix.UDP_SEGMENT && len(data) >= 2:
			segment = int(binary.NativeEndian.Uint16(data))
		case level == unix.IPPROTO_IP && typ == unix.IP_TOS && len(data) >= 1:
			ecn = datagram.ECN(data[0] & 3)
		case level == unix.IPPROTO_IPV6 && typ == unix.IPV6_TCLASS && len(data) >= 4:
			ecn = datagram.ECN(binary.NativeEndian.Uint32(data) & 3)
		}
		next := unix.CmsgSpace(len(data))
		if next > len(oob) {
			return segment, ecn
		}
		oob = oob[next:]
	}
	return segment, ecn
}
