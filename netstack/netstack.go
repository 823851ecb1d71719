// Package netstack turns IP packets into flows and back on a userspace TCP/IP stack (gVisor, imported only here). It knows
// no roles: handlers say what a flow is connected to.
//
// Packets come from a Device (a TUN, super-packets with offloads where it has a vnet header) or from a PacketConn (IP
// packets one by one, such as a CONNECT-IP session). Any destination is accepted:
//
//	TCP     HandleTCP gets each connection before its handshake: it dials, then Accepts or Rejects with what it met
//	UDP     HandleUDP gets each association of a source with a destination, and whole datagrams
//	echo    to the stack's own addresses is answered here
//	others  HandlePacket gets the raw packet: echo to other addresses, ICMP errors of such flows, other IP protocols
//
//	s, err := netstack.New(netstack.Config{
//		Device: dev,
//		HandleTCP: func(ctx context.Context, r *netstack.TCPRequest) {
//			up, err := dial(ctx, r.Dst)
//			if err != nil {
//				r.Reject(netstack.Refused)
//				return
//			}
//			down, err := r.Accept()
//			…
//		},
//	})
//	err = s.Run(ctx)
//
// Multicast, broadcast, and neighbour discovery do not pass: there is no link behind a tunnel.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// Device carries the packets of a host. Each is preceded by HeaderLen bytes: a struct virtio_net_hdr where that is 10,
// nothing where it is 0. Read is called by one goroutine, WriteParts by many; WriteParts keeps none of its argument. A waiting
// Read must end by SetReadDeadline or by Close, where the device has these methods. Where it has EnableUDPSegments() bool, and that
// returns true, packets may be UDP super-packets, both ways.
type Device interface {
	Read(p []byte) (int, error)
	WriteParts(parts [][]byte) (int, error)
	HeaderLen() int
	MTU() int
}

// PacketConn carries IP packets one by one; *connectip.Conn is one. WritePacket may return an ICMP packet for the sender
// of what it could not take. It is not called concurrently, and keeps none of its argument. Close ends a waiting ReadPacket.
type PacketConn interface {
	ReadPacket(p []byte) (int, error)
	WritePacket(p []byte) (icmp []byte, err error)
	Close() error
}

// Defaults and bounds of Config.
const (
	// DefaultDialsPerDestination is many for one program and few enough that one dead host leaves room for others.
	DefaultDialsPerDestination = 64
	// DefaultDials bounds dials in flight in all: each holds a SYN and whatever the dialler holds.
	DefaultDials = 2048
	// DefaultTCPFlows bounds open TCP flows: about 10 KiB each when idle.
	DefaultTCPFlows = 32768
	// DefaultUDPFlows bounds UDP associations.
	DefaultUDPFlows = 16384
	// DefaultUDPIdle is how long an association lives that saw packets in one direction only (RFC 4787 REQ-5: at least 2 min).
	DefaultUDPIdle = 2 * time.Minute
	// DefaultUDPAssuredIdle is the same for one that saw both directions (RFC 4787 REQ-5: 5 min recommended).
	DefaultUDPAssuredIdle = 5 * time.Minute

	// dnsIdle is the idle time of associations with port 53, of which a resolver makes one per question (RFC 4787 REQ-5a
	// allows less for well-known ports).
	dnsIdle = 30 * time.Second

	// tcpBufDefault and tcpBufMax are the buffers of a TCP flow in bytes, each direction; the stack tunes between them.
	tcpBufMin     = 4 << 10
	tcpBufDefault = 1 << 20
	tcpBufMax     = 8 << 20

	// tcpTimeWait is short because the other end is a memory copy away: no old segment is under way longer.
	tcpTimeWait = 5 * time.Second

	defaultTTL = 64
	nicID      = 1
)

// Config says where packets come from and what becomes of flows. Exactly one of Device and Conn is set.
type Config struct {
	Device Device
	Conn   PacketConn
	MTU    int // of Conn, bytes; 1280 where 0. A Device knows its own.

	// Sources says which source addresses are accepted; nil accepts all. Called for every packet.
	Sources func(netip.Addr) bool

	// HandleTCP decides about a connection; it runs on its own goroutine and returns when the flow is over. Nil refuses all.
	// ctx ends when Run does.
	HandleTCP func(ctx context.Context, r *TCPRequest)
	// HandleUDP serves an association; it runs on its own goroutine, and the flow ends when it returns. Nil refuses all.
	HandleUDP func(ctx context.Context, f *UDPFlow)
	// HandlePacket gets every packet that is neither TCP nor UDP nor for the stack itself, checksum complete. It runs on the
	// reading goroutine, so it must not block, and pkt is valid only until it returns. Nil drops them.
	HandlePacket func(pkt []byte)

	DialsPerDestination int // connections to one address that are not decided yet; SYNs beyond are dropped, and come again
	Dials               int // the same for all addresses together
	TCPFlows            int // open TCP flows; SYNs beyond are dropped
	UDPFlows            int // UDP associations; datagrams of more are dropped
	UDPIdle             time.Duration
	UDPAssuredIdle      time.Duration
}

func (c Config) withDefaults() Config {
	def := func(p *int, d int) {
		if *p == 0 {
			*p = d
		}
	}
	def(&c.MTU, header.IPv6MinimumMTU)
	def(&c.DialsPerDestination, DefaultDialsPerDestination)
	def(&c.Dials, DefaultDials)
	def(&c.TCPFlows, DefaultTCPFlows)
	def(&c.UDPFlows, DefaultUDPFlows)
	if c.UDPIdle == 0 {
		c.UDPIdle = DefaultUDPIdle
	}
	if c.UDPAssuredIdle == 0 {
		c.UDPAssuredIdle = DefaultUDPAssuredIdle
	}
	return c
}

// Validate says what is wrong with c, after defaults.
func (c Config) Validate() error {
	c = c.withDefaults()
	if (c.Device == nil) == (c.Conn == nil) {
		return errors.New("netstack: exactly one of Device and Conn")
	}
	mtu := c.MTU
	if c.Device != nil {
		mtu = c.Device.MTU()
		if n := c.Device.HeaderLen(); n != 0 && n != vnetHeaderLen {
			return fmt.Errorf("netstack: a device header of %d bytes: must be 0 or %d", n, vnetHeaderLen)
		}
	}
	if mtu < header.IPv6MinimumMTU || mtu > maxPacket {
		return fmt.Errorf("netstack: MTU %d: must be from %d to %d", mtu, header.IPv6MinimumMTU, maxPacket)
	}
	for _, n := range []int{c.DialsPerDestination, c.Dials, c.TCPFlows, c.UDPFlows, int(c.UDPIdle), int(c.UDPAssuredIdle)} {
		if n < 0 {
			return errors.New("netstack: limits must not be negative")
		}
	}
	return nil
}

// Stack is a userspace TCP/IP stack. Its methods may be called concurrently.
type Stack struct {
	cfg   Config
	dev   Device
	link  *link
	tcp   *tcpFlows
	udp   *udpFlows
	own   atomic.Pointer[[]netip.Addr]
	stats counters

	handlers sync.WaitGroup // HandleTCP and HandleUDP
	gv       *stack.Stack   // set by Run before packets flow

	closeOnce sync.Once
	closed    chan struct{} // closed by Close
	started   atomic.Bool
	done      chan struct{} // closed when Run has returned
}

// New returns a stack that does nothing yet.
func New(c Config) (*Stack, error) {
	c = c.withDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s := &Stack{cfg: c, dev: c.Device, closed: make(chan struct{}), done: make(chan struct{})}
	s.link = newLink(s)
	if d, ok := s.dev.(interface{ EnableUDPSegments() bool }); ok {
		s.link.udpSegments = d.EnableUDPSegments()
	}
	if s.dev == nil {
		s.dev = newConnDevice(c.Conn, c.MTU, s.link)
	}
	s.own.Store(new([]netip.Addr))
	s.tcp = newTCPFlows(s)
	s.udp = newUDPFlows(s)
	return s, nil
}

// SetAddresses makes addrs the stack's own addresses, whose echo requests it answers. They are also the sources of its ICMP
// errors. It may be called before and during Run.
func (s *Stack) SetAddresses(addrs []netip.Addr) {
	as := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		as = append(as, a.Unmap().WithZone(""))
	}
	s.own.Store(&as)
}

func (s *Stack) isOwn(a netip.Addr) bool { return slices.Contains(*s.own.Load(), a) }

// errorSource is the source address of an ICMP error about a packet to dst: an address of ours, else dst itself.
func (s *Stack) errorSource(dst netip.Addr) netip.Addr {
	for _, a := range *s.own.Load() {
		if a.Is4() == dst.Is4() {
			return a
		}
	}
	return dst
}

// Run reads packets until ctx ends or Close is called, or until the device fails, whose error it returns; then it resets every connection, ends every
// association, and waits for their handlers. A waiting Read is ended by SetReadDeadline where the device has that (and the
// device stays open), else by its Close. It may be called once.
func (s *Stack) Run(ctx context.Context) error {
	if s.started.Swap(true) {
		return errors.New("netstack: run twice")
	}
	defer close(s.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var err error
	if s.gv, err = s.newGVisor(); err != nil {
		return err
	}
	s.tcp.start(ctx)
	s.udp.start(ctx)
	read := make(chan error, 1)
	go func() { read <- s.link.readLoop(ctx) }()
	swept := make(chan struct{})
	go func() {
		defer close(swept)
		s.sweep(ctx)
	}()

	reading := true
	select {
	case <-ctx.Done():
	case <-s.closed:
	case err = <-read:
		reading = false
	}
	cancel()
	if reading {
		interrupt(s.dev)
		<-read //nolint:errcheck // the interruption
		resume(s.dev)
	}
	s.tcp.stop()
	s.udp.stop()
	s.gv.Close() // resets what is open, so that blocked handlers return
	s.handlers.Wait()
	<-swept
	s.gv.Wait()
	return err
}

// interrupt makes a waiting Read return: by a deadline where the device has one, else by closing it.
func interrupt(dev any) {
	switch d := dev.(type) {
	case interface{ SetReadDeadline(time.Time) error }:
		_ = d.SetReadDeadline(time.Unix(1, 0))
	case io.Closer:
		_ = d.Close()
	}
}

// resume takes the deadline back, so that another stack may read the device.
func resume(dev any) {
	if d, ok := dev.(interface{ SetReadDeadline(time.Time) error }); ok {
		_ = d.SetReadDeadline(time.Time{})
	}
}

// Close ends Run and waits for it.
func (s *Stack) Close() error {
	s.closeOnce.Do(func() { close(s.closed) })
	if s.started.Load() {
		<-s.done
	}
	return nil
}

// Inject writes a raw IP packet, checksums complete, to the device.
func (s *Stack) Inject(pkt []byte) error {
	p, err := parsePacket(pkt)
	if err != nil {
		return err
	}
	if p.len != len(pkt) {
		return fmt.Errorf("inject: %d bytes with a length of %d: %w", len(pkt), p.len, errMalformed)
	}
	s.stats.injected.Add(1)
	return s.link.writeRaw(pkt)
}

// Reject tells the sender of a raw packet, such as HandlePacket gets, of r by an ICMP error. Where there must be none about
// the packet (see AppendUnreachable) it does nothing.
func (s *Stack) Reject(pkt []byte, r Reason) error {
	return s.sendError(pkt, func(b []byte, src netip.Addr) []byte { return AppendUnreachable(b, pkt, src, r) })
}

// RejectTooBig tells the sender of a raw packet that only mtu bytes pass (see AppendTooBig).
func (s *Stack) RejectTooBig(pkt []byte, mtu int) error {
	return s.sendError(pkt, func(b []byte, src netip.Addr) []byte { return AppendTooBig(b, pkt, src, mtu) })
}

func (s *Stack) sendError(pkt []byte, build func(b []byte, src netip.Addr) []byte) error {
	p, err := parseQuoted(pkt)
	if err != nil {
		return err
	}
	o := s.link.outbox()
	o.scratch = build(o.scratch[:0], s.errorSource(p.dst))
	if len(o.scratch) == 0 {
		s.link.outboxes.Put(o)
		return nil
	}
	return s.link.write(o, vnetHeader{}, o.scratch)
}

// newGVisor returns the stack below: one interface that takes every packet and sends from every address.
func (s *Stack) newGVisor() (*stack.Stack, error) {
	gv := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	fail := func(what string, err tcpip.Error) (*stack.Stack, error) {
		gv.Destroy()
		return nil, fmt.Errorf("netstack: %s: %s", what, err)
	}
	sack := tcpip.TCPSACKEnabled(true)
	// Without RACK: it made no difference to measure on this path, which hardly loses, and its timers have more to go wrong.
	recovery := tcpip.TCPRecovery(0)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	cubic := tcpip.CongestionControlOption("cubic")
	wait := tcpip.TCPTimeWaitTimeoutOption(tcpTimeWait)
	for _, opt := range []tcpip.SettableTransportProtocolOption{
		&sack, &recovery, &moderate, &cubic, &wait,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcpBufMin, Default: tcpBufDefault, Max: tcpBufMax},
		&tcpip.TCPSendBufferSizeRangeOption{Min: tcpBufMin, Default: tcpBufDefault, Max: tcpBufMax},
	} {
		if err := gv.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fail(fmt.Sprintf("set %T", opt), err)
		}
	}
	if err := gv.CreateNIC(nicID, s.link); err != nil {
		return fail("create interface", err)
	}
	if err := gv.SetPromiscuousMode(nicID, true); err != nil {
		return fail("promiscuous", err)
	}
	if err := gv.SetSpoofing(nicID, true); err != nil {
		return fail("spoofing", err)
	}
	gv.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	gv.SetTransportProtocolHandler(tcp.ProtocolNumber, s.tcp.handlePacket)
	gv.SetTransportProtocolHandler(udp.ProtocolNumber, s.udp.handleReassembled)
	s.tcp.attach(gv)
	return gv, nil
}

// sweepEvery is how exact idle times are.
const sweepEvery = time.Second

// sweep ends idle associations and forgets old silent rejections.
func (s *Stack) sweep(ctx context.Context) {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.udp.sweep(now)
			s.tcp.sweep(now)
		}
	}
}
