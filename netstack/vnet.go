package netstack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// vnetHeaderLen is sizeof(struct virtio_net_hdr), bytes. Its fields: flags u8, gso_type u8, then u16 hdr_len, gso_size,
// csum_start, csum_offset in host byte order (a TUN's default).
const vnetHeaderLen = 10

const (
	vnetNeedsCsum = 1 // the checksum holds the pseudo-header only; the rest is from csum_start
	vnetDataValid = 2 // the checksum was verified

	vnetGSONone  = 0
	vnetGSOTCPv4 = 1
	vnetGSOTCPv6 = 4
	vnetGSOUDPL4 = 5 // a run of datagrams of gso_size bytes each, of which the last may be shorter
	vnetGSOECN   = 0x80
)

// vnetHeader is a struct virtio_net_hdr.
type vnetHeader struct {
	flags, gsoType                         uint8
	hdrLen, gsoSize, csumStart, csumOffset uint16
}

// parseVnet reads the header at the start of b, which must hold vnetHeaderLen bytes.
func parseVnet(b []byte) vnetHeader {
	e := binary.NativeEndian
	return vnetHeader{b[0], b[1], e.Uint16(b[2:]), e.Uint16(b[4:]), e.Uint16(b[6:]), e.Uint16(b[8:])}
}

// put writes the header to the start of b.
func (h vnetHeader) put(b []byte) {
	b[0], b[1] = h.flags, h.gsoType
	e := binary.NativeEndian
	e.PutUint16(b[2:], h.hdrLen)
	e.PutUint16(b[4:], h.gsoSize)
	e.PutUint16(b[6:], h.csumStart)
	e.PutUint16(b[8:], h.csumOffset)
}

// trusted reports whether the packet's checksum need not be verified.
func (h vnetHeader) trusted() bool { return h.flags&(vnetNeedsCsum|vnetDataValid) != 0 }

// udpSegment is how long the datagrams of a UDP super-packet are, bytes of payload; 0 where the packet is none. The partial
// checksum that comes with it tells that the kernel is where it was made.
func (h vnetHeader) udpSegment() int {
	if h.gsoType&^vnetGSOECN != vnetGSOUDPL4 || h.flags&vnetNeedsCsum == 0 {
		return 0
	}
	return int(h.gsoSize)
}

// complete finishes a partial checksum of pkt in place and reports whether the header's offsets lie within it.
func (h vnetHeader) complete(pkt []byte) bool {
	if h.flags&vnetNeedsCsum == 0 {
		return true
	}
	start, at := int(h.csumStart), int(h.csumStart)+int(h.csumOffset)
	if at+2 > len(pkt) {
		return false
	}
	// The field holds the pseudo-header's sum, so that the sum over it all is the one wanted (0 is sent as 0xffff, RFC 768).
	sum := ^checksum.Checksum(pkt[start:], 0)
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(pkt[at:], sum)
	return true
}
