package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// IP over a session (RFC 9484): packets travel as HTTP Datagrams with context ID 0, addresses and routes as capsules. A packet that does
// not fit the path goes in a DATAGRAM capsule, except TCP and UDP above IPv6's least MTU, which every link must carry: these are answered
// with ICMP, so that their sender learns and bulk traffic stays in datagrams.
const (
	// MaxIPPacket is the largest IP packet in bytes that an IPConn carries.
	MaxIPPacket = 65535
	// ipQueue is how many packets wait to be read; what comes when it is full is dropped.
	ipQueue = 256
)

// IPService is what a Handler offers a peer over CONNECT-IP.
type IPService struct {
	// Assign are the peer's addresses: packets from others are dropped.
	Assign []netip.Prefix
	// Routes are where the peer may send: packets to elsewhere are dropped.
	Routes []netip.Prefix
	// Serve moves packets until the conn is closed or ctx ends. The conn is closed when it returns.
	Serve func(ctx context.Context, c *IPConn) error
}

// IPConn exchanges IP packets with the other end. Its methods may be called concurrently.
type IPConn struct {
	datagrams
	client  bool
	scope   atomic.Pointer[ipScope]
	dropped atomic.Uint64
	learned chan struct{} // at a client: closed when addresses and routes are there

	queue  chan []byte
	ctx    context.Context // ends with the exchange; the cause says why
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup
}

// ipScope is what may pass: the client's addresses, and where it may send.
type ipScope struct{ assigned, routes []netip.Prefix }

func newIPConn(ctx context.Context, str h3datagrams, m *meter, client bool) *IPConn {
	c := &IPConn{client: client, queue: make(chan []byte, ipQueue), learned: make(chan struct{})}
	c.str, c.session = str, m
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.scope.Store(new(ipScope))
	return c
}

// start begins to receive.
func (c *IPConn) start() {
	c.tasks.Go(func() { _ = c.receiveFrames(c.ctx, c.take) }) // the capsules' reader says how it ended
	c.tasks.Go(func() {
		err := c.receiveIPCapsules()
		if errors.Is(err, io.EOF) || errors.Is(err, ErrReset) {
			err = net.ErrClosed
		}
		c.cancel(err)
	})
}

// take queues a packet that the other end may send, and drops others.
func (c *IPConn) take(b []byte) {
	h, ok := parseIP(b)
	scope := c.scope.Load()
	if c.client {
		// ICMP errors come from any router on the way; nothing else speaks for others.
		ok = ok && within(scope.assigned, h.dst) && (h.icmpError || within(scope.routes, h.src))
	} else {
		ok = ok && within(scope.assigned, h.src) && within(scope.routes, h.dst)
	}
	if ok {
		select {
		case c.queue <- b:
			return
		default: // full: this is IP
		}
	}
	c.dropped.Add(1)
}

// ReadPacket reads the next IP packet into b, which must have room for MaxIPPacket bytes. What comes from an address that is not the
// peer's, or goes where it may not send, has been dropped and counted before.
func (c *IPConn) ReadPacket(b []byte) (int, error) {
	select {
	case p := <-c.queue:
		return copy(b, p), nil
	case <-c.ctx.Done():
		return 0, c.err()
	}
}

// WritePacket sends an IP packet, whose hop limit it decrements in place. A packet that the other end would drop (source not assigned,
// destination not routed, hop limit used up) is dropped and counted. icmp, if not nil, is the ICMP error to hand to the packet's sender:
// the packet was too large.
func (c *IPConn) WritePacket(b []byte) (icmp []byte, err error) {
	if c.ctx.Err() != nil {
		return nil, c.err()
	}
	h, ok := parseIP(b)
	scope := c.scope.Load()
	if c.client {
		ok = ok && within(scope.assigned, h.src) && within(scope.routes, h.dst)
	} else {
		ok = ok && within(scope.assigned, h.dst) && (h.icmpError || within(scope.routes, h.src))
	}
	if !ok || h.hops <= 1 {
		c.dropped.Add(1)
		return nil, nil
	}
	takeHop(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.scratch = append(append(c.scratch[:0], 0), b...)
	err = c.str.SendDatagram(c.scratch)
	if _, tooLarge := errors.AsType[*quic.DatagramTooLargeError](err); tooLarge {
		if h.bulk && len(b) > leastMTU {
			return packetTooBig(b, h), nil
		}
		c.scratch = appendCapsule(c.scratch[:0], b)
		_, err = c.str.Write(c.scratch)
	}
	if err == nil {
		c.countWritten(len(b))
	}
	return nil, streamError(err)
}

func (c *IPConn) err() error {
	if err := context.Cause(c.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return ErrNoSession // the session's context ended
}

// Assigned are the addresses that the gateway assigned to the client.
func (c *IPConn) Assigned() []netip.Prefix { return slices.Clone(c.scope.Load().assigned) }

// Routes are where the client may send.
func (c *IPConn) Routes() []netip.Prefix { return slices.Clone(c.scope.Load().routes) }

// Dropped is how many packets were dropped, both ways.
func (c *IPConn) Dropped() uint64 { return c.dropped.Load() }

// Close ends the exchange. It may be called more than once.
func (c *IPConn) Close() error {
	c.cancel(net.ErrClosed)
	c.str.CancelRead(codeGone)
	c.str.CancelWrite(codeGone)
	c.tasks.Wait()
	return nil
}

// receiveIPCapsules deals with capsules until the stream ends.
func (c *IPConn) receiveIPCapsules() error {
	p := http3.NewCapsuleParser(c.str)
	var haveAddresses, haveRoutes bool
	for {
		typ, r, err := p.Next()
		if err != nil {
			return streamError(err)
		}
		if size := r.Remaining(); size < 0 || size > maxCapsule {
			return fmt.Errorf("%w: %d bytes", errCapsule, size)
		}
		known := typ == capsuleDatagram || (c.client && (typ == capsuleAddressAssign || typ == capsuleRoutes)) || (!c.client && typ == capsuleAddressRequest)
		if !known {
			if err := r.Discard(); err != nil {
				return streamError(err)
			}
			continue
		}
		body := make([]byte, r.Remaining())
		if _, err := io.ReadFull(r, body); err != nil {
			return streamError(err)
		}
		scope := *c.scope.Load()
		switch typ {
		case capsuleDatagram:
			if payload, ok := udpPayload(body); ok {
				c.countRead(len(payload))
				c.take(payload)
			}
			continue
		case capsuleAddressRequest:
			requests, err := parseAddresses(body)
			if err != nil {
				return err
			}
			if err := c.write(answerAddresses(requests, scope.assigned)); err != nil {
				return err
			}
			continue
		case capsuleAddressAssign:
			assigned, err := parseAddresses(body)
			if err != nil {
				return err
			}
			scope.assigned = nil
			for _, a := range assigned {
				if !a.refused() {
					scope.assigned = append(scope.assigned, a.prefix)
				}
			}
			haveAddresses = true
		case capsuleRoutes:
			if scope.routes, err = parseRoutes(body); err != nil {
				return err
			}
			haveRoutes = true
		}
		c.scope.Store(&scope)
		if haveAddresses && haveRoutes {
			select {
			case <-c.learned:
			default:
				close(c.learned)
			}
		}
	}
}

// write sends a capsule.
func (c *IPConn) write(capsule []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.str.Write(capsule)
	return streamError(err)
}

// DialIP opens an exchange of IP packets and returns when the gateway has assigned addresses and said what is routed. A refusal is a
// *ProxyError. ctx bounds the dial only.
func (s *Session) DialIP(ctx context.Context) (*IPConn, error) {
	str, _, err := s.connect(ctx, protoIP, ipPath+"*/*/", http.Header{http3.CapsuleProtocolHeader: {capsuleProtocol}})
	if err != nil {
		return nil, fmt.Errorf("dial ip: %w", err)
	}
	c := newIPConn(s.ctx, str, &s.flows, true)
	c.start()
	select {
	case <-c.learned:
		return c, nil
	case <-c.ctx.Done():
		err = c.err()
	case <-ctx.Done():
		err = dialError(ctx)
	}
	c.Close()
	return nil, fmt.Errorf("dial ip: %w", err)
}

// serveIP is an exchange of IP packets at the gateway.
func (p *peerSession) serveIP(w http.ResponseWriter, r *http.Request) {
	// The default template's variables may say everything only: /*/*/ (RFC 9484 §4.6), or be absent.
	rest, ok := strings.CutPrefix(r.URL.EscapedPath(), ipPath)
	if !ok || (rest != "" && rest != "*/*/" && rest != "%2A/%2A/") {
		p.fail(w, &ProxyError{Type: RequestError, Detail: "only whole addresses and all protocols are proxied"})
		return
	}
	done, err := p.openFlow()
	if err != nil {
		p.fail(w, err)
		return
	}
	defer done()
	svc, err := p.srv.cfg.Handler.OpenIP(r.Context(), p.peer)
	if err != nil {
		p.fail(w, err)
		return
	}
	w.Header().Set(http3.CapsuleProtocolHeader, capsuleProtocol)
	str, err := takeStream(w)
	if err != nil {
		return // the peer is gone
	}
	c := newIPConn(p.ctx, str, &p.flows, false)
	c.scope.Store(&ipScope{slices.Clone(svc.Assign), slices.Clone(svc.Routes)})
	defer c.Close()
	defer context.AfterFunc(p.ctx, func() { c.Close() })()
	if c.write(appendRoutes(appendAddresses(nil, assignments(svc.Assign)), svc.Routes)) != nil {
		return // the peer is gone
	}
	c.start()
	if err := svc.Serve(c.ctx, c); err != nil && !errors.Is(err, net.ErrClosed) && c.ctx.Err() == nil {
		p.srv.cfg.Logger.Warn("IP service ended", "peer", p.peer.Node, "err", err)
	}
}
