package netstack

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TCPConn is an accepted connection: an app's socket seen from the other side. Its local address is what the app dialled.
// Methods may be called concurrently. A reset by the app shows as syscall.ECONNRESET from Read and Write.
type TCPConn struct {
	ep       tcpip.Endpoint
	wq       *waiter.Queue
	src, dst netip.AddrPort

	closed    atomic.Bool // Close or Reset was called
	closeOnce sync.Once

	readMu  sync.Mutex // one Read at a time
	in      side
	writeMu sync.Mutex // one Write at a time; guards payload
	out     side
	payload bytes.Reader
}

var _ net.Conn = (*TCPConn)(nil)

// side is what a blocked Read or Write waits for.
type side struct {
	entry    waiter.Entry
	ready    chan struct{}
	deadline deadline
}

func newTCPConn(ep tcpip.Endpoint, wq *waiter.Queue, src, dst netip.AddrPort) (*TCPConn, error) {
	c := &TCPConn{ep: ep, wq: wq, src: src, dst: dst}
	c.in.entry, c.in.ready = newEntry(waiter.ReadableEvents)
	c.out.entry, c.out.ready = newEntry(waiter.WritableEvents)
	c.in.deadline.init()
	c.out.deadline.init()
	wq.EventRegister(&c.in.entry)
	wq.EventRegister(&c.out.entry)

	ep.SocketOptions().SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(keepaliveIdle), tcpip.KeepaliveIntervalOption(keepaliveInterval)
	for _, opt := range []tcpip.SettableSocketOption{&idle, &interval} {
		if err := ep.SetSockOpt(opt); err != nil {
			return nil, fmt.Errorf("keepalive: %w", goError(err))
		}
	}
	if err := ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepaliveCount); err != nil {
		return nil, fmt.Errorf("keepalive: %w", goError(err))
	}
	return c, nil
}

func newEntry(mask waiter.EventMask) (waiter.Entry, chan struct{}) {
	ch := make(chan struct{}, 1)
	return waiter.NewFunctionEntry(mask, func(waiter.EventMask) {
		select {
		case ch <- struct{}{}:
		default: // it is awake already
		}
	}), ch
}

// Read reads what the app sent. io.EOF is the app's half-close.
func (c *TCPConn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if c.in.deadline.passed() {
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		}
		w := tcpip.SliceWriter(p)
		res, err := c.ep.Read(&w, tcpip.ReadOptions{})
		switch err.(type) {
		case nil:
			c.ep.ModerateRecvBuf(res.Count)
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			select {
			case <-c.in.ready:
			case <-c.in.deadline.wait():
			}
			continue
		case *tcpip.ErrClosedForReceive:
			if c.closed.Load() {
				return 0, c.opError("read", net.ErrClosed)
			}
			// The stack reports a reset once, and Write may have taken it.
			if tcp.EndpointState(c.ep.State()) == tcp.StateError {
				return 0, c.opError("read", syscall.ECONNRESET)
			}
			return 0, io.EOF
		}
		return 0, c.opError("read", c.hide(err))
	}
}

// Write sends p to the app. It returns when the stack has it all.
func (c *TCPConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	done := 0
	for done < len(p) {
		if c.out.deadline.passed() {
			return done, c.opError("write", os.ErrDeadlineExceeded)
		}
		c.payload.Reset(p[done:])
		n, err := c.ep.Write(&c.payload, tcpip.WriteOptions{})
		done += int(n)
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			select {
			case <-c.out.ready:
			case <-c.out.deadline.wait():
			}
		case *tcpip.ErrClosedForSend:
			c.payload.Reset(nil)
			switch {
			case c.closed.Load():
				return done, c.opError("write", net.ErrClosed)
			case tcp.EndpointState(c.ep.State()) == tcp.StateError:
				return done, c.opError("write", syscall.ECONNRESET)
			}
			return done, c.opError("write", syscall.EPIPE)
		default:
			c.payload.Reset(nil)
			return done, c.opError("write", c.hide(err))
		}
	}
	c.payload.Reset(nil)
	return done, nil
}

// hide makes every error after our own Close or Reset net.ErrClosed.
func (c *TCPConn) hide(err tcpip.Error) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return goError(err)
}

// CloseWrite tells the app that no more comes (FIN), after what was written. Reading goes on.
func (c *TCPConn) CloseWrite() error {
	if err := c.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		return c.opError("close write", c.hide(err))
	}
	return nil
}

// CloseRead makes Read return; what the app still sends is lost. The app is not told.
func (c *TCPConn) CloseRead() error {
	if err := c.ep.Shutdown(tcpip.ShutdownRead); err != nil {
		return c.opError("close read", c.hide(err))
	}
	return nil
}

// Reset tells the app that the connection has failed (RST), and closes it.
func (c *TCPConn) Reset() error {
	c.closeOnce.Do(func() {
		c.closed.Store(true)
		c.ep.Abort()
		c.end()
	})
	return nil
}

// Close ends the connection: FIN after what was written, or RST where the app has sent what nobody read.
func (c *TCPConn) Close() error {
	c.closeOnce.Do(func() {
		c.closed.Store(true)
		c.ep.Close()
		c.end()
	})
	return nil
}

// end wakes what is blocked and lets go of timers. The entries stay registered: the endpoint goes with its queue.
func (c *TCPConn) end() {
	for _, s := range []*side{&c.in, &c.out} {
		s.deadline.set(time.Time{})
		select {
		case s.ready <- struct{}{}:
		default:
		}
	}
}

// LocalAddr is what the app dialled.
func (c *TCPConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.dst) }

// RemoteAddr is the app's address.
func (c *TCPConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.src) }

// SetDeadline sets both deadlines.
func (c *TCPConn) SetDeadline(t time.Time) error {
	c.in.deadline.set(t)
	c.out.deadline.set(t)
	return nil
}

// SetReadDeadline makes Read return os.ErrDeadlineExceeded after t; the zero time takes that back.
func (c *TCPConn) SetReadDeadline(t time.Time) error {
	c.in.deadline.set(t)
	return nil
}

// SetWriteDeadline makes Write return os.ErrDeadlineExceeded after t; the zero time takes that back.
func (c *TCPConn) SetWriteDeadline(t time.Time) error {
	c.out.deadline.set(t)
	return nil
}

func (c *TCPConn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// deadline is a channel that is closed when a time has passed.
type deadline struct {
	mu    sync.Mutex // guards what follows
	timer *time.Timer
	ch    chan struct{}
	done  bool // ch is closed
}

func (d *deadline) init() { d.ch = make(chan struct{}) }

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ch
}

func (d *deadline) passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.done {
		d.ch, d.done = make(chan struct{}), false
	}
	if t.IsZero() {
		return
	}
	ch := d.ch
	expire := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.ch == ch && !d.done { // else it was set again
			d.done = true
			close(ch)
		}
	}
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, expire)
		return
	}
	d.done = true
	close(ch)
}

// goError is the error of the standard library for one of the stack's.
func goError(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrConnectionReset, *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown, *tcpip.ErrNoNet:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH
	case *tcpip.ErrNotConnected:
		return syscall.ENOTCONN
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE
	}
	return errors.New(err.String())
}
