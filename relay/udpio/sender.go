package udpio

import (
	"net/netip"
	"sync"

	"sallyway/internal/datagram"
)

// Sender writes to one peer and never waits for room in the socket's buffer, as Conn.Write does. Its method may be called concurrently.
type Sender struct {
	c  *Conn
	to target     // none for the peer of a connected socket
	mu sync.Mutex // guards what follows: the write under way

	b, oob []byte
	space  [controlSpace]byte
	err    error
	do     func(fd uintptr) bool
}

// NewSender makes a sender for a connected socket.
func (c *Conn) NewSender() *Sender {
	s := &Sender{c: c}
	s.do = s.try
	return s
}

// NewSenderTo makes a sender to one of the peers of a socket that is not connected.
func (c *Conn) NewSenderTo(to netip.AddrPort) *Sender {
	s := c.NewSender()
	s.to = c.target(netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
	return s
}

// Send is Conn.Write except that it returns an error for which Full is true, at once, where Write would wait. It does not allocate.
func (s *Sender) Send(b []byte, segment int, ecn datagram.ECN) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if segment <= 0 || segment >= len(b) {
		return s.write(b, 0, ecn)
	}
	run := min(MaxSegments, MaxWrite/segment) * segment
	var first error
	for len(b) > 0 {
		if !s.c.gso.Load() || run <= segment {
			n := min(segment, len(b))
			if err := s.write(b[:n], 0, ecn); err != nil {
				if first == nil {
					first = err
				}
				if !TooLarge(err) {
					return first
				}
			}
			b = b[n:]
			continue
		}
		n := min(run, len(b))
		seg := segment
		if n <= segment {
			seg = 0
		}
		err := s.write(b[:n], seg, ecn)
		switch {
		case err == nil:
			b = b[n:]
		case seg == 0 || !retryEach(err):
			return err
		default:
			if offloadBroken(err) {
				s.c.gso.Store(false)
			}
			run = 0 // the rest one at a time
		}
	}
	return first
}
