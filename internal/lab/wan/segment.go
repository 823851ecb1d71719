package wan

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// struct virtio_net_hdr, fields in host byte order:
//
//	flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
const vnetLen = 10

const (
	ipv6HeaderLen = 40
	minTCPHeader  = 20
	tcpFIN        = 0x01
	tcpPSH        = 0x08
	tcpCWR        = 0x80
)

// segments are the packets of a link that one frame of a TUN device stands for: one, or those of a TCP super-packet.
type segments struct {
	frame []byte // with the vnet header
	head  int    // bytes of vnet header
	n     int    // at least one
	off   int    // of the payload in the IP packet, when n > 1
	tcp   int    // of the TCP header in the IP packet, when n > 1
	gso   int    // bytes of payload of each but the last, when n > 1
}

// parse looks at a frame. What is not a sound TCP super-packet is one packet.
func parse(frame []byte, head int) segments {
	whole := segments{frame: frame, head: head, n: 1}
	if head < vnetLen {
		return whole
	}
	kind := frame[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN
	if kind != unix.VIRTIO_NET_HDR_GSO_TCPV4 && kind != unix.VIRTIO_NET_HDR_GSO_TCPV6 {
		return whole
	}
	s := whole
	ip := frame[head:]
	s.gso = int(binary.NativeEndian.Uint16(frame[4:]))
	s.tcp = int(binary.NativeEndian.Uint16(frame[6:]))
	if s.gso == 0 || s.tcp < 20 || len(ip) < s.tcp+minTCPHeader {
		return whole
	}
	if v4 := kind == unix.VIRTIO_NET_HDR_GSO_TCPV4; v4 != (ip[0]>>4 == 4) || v4 && int(ip[0]&0xf)*4 > s.tcp || !v4 && s.tcp < ipv6HeaderLen {
		return whole
	}
	s.off = s.tcp + int(ip[s.tcp+12]>>4)*4
	if s.off < s.tcp+minTCPHeader || s.off >= len(ip) {
		return whole
	}
	s.n = (len(ip) - s.off + s.gso - 1) / s.gso
	return s
}

// size is how many bytes segment i has as an IP packet.
func (s *segments) size(i int) int {
	if s.n == 1 {
		return len(s.frame) - s.head
	}
	return s.off + min(s.gso, len(s.frame)-s.head-s.off-i*s.gso)
}

// cut appends to b a frame with the segments from to to and no others. Its TCP checksum is left to the kernel, as it was.
func (s *segments) cut(b []byte, from, to int) []byte {
	if from == 0 && to == s.n {
		return append(b, s.frame...)
	}
	first := s.head + s.off
	payload := s.frame[first+from*s.gso : min(len(s.frame), first+to*s.gso)]
	at := len(b)
	b = append(append(b, s.frame[:first]...), payload...)
	f := b[at:]
	if to-from == 1 {
		f[1] = unix.VIRTIO_NET_HDR_GSO_NONE
		binary.NativeEndian.PutUint16(f[4:], 0)
	} else if from > 0 {
		f[1] &^= unix.VIRTIO_NET_HDR_GSO_ECN // it was for the first segment
	}
	ip := f[s.head:]
	if ip[0]>>4 == 4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+uint16(from))
		sealIPv4(ip[:int(ip[0]&0xf)*4])
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ipv6HeaderLen))
	}
	tcp := ip[s.tcp:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(from*s.gso))
	if to < s.n {
		tcp[13] &^= tcpFIN | tcpPSH
	}
	if from > 0 {
		tcp[13] &^= tcpCWR
	}
	// The checksum field holds the sum of the pseudo header, in which the length counts (RFC 9293 section 3.1).
	was := uint16(len(s.frame) - s.head - s.tcp)
	sum := uint32(binary.BigEndian.Uint16(tcp[16:])) + uint32(^was) + uint32(len(tcp))
	binary.BigEndian.PutUint16(tcp[16:], fold(sum))
	return b
}

// sealIPv4 writes the checksum of an IPv4 header.
func sealIPv4(h []byte) {
	h[10], h[11] = 0, 0
	var sum uint32
	for i := 0; i+1 < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	binary.BigEndian.PutUint16(h[10:], ^fold(sum))
}

// fold is the ones' complement sum of 16 bits (RFC 1071).
func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
