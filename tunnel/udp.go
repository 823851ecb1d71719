package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"sallyway/internal/telemetry"
)

// UDP over a session (RFC 9298): payloads travel as HTTP Datagrams with context ID 0, in QUIC DATAGRAM frames where they fit the path,
// else in DATAGRAM capsules on the request stream (RFC 9297 §3.5), which costs order and retransmission but not the payload.
const (
	// MaxUDPPayload is the largest payload of a UDP datagram, in bytes.
	MaxUDPPayload = 65527
	// capsuleDatagram is the type of DATAGRAM capsules.
	capsuleDatagram http3.CapsuleType = 0
	// maxCapsule bounds capsules of other types, which are skipped, in bytes.
	maxCapsule = 1 << 20
	// udpQueue is how many datagrams wait to be read at the client; what comes when it is full is dropped.
	udpQueue = 256
)

// capsuleProtocol is the value of the Capsule-Protocol header field (RFC 9297 §3.4).
const capsuleProtocol = "?1"

// h3datagrams is an h3stream with HTTP Datagrams.
type h3datagrams interface {
	h3stream
	SendDatagram([]byte) error
	ReceiveDatagram(context.Context) ([]byte, error)
}

var (
	_ h3datagrams = (*http3.Stream)(nil)
	_ h3datagrams = (*http3.RequestStream)(nil)
)

// datagrams sends and receives UDP payloads on a request stream, by whichever of the two ways fits.
type datagrams struct {
	counter
	str h3datagrams

	mu      sync.Mutex // guards scratch, and writing to the stream
	scratch []byte
}

// send sends one payload. It waits while QUIC's queue of datagrams, or the stream's window, is full.
func (d *datagrams) send(payload []byte) error {
	if len(payload) > MaxUDPPayload {
		return fmt.Errorf("UDP payload of %d bytes, limit %d", len(payload), MaxUDPPayload)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.scratch = append(append(d.scratch[:0], 0), payload...)
	err := d.str.SendDatagram(d.scratch)
	if _, tooLarge := errors.AsType[*quic.DatagramTooLargeError](err); tooLarge {
		d.scratch = appendCapsule(d.scratch[:0], payload)
		_, err = d.str.Write(d.scratch)
	}
	if err == nil {
		d.countWritten(len(payload))
	}
	return streamError(err)
}

// appendCapsule appends a DATAGRAM capsule with a UDP payload.
func appendCapsule(b, payload []byte) []byte {
	b = quicvarint.Append(b, uint64(capsuleDatagram))
	b = quicvarint.Append(b, uint64(len(payload)+1))
	b = append(b, 0) // context ID
	return append(b, payload...)
}

// udpPayload cuts the context ID off an HTTP Datagram. Datagrams of other contexts are dropped (RFC 9298 §4).
func udpPayload(datagram []byte) (payload []byte, ok bool) {
	id, n, err := quicvarint.Parse(datagram)
	if err != nil || id != 0 || len(datagram)-n > MaxUDPPayload {
		return nil, false
	}
	return datagram[n:], true
}

// receiveFrames hands over what arrives in QUIC datagrams until the stream or ctx ends. f owns the payload.
func (d *datagrams) receiveFrames(ctx context.Context, f func(payload []byte)) error {
	for {
		b, err := d.str.ReceiveDatagram(ctx)
		if err != nil {
			return err
		}
		if payload, ok := udpPayload(b); ok {
			d.countRead(len(payload))
			f(payload)
		}
	}
}

// receiveCapsules hands over what arrives in capsules until the stream ends: io.EOF if the other end closed it. f may keep the payload
// only if fresh returns a new buffer every time; it is asked for one of a given size.
func (d *datagrams) receiveCapsules(fresh func(size int) []byte, f func(payload []byte)) error {
	p := http3.NewCapsuleParser(d.str)
	for {
		datagram, err := readDatagramCapsule(p, fresh)
		if err != nil {
			return streamError(err)
		}
		if payload, ok := udpPayload(datagram); ok {
			d.countRead(len(payload))
			f(payload)
		}
	}
}

var errCapsule = errors.New("malformed capsule")

// readDatagramCapsule returns the content of the next DATAGRAM capsule, skipping others.
func readDatagramCapsule(p *http3.CapsuleParser, fresh func(size int) []byte) ([]byte, error) {
	for {
		typ, r, err := p.Next()
		if err != nil {
			return nil, err
		}
		size := r.Remaining()
		switch {
		case typ == capsuleDatagram && size <= MaxUDPPayload+8:
			b := fresh(int(size))[:size]
			if _, err := io.ReadFull(r, b); err != nil {
				return nil, err
			}
			return b, nil
		case size > maxCapsule || size < 0:
			return nil, fmt.Errorf("%w: %d bytes", errCapsule, size)
		}
		if err := r.Discard(); err != nil {
			return nil, err
		}
	}
}

// UDPConn is a UDP flow through a session. Its methods may be called concurrently.
type UDPConn struct {
	datagrams
	remote Addr
	queue  chan []byte
	readMu sync.Mutex      // guards held, and makes reads one at a time
	held   []byte          // a datagram that did not belong to the run before it; nil: none
	ctx    context.Context // ends with the flow; the cause says why
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup
}

// DialUDP opens a UDP flow to host, a name or an IP address. A refusal is a *ProxyError. ctx bounds the dial only.
func (s *Session) DialUDP(ctx context.Context, host string, port uint16) (*UDPConn, error) {
	target := net.JoinHostPort(host, strconv.Itoa(int(port)))
	str, _, err := s.connect(ctx, protoUDP, formatUDPPath(host, port), http.Header{http3.CapsuleProtocolHeader: {capsuleProtocol}})
	if err != nil {
		return nil, fmt.Errorf("dial udp %s: %w", target, err)
	}
	c := &UDPConn{remote: Addr(target), queue: make(chan []byte, udpQueue)}
	c.str, c.session = str, &s.flows
	c.ctx, c.cancel = context.WithCancelCause(s.ctx)
	c.tasks.Go(func() { _ = c.receiveFrames(c.ctx, c.enqueue) }) // the capsules' reader says how it ended
	c.tasks.Go(func() {
		err := c.receiveCapsules(func(n int) []byte { return make([]byte, n) }, c.enqueue)
		reset, ok := errors.AsType[*resetError](err)
		switch {
		case errors.Is(err, io.EOF):
			err = net.ErrClosed
		case ok && reset.code == codeReset: // the gateway's word for ICMP port unreachable
			err = &ProxyError{Type: ConnectionRefused, Detail: "the destination refused the datagram"}
		}
		c.cancel(err)
	})
	return c, nil
}

func (c *UDPConn) enqueue(payload []byte) {
	select {
	case c.queue <- payload:
	default: // full: this is UDP
	}
}

// ReadPacket reads the next datagram's payload into b; what does not fit is cut off. It fails with ErrRefused when the destination
// answered with ICMP port unreachable, with ErrNoSession when the session ended, and with net.ErrClosed after Close or when the gateway
// gave up an idle flow.
func (c *UDPConn) ReadPacket(b []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	p, err := c.next()
	return copy(b, p), err
}

// ReadPackets is ReadPacket for a run of datagrams: the next one, and those of its size that have come behind it, as many as b holds;
// the last may be shorter. They are n bytes, in pieces of size.
func (c *UDPConn) ReadPackets(b []byte) (n, size int, err error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	p, err := c.next()
	n = copy(b, p)
	size = n
	for size > 0 && n%size == 0 {
		select {
		case p = <-c.queue:
		default:
			return n, size, err
		}
		if len(p) == 0 || len(p) > size || n+len(p) > len(b) {
			c.held = p
			return n, size, err
		}
		n += copy(b[n:], p)
	}
	return n, size, err
}

// next waits for the next datagram; readMu is held.
func (c *UDPConn) next() ([]byte, error) {
	if p := c.held; p != nil {
		c.held = nil
		return p, nil
	}
	select {
	case p := <-c.queue:
		return p, nil
	default:
	}
	select {
	case p := <-c.queue:
		return p, nil
	case <-c.ctx.Done():
		return nil, c.err()
	}
}

func (c *UDPConn) err() error {
	if err := context.Cause(c.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return ErrNoSession // the session's context ended
}

// WritePacket sends one datagram with payload b, of up to MaxUDPPayload bytes. b is not kept.
func (c *UDPConn) WritePacket(b []byte) error {
	if c.ctx.Err() != nil {
		return c.err()
	}
	return c.send(b)
}

// RemoteAddr is the destination as it was dialled.
func (c *UDPConn) RemoteAddr() net.Addr { return c.remote }

// Close ends the flow. It may be called more than once.
func (c *UDPConn) Close() error {
	c.cancel(net.ErrClosed)
	c.str.CancelRead(codeGone)
	c.str.CancelWrite(codeGone)
	c.tasks.Wait()
	return nil
}

// udpBuffers hold a payload with the byte of its context ID before it.
var udpBuffers = sync.Pool{New: func() any { return new([MaxUDPPayload + 8]byte) }}

// serveUDP is a UDP flow at the gateway.
func (p *peerSession) serveUDP(w http.ResponseWriter, r *http.Request) {
	t, err := parseUDPPath(r.URL.EscapedPath())
	if err != nil {
		p.fail(w, &ProxyError{Type: RequestError, Detail: err.Error()})
		return
	}
	done, err := p.openFlow()
	if err != nil {
		p.fail(w, err)
		return
	}
	defer done()
	conn, err := p.srv.cfg.Handler.DialUDP(telemetry.Extract(r.Context(), r.Header), p.peer, t)
	if err != nil {
		p.fail(w, err)
		return
	}
	defer conn.Close()
	w.Header().Set(http3.CapsuleProtocolHeader, capsuleProtocol)
	str, err := takeStream(w)
	if err != nil {
		return
	}
	d := &datagrams{str: str}
	d.session = &p.flows
	ctx, cancel := context.WithCancel(p.ctx)
	var tasks sync.WaitGroup
	// Whatever ends one direction ends the flow.
	end := func() {
		cancel()
		conn.Close()
		str.CancelRead(codeGone)
	}
	var over sync.Once // how the peer hears of the end
	abort := func() {
		over.Do(func() { str.CancelWrite(codeGone) })
		end()
	}
	defer context.AfterFunc(p.ctx, abort)()
	// What can not be sent is lost, as UDP is; refusal shows when reading.
	write := func(payload []byte) { _, _ = conn.Write(payload) }
	tasks.Go(func() {
		if rc, ok := conn.(RunConn); ok {
			d.receiveRuns(ctx, func(run []byte, size int) { _ = rc.WriteRun(run, size) })
			return
		}
		_ = d.receiveFrames(ctx, write) // ends with the flow
	})
	tasks.Go(func() {
		buf := udpBuffers.Get().(*[MaxUDPPayload + 8]byte)
		defer udpBuffers.Put(buf)
		_ = d.receiveCapsules(func(int) []byte { return buf[:] }, write) // ends when the peer closes the flow
		abort()
	})
	refused := d.sendAll(conn)
	over.Do(func() {
		if refused {
			str.CancelWrite(codeReset)
		} else {
			_ = str.Close() // the peer reads the end; that it is gone does not matter
		}
	})
	end()
	tasks.Wait()
}

// sendAll sends what conn receives until that or sending fails, and reports whether the destination refused.
func (d *datagrams) sendAll(conn net.Conn) (refused bool) {
	buf := udpBuffers.Get().(*[MaxUDPPayload + 8]byte)
	defer udpBuffers.Put(buf)
	read := func() (n, size int, err error) {
		n, err = conn.Read(buf[:])
		return n, n, err
	}
	if rc, ok := conn.(RunConn); ok {
		read = func() (n, size int, err error) { return rc.ReadRun(buf[:]) }
	}
	for {
		n, size, err := read()
		if err != nil {
			return errors.Is(AsProxyError(err), ErrRefused)
		}
		for run := buf[:min(n, MaxUDPPayload)]; ; {
			k := min(size, len(run))
			if d.send(run[:k]) != nil {
				return false
			}
			if run = run[k:]; len(run) == 0 {
				break
			}
		}
	}
}
