//go:build !linux

package udpio

import (
	"syscall"

	"sallyway/internal/datagram"
)

const controlSpace = 1

func controlReusePort(_, _ string, _ syscall.RawConn) error { return nil }

func (c *Conn) setup(cfg Config) ([]string, error) {
	if cfg.ReadBuffer > 0 {
		_ = c.udp.SetReadBuffer(cfg.ReadBuffer)
	}
	if cfg.WriteBuffer > 0 {
		_ = c.udp.SetWriteBuffer(cfg.WriteBuffer)
	}
	return nil, nil
}

func (c *Conn) parse([]byte, *Message) {}

func (c *Conn) control([]byte, int, datagram.ECN, Peer) []byte { return nil }

// TooLarge reports whether err says that a datagram exceeds the path's or the interface's MTU.
func TooLarge(error) bool { return false }

func offloadBroken(error) bool { return false }

func retryEach(error) bool { return false }

func (c *Conn) wait() error { return c.raw.Read(func(uintptr) bool { return true }) }
