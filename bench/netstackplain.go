package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	wgtun "golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sallyway/tunnel"
)

// The usual construction of a userspace stack behind a TUN: wireguard/tun reads and writes vectors of packets (it splits what
// the kernel kept together, and joins what it can), and each packet goes through gVisor's channel endpoint by itself. TCP is
// set as in our own netstack, so that the way of the packets is what differs.

const (
	plainQueue  = 1024    // packets that wait to be written to the TUN
	plainBuffer = 1 << 20 // bytes, of TCP; gVisor's largest is 8 MiB in both constructions
	plainMax    = 8 << 20
	plainNIC    = 1
	plainPacket = 65535
	plainHeader = 10 // bytes of virtio_net_hdr, which wireguard/tun writes in front of a packet
)

// plainStack is the construction.
type plainStack struct {
	dev  wgtun.Device
	ep   *channel.Endpoint
	st   *stack.Stack
	dial func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error)
}

// newPlainStack makes a TUN named name in the process's network namespace, and a stack on it that gives TCP connections to
// what dial connects to.
func newPlainStack(name string, mtu int, dial func(context.Context, netip.AddrPort) (*net.TCPConn, error)) (*plainStack, error) {
	dev, err := wgtun.CreateTUN(name, mtu)
	if err != nil {
		return nil, err
	}
	p := &plainStack{dev: dev, ep: channel.New(plainQueue, uint32(mtu), ""), dial: dial}
	p.st = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := p.set(); err != nil {
		p.close()
		return nil, fmt.Errorf("plain stack: %w", err)
	}
	return p, nil
}

func (p *plainStack) set() error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	recovery, cubic := tcpip.TCPRecovery(0), tcpip.CongestionControlOption("cubic")
	for _, opt := range []tcpip.SettableTransportProtocolOption{
		&sack, &moderate, &recovery, &cubic,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: plainBuffer, Max: plainMax},
		&tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: plainBuffer, Max: plainMax},
	} {
		if err := p.st.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("set %T: %s", opt, err)
		}
	}
	if err := p.st.CreateNIC(plainNIC, p.ep); err != nil {
		return errors.New(err.String())
	}
	if err := p.st.SetPromiscuousMode(plainNIC, true); err != nil {
		return errors.New(err.String())
	}
	if err := p.st.SetSpoofing(plainNIC, true); err != nil {
		return errors.New(err.String())
	}
	p.st.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: plainNIC}})
	return nil
}

func (p *plainStack) close() {
	p.ep.Close()
	_ = p.dev.Close() // a TUN that goes with the process
	p.st.Destroy()
}

// run moves packets until ctx ends, or until the TUN fails.
func (p *plainStack) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	p.st.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(p.st, 0, plainQueue, func(r *tcp.ForwarderRequest) { p.serve(ctx, r) }).HandlePacket)
	writes := make(chan struct{})
	go func() {
		defer close(writes)
		cancel(p.write(ctx))
	}()
	reads := make(chan struct{})
	go func() {
		defer close(reads)
		cancel(p.read())
	}()
	<-ctx.Done()
	p.close()
	<-writes
	<-reads
	return ignoreEnd(ctx, context.Cause(ctx))
}

// read injects each packet of the host.
func (p *plainStack) read() error {
	n := p.dev.BatchSize()
	bufs, sizes := make([][]byte, n), make([]int, n)
	for i := range bufs {
		bufs[i] = make([]byte, plainPacket)
	}
	for {
		n, err := p.dev.Read(bufs, sizes, 0)
		if err != nil && !errors.Is(err, wgtun.ErrTooManySegments) {
			return err
		}
		for i := range n {
			if b := bufs[i][:sizes[i]]; len(b) > 0 && b[0]>>4 == header.IPv4Version {
				pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
				p.ep.InjectInbound(header.IPv4ProtocolNumber, pkt)
				pkt.DecRef()
			}
		}
	}
}

// write hands the host what has queued, as a vector.
func (p *plainStack) write(ctx context.Context) error {
	room := make([][]byte, p.dev.BatchSize())
	for i := range room {
		room[i] = make([]byte, plainHeader+plainPacket)
	}
	bufs := make([][]byte, 0, len(room))
	for {
		pkt := p.ep.ReadContext(ctx)
		if pkt == nil {
			return ctx.Err()
		}
		bufs = bufs[:0]
		for pkt != nil {
			b, n := room[len(bufs)], plainHeader
			for _, part := range pkt.AsSlices() {
				n += copy(b[n:], part)
			}
			pkt.DecRef()
			bufs = append(bufs, b[:n])
			if pkt = nil; len(bufs) < len(room) {
				pkt = p.ep.Read()
			}
		}
		if _, err := p.dev.Write(bufs, plainHeader); err != nil && ctx.Err() != nil {
			return err
		}
	}
}

// serve connects and splices; each request has its goroutine (tcp.Forwarder).
func (p *plainStack) serve(ctx context.Context, r *tcp.ForwarderRequest) {
	id := r.ID()
	to, _ := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	up, err := p.dial(ctx, netip.AddrPortFrom(to, id.LocalPort))
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, gerr := r.CreateEndpoint(&wq)
	if gerr != nil {
		r.Complete(true)
		_ = up.Close()
		return
	}
	r.Complete(false)
	_ = tunnel.Splice(ctx, tunnel.NewConnFlow(gonet.NewTCPConn(&wq, ep)), tunnel.NewConnFlow(up)) // both ends hear of it
}
