package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyway/internal/policy"
	"sallyway/netstack"
	"sallyway/tunnel"
)

// echoTimeout is how long an echo request waits for its answer: what ping calls lost by default is sooner.
const echoTimeout = 10 * time.Second

// maxEchoes bounds a peer's echo requests that wait; more are dropped.
const maxEchoes = 256

// maxPacket is the largest IP packet in bytes.
const maxPacket = 65535

// OpenIP offers the peer an exchange of IP packets, which a netstack of its own ends here: neither ip_forward nor NAT rules are needed.
func (h *handler) OpenIP(_ context.Context, p tunnel.Peer) (*tunnel.IPService, error) {
	s, err := h.enforce.current()
	if err != nil {
		return nil, err
	}
	peer, known := s.Peer(p.Node)
	if !known || len(peer.Virtual) == 0 {
		return nil, h.refuse(p, policy.Target{}, tunnel.Denied(policy.DefaultDeny, "the platform has given this node no virtual address"))
	}
	var assign, routes []netip.Prefix
	for _, a := range peer.Virtual {
		assign = append(assign, netip.PrefixFrom(a, a.BitLen()))
	}
	add := func(r netip.Prefix) {
		// RFC 9484 wants ranges that do not overlap; a resource inside of another's prefix is covered by that.
		covers := func(a, b netip.Prefix) bool { return a.Overlaps(b) && a.Bits() <= b.Bits() }
		if slices.ContainsFunc(routes, func(have netip.Prefix) bool { return covers(have, r) }) {
			return
		}
		routes = slices.DeleteFunc(routes, func(have netip.Prefix) bool { return covers(r, have) })
		routes = append(routes, r)
	}
	for _, a := range h.virtual() {
		add(netip.PrefixFrom(a, a.BitLen()))
	}
	for i := range s.Resource {
		r := &s.Resource[i]
		for _, a := range r.Virtual {
			add(netip.PrefixFrom(a, a.BitLen()))
		}
		if prefix, ok := r.Prefix(); ok {
			add(prefix)
		}
	}
	return &tunnel.IPService{
		Assign: assign, Routes: routes,
		Serve: func(ctx context.Context, c *tunnel.IPConn) error { return h.serveIP(ctx, p, c) },
	}, nil
}

// ipSession is one peer's exchange of IP packets.
type ipSession struct {
	h      *handler
	peer   tunnel.Peer
	stack  *netstack.Stack
	ctx    context.Context
	echoes sync.WaitGroup
	slots  chan struct{}
}

func (h *handler) serveIP(ctx context.Context, p tunnel.Peer, c *tunnel.IPConn) error {
	ctx, cancel := context.WithCancel(ctx)
	x := &ipSession{h: h, peer: p, ctx: ctx, slots: make(chan struct{}, maxEchoes)}
	defer x.echoes.Wait()
	defer cancel()
	var err error
	x.stack, err = netstack.New(netstack.Config{Conn: c, MTU: maxPacket, HandleTCP: x.tcp, HandleUDP: x.udp, HandlePacket: x.packet})
	if err != nil {
		return err
	}
	x.stack.SetAddresses(h.virtual())
	return x.stack.Run(ctx)
}

func (x *ipSession) tcp(ctx context.Context, r *netstack.TCPRequest) {
	c, err := x.h.DialTCP(ctx, x.peer, policy.Target{Proto: policy.TCP, Host: r.Dst.Addr().String(), Addr: r.Dst.Addr(), Port: r.Dst.Port()})
	if err != nil {
		r.Reject(rejection(err))
		return
	}
	local, err := r.Accept()
	if err != nil {
		_ = c.Close()
		return
	}
	_ = tunnel.Splice(ctx, tunnel.NewConnFlow(tcpConn{local}), tunnel.NewConnFlow(c)) // what ended it early was passed on
}

// tcpConn gives a netstack connection the method by which a splice passes a reset on.
type tcpConn struct{ *netstack.TCPConn }

// Reset ends the connection with RST.
func (c tcpConn) Reset() { _ = c.TCPConn.Reset() }

func (x *ipSession) udp(ctx context.Context, f *netstack.UDPFlow) {
	c, err := x.h.DialUDP(ctx, x.peer, policy.Target{Proto: policy.UDP, Host: f.Dst.Addr().String(), Addr: f.Dst.Addr(), Port: f.Dst.Port()})
	if err != nil {
		f.Reject(rejection(err))
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxPacket)
		for {
			n, err := c.Read(buf)
			if err != nil {
				if errors.Is(tunnel.AsProxyError(err), tunnel.ErrRefused) {
					f.Reject(netstack.Refused)
				}
				_ = f.Close()
				return
			}
			_ = f.WritePacket(buf[:n]) // a datagram may be lost
		}
	}()
	buf := make([]byte, maxPacket)
	for {
		n, err := f.ReadPacket(buf)
		if err != nil {
			break
		}
		if _, err := c.Write(buf[:n]); errors.Is(err, net.ErrClosed) {
			break
		}
	}
	_ = c.Close()
	<-done
}

// packet answers echo requests with what the destination itself answers; other protocols are not passed. It runs on the reading goroutine.
func (x *ipSession) packet(pkt []byte) {
	e, err := netstack.ParseEcho(pkt)
	if err != nil || e.Reply {
		x.h.metrics.packetsDropped.Inc()
		return
	}
	select {
	case x.slots <- struct{}{}:
	default:
		x.h.metrics.packetsDropped.Inc()
		return
	}
	e.Data = slices.Clone(e.Data)
	orig := slices.Clone(pkt)
	x.echoes.Go(func() {
		defer func() { <-x.slots }()
		x.echo(e, orig)
	})
}

func (x *ipSession) echo(e netstack.Echo, orig []byte) {
	ctx, cancel := context.WithTimeout(x.ctx, echoTimeout)
	defer cancel()
	t := policy.Target{Proto: policy.ICMP, Host: e.Dst.String(), Addr: e.Dst}
	dest, err := x.h.enforce.check(ctx, x.peer.Node, t)
	if err != nil {
		x.unreachable(orig, x.h.refuse(x.peer, t, err))
		return
	}
	for _, a := range dest.addrs {
		var answer []byte
		if answer, err = x.h.pings.Echo(ctx, a, e.Data); err == nil {
			reply := e.Answer()
			reply.Data = answer
			_ = x.stack.Inject(reply.AppendPacket(nil)) // a packet may be lost
			return
		}
	}
	if errors.Is(err, errNoPing) {
		x.h.often.Warn(x.h.log, errNoPing, "echo request not sent", "err", err)
	}
	if pe := tunnel.AsProxyError(err); errors.Is(pe, tunnel.ErrUnreachable) {
		x.unreachable(orig, pe)
	}
}

// unreachable tells the sender of a packet why it goes nowhere, in the name of this gateway.
func (x *ipSession) unreachable(orig []byte, err error) {
	for _, own := range x.h.virtual() {
		if own.Is4() == (orig[0]>>4 == 4) {
			if b := netstack.AppendUnreachable(nil, orig, own, rejection(err)); len(b) > 0 {
				_ = x.stack.Inject(b)
			}
			return
		}
	}
}

// rejection is what the peer's app sees of a failed dial.
func rejection(err error) netstack.Reason {
	switch {
	case errors.Is(err, tunnel.ErrRefused), errors.Is(err, tunnel.ErrReset):
		return netstack.Refused
	case errors.Is(err, tunnel.ErrDenied):
		return netstack.AdminProhibited
	case errors.Is(err, tunnel.ErrTimeout):
		return netstack.Silent
	}
	return netstack.Unreachable
}
