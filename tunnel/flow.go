package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// Flow is a byte stream both ways that does not tell what carries it. Read and Write may run concurrently with each other and with
// everything else. A Read after the other end's CloseWrite returns io.EOF; one after its Reset returns an error that is ErrReset.
type Flow interface {
	io.Reader
	io.Writer
	// CloseWrite ends this direction: the other end reads io.EOF after everything written. Reading goes on.
	CloseWrite() error
	// Reset ends both directions at once; the other end's Read and Write fail with ErrReset. It may be called more than once.
	Reset()
	// Close ends what has not ended yet: what was written still arrives, what arrives is thrown away. It may be called more than once.
	Close() error
	// Offsets are the bytes read and written so far.
	Offsets() Offsets
}

// Offsets count the bytes that passed through a flow.
type Offsets struct{ Read, Written uint64 }

// counter counts a flow's bytes, and its session's beside it.
type counter struct {
	read, written atomic.Uint64
	session       *meter // nil: nobody else counts
}

// Offsets implements Flow.
func (c *counter) Offsets() Offsets { return Offsets{c.read.Load(), c.written.Load()} }

func (c *counter) countRead(n int) {
	c.read.Add(uint64(n))
	if c.session != nil {
		c.session.read.Add(uint64(n))
		c.session.moved()
	}
}

func (c *counter) countWritten(n int) {
	c.written.Add(uint64(n))
	if c.session != nil {
		c.session.written.Add(uint64(n))
		c.session.moved()
	}
}

// meter counts the bytes of a session's flows, and wakes whoever waits for the first one after a pause.
type meter struct {
	read, written atomic.Uint64
	idle          atomic.Bool
	wake          func() // nil: nobody waits
}

func (m *meter) moved() {
	if m.idle.Load() && m.idle.CompareAndSwap(true, false) && m.wake != nil {
		m.wake()
	}
}

func (m *meter) total() uint64 { return m.read.Load() + m.written.Load() }

// h3stream is what an end of an HTTP/3 request stream offers: *http3.Stream at the gateway, *http3.RequestStream at the client.
type h3stream interface {
	io.ReadWriteCloser
	CancelRead(quic.StreamErrorCode)
	CancelWrite(quic.StreamErrorCode)
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Stream is a TCP flow on a stream of a session: a Flow, and a net.Conn with CloseWrite.
type Stream struct {
	counter
	str           h3stream
	local, remote Addr

	mu       sync.Mutex // guards what follows
	finished bool       // the write side was closed
	over     bool       // reset or closed
}

var (
	_ Flow = (*Stream)(nil)
	_ Conn = (*Stream)(nil)
)

// Addr is the address of an end of a flow as the client named it: host:port.
type Addr string

// Network implements net.Addr.
func (Addr) Network() string { return "sallyway" }

func (a Addr) String() string { return string(a) }

// Codes on streams.
const (
	// codeReset stands for a TCP RST (RFC 9114 §4.4).
	codeReset = quic.StreamErrorCode(http3.ErrCodeConnectError)
	// codeGone says that nobody reads any more.
	codeGone = quic.StreamErrorCode(http3.ErrCodeNoError)
	// codeCanceled says that a request was given up.
	codeCanceled = quic.StreamErrorCode(http3.ErrCodeRequestCanceled)
)

// Read implements net.Conn and Flow.
func (s *Stream) Read(b []byte) (int, error) {
	n, err := s.str.Read(b)
	s.countRead(n)
	return n, streamError(err)
}

// Write implements net.Conn and Flow.
func (s *Stream) Write(b []byte) (int, error) {
	n, err := s.str.Write(b)
	s.countWritten(n)
	return n, streamError(err)
}

// CloseWrite implements Flow.
func (s *Stream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.finished {
		return nil
	}
	s.finished = true
	return streamError(s.str.Close())
}

// Reset implements Flow.
func (s *Stream) Reset() {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.str.CancelRead(codeReset)
	s.str.CancelWrite(codeReset)
}

// Close implements net.Conn and Flow.
func (s *Stream) Close() error {
	err := s.CloseWrite()
	s.mu.Lock()
	over := s.over
	s.over = true
	s.mu.Unlock()
	if !over {
		s.str.CancelRead(codeGone)
	}
	return err
}

// LocalAddr implements net.Conn.
func (s *Stream) LocalAddr() net.Addr { return s.local }

// RemoteAddr implements net.Conn: the destination as it was dialled.
func (s *Stream) RemoteAddr() net.Addr { return s.remote }

// SetDeadline implements net.Conn.
func (s *Stream) SetDeadline(t time.Time) error { return s.str.SetDeadline(t) }

// SetReadDeadline implements net.Conn.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.str.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.str.SetWriteDeadline(t) }

// streamError says in words of this package why reading from or writing to a stream failed.
func streamError(err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if e, ok := errors.AsType[*quic.StreamError](err); ok {
		if e.Remote {
			return &resetError{e.ErrorCode}
		}
		return net.ErrClosed
	}
	if errors.Is(err, quic.ErrStreamClosed) {
		return net.ErrClosed
	}
	if endsSession(err) {
		return sessionError(err)
	}
	return err
}

// resetError is a reset by the other end.
type resetError struct{ code quic.StreamErrorCode }

func (e *resetError) Error() string {
	return fmt.Sprintf("%v by the other end (%v)", ErrReset, http3.ErrCode(e.code))
}

// Is matches ErrReset.
func (e *resetError) Is(target error) bool { return target == ErrReset }

// endsSession reports whether err is one of those that QUIC ends a connection with.
func endsSession(err error) bool {
	_, app := errors.AsType[*quic.ApplicationError](err)
	_, transport := errors.AsType[*quic.TransportError](err)
	_, idle := errors.AsType[*quic.IdleTimeoutError](err)
	_, reset := errors.AsType[*quic.StatelessResetError](err)
	return app || transport || idle || reset
}

// connFlow is a Flow of a TCP-like conn.
type connFlow struct {
	counter
	c    Conn
	once sync.Once
}

// NewConnFlow makes a Flow of a TCP-like conn, which it takes over.
func NewConnFlow(c Conn) Flow { return &connFlow{c: c} }

// Read implements Flow.
func (f *connFlow) Read(b []byte) (int, error) {
	n, err := f.c.Read(b)
	f.countRead(n)
	return n, connError(err)
}

// Write implements Flow.
func (f *connFlow) Write(b []byte) (int, error) {
	n, err := f.c.Write(b)
	f.countWritten(n)
	return n, connError(err)
}

// CloseWrite implements Flow.
func (f *connFlow) CloseWrite() error { return f.c.CloseWrite() }

// Reset implements Flow: the peer gets RST where the conn can send one.
func (f *connFlow) Reset() {
	f.once.Do(func() {
		switch c := f.c.(type) {
		case interface{ Reset() }:
			c.Reset()
		case interface{ SetLinger(int) error }:
			_ = c.SetLinger(0) // fails on a closed conn only
		}
		_ = f.c.Close() // it is reset: nothing is left to fail
	})
}

// Close implements Flow.
func (f *connFlow) Close() error {
	var err error
	f.once.Do(func() { err = f.c.Close() })
	return err
}

func connError(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%w: %w", ErrReset, err)
	}
	return err
}
