package wan

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const ms = time.Millisecond

// numbered is a packet of size bytes, without a vnet header, that says its number.
func numbered(n, size int) []byte {
	b := make([]byte, size)
	b[0] = 0x45
	binary.BigEndian.PutUint32(b[4:], uint32(n))
	return b
}

// arrivals takes everything off the line: numbers and times, in order.
func arrivals(l *line) (numbers []int, times []time.Duration) {
	for l.next() != never {
		at := l.next()
		for _, p := range l.due(at, nil) {
			numbers = append(numbers, int(binary.BigEndian.Uint32(p.frame[4:])))
			times = append(times, at)
			p.release()
		}
	}
	return numbers, times
}

func TestDelay(t *testing.T) {
	l := newLine(Direction{Delay: 40 * ms}, 0, false, 1, 0)
	l.admit(3*ms, numbered(1, 100))
	if got := l.due(43*ms-1, nil); len(got) != 0 {
		t.Fatal("early")
	}
	if got := l.due(43*ms, nil); len(got) != 1 {
		t.Fatal("late")
	}
	if l.held != 0 || l.next() != never {
		t.Fatalf("%d bytes held, next %v", l.held, l.next())
	}
}

func TestJitterKeepsOrder(t *testing.T) {
	l := newLine(Direction{Delay: 40 * ms, Jitter: 10 * ms}, 0, false, 1, 0)
	for i := range 1000 {
		l.admit(time.Duration(i)*ms, numbered(i, 100))
	}
	numbers, times := arrivals(l)
	var low, high time.Duration = never, 0
	for i, n := range numbers {
		if n != i {
			t.Fatalf("packet %d came as number %d", n, i)
		}
		d := times[i] - time.Duration(i)*ms
		low, high = min(low, d), max(high, d)
	}
	if low < 40*ms || low > 42*ms || high > 50*ms || high < 48*ms {
		t.Fatalf("delays from %v to %v", low, high)
	}
}

func TestRateAndQueue(t *testing.T) {
	// 1 Mbit/s sends 1250 bytes in 10 ms; 10 000 bytes wait.
	l := newLine(Direction{Rate: 1e6, Queue: 10_000}, 0, false, 1, 0)
	for i := range 20 {
		l.admit(0, numbered(i, 1250))
	}
	numbers, times := arrivals(l)
	if len(numbers) != 8 || l.count.QueueDrops != 12 || l.count.Passed != 8 || l.count.Bytes != 10_000 {
		t.Fatalf("%d came, counted %+v", len(numbers), l.count)
	}
	for i, at := range times {
		if numbers[i] != i || at != time.Duration(i+1)*10*ms {
			t.Fatalf("number %d at %v", numbers[i], at)
		}
	}
	l.admit(35*ms, numbered(99, 1250)) // there is room again once time has passed
	if _, times := arrivals(l); len(times) != 1 || times[0] != 90*ms {
		t.Fatalf("came at %v", times)
	}
}

func TestLoss(t *testing.T) {
	const n = 100_000
	run := func(seed uint64) []int {
		l := newLine(Direction{Loss: 0.02}, 0, false, seed, 0)
		for i := range n {
			l.admit(0, numbered(i, 100))
		}
		numbers, _ := arrivals(l)
		if l.count.Lost+l.count.Passed != n {
			t.Fatalf("counted %+v", l.count)
		}
		return numbers
	}
	a, b, c := run(1), run(1), run(2)
	if lost := float64(n-len(a)) / n; math.Abs(lost-0.02) > 0.003 { // six standard deviations
		t.Fatalf("%.4f lost", lost)
	}
	if !equal(a, b) || equal(a, c) {
		t.Fatal("the seed does not decide")
	}
}

func equal(a, b []int) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestReorder(t *testing.T) {
	l := newLine(Direction{Delay: 10 * ms, Reorder: 0.1, ReorderBy: 5 * ms}, 0, false, 1, 0)
	const n = 5000
	for i := range n {
		l.admit(time.Duration(i)*ms, numbered(i, 100))
	}
	numbers, times := arrivals(l)
	late, highest := 0, -1
	for i, x := range numbers {
		d := times[i] - time.Duration(x)*ms
		if d != 10*ms && d != 15*ms {
			t.Fatalf("number %d took %v", x, d)
		}
		if x < highest {
			late++
		}
		highest = max(highest, x)
	}
	if share := float64(late) / n; math.Abs(share-0.1) > 0.03 || l.count.Reordered < uint64(late) {
		t.Fatalf("%.3f overtaken, counted %+v", share, l.count)
	}
}

func TestMTU(t *testing.T) {
	l := newLine(Direction{MTU: 1400}, 0, false, 1, 0)
	l.admit(0, numbered(1, 1400))
	l.admit(0, numbered(2, 1401))
	if numbers, _ := arrivals(l); len(numbers) != 1 || numbers[0] != 1 || l.count.MTUDrops != 1 {
		t.Fatalf("%v came, counted %+v", numbers, l.count)
	}
}

// super is a TCP super-packet with a sound partial checksum.
func super(v6 bool, segs, mss, last int) []byte {
	iph := 20
	if v6 {
		iph = 40
	}
	payload := (segs-1)*mss + last
	f := make([]byte, vnetLen+iph+20+payload)
	f[0], f[1] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, unix.VIRTIO_NET_HDR_GSO_TCPV4|unix.VIRTIO_NET_HDR_GSO_ECN
	binary.NativeEndian.PutUint16(f[4:], uint16(mss))
	binary.NativeEndian.PutUint16(f[6:], uint16(iph))
	binary.NativeEndian.PutUint16(f[8:], 16)
	ip := f[vnetLen:]
	if v6 {
		f[1] = unix.VIRTIO_NET_HDR_GSO_TCPV6 | unix.VIRTIO_NET_HDR_GSO_ECN
		ip[0], ip[6], ip[7] = 0x60, 6, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(20+payload))
		ip[8], ip[23], ip[24], ip[39] = 0xfd, 1, 0xfd, 2
	} else {
		ip[0], ip[8], ip[9] = 0x45, 64, 6
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		binary.BigEndian.PutUint16(ip[4:], 0xfffe) // wraps around
		copy(ip[12:], []byte{203, 0, 113, 1, 203, 0, 113, 2})
		sealIPv4(ip[:20])
	}
	tcp := ip[iph:]
	binary.BigEndian.PutUint32(tcp[4:], 0xffffff00) // wraps around
	tcp[12], tcp[13] = 5<<4, 0x10|tcpFIN|tcpPSH|tcpCWR
	binary.BigEndian.PutUint16(tcp[16:], pseudo(ip, iph))
	for i := range payload {
		tcp[20+i] = byte(i*7 + i>>8)
	}
	return f
}

// pseudo is the sum of the pseudo header.
func pseudo(ip []byte, iph int) uint16 {
	addrs := ip[12:20]
	if iph == 40 {
		addrs = ip[8:40]
	}
	sum := uint32(6 + len(ip) - iph)
	for i := 0; i < len(addrs); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(addrs[i:]))
	}
	return fold(sum)
}

func TestCut(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		iph, mss := 20, 1000
		if v6 {
			iph = 40
		}
		f := super(v6, 10, mss, 300)
		s := parse(f, vnetLen)
		if s.n != 10 || s.size(0) != iph+20+mss || s.size(9) != iph+20+300 {
			t.Fatalf("parsed as %d segments, first %d, last %d bytes", s.n, s.size(0), s.size(9))
		}
		whole := f[vnetLen+iph+20:]
		for _, r := range [][2]int{{0, 10}, {0, 1}, {0, 4}, {3, 7}, {5, 6}, {8, 10}, {9, 10}} {
			from, to := r[0], r[1]
			g := s.cut(nil, from, to)
			ip := g[vnetLen:]
			tcp := ip[iph:]
			if !bytes.Equal(tcp[20:], whole[from*mss:min(len(whole), to*mss)]) {
				t.Errorf("%v: other payload", r)
			}
			if seq := binary.BigEndian.Uint32(tcp[4:]) - 0xffffff00; seq != uint32(from*mss) {
				t.Errorf("%v: sequence number moved by %d", r, seq)
			}
			if got, want := binary.BigEndian.Uint16(tcp[16:]), pseudo(ip, iph); got != want {
				t.Errorf("%v: pseudo header %x, want %x", r, got, want)
			}
			if fin := tcp[13]&(tcpFIN|tcpPSH) != 0; fin != (to == 10) {
				t.Errorf("%v: FIN and PSH %v", r, fin)
			}
			if cwr := tcp[13]&tcpCWR != 0; cwr != (from == 0) {
				t.Errorf("%v: CWR %v", r, cwr)
			}
			if gso := g[1] != 0; gso != (to-from > 1) {
				t.Errorf("%v: GSO type %d", r, g[1])
			}
			again := parse(g, vnetLen)
			if again.n != to-from {
				t.Errorf("%v: parsed as %d segments", r, again.n)
			}
			if v6 {
				continue
			}
			if n := int(binary.BigEndian.Uint16(ip[2:])); n != len(ip) {
				t.Errorf("%v: total length %d of %d", r, n, len(ip))
			}
			if id := binary.BigEndian.Uint16(ip[4:]) - 0xfffe; int(id) != from {
				t.Errorf("%v: ID moved by %d", r, id)
			}
			sum := binary.BigEndian.Uint16(ip[10:])
			sealIPv4(ip[:20])
			if sum != binary.BigEndian.Uint16(ip[10:]) {
				t.Errorf("%v: header checksum %x", r, sum)
			}
		}
	}
}

// TestSuperPackets counts what becomes of super-packets: their segments, whole where nothing is lost.
func TestSuperPackets(t *testing.T) {
	frame := super(false, 40, 1000, 1000)
	for _, c := range []struct {
		name   string
		d      Direction
		split  bool
		frames func(n int) bool
		want   Count
	}{
		{"whole", Direction{}, false, func(n int) bool { return n == 1 }, Count{Passed: 40, Bytes: 41600}},
		{"split", Direction{}, true, func(n int) bool { return n == 40 }, Count{Passed: 40, Bytes: 41600}},
		{"queue takes the head", Direction{Rate: 1e6, Queue: 10_400}, false, func(n int) bool { return n == 1 }, Count{Passed: 10, Bytes: 10_400, QueueDrops: 30}},
		{"MTU", Direction{MTU: 1039}, false, func(n int) bool { return n == 0 }, Count{MTUDrops: 40}},
		{"all lost", Direction{Loss: 1}, false, func(n int) bool { return n == 0 }, Count{Lost: 40}},
	} {
		l := newLine(c.d, vnetLen, c.split, 1, 0)
		l.admit(0, frame)
		if n := len(l.due(time.Hour, nil)); !c.frames(n) || l.count != c.want {
			t.Errorf("%s: %d frames, counted %+v", c.name, n, l.count)
		}
	}
	l := newLine(Direction{Loss: 0.1}, vnetLen, false, 1, 0)
	for range 1000 {
		l.admit(0, frame)
	}
	got := 0
	for _, p := range l.due(0, nil) {
		s := parse(p.frame, vnetLen)
		got += s.n
		if s.n != p.packets {
			t.Fatalf("%d segments in a frame of %d packets", s.n, p.packets)
		}
	}
	if lost := 1 - float64(got)/40_000; math.Abs(lost-0.1) > 0.01 {
		t.Fatalf("%.3f lost", lost)
	}
}

func TestNoAllocation(t *testing.T) {
	l := newLine(Direction{Delay: ms, Rate: 1e9}, 0, false, 1, 0)
	frame, now := numbered(1, 1400), time.Duration(0)
	var ps []*packet
	pass := func() {
		l.admit(now, frame)
		now += 20 * ms
		ps = l.due(now, ps[:0])
		for _, p := range ps {
			p.release()
		}
	}
	pass()
	if n := testing.AllocsPerRun(1000, pass); n > 0.1 { // a collection may empty the pool
		t.Fatalf("%.1f allocations a packet", n)
	}
}

// FuzzParse holds that no frame, however broken, makes the link fail or invent bytes.
func FuzzParse(f *testing.F) {
	f.Add(super(false, 3, 1000, 10))
	f.Add(super(true, 3, 1000, 10))
	f.Add(make([]byte, vnetLen))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > vnetLen+maxPacket {
			return
		}
		l := newLine(Direction{Loss: 0.3}, vnetLen, false, 1, 0)
		l.admit(0, frame)
		for _, p := range l.due(0, nil) {
			if len(p.frame) > len(frame) {
				t.Fatalf("%d bytes became %d", len(frame), len(p.frame))
			}
		}
	})
}

func TestValidate(t *testing.T) {
	for _, d := range []Direction{
		{Delay: -1},
		{Jitter: -1},
		{Delay: 2 * time.Minute},
		{Loss: -0.1},
		{Loss: 1.1},
		{Loss: math.NaN()},
		{Rate: -1},
		{Rate: 100},
		{Queue: -1},
		{Reorder: 2},
		{MTU: 10},
	} {
		if d.validate() == nil {
			t.Errorf("%+v is taken", d)
		}
	}
	if err := (Direction{Delay: ms, Jitter: ms, Loss: 1, Rate: 1e9, Queue: 1, Reorder: 1, MTU: 1280}).validate(); err != nil {
		t.Error(err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a link without ends is taken")
	}
}

func TestSet(t *testing.T) {
	l := newLine(Direction{Delay: 40 * ms, Rate: 8000}, 0, false, 1, 0)
	l.admit(0, numbered(1, 1000)) // takes a second
	l.set(Direction{Delay: ms})
	l.admit(0, numbered(2, 1000))
	l.admit(5*ms, numbered(3, 1000))
	numbers, times := arrivals(l)
	// The line keeps the order: the two wait for the one before them.
	if len(numbers) != 3 || numbers[0] != 1 || numbers[1] != 2 || numbers[2] != 3 {
		t.Fatalf("arrived: %v at %v", numbers, times)
	}
	if late := time.Second + 40*ms; times[0] != late || times[2] != late {
		t.Fatalf("at %v", times)
	}
	l.admit(2000*ms, numbered(4, 1000))
	if _, times = arrivals(l); len(times) != 1 || times[0] != 2001*ms {
		t.Fatalf("later: %v", times)
	}
}

func TestSetRefuses(t *testing.T) {
	a, b := &fakePort{}, &fakePort{}
	l, err := New(Config{A: a, B: b})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Set(Direction{}, Direction{Loss: 2}); err == nil || l.ways[0].line.d.Delay != 0 {
		t.Fatalf("loss of 2: %v", err)
	}
	if err := l.Set(Direction{Delay: ms}, Direction{Delay: 2 * ms}); err != nil || l.ways[0].line.d.Delay != ms || l.ways[1].line.d.Delay != 2*ms {
		t.Fatal(err)
	}
}

// fakePort is an end that is never used.
type fakePort struct{ Port }

func (*fakePort) HeaderLen() int { return 0 }
