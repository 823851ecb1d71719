package tunnel

import (
	"net/netip"
	"testing"

	"sallyway/internal/policy"
)

func TestParseAuthority(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want policy.Target // zero: refused
	}{
		{"db.internal:5432", policy.Target{Proto: policy.TCP, Host: "db.internal", Port: 5432}},
		{"10.0.3.9:80", policy.Target{Proto: policy.TCP, Host: "10.0.3.9", Addr: netip.MustParseAddr("10.0.3.9"), Port: 80}},
		{"[fd00::1]:443", policy.Target{Proto: policy.TCP, Host: "fd00::1", Addr: netip.MustParseAddr("fd00::1"), Port: 443}},
		{"[::ffff:127.0.0.1]:80", policy.Target{Proto: policy.TCP, Host: "127.0.0.1", Addr: netip.MustParseAddr("127.0.0.1"), Port: 80}},
		{"db.internal", policy.Target{}},
		{"db.internal:0", policy.Target{}},
		{"db.internal:65536", policy.Target{}},
		{"db.internal:-1", policy.Target{}},
		{":80", policy.Target{}},
		{"[fe80::1%eth0]:80", policy.Target{}},
		{"a b:80", policy.Target{}},
		{"user@host:80", policy.Target{}},
		{"a/b:80", policy.Target{}},
	} {
		got, err := parseAuthority(tc.in)
		if (err != nil) != (tc.want == policy.Target{}) || (err == nil && got != tc.want) {
			t.Errorf("%q: %+v, %v", tc.in, got, err)
		}
	}
}

func TestUDPPath(t *testing.T) {
	for _, host := range []string{"db.internal", "10.0.3.9", "fd00::1"} {
		path := formatUDPPath(host, 53)
		got, err := parseUDPPath(path)
		if err != nil || got.Host != host || got.Port != 53 || got.Proto != policy.UDP {
			t.Errorf("%q: %+v, %v", path, got, err)
		}
	}
	if got := formatUDPPath("2001:db8::42", 443); got != "/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/" { // RFC 9298 §3
		t.Errorf("path %q", got)
	}
	for _, path := range []string{"", "/", udpPath, udpPath + "a", udpPath + "a/b/", udpPath + "a/1/2/", udpPath + "%zz/1/", udpPath + "%2Fetc/1/"} {
		if got, err := parseUDPPath(path); err == nil {
			t.Errorf("%q: %+v", path, got)
		}
	}
}

func FuzzParseUDPPath(f *testing.F) {
	f.Add("/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/")
	f.Fuzz(func(t *testing.T, path string) {
		got, err := parseUDPPath(path)
		if err != nil {
			return
		}
		again, err := parseUDPPath(formatUDPPath(got.Host, got.Port))
		if err != nil || again != got {
			t.Fatalf("%q: %+v, again %+v, %v", path, got, again, err)
		}
	})
}
