//go:build !linux

package leg

import (
	"errors"
	"net"
	"syscall"
)

func limitUnsent(net.Conn, int) error { return nil }

func unsent(syscall.RawConn) (int, error) { return 0, errors.ErrUnsupported }

func limitBacklog(syscall.RawConn, int) {}
