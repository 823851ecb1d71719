//go:build !linux

package tunnel

import (
	"errors"
	"syscall"
)

// rawSocket is what quic-go sets options on; where the kernel's offloads are not used there is none.
type rawSocket struct{}

var _ syscall.RawConn = (*rawSocket)(nil)

func newRawSocket() (*rawSocket, error) { return nil, errors.ErrUnsupported }

// Control implements syscall.RawConn.
func (r *rawSocket) Control(func(fd uintptr)) error { return errors.ErrUnsupported }

// Read implements syscall.RawConn.
func (r *rawSocket) Read(func(fd uintptr) bool) error { return errors.ErrUnsupported }

// Write implements syscall.RawConn.
func (r *rawSocket) Write(func(fd uintptr) bool) error { return errors.ErrUnsupported }

// Close does nothing.
func (r *rawSocket) Close() error { return nil }
