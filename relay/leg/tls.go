package leg

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/udpio"
)

const (
	// maxStreamPayload is the largest payload of a datagram on a TLS leg, in bytes.
	maxStreamPayload = 16 << 10
	// maxUnsent bounds what the kernel holds beyond what is on its way, in bytes; control waits behind it.
	maxUnsent = 64 << 10
	// controlQueue bounds the control messages that wait to be written, in bytes; it is apart from data, which can not starve it.
	controlQueue = 64 << 10
)

// tlsCarrier is a TLS connection with STUN and ChannelData in it.
type tlsCarrier struct {
	tcp    *gather
	conn   *tls.Conn
	up     upcalls
	local  netip.AddrPort
	remote netip.AddrPort

	mu      sync.Mutex // guards what follows
	wake    sync.Cond  // something to write, or closed
	control []byte     // waiting, written before data
	queue   []byte     // waiting data, at most limit bytes with what is being written
	writing int        // bytes of data that are being written
	limit   int
	backlog backlog
	closed  bool
}

func dialTLS(ctx context.Context, cfg *Config, addr netip.AddrPort, up upcalls, start func(func())) (*tlsCarrier, error) {
	dial := cfg.Dial
	if dial == nil {
		dial = (&net.Dialer{Control: cfg.Control}).DialContext
	}
	nc, err := dial(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	_ = limitUnsent(nc, maxUnsent)
	tc := identity.TLSConfig(func() (*tls.Certificate, error) { return new(tls.Certificate), nil }, false, nil, nil)
	tc.VerifyConnection = func(cs tls.ConnectionState) error { return verifyChain(cfg, cs.PeerCertificates) }
	tc.ServerName = cfg.Relay.ServerName()
	tc.DynamicRecordSizingDisabled = true
	t := &tlsCarrier{tcp: &gather{Conn: nc}, up: up, limit: cfg.Queue, backlog: backlog{most: cfg.Queue}}
	t.wake.L = &t.mu
	t.conn = tls.Client(t.tcp, tc)
	if err := t.conn.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	t.local, t.remote = tcpAddr(nc.LocalAddr()), tcpAddr(nc.RemoteAddr())
	start(t.read)
	start(t.writeLoop)
	return t, nil
}

// tcpAddr is the zero AddrPort for an address that is not known.
func tcpAddr(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok || t.IP == nil || t.IP.IsUnspecified() {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// read is the loop that reads the stream: frames in place, the rest of the last one moved to the next buffer.
func (t *tlsCarrier) read() {
	var in input = streamInput{t.up}
	buf := datagram.NewBuffer()
	have := 0
	for {
		n, err := t.conn.Read(buf.B[have:])
		have += n
		if have > 0 && n > 0 {
			used, werr := walkStream(buf.B[:have], buf, in)
			if werr != nil {
				err = werr
			}
			if used > 0 {
				next := datagram.NewBuffer()
				have = copy(next.B[:], buf.B[used:have])
				buf.Release()
				buf = next
			}
		}
		if err != nil {
			buf.Release()
			if errors.Is(err, io.EOF) {
				err = errors.New("the relay closed the connection")
			}
			t.up.broken(err)
			return
		}
	}
}

// streamInput takes what walkStream finds.
type streamInput struct{ up upcalls }

func (s streamInput) data(number uint16, b datagram.Batch) { s.up.data(number, b) }
func (s streamInput) control(_ class, b []byte)            { s.up.message(b) }
func (s streamInput) malformed()                           { s.up.malformed() }

// writeLoop writes what waits, as few system calls as it takes.
func (t *tlsCarrier) writeLoop() {
	var control, data []byte
	for {
		t.mu.Lock()
		for len(t.control) == 0 && len(t.queue) == 0 && !t.closed {
			t.wake.Wait()
		}
		if t.closed {
			t.mu.Unlock()
			return
		}
		control, t.control = t.control, control[:0]
		data, t.queue = t.queue, data[:0]
		t.writing = len(data)
		t.mu.Unlock()
		t.tcp.hold()
		var err error
		if len(control) > 0 {
			_, err = t.conn.Write(control)
		}
		if len(data) > 0 && err == nil {
			_, err = t.conn.Write(data)
		}
		if ferr := t.tcp.flush(); err == nil {
			err = ferr
		}
		if err != nil {
			t.up.broken(fmt.Errorf("write: %w", err))
			return
		}
		t.mu.Lock()
		t.writing = 0
		t.mu.Unlock()
	}
}

// write implements carrier.
func (t *tlsCarrier) write(message []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return net.ErrClosed
	}
	if len(t.control)+len(message) > controlQueue {
		return errors.New("the connection to the relay does not drain")
	}
	t.control = append(t.control, message...)
	t.wake.Signal()
	return nil
}

// errQueueFull says that the queue of a TLS leg is full.
var errQueueFull = errors.New("queue full")

// send implements carrier.
func (t *tlsCarrier) send(number uint16, payload []byte, segment int, _ datagram.ECN) {
	sent, bytes, unsent, err := t.enqueue(number, payload, segment)
	t.up.sent(sent, bytes)
	if unsent > 0 {
		t.up.unsent(unsent, err)
	}
}

func (t *tlsCarrier) enqueue(number uint16, payload []byte, segment int) (sent, bytes, unsent uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := len(t.queue)
	defer func() {
		if now := sinceEpoch(); t.backlog.sent(len(t.queue)-before, now) {
			t.limit, _ = t.backlog.look(t.writing+len(t.queue), now)
		}
		t.wake.Signal()
	}()
	for len(payload) > 0 {
		n := min(segment, len(payload))
		switch {
		case t.closed:
			err = net.ErrClosed
		case n > maxStreamPayload:
			err = errTooLarge
		case t.writing+len(t.queue)+channelHeader+n+3 > t.limit:
			err = errQueueFull
		}
		if err != nil {
			return sent, bytes, uint64((len(payload) + segment - 1) / segment), err
		}
		var head [channelHeader]byte
		binary.BigEndian.PutUint16(head[:], number)
		binary.BigEndian.PutUint16(head[2:], uint16(n))
		t.queue = append(t.queue, head[:]...)
		t.queue = append(t.queue, payload[:n]...)
		t.queue = append(t.queue, "\x00\x00\x00"[:-n&3]...)
		payload = payload[n:]
		sent++
		bytes += uint64(n)
	}
	return sent, bytes, 0, nil
}

func (t *tlsCarrier) maxPayload() int { return maxStreamPayload }
func (t *tlsCarrier) reliable() bool  { return true }

func (t *tlsCarrier) addrs() (local, remote netip.AddrPort) { return t.local, t.remote }

// close closes the connection; what waits is dropped.
func (t *tlsCarrier) close() {
	t.mu.Lock()
	t.closed = true
	t.wake.Broadcast()
	t.mu.Unlock()
	if t.tcp.mu.TryLock() {
		t.tcp.mu.Unlock()
		_ = t.conn.Close() // with close_notify
	}
	_ = t.tcp.Conn.Close() // a write that is stuck gets an error
}

// streamRead is how much a TLS leg reads at a time, in bytes: many records. TLS itself asks for one.
const streamRead = 128 << 10

// gather is a TCP connection that collects the TLS records of a burst into one write, and reads many at once. Without it every 16 KiB record
// is a system call.
type gather struct {
	net.Conn
	in []byte // what was read, of which TLS has taken at; only the reader's
	at int

	mu      sync.Mutex // guards what follows, and writes
	holding bool
	buf     []byte
}

// Read implements net.Conn.
func (g *gather) Read(b []byte) (int, error) {
	if g.at == len(g.in) {
		if g.in == nil {
			g.in = make([]byte, 0, streamRead)
		}
		n, err := g.Conn.Read(g.in[:cap(g.in)])
		g.in, g.at = g.in[:n], 0
		if n == 0 {
			return 0, err
		}
	}
	n := copy(b, g.in[g.at:])
	g.at += n
	return n, nil
}

// Write implements net.Conn.
func (g *gather) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.holding {
		return g.Conn.Write(b)
	}
	g.buf = append(g.buf, b...)
	return len(b), nil
}

// hold collects writes from now on.
func (g *gather) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holding = true
}

// flush writes what was collected and ends collecting.
func (g *gather) flush() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holding = false
	if len(g.buf) == 0 {
		return nil
	}
	_, err := g.Conn.Write(g.buf)
	g.buf = g.buf[:0]
	return err
}

// errTooLarge says that a datagram can not pass.
var errTooLarge = errors.New("datagram too large")

// isFull and isTooLarge tell why a datagram was not sent.
func isFull(err error) bool     { return errors.Is(err, errQueueFull) || udpio.Full(err) }
func isTooLarge(err error) bool { return errors.Is(err, errTooLarge) || udpio.TooLarge(err) }
