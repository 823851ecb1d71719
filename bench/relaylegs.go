package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// A session as ours, from a client's leg over a relay to a gateway's, with nothing at its ends: a stream of zeros, made by one
// process and thrown away by the other. Port sinkPort of the gateway takes bytes, and answers their number when they end; port
// sourcePort sends zeros until it is reset.

const (
	sinkPort, sourcePort = 1, 2
	legChunk             = 256 << 10 // bytes written and read at once
	legWait              = 20 * time.Second
)

// legEnd says where a process's leg leads.
type legEnd struct {
	Relay  netip.AddrPort
	Dir    string         // of the certificates
	Listen netip.AddrPort // of the client: where it is told what to do
}

// legSetup is what both ends start with.
func legSetup(config []byte, kind identity.Kind) (cfg legEnd, lc leg.Config, cert func() (*tls.Certificate, error), trust func() *identity.Trust, err error) {
	if err = json.Unmarshal(config, &cfg); err != nil {
		return
	}
	key, err := relayKey()
	if err != nil {
		return
	}
	t, err := loadTrust(cfg.Dir)
	if err != nil {
		return
	}
	c, err := loadNode(filepath.Join(cfg.Dir, string(kind)))
	if err != nil {
		return
	}
	cert = func() (*tls.Certificate, error) { return c, nil }
	return cfg, legConfig(cfg.Relay, relayNode(kind), t, key), cert, func() *identity.Trust { return t }, nil
}

// legGateway is the gateway's end. It runs until ctx ends.
func legGateway(ctx context.Context, config []byte) (err error) {
	_, lc, cert, trust, err := legSetup(config, identity.Gateway)
	if err != nil {
		return err
	}
	m, err := tunnel.NewMerged(tunnel.MergedConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	s, err := tunnel.Listen(m, tunnel.ServeConfig{Node: relayNode(identity.Gateway), Certificate: cert, Trust: trust, Handler: sinkHandler{}})
	if err != nil {
		return err
	}
	lc.OnRendezvous = func(peer identity.Node, _ netip.AddrPort, ch *leg.Channel) {
		if _, err := m.Add(ch, tunnel.LinkInfo{Name: "bench", Peer: peer}); err != nil {
			fmt.Println("channel:", err)
		}
	}
	l, err := leg.Dial(ctx, lc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	fmt.Println("ready")
	return s.Run(ctx)
}

// legOrder is what the client's end is told to do, a line of JSON; its answer is another, a legAnswer.
type legOrder struct {
	Down bool
	Time time.Duration
}

// legAnswer is what became of a legOrder.
type legAnswer struct {
	Bytes int64
	Took  time.Duration
	Err   string `json:",omitempty"`
}

// legClient is the client's end. It runs until ctx ends.
func legClient(ctx context.Context, config []byte) (err error) {
	cfg, lc, cert, trust, err := legSetup(config, identity.Client)
	if err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(ctx, legWait)
	defer cancel()
	l, err := leg.Dial(soon, lc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	ch, err := l.Connect(soon, relayNode(identity.Gateway))
	if err != nil {
		return err
	}
	s, err := tunnel.Dial(soon, tunnel.DialConfig{
		Link: ch, Info: tunnel.LinkInfo{Name: "bench"}, SingleLink: true, Gateway: relayNode(identity.Gateway), Certificate: cert, Trust: trust,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close("the end")) }()
	ln, err := net.Listen("tcp4", cfg.Listen.String())
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })() // ends Accept
	fmt.Println("ready", ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		if err := takeOrder(ctx, s, c); err != nil {
			return err
		}
	}
}

// takeOrder does what one connection asks for.
func takeOrder(ctx context.Context, s *tunnel.Session, c net.Conn) error {
	defer c.Close()
	line, err := bufio.NewReader(c).ReadBytes('\n')
	if err != nil {
		return err
	}
	var o legOrder
	if err := json.Unmarshal(line, &o); err != nil {
		return err
	}
	a, err := o.run(ctx, s)
	if err != nil {
		a.Err = err.Error()
	}
	return json.NewEncoder(c).Encode(a)
}

// run moves bytes through a flow of its own. Up, the time ends when the gateway has them all.
func (o legOrder) run(ctx context.Context, s *tunnel.Session) (a legAnswer, err error) {
	port := uint16(sinkPort)
	if o.Down {
		port = sourcePort
	}
	ctx, cancel := context.WithTimeout(ctx, o.Time+legWait)
	defer cancel()
	f, err := s.DialTCP(ctx, "192.0.2.1", port) // an address for documentation (RFC 5737): nothing is dialled
	if err != nil {
		return a, err
	}
	defer f.Reset()
	defer context.AfterFunc(ctx, f.Reset)()
	buf := make([]byte, legChunk)
	start := time.Now()
	for time.Since(start) < o.Time {
		var n int
		if o.Down {
			n, err = f.Read(buf)
		} else {
			n, err = f.Write(buf)
		}
		if a.Bytes += int64(n); err != nil {
			return a, err
		}
	}
	if !o.Down {
		if err := f.CloseWrite(); err != nil {
			return a, err
		}
		if _, err := io.ReadFull(f, buf[:8]); err != nil {
			return a, err
		}
		if got := int64(binary.BigEndian.Uint64(buf)); got != a.Bytes {
			return a, fmt.Errorf("%d bytes arrived, of %d", got, a.Bytes)
		}
	}
	a.Took = time.Since(start)
	return a, nil
}

// order has a client's end move bytes; dial connects to it.
func (o legOrder) order(ctx context.Context, dial func(ctx context.Context) (net.Conn, error)) (a legAnswer, err error) {
	c, err := dial(ctx)
	if err != nil {
		return a, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })() // ends what waits
	if err := json.NewEncoder(c).Encode(o); err != nil {
		return a, err
	}
	if err := json.NewDecoder(c).Decode(&a); err != nil {
		return a, err
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

// sinkHandler is a gateway with a sink and a source, and nothing behind it.
type sinkHandler struct{}

var _ tunnel.Handler = sinkHandler{}

// Authorize lets everybody in that has a certificate.
func (sinkHandler) Authorize(context.Context, tunnel.Peer) error { return nil }

// DialTCP returns the sink or the source.
func (sinkHandler) DialTCP(_ context.Context, _ tunnel.Peer, t policy.Target) (tunnel.Conn, error) {
	switch t.Port {
	case sinkPort:
		return &sinkConn{done: make(chan struct{}), gone: make(chan struct{})}, nil
	case sourcePort:
		return sourceConn{&sinkConn{done: make(chan struct{}), gone: make(chan struct{})}}, nil
	}
	return nil, tunnel.Denied(policy.DefaultDeny, "a sink and a source only")
}

// DialUDP refuses.
func (sinkHandler) DialUDP(context.Context, tunnel.Peer, policy.Target) (net.Conn, error) {
	return nil, tunnel.Denied(policy.DefaultDeny, "no UDP here")
}

// OpenIP refuses.
func (sinkHandler) OpenIP(context.Context, tunnel.Peer) (*tunnel.IPService, error) {
	return nil, tunnel.Denied(policy.DefaultDeny, "no IP here")
}

// Resolve refuses.
func (sinkHandler) Resolve(context.Context, tunnel.Peer, []byte) ([]byte, error) {
	return nil, tunnel.Denied(policy.DefaultDeny, "no names here")
}

// sinkConn counts what is written to it. When that ends, it can be read: eight bytes with the number.
type sinkConn struct {
	count int64         // of the writer; of the reader after done
	done  chan struct{} // closed by CloseWrite
	gone  chan struct{} // closed by Close
	told  bool
}

// Write counts.
func (c *sinkConn) Write(b []byte) (int, error) {
	c.count += int64(len(b))
	return len(b), nil
}

// CloseWrite ends what is counted. It is called once.
func (c *sinkConn) CloseWrite() error {
	close(c.done)
	return nil
}

// Read waits for the end.
func (c *sinkConn) Read(b []byte) (int, error) {
	if c.told {
		return 0, io.EOF
	}
	select {
	case <-c.done:
	case <-c.gone:
		return 0, net.ErrClosed
	}
	c.told = true
	return copy(b, binary.BigEndian.AppendUint64(nil, uint64(c.count))), nil
}

// Close ends a waiting Read. It is called once.
func (c *sinkConn) Close() error {
	close(c.gone)
	return nil
}

// LocalAddr, RemoteAddr and the deadlines are not used by a splice.
func (*sinkConn) LocalAddr() net.Addr              { return tunnel.Addr("sink") }
func (*sinkConn) RemoteAddr() net.Addr             { return tunnel.Addr("sink") }
func (*sinkConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (*sinkConn) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (*sinkConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// sourceConn can be read for ever.
type sourceConn struct{ *sinkConn }

// Read returns bytes of no meaning.
func (c sourceConn) Read(b []byte) (int, error) {
	select {
	case <-c.gone:
		return 0, net.ErrClosed
	default:
		return len(b), nil
	}
}
