package netstack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// maxSegments is how many datagrams a super-packet has at most: the kernel's UDP_MAX_SEGMENTS before Linux 6.9.
const maxSegments = 64

// udpChecksumOffset is where the checksum is in a UDP header.
const udpChecksumOffset = 6

// mayFragment lets the routers of a LAN behind the device fragment a packet, of which b is the IPv4 header: nobody would
// get their ICMP errors. So it, and each of the n packets that it may be cut into, needs an identification of its own (RFC 6864
// section 4.3).
func (l *link) mayFragment(b []byte, n int) {
	binary.BigEndian.PutUint16(b[4:], uint16(l.lastID.Add(uint32(n))-uint32(n)+1))
	b[6], b[10], b[11] = 0, 0, 0
	binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b, 0))
}

// writeUDP sends a datagram that fits the MTU; or, where the device takes super-packets, a run of datagrams of size bytes, of which
// the last may be shorter.
func (l *link) writeUDP(f *UDPFlow, payload []byte, size int) error {
	o := l.outbox()
	n := udpHeaderLen + len(payload)
	o.scratch = appendIP(o.scratch[:0], f.Dst.Addr(), f.Src.Addr(), protoUDP, defaultTTL, n)
	l4 := len(o.scratch)
	if l4 == ipv4HeaderLen {
		l.mayFragment(o.scratch, segments(len(payload), size))
	}
	o.scratch = binary.BigEndian.AppendUint16(o.scratch, f.Dst.Port())
	o.scratch = binary.BigEndian.AppendUint16(o.scratch, f.Src.Port())
	o.scratch = binary.BigEndian.AppendUint16(o.scratch, uint16(n))
	sum := pseudoHeader(f.Dst.Addr(), f.Src.Addr(), protoUDP, n)
	var h vnetHeader
	if l.headerLen > 0 {
		// The host knows that a partial checksum is right, and computes it only where the datagram leaves the host.
		h = vnetHeader{flags: vnetNeedsCsum, csumStart: uint16(l4), csumOffset: udpChecksumOffset}
		if len(payload) > size {
			h.gsoType, h.gsoSize, h.hdrLen = vnetGSOUDPL4, uint16(size), uint16(l4+udpHeaderLen)
		}
		o.scratch = binary.BigEndian.AppendUint16(o.scratch, sum)
	} else {
		sum = udpChecksum(sum, o.scratch[l4:], payload)
		o.scratch = binary.BigEndian.AppendUint16(o.scratch, sum)
	}
	return l.write(o, h, o.scratch, payload)
}

// segments is how many datagrams of size bytes, of which the last may be shorter, n bytes are: at least one.
func segments(n, size int) int {
	if n <= size {
		return 1
	}
	return (n + size - 1) / size
}

// udpChecksum is the checksum field for a header up to that field, whose length is even, and a payload.
func udpChecksum(pseudo uint16, h, payload []byte) uint16 {
	sum := ^checksum.Checksum(payload, checksum.Checksum(h, pseudo))
	if sum == 0 {
		return 0xffff // zero says that there is none (RFC 768)
	}
	return sum
}
