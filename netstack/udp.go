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

// datagram is a payload that waits, or a run of them.
type datagram struct {
	b    []byte // what nobody has read yet
	size int    // of each in b, bytes, but for the last, which may be shorter
	buf  []byte // what b is part of
	pool *sync.Pool
}

func newUDPFlows(s *Stack) *udpFlows {
	u := &udpFlows{s: s, flows: map[udpKey]*UDPFlow{}}
	u.small.New = func() any { return &datagram{buf: make([]byte, smallDatagram), pool: &u.small} }
	u.large.New = func() any { return &datagram{buf: make([]byte, maxPacket), pool: &u.large} }
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

// receive takes an unfragmented datagram whose checksum is right; or a super-packet, where size is how long its datagrams are.
func (u *udpFlows) receive(b []byte, p packet, size int) {
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
		f.queue(t[udpHeaderLen:n], size)
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
		f.queue(v.AsSlice(), 0)
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

	readMu sync.Mutex // guards rest, and makes reads one at a time
	rest   *datagram  // a run that was read in part; nil: none

	endOnce sync.Once
	err     error // why it ended; read after done is closed
	done    chan struct{}
}

// queue takes a copy of a datagram from the app, or of a run of datagrams of size bytes; with size 0 it is one.
func (f *UDPFlow) queue(b []byte, size int) {
	if size == 0 || size > len(b) {
		size = len(b)
	}
	if f.queued.Add(int64(len(b))) > udpQueueBytes {
		f.drop(b, size)
		return
	}
	d := f.u.get(len(b))
	d.b, d.size = d.buf[:copy(d.buf, b)], size
	select {
	case f.in <- d:
		f.seen.Store(time.Now().UnixNano())
	default:
		f.drop(b, size)
		d.pool.Put(d)
	}
}

func (f *UDPFlow) drop(b []byte, size int) {
	f.queued.Add(-int64(len(b)))
	f.u.s.stats.udpQueueFull.Add(uint64(segments(len(b), size)))
}

// ReadPacket waits for a datagram of the app and copies its payload to p. A payload that is longer than p is cut, with
// io.ErrShortBuffer; 65507 bytes hold any. At the end of the flow the error is ErrIdle or net.ErrClosed.
func (f *UDPFlow) ReadPacket(p []byte) (int, error) {
	n, _, err := f.read(p, 1)
	return n, err
}

// ReadPackets waits for datagrams of the app that it sent as one run (UDP_SEGMENT), and copies as many whole ones as p holds to p: n
// bytes, in pieces of size, of which the last may be shorter. A run of one is an ordinary datagram. Otherwise it is as ReadPacket.
func (f *UDPFlow) ReadPackets(p []byte) (n, size int, err error) { return f.read(p, maxPacket) }

// read reads a run of at most most datagrams.
func (f *UDPFlow) read(p []byte, most int) (n, size int, err error) {
	f.readMu.Lock()
	defer f.readMu.Unlock()
	d := f.rest
	if d == nil {
		select {
		case d = <-f.in:
		default:
			select {
			case d = <-f.in:
			case <-f.done:
				return 0, 0, f.err
			}
		}
	}
	size = min(d.size, len(d.b))
	take := size
	if size > 0 {
		take = min(len(d.b), size*max(1, min(most, len(p)/size)))
	}
	if n = copy(p, d.b[:take]); n < take {
		err = io.ErrShortBuffer
	}
	f.queued.Add(-int64(take))
	if d.b = d.b[take:]; len(d.b) > 0 {
		f.rest = d
	} else {
		f.rest = nil
		d.pool.Put(d)
	}
	return n, size, err
}

// WritePacket sends a datagram to the app, from Dst, in fragments where it is larger than the MTU.
func (f *UDPFlow) WritePacket(p []byte) error { return f.WritePackets(p, max(1, len(p))) }

// WritePackets sends datagrams of size bytes, of which the last may be shorter, to the app: at once where the device takes that, else
// one by one.
func (f *UDPFlow) WritePackets(p []byte, size int) error {
	select {
	case <-f.done:
		return f.err
	default:
	}
	if min(size, len(p)) > maxDatagram || size <= 0 {
		return fmt.Errorf("%d bytes in datagrams of %d: %w", len(p), size, syscall.EMSGSIZE)
	}
	f.seen.Store(time.Now().UnixNano())
	f.both.Store(true)
	ip := ipv4HeaderLen
	if f.Src.Addr().Is6() {
		ip = ipv6HeaderLen
	}
	fits := ip+udpHeaderLen+min(size, len(p)) <= f.u.s.dev.MTU()
	run := size // bytes sent in one piece
	if fits && f.u.s.link.udpSegments {
		run *= min(maxSegments, maxDatagram/size)
	}
	for {
		piece := p[:min(run, len(p))]
		p = p[len(piece):]
		var err error
		if fits {
			err = f.u.s.link.writeUDP(f, piece, size)
		} else {
			err = f.writeFragments(piece)
		}
		if err != nil || len(p) == 0 {
			return err
		}
	}
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
