package gateway

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// segmentSpace is how long the control message of a segmented write is, bytes.
const segmentSpace = 24

// udpBuffer is the kernel's receive buffer, bytes: a few runs, of which a program may send several at once.
const udpBuffer = 1 << 20

// offload asks the kernel for runs, both ways, where they are allowed, and for room for some.
func (u *udpFlow) offload() {
	raw, err := u.SyscallConn()
	if err != nil {
		return // closed: the first use says so
	}
	_ = raw.Control(func(fd uintptr) { // the same
		runs := datagram.OffloadAllowed()
		if runs && unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil {
			u.oob = make([]byte, unix.CmsgSpace(4))
		}
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpBuffer) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, udpBuffer) // up to the system's limit
		}
		// Reading the option succeeds from Linux 4.18 on, where writes understand it.
		_, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		u.segmented = runs && err == nil
	})
}

// runSize is the size of the datagrams of a run by the control message that came with it; 0 where there is none.
func runSize(oob []byte) int {
	if len(oob) < unix.CmsgLen(4) {
		return 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	if h.Level != unix.IPPROTO_UDP || h.Type != unix.UDP_GRO {
		return 0
	}
	return int(int32(binary.NativeEndian.Uint32(oob[unix.CmsgLen(0):])))
}

// segmentControl puts the control message for datagrams of size bytes into b, which has room for it.
func segmentControl(b []byte, size int) []byte {
	b = b[:unix.CmsgSpace(2)]
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], uint16(size))
	return b
}

// tooLarge reports whether the kernel refuses to segment: datagrams larger than the path takes, or a route that cannot.
func tooLarge(err error) bool {
	return errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIO)
}
