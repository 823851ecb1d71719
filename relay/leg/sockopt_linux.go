package leg

import (
	"net"

	"golang.org/x/sys/unix"
)

// limitUnsent keeps what TCP has not sent yet in the leg's own queue, which drops when it is full, rather than in the kernel's buffer,
// which delays (TCP_NOTSENT_LOWAT).
func limitUnsent(c *net.TCPConn, bytes int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, bytes)
	}); err != nil {
		return err
	}
	return serr
}
