package leg

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// limitUnsent keeps what TCP has not sent yet in the leg's own queue, which drops when it is full, rather than in the kernel's buffer,
// which delays (TCP_NOTSENT_LOWAT).
func limitUnsent(c net.Conn, bytes int) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
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

// unsent returns how many bytes wait in a UDP socket's send buffer (SIOCOUTQ), with what the kernel needs to keep them.
func unsent(c syscall.RawConn) (bytes int, err error) {
	if cerr := c.Control(func(fd uintptr) { bytes, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil {
		return 0, cerr
	}
	return bytes, err
}

// limitBacklog has a UDP socket's send buffer hold this many bytes. The kernel doubles what it is told, for what it needs to keep them.
func limitBacklog(c syscall.RawConn, bytes int) {
	_ = c.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, bytes/2) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, bytes/2)
		}
	})
}
