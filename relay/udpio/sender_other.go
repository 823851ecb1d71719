//go:build !linux

package udpio

import (
	"net/netip"

	"sallyway/internal/datagram"
)

// target is where a Sender writes to.
type target struct{ peer Peer }

func (c *Conn) target(to netip.AddrPort) target { return target{Peer{Addr: to}} }

func (s *Sender) try(uintptr) bool { return true }

func (s *Sender) write(b []byte, _ int, ecn datagram.ECN) error {
	return s.c.write(b, 0, ecn, s.to.peer)
}

// Full reports whether err says that the socket's buffer has no room; here the system waits instead.
func Full(error) bool { return false }
