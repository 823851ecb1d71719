package gateway

import (
	"net/netip"
	"testing"
)

func TestAllowListSpecialAddresses(t *testing.T) {
	open, err := ParseAllow(nil)
	if err != nil {
		t.Fatal(err)
	}
	wide, err := ParseAllow([]string{"0.0.0.0/0", "::/0"})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		"127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "ff02::1",
		"::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::127.0.0.1", "::169.254.169.254", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::",
		"2002:7f00:1::1", "2002:a9fe:a9fe::", "2001:0:1:2:3:4:80ff:fffe", "fd00:ec2::254", "100.100.100.200", "168.63.129.16",
	} {
		a := netip.MustParseAddr(s)
		for name, l := range map[string]*AllowList{"default": open, "everything": wide} {
			if err := l.Check(a, 80); err == nil {
				t.Errorf("%s list lets %s through", name, s)
			}
		}
	}
	for _, s := range []string{"10.0.3.7", "192.168.1.1", "8.8.8.8", "fd12::1", "2a00::1", "::ffff:10.0.3.7", "64:ff9b::a00:307"} {
		if err := open.Check(netip.MustParseAddr(s), 80); err != nil {
			t.Errorf("default list refuses %s: %v", s, err)
		}
	}
}

func TestAllowListEntries(t *testing.T) {
	l, err := ParseAllow([]string{"10.0.3.0/24 5432,8000-8100", "127.0.0.1 6379", "10.9.0.1"}, netip.MustParseAddrPort("10.9.0.1:9465"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		addr string
		port uint16
		ok   bool
	}{
		{"10.0.3.7", 5432, true},
		{"10.0.3.7", 8050, true},
		{"10.0.3.7", 80, false},
		{"10.0.3.7", 0, false},
		{"10.0.4.7", 5432, false},
		{"127.0.0.1", 6379, true},
		{"127.0.0.1", 22, false},
		{"127.0.0.2", 6379, false},
		{"10.9.0.1", 80, true},
		{"10.9.0.1", 0, true},
		{"10.9.0.1", 9465, false},
	} {
		if err := l.Check(netip.MustParseAddr(c.addr), c.port); (err == nil) != c.ok {
			t.Errorf("Check(%s, %d) = %v, want allowed %v", c.addr, c.port, err, c.ok)
		}
	}
	for _, bad := range []string{"", "x", "10.0.0.0/33", "10.0.0.0/8 0", "10.0.0.0/8 80,x", "10.0.0.0/8 ,"} {
		if _, err := ParseAllow([]string{bad}); err == nil {
			t.Errorf("ParseAllow(%q) is taken", bad)
		}
	}
}
