package tunnel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// quicBuffer is how large quic-go wants its socket buffers, in bytes; it writes to the process's log when they are smaller.
const quicBuffer = 7 << 20

// rawSocket is a UDP socket that is never bound, so no port is opened: quic-go sets options on it and asks it for GSO, and nothing else
// happens to it. It implements syscall.RawConn.
type rawSocket struct {
	mu sync.Mutex // guards fd
	fd int        // -1 when closed
}

var _ syscall.RawConn = (*rawSocket)(nil)

func newRawSocket() (*rawSocket, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open the socket for QUIC's options: %w", err)
	}
	quietBuffers.Do(func() {
		// The buffers of this socket do not matter, but quic-go looks at them and complains where it may not enlarge them.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, quicBuffer) != nil {
			_ = os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
		}
	})
	return &rawSocket{fd: fd}, nil
}

var quietBuffers sync.Once

// Control implements syscall.RawConn.
func (r *rawSocket) Control(f func(fd uintptr)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(r.fd))
	return nil
}

// Read implements syscall.RawConn; there is nothing to read.
func (r *rawSocket) Read(func(fd uintptr) bool) error { return errors.ErrUnsupported }

// Write implements syscall.RawConn; there is nothing to write.
func (r *rawSocket) Write(func(fd uintptr) bool) error { return errors.ErrUnsupported }

// Close closes the socket. It may be called more than once.
func (r *rawSocket) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 {
		return nil
	}
	fd := r.fd
	r.fd = -1
	return unix.Close(fd)
}
