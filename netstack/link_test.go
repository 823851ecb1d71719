package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// fakeDevice is a device whose packets come from a channel and go into another.
type fakeDevice struct {
	header   int
	in, out  chan []byte
	once     sync.Once
	closed   chan struct{}
	discards bool // writes
}

func newFakeDevice(header int) *fakeDevice {
	return &fakeDevice{header: header, in: make(chan []byte, 10), out: make(chan []byte, 10), closed: make(chan struct{})}
}

func (d *fakeDevice) Read(p []byte) (int, error) {
	select {
	case b := <-d.in:
		return copy(p, b), nil
	case <-d.closed:
		return 0, net.ErrClosed
	}
}

func (d *fakeDevice) WriteParts(parts [][]byte) (int, error) {
	if d.discards {
		n := 0
		for _, p := range parts {
			n += len(p)
		}
		return n, nil
	}
	b := bytes.Join(parts, nil)
	select {
	case d.out <- b:
		return len(b), nil
	case <-d.closed:
		return 0, net.ErrClosed
	}
}

func (d *fakeDevice) HeaderLen() int { return d.header }
func (d *fakeDevice) MTU() int       { return 1500 }
func (d *fakeDevice) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

// start runs a stack until the test ends.
func start(t *testing.T, c Config) *Stack {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	return s
}

var (
	app4, dst4 = netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.99.0.1")
	app6, dst6 = netip.MustParseAddr("fd77::1"), netip.MustParseAddr("fd99::1")
)

// udpPacket is a datagram with a right checksum.
func udpPacket(src, dst netip.Addr, sport, dport uint16, payload []byte) []byte {
	n := udpHeaderLen + len(payload)
	b := appendIP(nil, src, dst, protoUDP, 64, n)
	l4 := len(b)
	b = binary.BigEndian.AppendUint16(b, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = binary.BigEndian.AppendUint16(b, udpChecksum(pseudoHeader(src, dst, protoUDP, n), b[l4:], payload))
	return append(b, payload...)
}

func TestSorting(t *testing.T) {
	own := netip.MustParseAddr("10.98.0.1")
	damaged := udpPacket(app4, dst4, 1, 2, []byte("x"))
	damaged[28] ^= 1
	multicast := udpPacket(app4, netip.MustParseAddr("224.0.0.251"), 1, 2, []byte("x"))
	gre := append(appendIP(nil, app4, dst4, 47, 64, 4), 0, 0, 8, 0)
	echo := Echo{Src: app4, Dst: dst4, ID: 1, Seq: 1}.AppendPacket(nil)
	echoFrag := slices.Clone(echo)
	echoFrag[6] = 0x20
	neighbour := appendIP(nil, app6, dst6, protoICMPv6, 255, 8)
	neighbour = append(neighbour, 135, 0, 0, 0, 0, 0, 0, 0)
	for name, c := range map[string]struct {
		b    []byte
		want func(Stats) uint64
	}{
		"garbage":                  {[]byte{1, 2, 3}, func(s Stats) uint64 { return s.Malformed }},
		"UDP with a wrong sum":     {damaged, func(s Stats) uint64 { return s.BadChecksum }},
		"UDP":                      {udpPacket(app4, dst4, 1, 2, []byte("x")), func(s Stats) uint64 { return s.UDPFlowsTotal }},
		"UDP over IPv6":            {udpPacket(app6, dst6, 1, 2, []byte("x")), func(s Stats) uint64 { return s.UDPFlowsTotal }},
		"multicast":                {multicast, func(s Stats) uint64 { return s.Ignored }},
		"broadcast":                {udpPacket(app4, broadcast, 1, 2, nil), func(s Stats) uint64 { return s.Ignored }},
		"to loopback":              {udpPacket(app4, netip.MustParseAddr("127.0.0.1"), 1, 2, nil), func(s Stats) uint64 { return s.Ignored }},
		"from a strange source":    {udpPacket(netip.MustParseAddr("10.66.0.1"), dst4, 1, 2, nil), func(s Stats) uint64 { return s.BadSource }},
		"neighbour solicitation":   {neighbour, func(s Stats) uint64 { return s.Ignored }},
		"another protocol":         {gre, func(s Stats) uint64 { return s.Passed }},
		"echo":                     {echo, func(s Stats) uint64 { return s.Passed }},
		"a fragment of an echo":    {echoFrag, func(s Stats) uint64 { return s.Passed }},
		"echo to us":               {Echo{Src: app4, Dst: own}.AppendPacket(nil), func(s Stats) uint64 { return s.Echoed }},
		"error about our UDP":      {AppendUnreachable(nil, udpPacket(dst4, app4, 2, 1, nil), app4, Refused), func(s Stats) uint64 { return s.Ignored }},
		"error about a GRE packet": {AppendUnreachable(nil, append(appendIP(nil, dst4, app4, 47, 64, 4), 0, 0, 8, 0), app4, Unreachable), func(s Stats) uint64 { return s.Passed }},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newFakeDevice(0)
			dev.discards = true
			s := start(t, Config{Device: dev, Sources: func(a netip.Addr) bool { return a == app4 || a == app6 }})
			s.SetAddresses([]netip.Addr{own})
			dev.in <- c.b
			wait(t, func() bool { return s.Stats().PacketsIn == 1 && c.want(s.Stats()) == 1 })
			st := s.Stats()
			if n := st.Malformed + st.BadChecksum + st.UDPFlowsTotal + st.Ignored + st.BadSource + st.Passed + st.Echoed; n != 1 {
				t.Errorf("counted more than once: %+v", st)
			}
		})
	}
}

// synPacket is a SYN from port 1 to port 2.
func synPacket(seq byte) []byte {
	b := append(appendIP(nil, app4, dst4, protoTCP, 64, 20), 0, 1, 0, 2, 0, 0, 0, seq, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(b[36:], ^checksum.Checksum(b[20:], pseudoHeader(app4, dst4, protoTCP, 20)))
	return b
}

// TestSilentRemembers: a repeated SYN is no request, a new one from the same port is, and the memory ends.
func TestSilentRemembers(t *testing.T) {
	dev := newFakeDevice(0)
	s := start(t, Config{Device: dev, HandleTCP: func(_ context.Context, r *TCPRequest) { r.Reject(Silent) }})
	step := func(what string, requests uint64, send byte) {
		t.Helper()
		in := s.Stats().PacketsIn
		dev.in <- synPacket(send)
		wait(t, func() bool {
			st := s.Stats()
			return st.PacketsIn == in+1 && st.TCPRequests >= requests && st.TCPFlows == 0
		})
		// A sentinel behind it: what the SYN began has begun.
		dev.in <- udpPacket(app4, broadcast, 1, 2, nil)
		wait(t, func() bool { return s.Stats().PacketsIn == in+2 && s.Stats().TCPFlows == 0 })
		if n := s.Stats().TCPRequests; n != requests {
			t.Errorf("%s: %d requests, want %d", what, n, requests)
		}
	}
	step("first", 1, 9)
	step("repeated", 1, 9)
	step("another from the same port", 2, 10)
	step("repeated", 2, 10)
	s.tcp.sweep(time.Now().Add(silentFor + time.Second))
	step("forgotten", 3, 10)
	select {
	case b := <-dev.out:
		t.Errorf("silence was broken: %x", b)
	default:
	}
}

// TestRejectPacket: the errors about raw packets come from our own address.
func TestRejectPacket(t *testing.T) {
	dev := newFakeDevice(vnetHeaderLen)
	s := start(t, Config{Device: dev})
	s.SetAddresses([]netip.Addr{dst6, netip.MustParseAddr("10.98.0.1")})
	echo := Echo{Src: app4, Dst: dst4, ID: 1}.AppendPacket(nil)
	for _, send := range []func() error{
		func() error { return s.Reject(echo, AdminProhibited) },
		func() error { return s.RejectTooBig(echo, 1300) },
	} {
		if err := send(); err != nil {
			t.Fatal(err)
		}
		p, err := parsePacket((<-dev.out)[vnetHeaderLen:])
		if err != nil || p.src != netip.MustParseAddr("10.98.0.1") || p.dst != app4 || p.proto != protoICMP {
			t.Errorf("%+v %v", p, err)
		}
	}
	if err := s.Reject([]byte("x"), Refused); err == nil {
		t.Error("an error about garbage")
	}
}

func wait(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatal("never happened")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestVnetChecksums: a packet that the kernel has not vouched for is verified, one with a partial sum is completed.
func TestVnetChecksums(t *testing.T) {
	passed := make(chan []byte, 1)
	dev := newFakeDevice(vnetHeaderLen)
	dev.discards = true
	s := start(t, Config{Device: dev, HandlePacket: func(b []byte) { passed <- bytes.Clone(b) }})
	with := func(h vnetHeader, b []byte) []byte {
		hdr := make([]byte, vnetHeaderLen)
		h.put(hdr)
		return append(hdr, b...)
	}
	bad := udpPacket(app4, dst4, 1, 2, []byte("x"))
	bad[len(bad)-1] ^= 1
	dev.in <- with(vnetHeader{}, bad)
	wait(t, func() bool { return s.Stats().BadChecksum == 1 })
	dev.in <- with(vnetHeader{flags: vnetDataValid}, bad)
	wait(t, func() bool { return s.Stats().UDPFlowsTotal == 1 })

	syn := append(appendIP(nil, app4, dst4, protoTCP, 64, 20), 0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0)
	dev.in <- with(vnetHeader{}, syn)
	wait(t, func() bool { return s.Stats().BadChecksum == 2 })
	dev.in <- with(vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16}, syn)
	wait(t, func() bool { return s.Stats().TCPRequests == 1 })

	e := Echo{Src: app6, Dst: dst6, ID: 5, Data: []byte("abc")}.AppendPacket(nil)
	sum := pseudoHeader(app6, dst6, protoICMPv6, 11)
	binary.BigEndian.PutUint16(e[42:], sum)
	dev.in <- with(vnetHeader{flags: vnetNeedsCsum, csumStart: 40, csumOffset: 2}, e)
	if got, err := ParseEcho(<-passed); err != nil || got.ID != 5 {
		t.Error(got, err)
	}
	dev.in <- with(vnetHeader{flags: vnetNeedsCsum, csumStart: 400, csumOffset: 2}, e)
	wait(t, func() bool { return s.Stats().Malformed == 1 })
}

// TestUDPFlowBytes holds what a flow writes to the bytes on the wire, and what is done with too much.
func TestUDPFlowBytes(t *testing.T) {
	for _, header := range []int{0, vnetHeaderLen} {
		flows := make(chan *UDPFlow)
		dev := newFakeDevice(header)
		s := start(t, Config{Device: dev, UDPFlows: 1, HandleUDP: func(ctx context.Context, f *UDPFlow) {
			flows <- f
			<-ctx.Done()
		}})
		hdr := make([]byte, header)
		for range 3 {
			dev.in <- append(slices.Clone(hdr), udpPacket(app4, dst4, 1000, 53, []byte("question"))...)
		}
		f := <-flows
		if f.Src.String() != "10.77.0.1:1000" || f.Dst.String() != "10.99.0.1:53" {
			t.Error(f.Src, f.Dst)
		}
		b := make([]byte, 100)
		if n, err := f.ReadPacket(b); string(b[:n]) != "question" || err != nil {
			t.Errorf("%q %v", b[:n], err)
		}
		if n, err := f.ReadPacket(b[:4]); string(b[:n]) != "ques" || err != io.ErrShortBuffer {
			t.Errorf("%q %v", b[:n], err)
		}
		if err := f.WritePacket([]byte("answer")); err != nil {
			t.Error(err)
		}
		got := <-dev.out
		if header > 0 && !parseVnet(got).complete(got[header:]) {
			t.Errorf("%x", got)
		}
		want := udpPacket(dst4, app4, 53, 1000, []byte("answer"))
		s.link.lastID.Store(0)
		s.link.mayFragment(want[:20], 1)
		if !bytes.Equal(got[header:], want) || want[5] != 1 || want[6] != 0 {
			t.Errorf("%x\nwant %x", got[header:], want)
		}
		if err := f.WritePacket(make([]byte, maxDatagram+1)); err == nil {
			t.Error("a datagram that cannot be was sent")
		}
		// A second flow is one too many.
		dev.in <- append(slices.Clone(hdr), udpPacket(app4, dst4, 1001, 53, nil)...)
		wait(t, func() bool { return s.Stats().UDPOverLimit == 1 })
		// The queue is bounded.
		for range udpQueueLen + 10 {
			dev.in <- append(slices.Clone(hdr), udpPacket(app4, dst4, 1000, 53, []byte("x"))...)
		}
		wait(t, func() bool { return s.Stats().UDPQueueFull >= 10 })
	}
}

// TestNoAllocations holds the path of a datagram to zero allocations in both directions.
func TestNoAllocations(t *testing.T) {
	for _, header := range []int{0, vnetHeaderLen} {
		flows := make(chan *UDPFlow)
		dev := newFakeDevice(header)
		dev.discards = true
		s := start(t, Config{Device: dev, HandleUDP: func(ctx context.Context, f *UDPFlow) {
			flows <- f
			<-ctx.Done()
		}})
		pkt := append(make([]byte, header), udpPacket(app4, dst4, 1000, 4433, make([]byte, 1400))...)
		dev.in <- pkt
		f := <-flows
		b := make([]byte, maxPacket)
		f.ReadPacket(b)
		if avg := testing.AllocsPerRun(1000, func() {
			s.link.receive(pkt)
			n, err := f.ReadPacket(b)
			if err != nil {
				t.Error(err)
			}
			f.WritePacket(b[:n])
		}); avg > 0.1 && !race { // a collection may empty the pools, and the race detector does
			t.Errorf("header of %d bytes: %v allocations a datagram", header, avg)
		}
		echo := append(make([]byte, header), Echo{Src: app4, Dst: dst4}.AppendPacket(nil)...)
		if avg := testing.AllocsPerRun(1000, func() { s.link.receive(echo) }); avg > 0 {
			t.Errorf("%v allocations a packet passed on", avg)
		}
	}
}

// TestDeviceEnds: a device that goes away by itself ends Run, with an error.
func TestDeviceEnds(t *testing.T) {
	dev := newFakeDevice(0)
	s, err := New(Config{Device: dev})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	dev.Close()
	if err := <-ran; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// TestRunEndsDuringHandshake: the app is gone and answers nothing when the stack ends.
func TestRunEndsDuringHandshake(t *testing.T) {
	dev := newFakeDevice(0)
	accepted := make(chan error, 1)
	s, err := New(Config{Device: dev, HandleTCP: func(_ context.Context, r *TCPRequest) {
		_, err := r.Accept()
		accepted <- err
	}})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	dev.in <- synPacket(9)
	if synAck := <-dev.out; synAck[33] != tcpFlagSYN|tcpFlagACK {
		t.Errorf("%x", synAck)
	}
	s.Close()
	if err := <-accepted; err == nil {
		t.Error("accepted")
	}
	if err := <-ran; err != nil {
		t.Error(err)
	}
}

func TestConfigValidate(t *testing.T) {
	dev := newFakeDevice(0)
	for name, c := range map[string]Config{
		"no device":        {},
		"two":              {Device: dev, Conn: struct{ PacketConn }{}},
		"a strange header": {Device: newFakeDevice(4)},
		"MTU too small":    {Conn: struct{ PacketConn }{}, MTU: 1000},
		"MTU too large":    {Conn: struct{ PacketConn }{}, MTU: 1 << 16},
		"negative":         {Device: dev, Dials: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s passes", name)
		}
	}
	s, err := New(Config{Device: dev})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{nil, {0x45}, append(udpPacket(app4, dst4, 1, 2, nil), 0)} {
		if err := s.Inject(b); err == nil {
			t.Errorf("%x was injected", b)
		}
	}
	s.Close() // before Run: Run then returns at once
	if err := s.Run(context.Background()); err != nil {
		t.Error(err)
	}
	if err := s.Run(context.Background()); err == nil {
		t.Error("ran twice")
	}
}

func TestDeadline(t *testing.T) {
	var d deadline
	d.init()
	if d.passed() {
		t.Error("none has passed")
	}
	d.set(time.Now().Add(time.Hour))
	first := d.wait()
	d.set(time.Now().Add(-time.Second))
	select {
	case <-first:
	default:
		t.Error("an earlier deadline does not wake who waits for a later one")
	}
	if !d.passed() {
		t.Error("a past deadline has not passed")
	}
	d.set(time.Time{})
	if d.passed() {
		t.Error("a deadline taken back has passed")
	}
}
