package addrspace

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
)

// TestOf: each range by its first and last address, and their neighbours that are the Internet's.
func TestOf(t *testing.T) {
	for addr, want := range map[string]Class{
		"8.8.8.8": Internet, "1.0.0.0": Internet, "9.255.255.255": Internet, "11.0.0.0": Internet, "100.63.255.255": Internet, "100.128.0.0": Internet, "126.255.255.255": Internet,
		"128.0.0.0": Internet, "169.253.255.255": Internet, "169.255.0.0": Internet, "172.15.255.255": Internet, "172.32.0.0": Internet, "192.0.1.0": Internet, "192.0.3.0": Internet,
		"192.88.98.255": Internet, "192.88.100.0": Internet, "192.167.255.255": Internet, "192.169.0.0": Internet, "198.17.255.255": Internet, "198.20.0.0": Internet,
		"198.51.99.255": Internet, "198.51.101.0": Internet, "203.0.112.255": Internet, "203.0.114.0": Internet, "223.255.255.255": Internet,
		"0.0.0.0": Unspecified, "0.255.255.255": Unspecified, "127.0.0.0": Loopback, "127.255.255.255": Loopback, "169.254.0.0": LinkLocal, "169.254.169.254": LinkLocal,
		"169.254.255.255": LinkLocal, "100.100.100.200": Metadata, "192.0.0.192": Metadata, "168.63.129.16": Metadata, "168.63.129.15": Internet, "10.0.0.0": Private,
		"10.255.255.255": Private, "172.16.0.0": Private, "172.31.255.255": Private, "192.168.0.0": Private, "192.168.255.255": Private, "100.64.0.0": Private,
		"100.127.255.255": Private, "100.100.100.199": Private, "198.18.0.0": Testing, "198.19.255.255": Testing, "192.0.2.1": Testing, "198.51.100.1": Testing,
		"203.0.113.1": Testing, "192.0.0.0": Assigned, "192.0.0.255": Assigned, "192.88.99.1": Assigned, "224.0.0.0": Multicast, "239.255.255.255": Multicast,
		"240.0.0.0": Reserved, "255.255.255.255": Reserved,

		"2606:4700::1111": Internet, "2001:1::1": Internet, "2001:db9::": Internet, "2003::": Internet, "101::": Internet, "64:ff9a::1": Internet,
		"::": Unspecified, "::1": Loopback, "fe80::1": LinkLocal, "febf::1": LinkLocal, "fe80::1%eth0": LinkLocal, "2606:4700::1111%eth0": LinkLocal, "fec0::1": LinkLocal,
		"feff::1": LinkLocal, "fd00:ec2::254": Metadata, "fd20:ce::254": Metadata, "fc00::": Private, "fdff::1": Private, "2001:db8::1": Testing, "100::1": Assigned,
		"ff00::": Multicast, "ff02::1": Multicast, "::2": Embedded, "64:ff9b::808:808": Embedded, "64:ff9b:1::808:808": Embedded, "2002:808:808::": Embedded, "2001::1": Embedded,
		"::ffff:0:8.8.8.8": Embedded,

		"::ffff:8.8.8.8": Internet, "::ffff:10.0.0.1": Private, "::ffff:100.64.0.1": Private, "::ffff:224.0.0.1": Multicast,
	} {
		a := netip.MustParseAddr(addr)
		r := Of(a)
		if r.Class != want || r.What == "" {
			t.Errorf("%s: %d, want %d (%+v)", addr, r.Class, want, r)
		}
		if Public(a) != (want == Internet) {
			t.Errorf("%s: public: %v", addr, Public(a))
		}
		if r.Prefix.IsValid() && !r.Prefix.Contains(a.Unmap()) {
			t.Errorf("%s is not in %v", addr, r.Prefix)
		}
	}
	if r := Of(netip.Addr{}); r.Class != None || Public(netip.Addr{}) {
		t.Errorf("no address: %+v", r)
	}
}

// TestEverySpelling: this host, every host and the metadata service are what they are in every spelling (CVE-2020-26262, CVE-2024-24790).
func TestEverySpelling(t *testing.T) {
	for four, class := range map[string]Class{"127.0.0.1": Loopback, "0.0.0.0": Unspecified, "169.254.169.254": LinkLocal} {
		a := netip.MustParseAddr(four)
		b := a.As4()
		hi, lo, not := binary.BigEndian.Uint16(b[:]), binary.BigEndian.Uint16(b[2:]), ^binary.BigEndian.Uint32(b[:])
		spellings := map[string]bool{ // whether it is one that sockets do not take for IPv4
			four:                                false,
			"::ffff:" + four:                    false,
			fmt.Sprintf("::ffff:%x:%x", hi, lo): false,
			fmt.Sprintf("0:0:0:0:0:FFFF:%04X:%04X", hi, lo): false,
			"::ffff:0:" + four:                                                   true,
			"64:ff9b::" + four:                                                   true,
			fmt.Sprintf("64:ff9b::%x:%x", hi, lo):                                true,
			fmt.Sprintf("64:ff9b:1::%x:%x", hi, lo):                              true,
			fmt.Sprintf("64:ff9b:1:fffe::%x:%x", hi, lo):                         true,
			fmt.Sprintf("2002:%x:%x::", hi, lo):                                  true,
			fmt.Sprintf("2002:%x:%x::1", hi, lo):                                 true,
			fmt.Sprintf("2001:0:4136:e378:8000:63bf:%x:%x", not>>16, not&0xffff): true,
		}
		if a.IsUnspecified() {
			if c, embedded := Canonical(netip.IPv6Unspecified()); c != netip.IPv6Unspecified() || embedded {
				t.Errorf(":: became %v", c)
			}
		} else { // :: itself is IPv6's own
			spellings["::"+four] = true
			spellings[fmt.Sprintf("::%x:%x", hi, lo)] = true
		}
		for s, other := range spellings {
			in, err := netip.ParseAddr(s)
			if err != nil {
				t.Errorf("%s: %v", s, err)
				continue
			}
			if Public(in) {
				t.Errorf("%s is public", s)
			}
			c, embedded := Canonical(in)
			if c != a || embedded != other {
				t.Errorf("%s became %v (%v), want %v", s, c, embedded, a)
			}
			want := class
			if other {
				want = Embedded
			}
			if got := Of(in).Class; got != want {
				t.Errorf("%s: class %d, want %d", s, got, want)
			}
			if got := Of(c).Class; got != class {
				t.Errorf("%s: what is inside is %d, want %d", s, got, class)
			}
		}
	}
	for _, same := range []string{"::1", "::", "2606:4700::1111", "8.8.8.8", "fd00::7f00:1"} {
		if c, embedded := Canonical(netip.MustParseAddr(same)); c != netip.MustParseAddr(same) || embedded {
			t.Errorf("%s became %v", same, c)
		}
	}
	if c, _ := Canonical(netip.MustParseAddr("fe80::1%eth0")); c != netip.MustParseAddr("fe80::1") {
		t.Errorf("the zone stays: %v", c)
	}
}
