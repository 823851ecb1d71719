package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/logging"

	"sallyway/relay/budget"
	"sallyway/relay/udpio"
)

// DTLS record layer (RFC 6347 §4.1): type 1, version 2, epoch 2, sequence 6, length 2; then, for a handshake, its type.
const (
	recordHeader    = 13
	recordCCS       = 20
	recordHandshake = 22
	helloMessage    = 1
)

const (
	// dtlsQueue is how many datagrams wait for a DTLS connection; more are dropped. A coalesced read may bring 64 at once.
	dtlsQueue = 256
	// dtlsRead is the largest message in a record that is taken.
	dtlsRead = 8 << 10
	// readerLinger is how long a connection's reader waits for more before it goes.
	readerLinger = time.Second
	// dtlsLateHandshake is how long after a handshake its plain records may still be repeated.
	dtlsLateHandshake = 30 * time.Second
)

// dtlsTable is the DTLS connections by source. Its half-open ones are bounded by connections.reserve: the cookie exchange keeps a forged
// source from getting further, and the deadline from staying.
type dtlsTable struct {
	peers shared[dtlsPeer]
}

// dtlsPeer is a source's connection and the one that may replace it when its handshake completes. Either may be nil.
type dtlsPeer struct {
	half, live *virtualConn
}

func (t *dtlsTable) init(Limits) { t.peers.init() }

// handleDTLS passes a datagram on to the connection it belongs to. Only a ClientHello makes a new one.
func (sh *shard) handleDTLS(d []byte, m udpio.Message) {
	s := sh.s
	p, _ := s.dtls.peers.get(m.From)
	if p.half == nil && isClientHello(d) {
		if v := s.newDTLS(sh.end(m)); v != nil {
			v.push(d)
		}
		return
	}
	if p.half == nil && p.live == nil {
		sh.unknown(len(d), m)
		return
	}
	if p.half != nil {
		p.half.push(d)
	}
	// A plain record could be anybody's: towards an established connection only repeated handshake flights pass, and only for a while.
	if p.live != nil && (encrypted(d) || (plainHandshake(d) && time.Since(p.live.since) < dtlsLateHandshake)) {
		p.live.push(d)
		p.live.wake()
	}
}

func isClientHello(d []byte) bool {
	return len(d) > recordHeader && d[0] == recordHandshake && d[1] == 0xFE && d[3] == 0 && d[4] == 0 && d[recordHeader] == helloMessage
}

// records calls f with type and epoch of every record of a datagram, and reports whether the datagram consists of records and f was true
// for all.
func records(d []byte, f func(typ byte, epoch int) bool) bool {
	for len(d) > 0 {
		if len(d) < recordHeader {
			return false
		}
		n := recordHeader + int(d[11])<<8 + int(d[12])
		if n > len(d) || !f(d[0], int(d[3])<<8|int(d[4])) {
			return false
		}
		d = d[n:]
	}
	return true
}

func encrypted(d []byte) bool {
	return records(d, func(_ byte, epoch int) bool { return epoch > 0 })
}

func plainHandshake(d []byte) bool {
	return records(d, func(typ byte, epoch int) bool { return epoch > 0 || typ == recordHandshake || typ == recordCCS })
}

// newDTLS starts a handshake with a source, or returns nil where there are too many.
func (s *Server) newDTLS(end udpEnd) *virtualConn {
	from := end.peer.Addr
	src := budget.SourceOf(from.Addr())
	if s.cfg.Certificate == nil {
		return nil
	}
	v := &virtualConn{s: s, end: end, ready: make(chan struct{}, 1)}
	v.wire = newDTLSWire(v)
	if s.handshake.allow(src, 1, s.now().UnixNano()) {
		wire := v.wire
		v.half = s.conns.reserve(src, func() {
			_ = wire.Close()
			if c := v.conn.Load(); c != nil {
				c.close()
			}
		})
	}
	if v.half == nil {
		s.count.handshakesRefused.Add(1)
		return nil
	}
	s.dtls.peers.update(from, func(p dtlsPeer, _ bool) (dtlsPeer, bool) {
		p.half = v
		return p, true
	})
	s.wg.Go(func() {
		if !s.shakeHands(from, v) {
			s.forgetDTLS(from, v)
		}
	})
	return v
}

// forgetDTLS takes v out of the table.
func (s *Server) forgetDTLS(from netip.AddrPort, v *virtualConn) {
	s.dtls.peers.update(from, func(p dtlsPeer, _ bool) (dtlsPeer, bool) {
		if p.half == v {
			p.half = nil
		}
		if p.live == v {
			p.live = nil
		}
		return p, p.half != nil || p.live != nil
	})
}

// dtlsSuites are the suites with forward secrecy and an AEAD.
var dtlsSuites = []dtls.CipherSuiteID{
	dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, dtls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	dtls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, dtls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
}

var dtlsBuffers = sync.Pool{New: func() any { return new([dtlsRead]byte) }}

// quiet keeps the library from writing to standard error on its own.
var quiet = &logging.DefaultLoggerFactory{Writer: io.Discard, DefaultLogLevel: logging.LogLevelDisabled}

// dtlsMTU is the largest datagram of a handshake.
const dtlsMTU = 1200

// shakeHands does the handshake over v, and reports whether v is a connection from now on, which cleans up after itself.
func (s *Server) shakeHands(from netip.AddrPort, v *virtualConn) bool {
	const flight = 250 * time.Millisecond
	dc, err := dtls.ServerWithOptions(v.wire, v.RemoteAddr(),
		dtls.WithGetCertificate(func(*dtls.ClientHelloInfo) (*tls.Certificate, error) { return s.cfg.Certificate() }),
		dtls.WithCipherSuites(dtlsSuites...), dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithLoggerFactory(quiet), dtls.WithMTU(dtlsMTU), dtls.WithFlightInterval(flight))
	if err != nil {
		_ = v.wire.Close()
		s.conns.release(v.half)
		s.count.handshakesFailed.Add(1)
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.handshakeTimeout)
	stop := context.AfterFunc(ctx, func() { _ = v.wire.Close() })
	go func() { // a stopping relay does not wait for the deadline
		select {
		case <-s.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	err = dc.HandshakeContext(ctx)
	stop()
	cancel()
	if err != nil {
		_ = v.wire.Close()
		_ = dc.Close()
		s.conns.release(v.half)
		s.count.handshakesFailed.Add(1)
		return false
	}
	v.dc = dc
	c := &conn{s: s, kind: overDTLS, addr: from, nc: v, udp: v.end, half: v.half}
	c.ended = func() {
		s.forgetDTLS(from, v)
		c.finish()
	}
	if !s.conns.add(c) {
		_ = v.Close()
		return false
	}
	v.since = time.Now()
	v.conn.Store(c)
	var old *virtualConn
	s.dtls.peers.update(from, func(p dtlsPeer, _ bool) (dtlsPeer, bool) {
		old = p.live
		p.live = v
		if p.half == v {
			p.half = nil
		}
		return p, true
	})
	if old != nil { // the client has begun anew, and has proved that by the handshake
		c := old.conn.Load()
		if a := c.alloc.Load(); a != nil {
			s.end(a, "replaced by a new connection")
		}
		c.close()
	}
	v.wake() // what came right behind the handshake may wait already
	return true
}

// wake sees to it that what has been queued is read. An idle connection has no reader of its own: a goroutine and a buffer for each of many
// thousand would be most of the relay's memory.
func (v *virtualConn) wake() {
	v.wakes.Add(1)
	if v.reading.CompareAndSwap(false, true) {
		v.s.wg.Go(v.read)
	}
}

// read handles what comes in records until nothing has come for readerLinger, or the connection ends. Before it goes it parks v.
func (v *virtualConn) read() {
	c := v.conn.Load()
	buf := dtlsBuffers.Get().(*[dtlsRead]byte)
	defer dtlsBuffers.Put(buf)
	const patience = 64 // errors in a row; a forged or oversized record is one
	for errs := 0; errs < patience; {
		wakes := v.wakes.Load()
		seen, quiet := v.quiet()
		_ = v.SetReadDeadline(time.Now().Add(c.s.cfg.linger))
		n, err := v.Read(buf[:])
		var timeout net.Error
		switch {
		case err == nil && n > 0:
			errs = 0
			if !c.record(buf[:n]) {
				c.close()
				return
			}
		case errors.As(err, &timeout) && timeout.Timeout():
			if !quiet { // of what came before there may be something to read yet
				continue
			}
			v.park(seen)
			v.reading.Store(false)
			// Whoever woke it meanwhile saw a reader at work.
			if v.wakes.Load() == wakes || !v.reading.CompareAndSwap(false, true) {
				return
			}
		case errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, dtls.ErrConnClosed):
			c.close()
			return
		default:
			errs++
			c.s.count.malformed.Add(1)
		}
	}
	c.close()
}

// record handles the message in a record, and reports whether the connection may go on.
func (c *conn) record(d []byte) bool {
	if !c.admits(len(d)) {
		return false
	}
	switch first := d[0]; {
	case first <= 3:
		c.control(d)
	case first >= 64 && first <= 79:
		if a := c.alloc.Load(); a != nil {
			c.s.datagrams(a, nil, d, len(d), 0, c.s.now().UnixNano())
		} else {
			c.s.count.strays.Add(1)
		}
	default:
		c.s.count.malformed.Add(1)
	}
	return true
}

// deadline is a channel that is closed when a time has passed, and can be set anew.
type deadline struct {
	mu    sync.Mutex // guards the rest
	timer *time.Timer
	ch    chan struct{}
}

func makeDeadline() *deadline { return &deadline{ch: make(chan struct{})} }

func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ch
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.ch // the timer is about to close it
	}
	d.timer = nil
	select {
	case <-d.ch:
		d.ch = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	ch := d.ch
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { close(ch) })
		return
	}
	close(ch)
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
