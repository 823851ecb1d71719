package tun

import (
	"net/netip"
	"strings"
	"testing"
)

func TestConfigValidate(t *testing.T) {
	for _, c := range []struct {
		c  Config
		ok bool
	}{
		{Config{}, true},
		{Config{Name: "sally1", MTU: 1280}, true},
		{Config{Name: "fifteen-bytes-1", MTU: MaxMTU}, true},
		{Config{Name: "sixteen-bytes-12"}, false},
		{Config{Name: "a/b"}, false},
		{Config{Name: "a b"}, false},
		{Config{Name: "a%d"}, false},
		{Config{Name: ".."}, false},
		{Config{MTU: 1279}, false},
		{Config{MTU: 65535}, false},
	} {
		if err := c.c.Validate(); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.c, err)
		}
	}
}

func TestHazardsCheck(t *testing.T) {
	h := Hazards{
		Connected: []Subnet{
			{netip.MustParsePrefix("192.168.1.0/24"), "eth0"},
			{netip.MustParsePrefix("203.0.113.9/32"), "eth1"},
			{netip.MustParsePrefix("2001:db8:1::/64"), "eth0"},
		},
		Gateways:  []netip.Addr{netip.MustParseAddr("203.0.113.1")},
		Resolvers: []netip.Addr{netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fd00::53")},
		Logins:    []netip.Addr{netip.MustParseAddr("10.20.0.7")},
		Protected: []netip.Addr{netip.MustParseAddr("198.51.100.4"), netip.MustParseAddr("::ffff:198.51.100.5")},
	}
	for p, want := range map[string]string{
		"0.0.0.0/0":          "default route",
		"::/0":               "default route",
		"10.1.0.0/16":        "",
		"10.0.0.0/24":        "DNS resolver 10.0.0.53",
		"10.0.0.53/32":       "DNS resolver",
		"10.0.0.54/32":       "",
		"fd00::/8":           "DNS resolver fd00::53",
		"10.20.0.0/16":       "ssh login, 10.20.0.7",
		"192.168.0.0/16":     "covers the subnet 192.168.1.0/24 of eth0",
		"192.168.1.0/24":     "covers the subnet",
		"192.168.1.7/24":     "covers the subnet",
		"192.168.1.7/32":     "lies within the subnet",
		"192.168.2.0/24":     "",
		"2001:db8::/32":      "covers the subnet 2001:db8:1::/64",
		"2001:db8:2::/64":    "",
		"203.0.113.0/24":     "default gateway 203.0.113.1",
		"203.0.113.9/32":     "", // our own address is nobody's to take away
		"198.51.100.4/30":    "platform or a relay, 198.51.100.4",
		"198.51.100.5/32":    "platform or a relay, 198.51.100.5",
		"128.0.0.0/1":        "touches",
		"127.0.0.5/32":       "loopback",
		"169.254.169.254/32": "link-local",
		"224.0.0.0/24":       "multicast",
		"::1/128":            "loopback",
		"fe80::/64":          "link-local",
		"ff02::1/128":        "multicast",
		"100.112.0.0/12":     "",
	} {
		got := h.Check(netip.MustParsePrefix(p))
		if want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", p, got, want)
		}
	}
	if h.Check(netip.Prefix{}) == "" {
		t.Error("an invalid prefix may be routed")
	}
}

func TestPartition(t *testing.T) {
	ps := func(ss ...string) (ps []netip.Prefix) {
		for _, s := range ss {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		return ps
	}
	ok, skipped := Hazards{}.partition(ps("10.2.3.4/16", "10.2.0.0/16", "10.1.0.0/16", "0.0.0.0/0"))
	if len(ok) != 2 || ok[0] != ps("10.1.0.0/16")[0] || ok[1] != ps("10.2.0.0/16")[0] || len(skipped) != 1 {
		t.Error(ok, skipped)
	}
}
