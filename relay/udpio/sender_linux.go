package udpio

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// target is where a Sender writes to, in the socket's own family.
type target struct {
	peer Peer
	sa   unix.Sockaddr
}

func (c *Conn) target(to netip.AddrPort) target {
	if !c.v6 {
		return target{Peer{Addr: to}, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}}
	}
	return target{Peer{Addr: to}, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}}
}

func (s *Sender) write(b []byte, segment int, ecn datagram.ECN) error {
	s.b, s.oob, s.err = b, s.c.control(s.space[:0], segment, ecn, s.to.peer), nil
	err := s.c.raw.Write(s.do)
	s.b = nil
	if err != nil {
		return err
	}
	return s.err
}

// try makes the system call. It always says that it is done, so that the runtime never waits for the socket to become writable.
func (s *Sender) try(fd uintptr) bool {
	for {
		_, s.err = unix.SendmsgN(int(fd), s.b, s.oob, s.to.sa, unix.MSG_DONTWAIT)
		if !errors.Is(s.err, unix.EINTR) {
			return true
		}
	}
}

// Full reports whether err says that the socket's buffer or the device's queue has no room.
func Full(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) }
