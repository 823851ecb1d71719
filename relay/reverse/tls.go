package reverse

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// TLSConfig says which gateway to reach over which relay, and as whom.
type TLSConfig struct {
	// Relay is the identity that the relay's certificate must prove, Verify checks its chain (leaf first), by identity.Trust.
	Relay  identity.Node
	Verify func(chain []*x509.Certificate) error
	// Addrs are the addresses of its TLS port, tried in this order.
	Addrs []netip.AddrPort
	// Gateway is whom to reach.
	Gateway identity.Node
	// Certificate is this node's, of kind client, site or platform and of the gateway's organization.
	Certificate func() (*tls.Certificate, error)
	// Dial opens connections, perhaps through a proxy; nil is a net.Dialer with Control.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Control is called on every socket before it connects (see net.Dialer.Control).
	Control func(network, address string, c syscall.RawConn) error
	// Queue bounds what waits to be written, in bytes; 0 is DefaultQueue.
	Queue int
}

// ErrRefused says that the relay does not lead to the gateway: it has no connection of it, or does not take this node. It does not tell
// which.
var ErrRefused = errors.New("the relay does not lead to this gateway over its TLS port: it has no SSH connection of the gateway, or does not take this node")

// DialTLS connects to a gateway by the relay's TLS port. The link is good when it returns. ErrRefused is final for now; other errors are of
// the way to the relay.
func DialTLS(ctx context.Context, cfg TLSConfig) (*Link, error) {
	if len(cfg.Addrs) == 0 {
		return nil, fmt.Errorf("no address of relay %v", cfg.Relay)
	}
	if cfg.Queue == 0 {
		cfg.Queue = DefaultQueue
	}
	var errs []error
	for i, addr := range cfg.Addrs {
		// One address that swallows everything does not get all the time.
		actx, cancel := ctx, context.CancelFunc(func() {})
		if i < len(cfg.Addrs)-1 {
			actx, cancel = context.WithTimeout(ctx, TLSGrace)
		}
		l, err := dialTLS(actx, &cfg, addr)
		cancel()
		if err == nil {
			return l, nil
		}
		errs = append(errs, fmt.Errorf("relay %v at %v: %w", cfg.Relay, addr, err))
		if ctx.Err() != nil || errors.Is(err, ErrRefused) {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// stream is a client's TLS connection.
type stream struct {
	link *Link
	tcp  *Gather
	conn *tls.Conn

	done, draining chan struct{}

	once  sync.Once
	err   error // written before done is closed
	tasks sync.WaitGroup
}

func dialTLS(ctx context.Context, cfg *TLSConfig, addr netip.AddrPort) (*Link, error) {
	nc, err := dial(ctx, cfg.Dial, cfg.Control, addr)
	if err != nil {
		return nil, err
	}
	LimitUnsent(nc)
	tc := identity.TLSConfig(cfg.Certificate, false, nil, nil)
	tc.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := cfg.Verify(cs.PeerCertificates); err != nil {
			return err
		}
		n, err := identity.CertificateNode(cs.PeerCertificates[0])
		if err != nil {
			return err
		}
		if n != cfg.Relay {
			return fmt.Errorf("%v answered, want %v", n, cfg.Relay)
		}
		return nil
	}
	tc.ServerName = cfg.Gateway.ServerName()
	tc.DynamicRecordSizingDisabled = true
	s := &stream{tcp: &Gather{Conn: nc}, done: make(chan struct{}), draining: make(chan struct{})}
	s.conn = tls.Client(s.tcp, tc)
	if err := s.conn.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	if err := s.awaitReady(ctx); err != nil {
		nc.Close()
		return nil, err
	}
	s.link = &Link{
		out: NewQueue(cfg.Queue), done: s.done, draining: s.draining, close: s.close,
		err: func() error {
			select {
			case <-s.done:
				return s.err
			default:
				return nil
			}
		},
	}
	s.tasks.Go(s.read)
	s.tasks.Go(s.write)
	s.tasks.Go(s.ping)
	return s.link, nil
}

// awaitReady waits until the relay has joined the connection with the gateway's.
func (s *stream) awaitReady(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.tcp.Conn.SetReadDeadline(time.Unix(1, 0)) })()
	var b [controlFrame]byte
	for have := 0; have < len(b); {
		n, err := s.conn.Read(b[have:])
		have += n
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && have < len(b) && errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("wait for the gateway: %w", err)
		case err != nil && have < len(b):
			return ErrRefused
		}
	}
	if b != [controlFrame]byte{0, 0, byte(ControlReady)} {
		return errors.New("this is not a relay's TLS port for clients")
	}
	return nil
}

// read is the loop that reads the stream: frames in place, the rest of the last one moved to the next buffer.
func (s *stream) read() {
	buf := datagram.NewBuffer()
	defer func() { buf.Release() }()
	have := 0
	drained := false
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(KeepaliveInterval + KeepaliveTimeout)); err != nil {
			s.fail(err)
			return
		}
		n, err := s.conn.Read(buf.B[have:])
		have += n
		used := 0
		for {
			run, kind, size, ferr := Next(buf.B[used:have])
			if ferr != nil {
				s.fail(ferr)
				return
			}
			if size == 0 {
				break
			}
			used += size
			switch {
			case kind == ControlDraining && !drained:
				drained = true
				close(s.draining)
			case kind == 0 && len(run.Frames) > 0:
				s.link.receive(run, buf)
			}
		}
		if used > 0 {
			next := datagram.NewBuffer()
			have = copy(next.B[:], buf.B[used:have])
			buf.Release()
			buf = next
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = errors.New("the relay is silent")
			}
			s.fail(ended(err))
			return
		}
	}
}

func (s *stream) write() {
	buf := make([]byte, MaxChunk)
	for {
		n, _, ok := s.link.out.Take(buf)
		if !ok {
			return
		}
		if err := s.tcp.Burst(func() error {
			_, err := s.conn.Write(buf[:n])
			return err
		}); err != nil {
			s.fail(fmt.Errorf("write: %w", err))
			return
		}
	}
}

// ping has the relay answer, so that its loss shows on an idle link.
func (s *stream) ping() {
	t := time.NewTicker(KeepaliveInterval)
	defer t.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-t.C:
			s.link.out.PutControl(ControlPing)
		}
	}
}

func (s *stream) fail(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.done)
		s.link.out.Close()
		_ = s.tcp.Conn.Close() // whoever reads or writes ends
	})
}

func (s *stream) close() {
	s.fail(net.ErrClosed)
	s.tasks.Wait()
}

// dial opens a TCP connection.
func dial(ctx context.Context, f func(context.Context, string, string) (net.Conn, error), control func(string, string, syscall.RawConn) error, addr netip.AddrPort) (net.Conn, error) {
	if f == nil {
		d := net.Dialer{Control: control}
		f = d.DialContext
	}
	return f(ctx, "tcp", addr.String())
}

// Gather is a connection that collects the records of a burst into one write: without it every 16 KiB are a system call.
type Gather struct {
	net.Conn

	mu      sync.Mutex // guards what follows, and writes
	holding bool
	buf     []byte
}

// Write implements net.Conn.
func (g *Gather) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.holding {
		return g.Conn.Write(b)
	}
	g.buf = append(g.buf, b...)
	return len(b), nil
}

// Burst writes what is written in f at once. One goroutine calls it.
func (g *Gather) Burst(f func() error) error {
	g.mu.Lock()
	g.holding = true
	g.mu.Unlock()
	err := f()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holding = false
	if len(g.buf) > 0 && err == nil {
		_, err = g.Conn.Write(g.buf)
	}
	g.buf = g.buf[:0]
	return err
}
