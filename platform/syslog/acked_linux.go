package syslog

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ackPoll is how often the kernel is asked.
const ackPoll = 5 * time.Millisecond

// acknowledged waits until the peer's host has acknowledged everything that was written to a stream.
func acknowledged(ctx context.Context, c net.Conn, most time.Duration) error {
	tcp := tcpOf(c)
	if tcp == nil {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	t := time.NewTicker(ackPoll)
	defer t.Stop()
	for until := time.Now().Add(most); ; {
		left, state := 0, 0
		var ioctl, soerr error
		if err := raw.Control(func(fd uintptr) {
			left, ioctl = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
			state, soerr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		}); err != nil {
			return err
		}
		switch {
		case errors.Join(ioctl, soerr) != nil:
			return errors.Join(ioctl, soerr)
		case state != 0:
			return os.NewSyscallError("write", unix.Errno(state))
		case left == 0:
			return nil
		case time.Now().After(until):
			return os.ErrDeadlineExceeded
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}
