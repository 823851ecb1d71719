package relay

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/dtls/v3"
)

// virtualConn is the part of a UDP socket that one source talks DTLS to: a queue of its datagrams and, from the handshake on, a connection.
//
// The library keeps three goroutines and buffers of 30 to 50 KB for a connection, and most connections are idle most of the time. So an idle
// one is parked: its keys and counters are kept, the library's part is given up, and made again when a datagram comes or is to be sent.
// From before its counters are taken until it is made again nothing of the connection leaves, and what was given up never sends again, so
// that no counter is used twice; what came in before is not accepted again, since its counter is kept as well.
type virtualConn struct {
	s       *Server
	end     udpEnd
	half    *halfOpen
	reading atomic.Bool          // a reader is at work
	pushes  atomic.Uint64        // datagrams queued
	wakes   atomic.Uint64        // calls of wake
	ready   chan struct{}        // something has been queued
	since   time.Time            // of the completed handshake; set before it is in the table as live
	conn    atomic.Pointer[conn] // likewise

	life   sync.RWMutex // guards what follows; read-locked by who writes
	dc     *dtls.Conn   // nil while parked
	wire   *dtlsWire    // what dc talks to
	parked *dtls.State
	closed bool

	mu      sync.Mutex // guards the rest
	in      [][]byte
	waiting bool // the library has handled what it took, and waits for more
}

var _ net.Conn = (*virtualConn)(nil)

// errParked is what a write finds where a connection can not be made again.
var errParked = errors.New("the connection could not be resumed")

// push hands a copy of d over, or drops it where too many wait.
func (v *virtualConn) push(d []byte) {
	v.mu.Lock()
	if len(v.in) >= dtlsQueue {
		v.mu.Unlock()
		v.s.count.queueDrops.Add(1)
		return
	}
	v.in = append(v.in, append([]byte(nil), d...))
	v.pushes.Add(1)
	v.mu.Unlock()
	select {
	case v.ready <- struct{}{}:
	default:
	}
}

// pop takes the datagram that has waited longest, unless w has been given up.
func (v *virtualConn) pop(w *dtlsWire) ([]byte, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if w.mute.Load() {
		return nil, false
	}
	v.waiting = len(v.in) == 0
	if v.waiting {
		v.in = nil // an idle connection holds no queue
		return nil, false
	}
	d := v.in[0]
	v.in = v.in[1:]
	return d, true
}

// quiet reports whether all that has been queued, which is so much, has been handled up to records.
func (v *virtualConn) quiet() (pushes uint64, quiet bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.pushes.Load(), len(v.in) == 0 && v.waiting
}

// park gives up the library's part of an established connection to which nothing has come since seen, and all of that was read.
func (v *virtualConn) park(seen uint64) {
	// Until there is an allocation the library may have to repeat the end of its handshake. Standard clients send data over DTLS.
	a := v.conn.Load().alloc.Load()
	if a == nil || !a.plain {
		return
	}
	v.life.Lock()
	defer v.life.Unlock()
	if v.dc == nil || v.closed {
		return
	}
	v.mu.Lock()
	idle := v.pushes.Load() == seen && v.waiting
	if idle {
		v.wire.mute.Store(true) // from here on nothing leaves; a record that is on its way was counted before
	}
	v.mu.Unlock()
	if !idle {
		return
	}
	state, ok := v.dc.ConnectionState()
	if !ok {
		v.wire.mute.Store(false)
		return
	}
	_ = v.dc.Close() // its close_notify goes nowhere
	v.dc, v.wire, v.parked = nil, nil, &state
}

// lockLive read-locks v.life and returns the connection, which it makes again where it is parked. On an error nothing is locked.
func (v *virtualConn) lockLive() (*dtls.Conn, error) {
	for {
		v.life.RLock()
		if v.dc != nil {
			return v.dc, nil
		}
		v.life.RUnlock()
		v.life.Lock()
		_, err := v.resumeLocked()
		v.life.Unlock()
		if err != nil {
			return nil, err
		}
	}
}

// resumeLocked returns the connection, which it makes again where it is parked. v.life is locked.
func (v *virtualConn) resumeLocked() (*dtls.Conn, error) {
	if v.dc != nil {
		return v.dc, nil
	}
	if v.closed || v.parked == nil {
		return nil, net.ErrClosed
	}
	state := v.parked
	v.parked = nil // never twice
	v.mu.Lock()
	v.waiting = false
	v.mu.Unlock()
	w := newDTLSWire(v)
	dc, err := dtls.ResumeWithOptions(state, w, v.RemoteAddr(), dtls.WithLoggerFactory(quiet), dtls.WithMTU(dtlsMTU))
	if err != nil {
		return nil, errors.Join(errParked, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := dc.HandshakeContext(ctx); err != nil { // exchanges nothing: the state says that it is done
		_ = dc.Close()
		return nil, errors.Join(errParked, err)
	}
	v.dc, v.wire = dc, w
	return dc, nil
}

// Read reads a record. It is for one reader.
func (v *virtualConn) Read(b []byte) (int, error) {
	dc, err := v.lockLive()
	if err != nil {
		return 0, err
	}
	v.life.RUnlock()
	return dc.Read(b)
}

// Write sends b in a record. The connection is parked again by the reader that it wakes.
func (v *virtualConn) Write(b []byte) (int, error) {
	dc, err := v.lockLive()
	if err != nil {
		return 0, err
	}
	defer v.life.RUnlock()
	v.wake()
	return dc.Write(b)
}

// Close ends the connection and tells the client.
func (v *virtualConn) Close() error {
	v.life.Lock()
	defer v.life.Unlock()
	dc, err := v.resumeLocked()
	v.closed = true
	if err != nil {
		return nil // closed, or beyond telling
	}
	return dc.Close()
}

// LocalAddr is the relay's address.
func (v *virtualConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(v.end.sock.LocalAddr()) }

// RemoteAddr is the source.
func (v *virtualConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(v.end.peer.Addr) }

// SetDeadline sets the read deadline; writes do not block.
func (v *virtualConn) SetDeadline(t time.Time) error { return v.SetReadDeadline(t) }

// SetReadDeadline bounds reads, those under way included.
func (v *virtualConn) SetReadDeadline(t time.Time) error {
	dc, err := v.lockLive()
	if err != nil {
		return err
	}
	defer v.life.RUnlock()
	return dc.SetReadDeadline(t)
}

// SetWriteDeadline does nothing, since writes do not block.
func (v *virtualConn) SetWriteDeadline(time.Time) error { return nil }

// dtlsWire is what the library's part of a connection reads from and writes to, until it is given up.
type dtlsWire struct {
	v        *virtualConn
	mute     atomic.Bool // nothing leaves any more
	deadline *deadline
	once     sync.Once
	closed   chan struct{}
}

var _ net.PacketConn = (*dtlsWire)(nil)

func newDTLSWire(v *virtualConn) *dtlsWire {
	return &dtlsWire{v: v, deadline: makeDeadline(), closed: make(chan struct{})}
}

// ReadFrom waits for a datagram of the source. It is for one reader.
func (w *dtlsWire) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		if d, ok := w.v.pop(w); ok {
			return copy(b, d), w.v.RemoteAddr(), nil
		}
		if w.mute.Load() { // what comes is for the next
			select {
			case w.v.ready <- struct{}{}:
			default:
			}
			return 0, nil, net.ErrClosed
		}
		select {
		case <-w.v.ready:
		case <-w.closed:
			return 0, nil, net.ErrClosed
		case <-w.deadline.passed():
			return 0, nil, os.ErrDeadlineExceeded
		}
	}
}

// WriteTo sends a datagram to the source, whatever addr says.
func (w *dtlsWire) WriteTo(b []byte, _ net.Addr) (int, error) {
	if w.mute.Load() {
		return len(b), nil
	}
	if err := w.v.end.sock.Write(b, 0, 0, w.v.end.peer); err != nil && errors.Is(err, net.ErrClosed) {
		return 0, err
	}
	return len(b), nil // what the network refuses is lost, as on the way
}

// Close ends reads. The socket stays.
func (w *dtlsWire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return nil
}

// LocalAddr is the relay's address.
func (w *dtlsWire) LocalAddr() net.Addr { return w.v.LocalAddr() }

// SetDeadline sets the read deadline; writes do not block.
func (w *dtlsWire) SetDeadline(t time.Time) error { return w.SetReadDeadline(t) }

// SetReadDeadline bounds reads, those under way included.
func (w *dtlsWire) SetReadDeadline(t time.Time) error {
	w.deadline.set(t)
	return nil
}

// SetWriteDeadline does nothing, since writes do not block.
func (w *dtlsWire) SetWriteDeadline(time.Time) error { return nil }
