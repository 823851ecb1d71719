package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// gsoMaxSize is the largest TCP super-packet that the stack hands out, bytes: an IP packet with room for its headers.
	gsoMaxSize = 65435

	// maxReadErrors is how many reads in a row may fail before the device counts as broken.
	maxReadErrors = 100
)

// link is the gVisor stack's way to the device, and the sorting of what comes from it.
type link struct {
	s         *Stack
	headerLen int
	// udpSegments says that the device takes UDP super-packets.
	udpSegments bool
	outboxes    sync.Pool     // of *outbox
	lastID      atomic.Uint32 // of an IPv4 packet that may be fragmented

	dispatcher atomic.Pointer[stack.NetworkDispatcher]
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func newLink(s *Stack) *link {
	l := &link{s: s}
	if s.cfg.Device != nil {
		l.headerLen = s.cfg.Device.HeaderLen()
	}
	l.outboxes.New = func() any { return new(outbox) }
	return l
}

// readLoop reads packets until the device or ctx ends.
func (l *link) readLoop(ctx context.Context) error {
	buf := make([]byte, l.headerLen+maxPacket)
	failed := 0
	for {
		n, err := l.s.dev.Read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if failed++; failed == maxReadErrors || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
				return fmt.Errorf("netstack: %w", err)
			}
			continue
		}
		failed = 0
		l.receive(buf[:n])
	}
}

// receive takes one packet with its header; it keeps nothing of b.
func (l *link) receive(b []byte) {
	st := &l.s.stats
	if len(b) < l.headerLen {
		st.malformed.Add(1)
		return
	}
	var h vnetHeader
	if l.headerLen > 0 {
		h = parseVnet(b)
		b = b[l.headerLen:]
	}
	st.packetsIn.Add(1)
	st.bytesIn.Add(uint64(len(b)))
	p, err := parsePacket(b)
	if err != nil {
		st.malformed.Add(1)
		return
	}
	b = b[:p.len]
	if p.dst.IsMulticast() || p.dst.IsUnspecified() || p.src.IsMulticast() || p.src.IsUnspecified() ||
		p.dst == broadcast || p.dst.IsLoopback() || p.src.IsLoopback() {
		st.ignored.Add(1)
		return
	}
	if f := l.s.cfg.Sources; f != nil && !f(p.src) {
		st.badSource.Add(1)
		return
	}
	switch p.proto {
	case protoTCP:
		// Without a vnet header gVisor verifies the checksum itself.
		if l.headerLen > 0 && !p.fragment && !h.trusted() && !transportValid(b, p) {
			st.badChecksum.Add(1)
			return
		}
		l.inject(b)
	case protoUDP:
		if p.fragment {
			l.inject(b) // comes back whole, by udpFlows.handleReassembled
			return
		}
		if !h.trusted() && !transportValid(b, p) {
			st.badChecksum.Add(1)
			return
		}
		l.s.udp.receive(b, p, h.udpSegment())
	case protoICMP, protoICMPv6:
		l.receiveICMP(b, p, h)
	default:
		l.pass(b, h)
	}
}

// receiveICMP sorts ICMP: echo to us is answered, errors about TCP go to the stack, other messages to the handler.
func (l *link) receiveICMP(b []byte, p packet, h vnetHeader) {
	st := &l.s.stats
	if (p.proto == protoICMP) != p.src.Is4() || !p.rest && p.len-p.l4 < icmpHeaderLen {
		st.malformed.Add(1)
		return
	}
	if p.fragment {
		l.pass(b, h)
		return
	}
	switch kind := icmpKind(p, b[p.l4]); kind {
	case icmpEchoRequest:
		if !l.s.isOwn(p.dst) {
			l.pass(b, h)
			return
		}
		h.complete(b)
		e, err := ParseEcho(b)
		if err != nil {
			st.badChecksum.Add(1)
			return
		}
		st.echoed.Add(1)
		o := l.outbox()
		o.scratch = e.Answer().AppendPacket(o.scratch[:0])
		_ = l.write(o, vnetHeader{}, o.scratch)
	case icmpError:
		switch quoted, err := parseQuoted(b[p.l4+icmpHeaderLen:]); {
		case err != nil:
			st.malformed.Add(1)
		case quoted.proto == protoTCP:
			l.inject(b)
		case quoted.proto == protoUDP:
			st.ignored.Add(1) // the app has gone: its flow ends by itself
		default:
			l.pass(b, h)
		}
	case icmpNeighbour:
		st.ignored.Add(1)
	default:
		l.pass(b, h)
	}
}

// pass gives a packet to the handler.
func (l *link) pass(b []byte, h vnetHeader) {
	if !h.complete(b) {
		l.s.stats.malformed.Add(1)
		return
	}
	l.s.stats.passed.Add(1)
	if f := l.s.cfg.HandlePacket; f != nil {
		f(b)
	}
}

// inject gives a copy of a packet to the gVisor stack.
func (l *link) inject(b []byte) {
	d := l.dispatcher.Load()
	if d == nil {
		return
	}
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(buffer.NewViewWithData(b))})
	(*d).DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// outbox is the parts of a packet on their way out, reused.
type outbox struct {
	header  [vnetHeaderLen]byte
	parts   [][]byte
	scratch []byte // for packets built here
}

func (l *link) outbox() *outbox { return l.outboxes.Get().(*outbox) }

// write sends header and parts as one packet and takes o back.
func (l *link) write(o *outbox, h vnetHeader, parts ...[]byte) error {
	o.parts = o.parts[:0]
	if l.headerLen > 0 {
		h.put(o.header[:])
		o.parts = append(o.parts, o.header[:])
	}
	o.parts = append(o.parts, parts...)
	return l.send(o)
}

// send writes o.parts, counts, and takes o back.
func (l *link) send(o *outbox) error {
	n, err := l.s.dev.WriteParts(o.parts)
	clear(o.parts)
	l.outboxes.Put(o)
	if err != nil {
		l.s.stats.writeErrors.Add(1)
		return err
	}
	l.s.stats.packetsOut.Add(1)
	l.s.stats.bytesOut.Add(uint64(n - l.headerLen))
	return nil
}

// writeRaw sends a complete packet.
func (l *link) writeRaw(pkt []byte) error { return l.write(l.outbox(), vnetHeader{}, pkt) }

// WritePackets sends the stack's packets. One that the device does not take is lost, as on a wire.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	n := 0
	for _, pkt := range pkts.AsSlice() {
		o := l.outbox()
		o.parts = o.parts[:0]
		if l.headerLen > 0 {
			vnetOf(pkt).put(o.header[:])
			o.parts = append(o.parts, o.header[:])
		}
		views, offset := pkt.AsViewList()
		for v := views.Front(); v != nil; v = v.Next() {
			b := v.AsSlice()
			if offset >= len(b) {
				offset -= len(b)
				continue
			}
			o.parts = append(o.parts, b[offset:])
			offset = 0
		}
		_ = l.send(o)
		n++
	}
	return n, nil
}

// vnetOf is the header of a packet of the stack: its TCP segments come with a partial checksum and up to gsoMaxSize.
func vnetOf(pkt *stack.PacketBuffer) vnetHeader {
	g := pkt.GSOOptions
	if g.Type == stack.GSONone || !g.NeedsCsum {
		return vnetHeader{}
	}
	h := vnetHeader{flags: vnetNeedsCsum, hdrLen: uint16(pkt.HeaderSize()), csumOffset: g.CsumOffset}
	h.csumStart = uint16(len(pkt.NetworkHeader().Slice()))
	if pkt.Data().Size() > int(g.MSS) {
		h.gsoSize = g.MSS
		if g.Type == stack.GSOTCPv4 {
			h.gsoType = vnetGSOTCPv4
		} else {
			h.gsoType = vnetGSOTCPv6
		}
	}
	return h
}

// MTU is that of the device.
func (l *link) MTU() uint32 { return uint32(l.s.dev.MTU()) }

// Capabilities: with a vnet header the kernel has verified checksums, or we have (receive), and completes those of TCP.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if l.headerLen > 0 {
		return stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityNone
}

// SupportedGSO says that the device takes super-packets, where it does.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.headerLen > 0 {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// GSOMaxSize is the size of those, bytes.
func (l *link) GSOMaxSize() uint32 { return gsoMaxSize }

// Attach is how the stack says where packets go; nil takes it away.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

// IsAttached reports whether Attach has been called.
func (l *link) IsAttached() bool { return l.dispatcher.Load() != nil }

// What follows has no meaning without a link layer.

func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}

// connDevice makes a PacketConn a Device.
type connDevice struct {
	conn PacketConn
	mtu  int
	link *link

	mu  sync.Mutex // guards buf, and makes writes one at a time
	buf []byte
}

func newConnDevice(c PacketConn, mtu int, l *link) *connDevice {
	return &connDevice{conn: c, mtu: mtu, link: l, buf: make([]byte, 0, maxPacket)}
}

func (d *connDevice) Read(p []byte) (int, error) { return d.conn.ReadPacket(p) }
func (d *connDevice) HeaderLen() int             { return 0 }
func (d *connDevice) MTU() int                   { return d.mtu }

func (d *connDevice) WriteParts(parts [][]byte) (int, error) {
	d.mu.Lock()
	d.buf = d.buf[:0]
	for _, p := range parts {
		d.buf = append(d.buf, p...)
	}
	n := len(d.buf)
	icmp, err := d.conn.WritePacket(d.buf)
	d.mu.Unlock()
	if len(icmp) > 0 {
		// About a packet of ours, so it is for the stack: TCP then sends smaller ones.
		if p, err := parsePacket(icmp); err == nil && p.len == len(icmp) {
			d.link.injectLater(icmp)
		}
	}
	return n, err
}

// injectLater gives a packet to the stack from a goroutine of its own: the caller may hold the stack's locks.
func (l *link) injectLater(b []byte) { go l.inject(b) }

// Close ends a waiting Read.
func (d *connDevice) Close() error { return d.conn.Close() }

// quoteLen is how much of a packet an ICMP error of ours quotes, bytes: headers and what identifies the flow.
const quoteLen = 128

// quote is the start of a packet that an ICMP error may have to be sent about.
type quote struct {
	n int
	b [quoteLen]byte
}

func (q *quote) set(parts ...[]byte) {
	q.n = 0
	for _, p := range parts {
		q.n += copy(q.b[q.n:], p)
	}
}
