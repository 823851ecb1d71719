package client

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/tally"
	"sallyway/netstack"
	"sallyway/tunnel"
)

// maxPacket is the largest IP packet in bytes.
const maxPacket = 65535

// dnsPort is where the stub resolver listens on its virtual address.
const dnsPort = 53

// ipQueue bounds the packets that wait for a gateway's CONNECT-IP exchange; the oldest wait, new ones are dropped.
const ipQueue = 64

// ipRetry is how long a gateway whose exchange failed is left alone, and ipShun how long packets that another gateway serves, too, go there.
const (
	ipRetry = time.Second
	ipShun  = 10 * time.Second
)

// ipPatience is how long an exchange may take to open before packets take another gateway that serves them.
const ipPatience = time.Second

// capture turns what comes out of a TUN into flows: TCP and UDP over CONNECT and CONNECT-UDP, everything else over one CONNECT-IP exchange
// per gateway, DNS to the stub.
type capture struct {
	log      *slog.Logger
	sessions *Sessions
	stub     *stub
	stack    *netstack.Stack
	seed     maphash.Seed // of which gateway takes the packets to a destination

	mu sync.Mutex // guards ip
	ip map[identity.Node]*ipExchange

	often   tally.Log     // what does not work for apps
	refused atomic.Uint64 // flows refused
	dropped atomic.Uint64 // packets dropped for want of a route or room
}

// newCapture makes the netstack on a device. Sources are those of the host itself and, at a gateway, of the LAN behind it.
func newCapture(log *slog.Logger, dev netstack.Device, s *Sessions, st *stub) (*capture, error) {
	c := &capture{log: log, sessions: s, stub: st, seed: maphash.MakeSeed(), ip: map[identity.Node]*ipExchange{}}
	var err error
	c.stack, err = netstack.New(netstack.Config{Device: dev, HandleTCP: c.tcp, HandleUDP: c.udp, HandlePacket: c.packet})
	return c, err
}

// run moves packets until ctx ends.
func (c *capture) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var lines sync.WaitGroup
	defer lines.Wait()
	defer cancel()
	for _, l := range []*tally.Log{&c.often, &c.stub.often} {
		lines.Go(func() { _ = l.Run(ctx, c.log) }) // ends with ctx
	}
	err := c.stack.Run(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range c.ip {
		x.stop()
	}
	return err
}

// isStub reports whether a destination is the stub resolver.
func (c *capture) isStub(dst netip.AddrPort) bool {
	if dst.Port() != dnsPort {
		return false
	}
	for _, a := range c.sessions.table.Load().stubAddrs() {
		if a == dst.Addr() {
			return true
		}
	}
	return false
}

func (c *capture) tcp(ctx context.Context, r *netstack.TCPRequest) {
	if c.isStub(r.Dst) {
		c.dnsTCP(ctx, r)
		return
	}
	dctx, cancel := context.WithTimeout(ctx, DialTimeout)
	f, err := c.sessions.DialTCP(dctx, hostOf(r.Dst), r.Dst.Port())
	cancel()
	if err != nil {
		c.refuse("tcp", r.Dst, err)
		r.Reject(rejection(err))
		return
	}
	local, err := r.Accept()
	if err != nil {
		f.Reset()
		return
	}
	splice(ctx, f, tcpConn{local})
}

// tcpConn gives a netstack connection the method by which a splice passes a reset on.
type tcpConn struct{ *netstack.TCPConn }

// Reset ends the connection with RST.
func (c tcpConn) Reset() { _ = c.TCPConn.Reset() }

func (c *capture) udp(ctx context.Context, f *netstack.UDPFlow) {
	if c.isStub(f.Dst) {
		c.dnsUDP(ctx, f)
		return
	}
	dctx, cancel := context.WithTimeout(ctx, DialTimeout)
	up, err := c.sessions.DialUDP(dctx, hostOf(f.Dst), f.Dst.Port())
	cancel()
	if err != nil {
		c.refuse("udp", f.Dst, err)
		f.Reject(rejection(err))
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = up.Close() })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxPacket)
		for {
			n, size, err := up.ReadPackets(buf)
			if err != nil {
				if errors.Is(err, tunnel.ErrRefused) {
					f.Reject(netstack.Refused)
				}
				_ = f.Close()
				return
			}
			_ = f.WritePackets(buf[:n], max(1, size)) // a datagram may be lost
		}
	}()
	buf := make([]byte, maxPacket)
	for {
		n, size, err := f.ReadPackets(buf)
		if err != nil || writeEach(up, buf[:n], size) != nil {
			break
		}
	}
	_ = up.Close()
	<-done
}

// writeEach sends a run of datagrams of size bytes, of which the last may be shorter.
func writeEach(up *tunnel.UDPConn, run []byte, size int) error {
	for {
		n := min(size, len(run))
		if err := up.WritePacket(run[:n]); err != nil {
			return err
		}
		if run = run[n:]; len(run) == 0 {
			return nil
		}
	}
}

func (c *capture) refuse(proto string, dst netip.AddrPort, err error) {
	c.refused.Add(1)
	c.often.Info(c.log, refusal{proto, whyRefused(err)}, "flow refused", "proto", proto, "to", dst, "err", err)
}

// refusal is what lines about refused flows are counted by.
type refusal struct{ proto, why string }

// whyRefused is a refusal's kind: a rule, an error of RFC 9209, or one that is the client's own.
func whyRefused(err error) string {
	if pe, ok := errors.AsType[*tunnel.ProxyError](err); ok {
		return string(pe.Type) + " " + pe.Rule
	}
	if _, ok := errors.AsType[*NoRouteError](err); ok {
		return "no route"
	}
	return ""
}

// rejection is what an app sees of a failed dial: what it would see on the spot.
func rejection(err error) netstack.Reason {
	var none *NoRouteError
	switch {
	case errors.Is(err, tunnel.ErrRefused), errors.Is(err, tunnel.ErrReset):
		return netstack.Refused
	case errors.Is(err, tunnel.ErrDenied):
		return netstack.AdminProhibited
	case errors.As(err, &none):
		return netstack.NetUnreachable
	case errors.Is(err, tunnel.ErrUnreachable), errors.Is(err, tunnel.ErrNotFound):
		return netstack.Unreachable
	case errors.Is(err, tunnel.ErrTimeout):
		return netstack.Silent
	}
	// The gateway is not reached: the host would see a router that has lost its way.
	return netstack.Unreachable
}

func (c *capture) dnsUDP(ctx context.Context, f *netstack.UDPFlow) {
	buf := make([]byte, dns.MaxMsgSize)
	var asking sync.WaitGroup
	defer asking.Wait()
	for {
		n, err := f.ReadPacket(buf)
		if err != nil {
			return
		}
		query := append([]byte(nil), buf[:n]...)
		asking.Go(func() {
			if a := c.stub.answer(ctx, query, dns.MinMsgSize); a != nil {
				_ = f.WritePacket(a) // a datagram may be lost
			}
		})
	}
}

func (c *capture) dnsTCP(ctx context.Context, r *netstack.TCPRequest) {
	conn, err := r.Accept()
	if err != nil {
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	d := &dns.Conn{Conn: conn}
	for {
		_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
		query, err := d.ReadMsgHeader(nil)
		if err != nil {
			return
		}
		a := c.stub.answer(ctx, query, dns.MaxMsgSize)
		if a == nil {
			return
		}
		if _, err := d.Write(a); err != nil {
			return
		}
	}
}

// packet sends what is neither TCP nor UDP to a gateway that serves its destination. It runs on the reading goroutine.
func (c *capture) packet(pkt []byte) {
	dst, ok := destination(pkt)
	if !ok {
		c.dropped.Add(1)
		return
	}
	route, err := c.sessions.Lookup(dst.String(), policy.ICMP, 0)
	if err != nil || len(route.Gateways) == 0 {
		c.dropped.Add(1)
		return
	}
	x := c.exchangeFor(steady(c.seed, route, dst))
	select {
	case x.queue <- append([]byte(nil), pkt...):
	default:
		c.dropped.Add(1)
	}
}

// destination reads the destination of an IP packet.
func destination(pkt []byte) (netip.Addr, bool) {
	switch {
	case len(pkt) >= 20 && pkt[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(pkt[16:20])), true
	case len(pkt) >= 40 && pkt[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(pkt[24:40])), true
	}
	return netip.Addr{}, false
}

// source reads the source of an IP packet.
func source(pkt []byte) (netip.Addr, bool) {
	switch {
	case len(pkt) >= 20 && pkt[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(pkt[12:16])), true
	case len(pkt) >= 40 && pkt[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(pkt[8:24])), true
	}
	return netip.Addr{}, false
}

// ipExchange carries IP packets to and from one gateway.
type ipExchange struct {
	c       *capture
	gateway identity.Node
	queue   chan []byte
	cancel  context.CancelFunc
	done    chan struct{}

	opening atomic.Int64 // since when, in Unix nanoseconds; 0 while it is not
	failed  atomic.Int64 // when it last did, likewise
}

// exchangeFor is the exchange of the first gateway that would be asked for a new flow and whose exchange is not stuck, else of the first.
func (c *capture) exchangeFor(route Route) *ipExchange {
	gateways := c.sessions.fitFirst(route)
	for _, n := range gateways {
		if x := c.exchange(n); !x.stuck(time.Now()) {
			return x
		}
	}
	return c.exchange(gateways[0])
}

// stuck reports whether another gateway takes packets sooner.
func (x *ipExchange) stuck(now time.Time) bool {
	if t := x.failed.Load(); t != 0 && now.Sub(time.Unix(0, t)) < ipShun {
		return true
	}
	t := x.opening.Load()
	return t != 0 && now.Sub(time.Unix(0, t)) > ipPatience
}

func (c *capture) exchange(n identity.Node) *ipExchange {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x := c.ip[n]; x != nil {
		return x
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &ipExchange{c: c, gateway: n, queue: make(chan []byte, ipQueue), cancel: cancel, done: make(chan struct{})}
	c.ip[n] = x
	go x.run(ctx)
	return x
}

func (x *ipExchange) stop() {
	x.cancel()
	<-x.done
}

func (x *ipExchange) run(ctx context.Context) {
	defer close(x.done)
	for {
		var first []byte
		select {
		case first = <-x.queue:
		case <-ctx.Done():
			return
		}
		x.opening.Store(time.Now().UnixNano())
		dctx, cancel := context.WithTimeout(ctx, DialTimeout)
		conn, err := x.c.sessions.OpenIP(dctx, x.gateway)
		cancel()
		x.opening.Store(0)
		if err != nil {
			x.failed.Store(time.Now().UnixNano())
			x.c.dropped.Add(1)
			x.c.often.Info(x.c.log, x.gateway, "no exchange of IP packets", "gateway", x.gateway.ID, "err", err)
			select {
			case <-time.After(ipRetry):
				continue
			case <-ctx.Done():
				return
			}
		}
		x.failed.Store(0)
		x.serve(ctx, conn, first)
	}
}

func (x *ipExchange) serve(ctx context.Context, conn *tunnel.IPConn, first []byte) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	over := make(chan struct{})
	go func() {
		defer close(over)
		buf := make([]byte, maxPacket)
		for {
			n, err := conn.ReadPacket(buf)
			if err != nil {
				return
			}
			if x.fromGateway(buf[:n]) {
				_ = x.c.stack.Inject(buf[:n]) // a packet may be lost
			}
		}
	}()
	defer func() {
		_ = conn.Close()
		<-over
	}()
	pkt := first
	for {
		icmp, err := conn.WritePacket(pkt)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if len(icmp) > 0 {
			_ = x.c.stack.Inject(icmp)
		}
		select {
		case pkt = <-x.queue:
		case <-over:
			return
		case <-ctx.Done():
			return
		}
	}
}

// fromGateway reports whether a packet's source is something that is reached by this gateway: it may not speak for others.
func (x *ipExchange) fromGateway(pkt []byte) bool {
	src, ok := source(pkt)
	if !ok {
		return false
	}
	route, err := x.c.sessions.Lookup(src.String(), policy.ICMP, 0)
	if err != nil {
		x.c.dropped.Add(1)
		return false
	}
	for _, n := range route.Gateways {
		if n == x.gateway {
			return true
		}
	}
	x.c.dropped.Add(1)
	return false
}
