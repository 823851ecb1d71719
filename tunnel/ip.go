package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	connectip "github.com/quic-go/connect-ip-go"
	"github.com/yosida95/uritemplate/v3"
)

// MaxIPPacket is the largest IP packet in bytes that an IPConn carries.
const MaxIPPacket = 65535

// IPService is what a Handler offers a peer over CONNECT-IP.
type IPService struct {
	// Assign are the peer's addresses: packets from others are dropped.
	Assign []netip.Prefix
	// Routes are where the peer may send: packets to elsewhere are dropped.
	Routes []netip.Prefix
	// Serve moves packets until the conn is closed or ctx ends. The conn is closed when it returns.
	Serve func(ctx context.Context, c *IPConn) error
}

// IPConn exchanges IP packets with the other end (RFC 9484). ReadPacket is for one goroutine, the rest for any.
type IPConn struct {
	counter
	c                *connectip.Conn
	sources, targets []netip.Prefix // what WritePacket lets pass
	assigned, routes []netip.Prefix
	dropped          atomic.Uint64
	once             sync.Once
}

// ReadPacket reads the next IP packet into b, which must have room for MaxIPPacket bytes. What comes from an address that is not the
// peer's, or goes where it may not send, has been dropped before.
func (c *IPConn) ReadPacket(b []byte) (int, error) {
	n, err := c.c.ReadPacket(b)
	c.countRead(n)
	return n, ipError(err)
}

// WritePacket sends an IP packet, whose hop limit it decrements in place. A packet that the other end would drop (source not assigned,
// destination not routed, hop limit used up) is dropped and counted. icmp, if not nil, is the ICMP error to hand to the packet's sender:
// the packet was too large.
func (c *IPConn) WritePacket(b []byte) (icmp []byte, err error) {
	if !c.passes(b) {
		c.dropped.Add(1)
		return nil, nil
	}
	icmp, err = c.c.WritePacket(b)
	if err == nil && icmp == nil {
		c.countWritten(len(b))
	}
	return icmp, ipError(err)
}

// Assigned are the addresses that the gateway assigned to the client.
func (c *IPConn) Assigned() []netip.Prefix { return c.assigned }

// Routes are where the client may send.
func (c *IPConn) Routes() []netip.Prefix { return c.routes }

// Dropped is how many packets WritePacket dropped.
func (c *IPConn) Dropped() uint64 { return c.dropped.Load() }

// Close ends the exchange. It may be called more than once.
func (c *IPConn) Close() error {
	c.once.Do(func() { _ = c.c.Close() }) // that a peer which is gone was not told does not matter
	return nil
}

// passes reports whether the other end would take the packet. The check is made here because below it every refusal is a line in the log.
func (c *IPConn) passes(b []byte) bool {
	h, ok := parseIP(b)
	if !ok || h.hops <= 1 || !within(c.targets, h.dst) {
		return false
	}
	return h.icmpError || within(c.sources, h.src) // ICMP errors come from any router on the way
}

type ipHeader struct {
	src, dst  netip.Addr
	hops      uint8
	icmpError bool
}

// IP protocol numbers and message types that parseIP knows.
const (
	protoICMP, protoICMPv6 = 1, 58
	minIPv4, lenIPv6       = 20, 40
)

// parseIP reads the header of an IP packet (RFC 791 §3.1, RFC 8200 §3).
func parseIP(b []byte) (h ipHeader, ok bool) {
	if len(b) < minIPv4 {
		return h, false
	}
	switch b[0] >> 4 {
	case 4:
		head := int(b[0]&0xf) * 4
		if head < minIPv4 || head > len(b) || int(binary.BigEndian.Uint16(b[2:])) != len(b) || headerSum(b[:head]) != 0xffff {
			return h, false
		}
		h.src, h.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		h.hops = b[8]
		first := binary.BigEndian.Uint16(b[6:])&0x1fff == 0
		if b[9] == protoICMP && first && len(b) > head {
			t := b[head]
			h.icmpError = t == 3 || t == 4 || t == 5 || t == 11 || t == 12
		}
		return h, true
	case 6:
		if len(b) < lenIPv6 || int(binary.BigEndian.Uint16(b[4:]))+lenIPv6 != len(b) {
			return h, false
		}
		h.src, h.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		h.hops = b[7]
		h.icmpError = b[6] == protoICMPv6 && len(b) > lenIPv6 && b[lenIPv6] < 128
		return h, true
	}
	return h, false
}

// headerSum is the one's complement sum of an IPv4 header, all ones if its checksum is right (RFC 1071).
func headerSum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func within(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

func ipError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, net.ErrClosed), err == io.EOF:
		return net.ErrClosed
	}
	return streamError(err)
}

// DialIP opens an exchange of IP packets and returns when the gateway has assigned addresses and said what is routed. A refusal is a
// *ProxyError. ctx bounds the dial only.
func (s *Session) DialIP(ctx context.Context) (*IPConn, error) {
	template, err := uritemplate.New("https://" + s.authority + ipPath)
	if err != nil {
		return nil, fmt.Errorf("dial ip: %w", err)
	}
	req, err := connectip.NewRequest(ctx, template)
	if err != nil {
		return nil, fmt.Errorf("dial ip: %w", err)
	}
	// The library's dial waits for the answer without looking at ctx.
	type dialed struct {
		c   *connectip.Conn
		rsp *http.Response
		err error
	}
	answered := make(chan dialed, 1)
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("dial ip: %w", s.err)
	}
	s.tasks.Go(func() {
		c, rsp, err := connectip.NewClientConn(s.h3).Dial(req)
		answered <- dialed{c, rsp, err}
	})
	s.mu.Unlock()
	var d dialed
	select {
	case d = <-answered:
	case <-ctx.Done():
		go func() { // the gateway may still say yes
			if d := <-answered; d.c != nil {
				d.c.Close()
			}
		}()
		return nil, fmt.Errorf("dial ip: %w", dialError(ctx))
	}
	if d.rsp != nil && d.err != nil {
		return nil, fmt.Errorf("dial ip: %w", parseProxyError(d.rsp.StatusCode, d.rsp.Header))
	}
	if d.err != nil {
		return nil, fmt.Errorf("dial ip: %w", streamError(d.err))
	}
	c := &IPConn{c: d.c}
	c.session = &s.flows
	if err := c.learn(ctx); err != nil {
		c.Close()
		if ctx.Err() != nil {
			err = dialError(ctx)
		}
		return nil, fmt.Errorf("dial ip: %w", ipError(err))
	}
	return c, nil
}

// learn waits for what the gateway assigns and routes.
func (c *IPConn) learn(ctx context.Context) error {
	assigned, err := c.c.ReceiveAddressAssignment(ctx)
	if err != nil {
		return err
	}
	for _, a := range assigned {
		if !a.Rejected() {
			c.assigned = append(c.assigned, a.IPPrefix)
		}
	}
	routes, err := c.c.Routes(ctx)
	if err != nil {
		return err
	}
	for _, r := range routes {
		c.routes = append(c.routes, r.Prefixes()...)
	}
	c.sources, c.targets = c.assigned, c.routes
	return nil
}

// serveIP is an exchange of IP packets at the gateway.
func (p *peerSession) serveIP(w http.ResponseWriter, r *http.Request) {
	template, err := uritemplate.New("https://" + r.Host + ipPath)
	if err != nil {
		p.fail(w, &ProxyError{Type: RequestError, Detail: "malformed authority"})
		return
	}
	req, err := connectip.ParseProxyRequest(r, template)
	if err != nil {
		bad := &ProxyError{Type: RequestError, Detail: err.Error()}
		if e, ok := errors.AsType[*connectip.ProxyRequestParseError](err); ok {
			bad.Status = e.HTTPStatus
		}
		p.fail(w, bad)
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
	var proxy connectip.Proxy
	raw, err := proxy.Proxy(w, req)
	if err != nil {
		return // the peer is gone
	}
	c := &IPConn{c: raw, assigned: svc.Assign, routes: svc.Routes, sources: svc.Routes, targets: svc.Assign}
	c.session = &p.flows
	defer c.Close()
	defer context.AfterFunc(p.ctx, func() { c.Close() })()
	if raw.AssignAddresses(svc.Assign) != nil || raw.AdvertiseRoute(ipRoutes(svc.Routes)) != nil {
		return // the peer is gone
	}
	if err := svc.Serve(p.ctx, c); err != nil && !errors.Is(err, net.ErrClosed) && p.ctx.Err() == nil {
		p.srv.cfg.Logger.Warn("IP service ended", "peer", p.peer.Node, "err", err)
	}
}

// ipRoutes turns prefixes into the ranges that are advertised: sorted, not overlapping (RFC 9484 §4.7.3).
func ipRoutes(ps []netip.Prefix) []connectip.IPRoute {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().BitLen() - b.Addr().BitLen(); c != 0 {
			return c
		}
		if c := a.Masked().Addr().Compare(b.Masked().Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var out []connectip.IPRoute
	for _, p := range ps {
		p = p.Masked()
		last := lastAddr(p)
		if n := len(out); n > 0 && out[n-1].StartIP.BitLen() == last.BitLen() && out[n-1].EndIP.Compare(last) >= 0 {
			continue // a prefix of one before it
		}
		out = append(out, connectip.IPRoute{StartIP: p.Addr(), EndIP: last})
	}
	return out
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
