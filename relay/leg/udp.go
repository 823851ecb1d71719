package leg

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/logging"
	"github.com/pion/stun/v4"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

const (
	// flightInterval is the wait before a DTLS flight is sent again; it doubles.
	flightInterval = 300 * time.Millisecond
	// writeBuffer is the socket's send buffer in bytes, of which the kernel makes twice as much: 20 ms of 1.6 Gbit/s. On a slower way out it
	// follows what drains.
	writeBuffer = 2 << 20
	// readFailures is how many reads may fail in a row, not counting ICMP errors, before the socket counts as broken.
	readFailures = 100
	// maxRecord is the largest control message or DTLS record read, in bytes.
	maxRecord = 16 << 10
	// ipv4Overhead and ipv6Overhead are the IP and UDP headers, in bytes.
	ipv4Overhead = 20 + 8
	ipv6Overhead = 40 + 8
	// dtlsOverhead is a DTLS record's header, explicit nonce and tag, in bytes.
	dtlsOverhead = 13 + 8 + 16
)

// quiet keeps the DTLS library from writing to standard error on its own.
var quiet = &logging.DefaultLoggerFactory{Writer: io.Discard, DefaultLogLevel: logging.LogLevelDisabled}

// unknownType is the message type of the Unknown indication.
var unknownType = stun.NewType(wire.MethodUnknown, stun.ClassIndication).Value()

// udpCarrier is the 5-tuple of a UDP leg: DTLS, and ChannelData beside it where plain.
type udpCarrier struct {
	conn  *udpio.Conn
	tx    *udpio.Sender
	out   *gatherer // of ChannelData in the clear
	pipe  *pipe
	dtls  *dtls.Conn
	plain bool // ChannelData goes outside of DTLS
	up    upcalls
	max   int // largest payload of a datagram

	raw     syscall.RawConn
	backlog backlog // of the socket's buffer; only transmitData's

	refusal chan error // the first refusal while the handshake is under way

	mu     sync.Mutex // guards record
	record [maxRecord]byte
}

// dialUDP connects the socket and does the DTLS handshake. Its goroutines are run by start.
func dialUDP(ctx context.Context, cfg *Config, addr netip.AddrPort, plain bool, up upcalls, start func(func())) (_ *udpCarrier, err error) {
	network, overhead := "udp6", ipv6Overhead
	if addr.Addr().Is4() {
		network, overhead = "udp4", ipv4Overhead
	}
	d := net.Dialer{Control: cfg.Control}
	nc, err := d.DialContext(ctx, network, addr.String())
	if err != nil {
		return nil, err
	}
	conn, warnings, err := udpio.New(nc.(*net.UDPConn), udpio.Config{WriteBuffer: writeBuffer})
	if err != nil {
		return nil, err
	}
	for _, w := range warnings {
		cfg.Logger.Debug("UDP socket", "warning", w)
	}
	u := &udpCarrier{
		conn: conn, tx: conn.NewSender(), plain: plain, up: up,
		max:     max(cfg.MTU-overhead-channelHeader, 0),
		refusal: make(chan error, 1), backlog: backlog{most: 2 * writeBuffer},
	}
	if u.raw, err = conn.UDPConn().SyscallConn(); err != nil {
		conn.Close()
		return nil, err
	}
	u.out = newGatherer(u.transmitData, up)
	if !plain {
		u.max = max(u.max-dtlsOverhead, 0)
	}
	u.pipe = newPipe(conn.UDPConn().LocalAddr(), conn.UDPConn().RemoteAddr(), u.writeRecord)
	u.dtls, err = dtls.ClientWithOptions(u.pipe, conn.UDPConn().RemoteAddr(),
		dtls.WithInsecureSkipVerify(true), // VerifyConnection checks chain, pins and URI SAN, which pion does not know
		dtls.WithVerifyConnection(func(st *dtls.State) error { return verifyRaw(cfg, st.PeerCertificates) }),
		dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, dtls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
		dtls.WithServerName(cfg.Relay.ServerName()),
		dtls.WithFlightInterval(flightInterval),
		dtls.WithLoggerFactory(quiet),
	)
	if err != nil {
		conn.Close()
		return nil, err
	}
	start(u.read)
	if err := u.handshake(ctx); err != nil {
		u.close()
		return nil, err
	}
	start(u.readControl)
	if plain {
		start(u.out.loop)
	}
	return u, nil
}

// handshake does the DTLS handshake, and gives up at once when the port is closed.
func (u *udpCarrier) handshake(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case err := <-u.refusal:
			cancel(err)
		case <-stop:
		}
	}()
	if err := u.dtls.HandshakeContext(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("DTLS handshake: %w", err)
	}
	return nil
}

// verifyRaw checks the chain that DTLS received.
func verifyRaw(cfg *Config, raw [][]byte) error {
	if len(raw) > identity.MaxChain {
		return fmt.Errorf("the relay showed %d certificates, limit %d", len(raw), identity.MaxChain)
	}
	var chain []*x509.Certificate
	for _, der := range raw {
		if len(der) > identity.MaxCertificate {
			return fmt.Errorf("certificate of %d bytes, limit %d", len(der), identity.MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("parse the relay's certificate: %w", err)
		}
		chain = append(chain, c)
	}
	return verifyChain(cfg, chain)
}

// verifyChain has the caller check the chain and then whom it names.
func verifyChain(cfg *Config, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the relay showed no certificate")
	}
	if err := cfg.Verify(chain); err != nil {
		return fmt.Errorf("verify relay %v: %w", cfg.Relay, err)
	}
	n, err := identity.CertificateNode(chain[0])
	if err != nil {
		return fmt.Errorf("verify relay %v: %w", cfg.Relay, err)
	}
	if n != cfg.Relay {
		return fmt.Errorf("the certificate is of %v, want relay %v", n, cfg.Relay)
	}
	return nil
}

// writeRecord sends a DTLS record.
func (u *udpCarrier) writeRecord(b []byte) error {
	err := u.transmit(b, 0, datagram.NotECT)
	if err == nil || udpio.Full(err) || udpio.TooLarge(err) {
		return nil // lost on the way, as far as DTLS is concerned
	}
	if errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil // retransmission is DTLS's and control's
}

// transmit sends on the socket. An ICMP message about an earlier datagram surfaces as the error of the next call, which sends nothing:
// what can be sent all the same is sent again.
func (u *udpCarrier) transmit(b []byte, segment int, ecn datagram.ECN) error {
	err := u.tx.Send(b, segment, ecn)
	if err == nil || !isICMP(err) {
		return err
	}
	u.failed(err)
	return u.tx.Send(b, segment, ecn)
}

// transmitData is transmit for the gatherer, and has the socket's buffer follow the rate.
func (u *udpCarrier) transmitData(b []byte, segment int, ecn datagram.ECN) error {
	err := u.transmit(b, segment, ecn)
	n := 0
	if err == nil {
		n = len(b)
	}
	if now := sinceEpoch(); u.backlog.sent(n, now) {
		if queued, qerr := unsent(u.raw); qerr == nil {
			if limit, changed := u.backlog.look(queued, now); changed {
				limitBacklog(u.raw, limit)
			}
		}
	}
	return err
}

// epoch is the moment that times of backlogs count from.
var epoch = time.Now()

func sinceEpoch() time.Duration { return time.Since(epoch) }

// isICMP reports whether err of a connected UDP socket comes from an ICMP message about an earlier datagram, or looks as if.
func isICMP(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EPROTO, syscall.ENOPROTOOPT,
		syscall.EOPNOTSUPP, syscall.EACCES,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// failed takes an error of the socket, most of which are ICMP messages about what was sent before.
func (u *udpCarrier) failed(err error) {
	if errors.Is(err, syscall.ECONNREFUSED) {
		select {
		case u.refusal <- err:
		default:
		}
	}
	u.up.suspect(err)
}

// read is the loop that reads the socket.
func (u *udpCarrier) read() {
	failures := 0
	for {
		buf := datagram.NewBuffer()
		m, err := u.conn.Read(buf.B[:])
		if err != nil {
			buf.Release()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if isICMP(err) {
				u.failed(err)
			} else if failures++; failures == readFailures {
				u.up.broken(fmt.Errorf("read: %w", err))
				return
			}
			continue
		}
		failures = 0
		if m.N > 0 {
			walk(buf.B[:m.N], m.Segment, m.ECN, buf, u)
		}
		buf.Release()
	}
}

// data implements input.
func (u *udpCarrier) data(number uint16, b datagram.Batch) {
	if !u.plain {
		// Whoever did not agree to data in the clear gets none.
		b.Release()
		u.up.malformed()
		return
	}
	u.up.data(number, b)
}

// control implements input. STUN outside of DTLS proves nothing: an Unknown is a reason to ask, anything else is dropped.
func (u *udpCarrier) control(c class, b []byte) {
	switch {
	case c == classDTLS:
		u.pipe.push(b)
	case stun.IsMessage(b) && binary.BigEndian.Uint16(b) == unknownType:
		u.up.suspect(errUnknown)
	default:
		u.up.malformed()
	}
}

// malformed implements input.
func (u *udpCarrier) malformed() { u.up.malformed() }

// readControl is the loop that reads what came in DTLS.
func (u *udpCarrier) readControl() {
	b := make([]byte, maxRecord)
	for {
		n, err := u.dtls.Read(b)
		if err != nil {
			u.up.broken(fmt.Errorf("the relay ended DTLS: %w", err))
			return
		}
		if n == 0 {
			continue
		}
		if classify(b[0]) != classChannel {
			u.up.message(b[:n])
			continue
		}
		number, size, ok := parseChannelData(b[:n])
		if !ok || size == channelHeader {
			u.up.malformed()
			continue
		}
		buf := datagram.NewBuffer()
		copy(buf.B[:], b[:size])
		u.up.data(number, datagram.NewBatch(buf.B[:size:size], size, channelHeader, datagram.NotECT, buf))
	}
}

// write implements carrier.
func (u *udpCarrier) write(message []byte) error {
	_, err := u.dtls.Write(message)
	return err
}

// send implements carrier.
func (u *udpCarrier) send(number uint16, payload []byte, segment int, ecn datagram.ECN) {
	if u.plain {
		u.out.send(number, payload, segment, ecn)
		return
	}
	// A record a datagram: the slow way, of those whose credential does not ask for data in the clear.
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(payload) > 0 {
		k := min(segment, len(payload))
		if channelHeader+k > len(u.record) {
			u.up.unsent(1, errTooLarge)
		} else {
			binary.BigEndian.PutUint16(u.record[:], number)
			binary.BigEndian.PutUint16(u.record[2:], uint16(k))
			copy(u.record[channelHeader:], payload[:k])
			if _, err := u.dtls.Write(u.record[:channelHeader+k]); err != nil {
				u.up.unsent(1, err)
			} else {
				u.up.sent(1, uint64(k))
			}
		}
		payload = payload[k:]
	}
}

func (u *udpCarrier) maxPayload() int { return u.max }
func (u *udpCarrier) reliable() bool  { return false }

func (u *udpCarrier) addrs() (local, remote netip.AddrPort) {
	r := u.conn.UDPConn().RemoteAddr().(*net.UDPAddr).AddrPort()
	return u.conn.LocalAddr(), netip.AddrPortFrom(r.Addr().Unmap(), r.Port())
}

// close says goodbye and closes the socket.
func (u *udpCarrier) close() {
	u.out.stop()
	_ = u.dtls.Close()
	_ = u.pipe.Close()
	_ = u.conn.Close()
}
