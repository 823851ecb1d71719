package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// handshakeTimeout bounds what a proxy's user may take to say what it wants.
const handshakeTimeout = 10 * time.Second

// SOCKS5 replies (RFC 1928 §6).
const (
	socksOK              = 0
	socksFailure         = 1
	socksNotAllowed      = 2
	socksNetUnreachable  = 3
	socksHostUnreachable = 4
	socksRefused         = 5
	socksTTLExpired      = 6
	socksBadCommand      = 7
	socksBadAddress      = 8
)

// maxSOCKSDatagram bounds a datagram of a UDP association in bytes, header included.
const maxSOCKSDatagram = 65507

// SOCKS serves SOCKS5 (RFC 1928): CONNECT and UDP ASSOCIATE, without authentication or with user and password (RFC 1929).
type SOCKS struct {
	Dialer Dialer
	Logger *slog.Logger
	// User and Password are demanded when User is not empty.
	User, Password string
}

// Serve answers on l until ctx ends.
func (s *SOCKS) Serve(ctx context.Context, l net.Listener) error {
	return serveConns(ctx, l, func(ctx context.Context, c net.Conn) {
		if err := s.serve(ctx, c); err != nil {
			s.Logger.Info("socks request refused", "err", err)
		}
	})
}

func (s *SOCKS) serve(ctx context.Context, c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(handshakeTimeout)) // a conn that takes no deadline fails at the next read
	r := bufio.NewReader(c)
	if err := s.greet(r, c); err != nil {
		return err
	}
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	if head[0] != 5 {
		return fmt.Errorf("request of SOCKS version %d, want 5", head[0])
	}
	host, port, err := readSOCKSAddr(r, head[3])
	if err != nil {
		_ = socksReply(c, socksBadAddress, netip.AddrPort{})
		return err
	}
	_ = c.SetDeadline(time.Time{})
	switch head[1] {
	case 1:
		return s.connect(ctx, r, c, host, port)
	case 3:
		return s.associate(ctx, r, c)
	}
	_ = socksReply(c, socksBadCommand, netip.AddrPort{})
	return fmt.Errorf("command %d: only CONNECT and UDP ASSOCIATE are served", head[1])
}

// greet settles the method (RFC 1928 §3) and checks user and password where they are demanded.
func (s *SOCKS) greet(r *bufio.Reader, w io.Writer) error {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if head[0] != 5 {
		return fmt.Errorf("greeting of SOCKS version %d, want 5", head[0])
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(r, methods); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	want := byte(0)
	if s.User != "" {
		want = 2
	}
	for _, m := range methods {
		if m != want {
			continue
		}
		if _, err := w.Write([]byte{5, want}); err != nil {
			return err
		}
		if want == 2 {
			return s.authenticate(r, w)
		}
		return nil
	}
	_, _ = w.Write([]byte{5, 0xff})
	if want == 2 {
		return errors.New("this proxy wants user and password")
	}
	return errors.New("the client offers no method without authentication")
}

func (s *SOCKS) authenticate(r *bufio.Reader, w io.Writer) error {
	v, err := r.ReadByte()
	if err != nil || v != 1 {
		return errors.New("malformed user and password")
	}
	user, err := readSOCKSString(r)
	if err != nil {
		return err
	}
	password, err := readSOCKSString(r)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare([]byte(user), []byte(s.User))&subtle.ConstantTimeCompare([]byte(password), []byte(s.Password)) != 1 {
		_, _ = w.Write([]byte{1, 1})
		return errors.New("wrong user or password")
	}
	_, err = w.Write([]byte{1, 0})
	return err
}

func (s *SOCKS) connect(ctx context.Context, r *bufio.Reader, c net.Conn, host string, port uint16) error {
	f, err := s.Dialer.DialTCP(ctx, host, port)
	if err != nil {
		_ = socksReply(c, socksCode(err), netip.AddrPort{})
		return fmt.Errorf("connect %s: %w", joinHostPort(host, port), err)
	}
	if err := socksReply(c, socksOK, netip.AddrPort{}); err != nil {
		f.Reset()
		return err
	}
	splice(ctx, f, buffered(c, r))
	return nil
}

// associate relays datagrams while the TCP connection that asked for it stands (RFC 1928 §7). Only the asker's address is served.
func (s *SOCKS) associate(ctx context.Context, r *bufio.Reader, c net.Conn) error {
	local, ok := c.LocalAddr().(*net.TCPAddr)
	if !ok {
		return errors.New("UDP ASSOCIATE needs a TCP listener")
	}
	pc, err := net.ListenUDP("udp", &net.UDPAddr{IP: local.IP, Zone: local.Zone})
	if err != nil {
		_ = socksReply(c, socksFailure, netip.AddrPort{})
		return fmt.Errorf("open UDP association: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.relayDatagrams(ctx, pc, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	}()
	if err := socksReply(c, socksOK, pc.LocalAddr().(*net.UDPAddr).AddrPort()); err == nil {
		_, _ = io.Copy(io.Discard, r) // until the asker hangs up
	}
	cancel()
	_ = pc.Close()
	<-done
	return nil
}

// socksFlows and socksQueue bound the destinations of one association, and the datagrams that wait for a flow to be opened.
const (
	socksFlows = 256
	socksQueue = 32
)

// relayDatagrams keeps one UDP flow per destination, each on a goroutine of its own, so that a destination that is not reached holds up nobody.
func (s *SOCKS) relayDatagrams(ctx context.Context, pc *net.UDPConn, owner netip.Addr) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	var source atomic.Pointer[netip.AddrPort] // where the owner last sent from
	var mu sync.Mutex
	flows := map[string]chan []byte{} // guarded by mu
	buf := make([]byte, maxSOCKSDatagram)
	for {
		n, from, err := pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if from.Addr().Unmap() != owner {
			continue
		}
		host, port, payload, err := parseSOCKSDatagram(buf[:n])
		if err != nil {
			continue
		}
		source.Store(&from)
		key := joinHostPort(host, port)
		mu.Lock()
		queue := flows[key]
		if queue == nil && len(flows) < socksFlows {
			queue = make(chan []byte, socksQueue)
			flows[key] = queue
			running.Go(func() {
				s.flow(ctx, pc, &source, host, port, queue)
				mu.Lock()
				delete(flows, key)
				mu.Unlock()
			})
		}
		mu.Unlock()
		select {
		case queue <- bytes.Clone(payload): // a nil queue takes nothing: too many destinations
		default:
		}
	}
}

// flow carries the datagrams of one destination until its flow or ctx ends.
func (s *SOCKS) flow(ctx context.Context, pc *net.UDPConn, source *atomic.Pointer[netip.AddrPort], host string, port uint16, queue <-chan []byte) {
	f, err := s.Dialer.DialUDP(ctx, host, port)
	if err != nil {
		s.Logger.Info("datagram refused", "to", joinHostPort(host, port), "err", err)
		return
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		header := append([]byte{0, 0, 0}, socksAddr(host, port)...)
		buf := make([]byte, maxSOCKSDatagram)
		copy(buf, header)
		for {
			n, err := f.ReadPacket(buf[len(header):])
			if err != nil {
				return
			}
			if _, err := pc.WriteToUDPAddrPort(buf[:len(header)+n], *source.Load()); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	defer func() {
		_ = f.Close()
		<-over
	}()
	for {
		select {
		case b := <-queue:
			if err := f.WritePacket(b); err != nil {
				return
			}
		case <-over:
			return
		case <-ctx.Done():
			return
		}
	}
}

// parseSOCKSDatagram reads a UDP request header (RFC 1928 §7). Fragments are refused, as the RFC allows.
func parseSOCKSDatagram(b []byte) (host string, port uint16, payload []byte, err error) {
	if len(b) < 4 || b[0] != 0 || b[1] != 0 {
		return "", 0, nil, errors.New("malformed datagram header")
	}
	if b[2] != 0 {
		return "", 0, nil, errors.New("fragmented datagram")
	}
	rest := b[4:]
	switch b[3] {
	case 1, 4:
		size := 4
		if b[3] == 4 {
			size = 16
		}
		if len(rest) < size+2 {
			return "", 0, nil, io.ErrUnexpectedEOF
		}
		a, _ := netip.AddrFromSlice(rest[:size])
		host, rest = a.Unmap().String(), rest[size:]
	case 3:
		if len(rest) < 1 || len(rest) < 1+int(rest[0])+2 || rest[0] == 0 {
			return "", 0, nil, io.ErrUnexpectedEOF
		}
		host, rest = string(rest[1:1+rest[0]]), rest[1+rest[0]:]
	default:
		return "", 0, nil, fmt.Errorf("address type %d", b[3])
	}
	return host, binary.BigEndian.Uint16(rest), rest[2:], nil
}

func readSOCKSAddr(r *bufio.Reader, typ byte) (string, uint16, error) {
	var host string
	switch typ {
	case 1, 4:
		b := make([]byte, 4)
		if typ == 4 {
			b = make([]byte, 16)
		}
		if _, err := io.ReadFull(r, b); err != nil {
			return "", 0, fmt.Errorf("read address: %w", err)
		}
		a, _ := netip.AddrFromSlice(b)
		host = a.Unmap().String()
	case 3:
		var err error
		if host, err = readSOCKSString(r); err != nil {
			return "", 0, err
		}
		if host == "" {
			return "", 0, errors.New("empty host name")
		}
	default:
		return "", 0, fmt.Errorf("address type %d", typ)
	}
	var port [2]byte
	if _, err := io.ReadFull(r, port[:]); err != nil {
		return "", 0, fmt.Errorf("read port: %w", err)
	}
	return host, binary.BigEndian.Uint16(port[:]), nil
}

func readSOCKSString(r *bufio.Reader) (string, error) {
	n, err := r.ReadByte()
	if err != nil {
		return "", fmt.Errorf("read length: %w", err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return "", fmt.Errorf("read string: %w", err)
	}
	return string(b), nil
}

// socksAddr encodes a destination as address type, address and port.
func socksAddr(host string, port uint16) []byte {
	var b []byte
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		b = append(b, 1)
		if a.Is6() {
			b[0] = 4
		}
		b = append(b, a.AsSlice()...)
	} else {
		b = append(b, 3, byte(len(host)))
		b = append(b, host...)
	}
	return binary.BigEndian.AppendUint16(b, port)
}

func socksReply(w io.Writer, code byte, bound netip.AddrPort) error {
	host := "0.0.0.0"
	if bound.IsValid() {
		host = bound.Addr().String()
	}
	_, err := w.Write(append([]byte{5, code, 0}, socksAddr(host, bound.Port())...))
	return err
}
