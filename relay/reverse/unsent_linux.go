package reverse

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxUnsent bounds what the kernel holds beyond what is on its way, in bytes.
const maxUnsent = 64 << 10

// LimitUnsent keeps what TCP has not sent yet in queues of ours rather than in the kernel's buffer (TCP_NOTSENT_LOWAT). Where the system does
// not take it, there is more delay under load and nothing else.
func LimitUnsent(c net.Conn) {
	tc, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
	})
}
