package netstack

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Packets as Linux sends them.
const (
	// ping -c1 -s4: 10.77.0.1 > 10.99.0.1
	ping4 = "4500002000004000400125cb" + "0a4d0001" + "0a630001" + "080020fe12340007" + "61626364"
	// UDP 10.77.0.1:1000 > 10.99.0.1:53 "hi", no checksum
	udp4 = "4500001e00004000401125bd" + "0a4d0001" + "0a630001" + "03e80035000a0000" + "6869"
	// the same from fd77::1 to fd99::1 behind a hop-by-hop and an empty destination options header
	udp6 = "60000000001a0040" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
		"3c00010400000000" + "1100010400000000" + "03e80035000a0000" + "6869"
	// the second fragment of a UDP datagram
	frag4 = "4500001c0001000140113ddd" + "0a4d0001" + "0a630001" + "0102030405060708"
	frag6 = "6000000000102c40" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
		"1100000800000001" + "0102030405060708"
	firstFrag6 = "6000000000102c40" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
		"1100000100000001" + "03e8003500100000"
	atomic6 = "6000000000102c40" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
		"1100000000000001" + "03e8003500080000"
)

func TestParsePacket(t *testing.T) {
	a4, b4 := netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.99.0.1")
	a6, b6 := netip.MustParseAddr("fd77::1"), netip.MustParseAddr("fd99::1")
	for name, c := range map[string]struct {
		hex  string
		want packet
	}{
		"echo":             {ping4, packet{src: a4, dst: b4, proto: 1, l4: 20, len: 32, ttl: 64}},
		"udp":              {udp4, packet{src: a4, dst: b4, proto: 17, l4: 20, len: 30, ttl: 64}},
		"extensions":       {udp6, packet{src: a6, dst: b6, proto: 17, l4: 56, len: 66, ttl: 64}},
		"fragment":         {frag4, packet{src: a4, dst: b4, proto: 17, l4: 20, len: 28, ttl: 64, fragment: true, rest: true}},
		"v6 fragment":      {frag6, packet{src: a6, dst: b6, proto: 17, l4: 48, len: 56, ttl: 64, fragment: true, rest: true}},
		"v6 first":         {firstFrag6, packet{src: a6, dst: b6, proto: 17, l4: 48, len: 56, ttl: 64, fragment: true}},
		"v6 atomic":        {atomic6, packet{src: a6, dst: b6, proto: 17, l4: 48, len: 56, ttl: 64}},
		"with padding":     {udp4 + "0000", packet{src: a4, dst: b4, proto: 17, l4: 20, len: 30, ttl: 64}},
		"empty":            {"", packet{}},
		"version":          {"5" + udp4[1:], packet{}},
		"short":            {udp4[:58], packet{}},
		"header too short": {"44" + udp4[2:], packet{}},
		"header too long":  {"4f" + udp4[2:], packet{}},
		"v6 short":         {udp6[:120], packet{}},
		"v6 mapped":        {"6000000000001140" + "00000000000000000000ffff0a4d0001" + "00000000000000000000ffff0a630001", packet{}},
		"v6 extension past end": {"6000000000080040" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
			"1101010400000000", packet{}},
		"v6 nine extensions": {"6000000000480040" + "fd770000000000000000000000000001" + "fd990000000000000000000000000001" +
			"0000010400000000" + "0000010400000000" + "0000010400000000" + "0000010400000000" + "0000010400000000" +
			"0000010400000000" + "0000010400000000" + "0000010400000000" + "1100010400000000", packet{}},
	} {
		got, err := parsePacket(unhex(t, c.hex))
		if got != c.want || (err == nil) != (c.want != packet{}) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, got, err, c.want)
		}
	}
}

func TestTransportValid(t *testing.T) {
	for name, c := range map[string]struct {
		hex  string
		want bool
	}{
		"v4 without a sum": {udp4, true},
		"v6 without a sum": {udp6, false},
		"wrong":            {"4500001e00004000401125bd" + "0a4d0001" + "0a630001" + "03e80035000a1234" + "6869", false},
	} {
		b := unhex(t, c.hex)
		p, err := parsePacket(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := transportValid(b, p); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	// What we send is right by our own check and by gVisor's.
	for _, pair := range [][2]string{{"10.77.0.1", "10.99.0.1"}, {"fd77::1", "fd99::1"}} {
		src, dst := netip.MustParseAddr(pair[0]), netip.MustParseAddr(pair[1])
		for _, payload := range []string{"", "h", "hello, odd"} {
			n := udpHeaderLen + len(payload)
			b := appendIP(nil, src, dst, protoUDP, 64, n)
			l4 := len(b)
			b = append(b, 3, 0xe8, 0, 53, 0, byte(n))
			sum := udpChecksum(pseudoHeader(src, dst, protoUDP, n), b[l4:], []byte(payload))
			b = append(append(b, byte(sum>>8), byte(sum)), payload...)
			p, err := parsePacket(b)
			if err != nil || !transportValid(b, p) {
				t.Errorf("%x: %v", b, err)
			}
			b[len(b)-1] ^= 1
			if transportValid(b, p) {
				t.Errorf("%x: the wrong sum passes", b)
			}
			if src.Is4() && !header.IPv4(b).IsChecksumValid() {
				t.Errorf("%x: IP header checksum", b)
			}
		}
	}
}

func TestVnetComplete(t *testing.T) {
	src, dst := netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.99.0.1")
	b := appendIP(nil, src, dst, protoUDP, 64, 12)
	sum := pseudoHeader(src, dst, protoUDP, 12)
	b = append(b, 3, 0xe8, 0, 53, 0, 12, byte(sum>>8), byte(sum), 'a', 'b', 'c', 'd')
	h := vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 6}
	enc := make([]byte, vnetHeaderLen)
	h.put(enc)
	if parseVnet(enc) != h {
		t.Errorf("%x → %+v", enc, parseVnet(enc))
	}
	p, _ := parsePacket(b)
	if !h.complete(b) || !transportValid(b, p) {
		t.Errorf("%x", b)
	}
	for _, h := range []vnetHeader{{flags: vnetNeedsCsum, csumStart: 31, csumOffset: 0}, {flags: vnetNeedsCsum, csumStart: 65535, csumOffset: 65535}} {
		if h.complete(b) {
			t.Errorf("%+v lies outside of the packet", h)
		}
	}
}

func TestEchoRoundTrip(t *testing.T) {
	for _, pair := range [][2]string{{"10.77.0.1", "10.99.0.1"}, {"fd77::1", "fd99::1"}} {
		e := Echo{Src: netip.MustParseAddr(pair[0]), Dst: netip.MustParseAddr(pair[1]), ID: 7, Seq: 0xfffe, TTL: 9, Data: []byte("12345")}
		b := e.AppendPacket([]byte("kept"))
		if string(b[:4]) != "kept" {
			t.Errorf("%x", b)
		}
		got, err := ParseEcho(b[4:])
		if err != nil || got.Src != e.Src || got.Dst != e.Dst || got.ID != 7 || got.Seq != 0xfffe || got.TTL != 9 || got.Reply || string(got.Data) != "12345" {
			t.Errorf("%+v %v", got, err)
		}
		a, err := ParseEcho(got.Answer().AppendPacket(nil))
		if err != nil || a.Src != e.Dst || a.Dst != e.Src || !a.Reply || a.TTL != 64 || string(a.Data) != "12345" {
			t.Errorf("%+v %v", a, err)
		}
		for i := range b[4:] {
			bad := bytes.Clone(b[4:])
			bad[i] ^= 0x40
			if x, err := ParseEcho(bad); err == nil && x.Src == e.Src && x.Dst == e.Dst && x.TTL == e.TTL && i > 12 {
				t.Errorf("a flipped bit in byte %d passes: %+v", i, x)
			}
		}
	}
	if _, err := ParseEcho(unhex(t, udp4)); err == nil {
		t.Error("UDP is no echo")
	}
	if _, err := ParseEcho(unhex(t, frag4)); err == nil {
		t.Error("a fragment is no echo")
	}
}

func TestICMPErrors(t *testing.T) {
	s4, s6 := netip.MustParseAddr("10.98.0.1"), netip.MustParseAddr("fd98::1")
	long4 := append(unhex(t, udp4), make([]byte, 2000)...)
	for name, c := range map[string]struct {
		b       []byte
		typ     [2]byte
		len     int
		v6      bool
		mtuInfo uint32
	}{
		"refused":      {AppendUnreachable(nil, unhex(t, udp4), s4, Refused), [2]byte{3, 3}, 20 + 8 + 30, false, 0},
		"host":         {AppendUnreachable(nil, unhex(t, udp4), s4, Unreachable), [2]byte{3, 1}, 58, false, 0},
		"net":          {AppendUnreachable(nil, unhex(t, udp4), s4, NetUnreachable), [2]byte{3, 0}, 58, false, 0},
		"admin":        {AppendUnreachable(nil, unhex(t, udp4), s4, AdminProhibited), [2]byte{3, 13}, 58, false, 0},
		"too big":      {AppendTooBig(nil, unhex(t, udp4), s4, 1400), [2]byte{3, 4}, 58, false, 1400},
		"cut":          {AppendTooBig(nil, long4, s4, 1400), [2]byte{3, 4}, 576, false, 1400},
		"v6 refused":   {AppendUnreachable(nil, unhex(t, udp6), s6, Refused), [2]byte{1, 4}, 40 + 8 + 66, true, 0},
		"v6 host":      {AppendUnreachable(nil, unhex(t, udp6), s6, Unreachable), [2]byte{1, 3}, 114, true, 0},
		"v6 net":       {AppendUnreachable(nil, unhex(t, udp6), s6, NetUnreachable), [2]byte{1, 0}, 114, true, 0},
		"v6 admin":     {AppendUnreachable(nil, unhex(t, udp6), s6, AdminProhibited), [2]byte{1, 1}, 114, true, 0},
		"v6 too big":   {AppendTooBig(nil, unhex(t, udp6), s6, 1280), [2]byte{2, 0}, 114, true, 1280},
		"about a ping": {AppendUnreachable(nil, unhex(t, ping4), s4, Unreachable), [2]byte{3, 1}, 60, false, 0},
	} {
		if len(c.b) != c.len {
			t.Errorf("%s: %d bytes, want %d", name, len(c.b), c.len)
			continue
		}
		p, err := parsePacket(c.b)
		if err != nil || p.len != c.len {
			t.Errorf("%s: %+v %v", name, p, err)
			continue
		}
		m := header.ICMPv4(c.b[p.l4:])
		if [2]byte(m[:2]) != c.typ || uint32(m[4])<<24|uint32(m[5])<<16|uint32(m[6])<<8|uint32(m[7]) != c.mtuInfo {
			t.Errorf("%s: %x", name, m[:8])
		}
		if c.v6 {
			if !transportValid(c.b, p) {
				t.Errorf("%s: checksum", name)
			}
		} else if header.ICMPv4Checksum(m, 0) != m.Checksum() {
			t.Errorf("%s: checksum", name)
		}
	}
	// None is sent about these (RFC 1122 section 3.2.2).
	anError := AppendUnreachable(nil, unhex(t, udp4), s4, Refused)
	multicast := unhex(t, udp4)
	multicast[16] = 224
	for name, b := range map[string][]byte{
		"an error":     AppendUnreachable(nil, anError, s4, Refused),
		"a fragment":   AppendUnreachable(nil, unhex(t, frag4), s4, Refused),
		"multicast":    AppendUnreachable(nil, multicast, s4, Refused),
		"silent":       AppendUnreachable(nil, unhex(t, udp4), s4, Silent),
		"nothing":      AppendUnreachable(nil, nil, s4, Refused),
		"two families": AppendUnreachable(nil, unhex(t, udp4), s6, Refused),
	} {
		if len(b) != 0 {
			t.Errorf("an ICMP error about %s: %x", name, b)
		}
	}
}

func FuzzParsePacket(f *testing.F) {
	for _, s := range []string{ping4, udp4, udp6, frag4, frag6, firstFrag6, atomic6} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePacket(b)
		if err == nil {
			if p.l4 > p.len || p.len > len(b) || p.l4 < ipv4HeaderLen || p.rest && !p.fragment || p.src.Is4() != p.dst.Is4() {
				t.Fatalf("%x: %+v", b, p)
			}
			if p.proto == protoUDP || p.proto == protoTCP {
				transportValid(b, p)
			}
		}
		if e, err := ParseEcho(b); err == nil {
			if again, err := ParseEcho(e.AppendPacket(nil)); err != nil || again.Src != e.Src || again.ID != e.ID || !bytes.Equal(again.Data, e.Data) {
				t.Fatalf("%x: %+v, %+v, %v", b, e, again, err)
			}
		}
		for _, src := range []netip.Addr{netip.MustParseAddr("10.98.0.1"), netip.MustParseAddr("fd98::1")} {
			for _, e := range [][]byte{AppendUnreachable(nil, b, src, Refused), AppendTooBig(nil, b, src, 1280)} {
				if len(e) == 0 {
					continue
				}
				if p, err := parsePacket(e); err != nil || p.len != len(e) || p.src != src || len(e) > maxError6 {
					t.Fatalf("%x → %x: %+v %v", b, e, p, err)
				}
			}
		}
		h := vnetHeader{flags: vnetNeedsCsum}
		if len(b) >= vnetHeaderLen {
			h = parseVnet(b)
		}
		h.complete(bytes.Clone(b))
	})
}
