//go:build !linux

package udpio

import "sallyway/internal/datagram"

func (s *Sender) try(uintptr) bool { return true }

func (s *Sender) write(b []byte, _ int, ecn datagram.ECN) error { return s.c.write(b, 0, ecn, Peer{}) }

// Full reports whether err says that the socket's buffer has no room; here the system waits instead.
func Full(error) bool { return false }
