package relay

import (
	"net"

	"golang.org/x/sys/unix"
)

// unsentLimit is how many bytes the kernel takes of a connection beyond what is under way: what is queued there can not be dropped.
const unsentLimit = 128 << 10

func limitUnsent(c *net.TCPConn) {
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentLimit)
	})
}
