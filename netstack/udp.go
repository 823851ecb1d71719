package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// udpQueueLen and udpQueueBytes bound what waits in a flow for its handler; more is dropped, newest first.
	udpQueueLen   = 512
	udpQueueBytes = 1 << 20

	// smallDatagram is the size of the buffers that most datagrams fit, bytes.
	smallDatagram = 2048

	maxDatagram = maxPacket - ipv4HeaderLen - udpHeaderLen

	portDNS = 53
)

// ErrIdle is what ReadPacket returns when an association has seen no packet for its idle time.
var ErrIdle = errors.New("netstack: UDP flow idle")

type udpKey struct{ src, dst netip.AddrPort }

// udpFlows are the associations.
type udpFlows struct {
	s            *Stack
	ctx          context.Context
	small, large sync.Pool // of *datagram

	mu      sync.Mutex // guards what follows
	stopped bool
	flows   map[udpKey]*UDPFlow
}

// datagram is a payload that waits.
type datagram struct {
	b    []byte
	pool *sync.Pool
}

func newUDPFlows(s *Stack) *udpFlows {
	u := &udpFlows{s: s, flows: map[udpKey]*UDPFlow{}}
	u.small.New = func() any { return &datagram{make([]byte, 0, smallDatagram), &u.small} }
	u.large.New = func() any { return &datagram{make([]byte, 0, maxPacket), &u.large} }
	return u
}

func (u *udpFlows) start(ctx context.Context) { u.ctx = ctx }

// stop ends every flow and lets no more in.
func (u *udpFlows) stop() {
	u.mu.Lock()
	u.stopped = true
	flows := make([]*UDPFlow, 0, len(u.flows))
	for _, f := range u.flows {
		flows = append(flows, f)
	}
	u.mu.Unlock()
	for _, f := range flows {
		f.end(net.ErrClosed)
	}
}

// receive takes an unfragmented datagram whose checksum is right.
func (u *udpFlows) receive(b []byte, p packet) {
	t := b[p.l4:p.len]
	if len(t) < udpHeaderLen {
		u.s.stats.malformed.Add(1)
		return
	}
	n := int(binary.BigEndian.Uint16(t[4:]))
	if n < udpHeaderLen || n > len(t) {
		u.s.stats.malformed.Add(1)
		return
	}
	f := u.flow(udpKey{
		netip.AddrPortFrom(p.src, binary.BigEndian.Uint16(t)),
		netip.AddrPortFrom(p.dst, binary.BigEndian.Uint16(t[2:])),
	}, b, nil)
	if f != nil {
		f.queue(t[udpHeaderLen:n])
	}
}

// handleReassembled takes a datagram that came in fragments.
func (u *udpFlows) handleReassembled(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	// Reassembly has joined parts whose checksum nobody has verified, whatever the link says.
	net := pkt.Network()
	lengthOK, sumOK := header.UDPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()),
		pkt.NetworkProtocolNumber, net.SourceAddress(), net.DestinationAddress(), false)
	if !lengthOK || !sumOK {
		u.s.stats.badChecksum.Add(1)
		return true
	}
	f := u.flow(udpKey{
		netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort),
		netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort),
	}, pkt.NetworkHeader().Slice(), h)
	if f != nil {
		v := pkt.Data().AsRange().ToView()
		f.queue(v.AsSlice())
		v.Release()
	}
	return true
}

// flow returns the flow of k, which it begins where there is none, or nil where there is no room. q1 and q2 are the start
// of its first packet.
func (u *udpFlows) flow(k udpKey, q1, q2 []byte) *UDPFlow {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.flows[k]; f != nil {
		return f
	}
	if u.stopped {
		return nil
	}
	if len(u.flows) >= u.s.cfg.UDPFlows {
		u.s.stats.udpOverLimit.Add(1)
		return nil
	}
	f := &UDPFlow{
		Src: k.src, Dst: k.dst, u: u,
		in: make(chan *datagram, udpQueueLen), done: make(chan struct{}),
	}
	f.first.set(q1, q2)
	f.seen.Store(time.Now().UnixNano())
	u.flows[k] = f
	u.s.stats.udpFlowsTotal.Add(1)
	u.s.stats.udpFlows.Add(1)
	u.s.handlers.Add(1)
	go u.serve(f)
	return f
}

func (u *udpFlows) serve(f *UDPFlow) {
	defer u.s.handlers.Done()
	defer u.s.stats.udpFlows.Add(-1)
	if h := u.s.cfg.HandleUDP; h != nil {
		h(u.ctx, f)
	} else {
		f.Reject(Refused)
	}
	f.end(net.ErrClosed)
}

// sweep ends idle flows.
func (u *udpFlows) sweep(now time.Time) {
	var idle []*UDPFlow
	u.mu.Lock()
	for _, f := range u.flows {
		if now.UnixNano()-f.seen.Load() > int64(f.idleTime()) {
			idle = append(idle, f)
		}
	}
	u.mu.Unlock()
	for _, f := range idle {
		f.end(ErrIdle)
	}
}

func (u *udpFlows) get(n int) *datagram {
	pool := &u.small
	if n > smallDatagram {
		pool = &u.large
	}
	return pool.Get().(*datagram)
}

// UDPFlow is the datagrams between a source and a destination. It ends when its handler returns, when it is idle, or with
// the stack. Methods may be called concurrently.
type UDPFlow struct {
	Src, Dst netip.AddrPort // of the app, and where it sends to

	u      *udpFlows
	in     chan *datagram
	queued atomic.Int64 // bytes in in
	seen   atomic.Int64 // when the last datagram passed, unix ns
	both   atomic.Bool  // whether they passed in both directions
	first  quote

	endOnce sync.Once
	err     error // why it ended; read after done is closed
	done    chan struct{}
}

// queue takes a copy of a datagram from the app.
func (f *UDPFlow) queue(b []byte) {
	if f.queued.Add(int64(len(b))) > udpQueueBytes {
		f.drop(b)
		return
	}
	d := f.u.get(len(b))
	d.b = append(d.b[:0], b...)
	select {
	case f.in <- d:
		f.seen.Store(time.Now().UnixNano())
	default:
		f.drop(b)
		d.pool.Put(d)
	}
}

func (f *UDPFlow) drop(b []byte) {
	f.queued.Add(-int64(len(b)))
	f.u.s.stats.udpQueueFull.Add(1)
}

// ReadPacket waits for a datagram of the app and copies its payload to p. A payload that is longer than p is cut, with
// io.ErrShortBuffer; 65507 bytes hold any. At the end of the flow the error is ErrIdle or net.ErrClosed.
func (f *UDPFlow) ReadPacket(p []byte) (int, error) {
	var d *datagram
	select {
	case d = <-f.in:
	default:
		select {
		case d = <-f.in:
		case <-f.done:
			return 0, f.err
		}
	}
	f.queued.Add(-int64(len(d.b)))
	n := copy(p, d.b)
	var err error
	if n < len(d.b) {
		err = io.ErrShortBuffer
	}
	d.pool.Put(d)
	return n, err
}

// WritePacket sends a datagram to the app, from Dst, in fragments where it is larger than the MTU.
func (f *UDPFlow) WritePacket(p []byte) error {
	select {
	case <-f.done:
		return f.err
	default:
	}
	if len(p) > maxDatagram {
		return fmt.Errorf("datagram of %d bytes: %w", len(p), syscall.EMSGSIZE)
	}
	f.seen.Store(time.Now().UnixNano())
	f.both.Store(true)
	ip := ipv4HeaderLen
	if f.Src.Addr().Is6() {
		ip = ipv6HeaderLen
	}
	if ip+udpHeaderLen+len(p) <= f.u.s.dev.MTU() {
		return f.u.s.link.writeUDP(f, p)
	}
	return f.writeFragments(p)
}

// writeFragments sends a datagram through the gVisor stack, which cuts it up.
func (f *UDPFlow) writeFragments(p []byte) error {
	proto := header.IPv4ProtocolNumber
	if f.Src.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	r, terr := f.u.s.gv.FindRoute(nicID, tcpip.AddrFromSlice(f.Dst.Addr().AsSlice()), tcpip.AddrFromSlice(f.Src.Addr().AsSlice()), proto, false)
	if terr != nil {
		return fmt.Errorf("route to %v: %w", f.Src, goError(terr))
	}
	defer r.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(r.MaxHeaderLength()) + udpHeaderLen,
		Payload:            buffer.MakeWithData(p),
	})
	defer pkt.DecRef()
	h := header.UDP(pkt.TransportHeader().Push(udpHeaderLen))
	n := udpHeaderLen + len(p)
	h.Encode(&header.UDPFields{SrcPort: f.Dst.Port(), DstPort: f.Src.Port(), Length: uint16(n)})
	h.SetChecksum(udpChecksum(pseudoHeader(f.Dst.Addr(), f.Src.Addr(), protoUDP, n), h[:udpChecksumOffset], p))
	pkt.TransportProtocolNumber = header.UDPProtocolNumber
	if terr := r.WritePacket(stack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: defaultTTL}, pkt); terr != nil {
		return fmt.Errorf("write to %v: %w", f.Src, goError(terr))
	}
	return nil
}

// udpChecksum is the checksum field for a header up to that field, whose length is even, and a payload.
func udpChecksum(pseudo uint16, h, payload []byte) uint16 {
	sum := ^checksum.Checksum(payload, checksum.Checksum(h, pseudo))
	if sum == 0 {
		return 0xffff // zero says that there is none (RFC 768)
	}
	return sum
}

// Reject tells the app why its datagrams go nowhere, by an ICMP error about the first one, and ends the flow.
func (f *UDPFlow) Reject(r Reason) {
	select {
	case <-f.done:
		return
	default:
	}
	f.u.s.stats.udpRejected.Add(1)
	_ = f.u.s.Reject(f.first.b[:f.first.n], r) // counted, and the app asks again
	f.end(net.ErrClosed)
}

// Close ends the flow: ReadPacket returns, and the next datagram of the app begins another flow.
func (f *UDPFlow) Close() error {
	f.end(net.ErrClosed)
	return nil
}

func (f *UDPFlow) end(err error) {
	f.endOnce.Do(func() {
		f.err = err
		f.u.mu.Lock()
		delete(f.u.flows, udpKey{f.Src, f.Dst})
		f.u.mu.Unlock()
		close(f.done)
	})
}

// idleTime is how long the flow may be without a packet.
func (f *UDPFlow) idleTime() time.Duration {
	c := &f.u.s.cfg
	switch {
	case !f.both.Load():
		return c.UDPIdle
	case f.Dst.Port() == portDNS:
		return min(dnsIdle, c.UDPAssuredIdle)
	}
	return c.UDPAssuredIdle
}
