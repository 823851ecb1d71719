package direct

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

func TestUsable(t *testing.T) {
	for _, tc := range []struct {
		addr            string
		public, private bool
	}{
		{"198.51.100.7:40000", true, true},
		{"[2001:db8::7]:40000", true, true},
		{"[::ffff:198.51.100.7]:40000", true, true},
		{"198.51.100.7:53", false, false},
		{"198.51.100.7:0", false, false},
		{"10.1.2.3:40000", false, true},
		{"172.16.0.1:40000", false, true},
		{"192.168.1.1:40000", false, true},
		{"[::ffff:192.168.1.1]:40000", false, true},
		{"100.64.1.1:40000", false, true},
		{"[fd00::1]:40000", false, true},
		{"127.0.0.1:40000", false, false},
		{"[::1]:40000", false, false},
		{"[::ffff:127.0.0.1]:40000", false, false},
		{"[::127.0.0.1]:40000", false, false},
		{"[64:ff9b::7f00:1]:40000", false, false},
		{"[2002:7f00:1::]:40000", false, false},
		{"169.254.169.254:40000", false, false},
		{"[fe80::1]:40000", false, false},
		{"[fe80::1%eth0]:40000", false, false},
		{"[fec0::1]:40000", false, false},
		{"224.0.0.251:40000", false, false},
		{"[ff02::1]:40000", false, false},
		{"255.255.255.255:40000", false, false},
		{"0.0.0.0:40000", false, false},
		{"0.1.2.3:40000", false, false},
		{"240.0.0.1:40000", false, false},
		{"[::]:40000", false, false},
	} {
		a := netip.MustParseAddrPort(tc.addr)
		if got := Usable(a, false); got != tc.public {
			t.Errorf("%v: %v", a, got)
		}
		if got := Usable(a, true); got != tc.private {
			t.Errorf("%v with private addresses: %v", a, got)
		}
	}
}

func TestParseOffer(t *testing.T) {
	many := `{"candidates":["198.51.100.7:1111"` + strings.Repeat(`,"198.51.100.7:1111"`, MaxCandidates) + `]}`
	for in, ok := range map[string]bool{
		`{"candidates":["198.51.100.7:40000","[::ffff:198.51.100.8]:40000"]}`: true,
		`{"refused":"off"}`:             true,
		`{}`:                            true,
		many:                            false,
		`{"candidates":[""]}`:           false,
		`{"candidates":["host:1"]}`:     false,
		`{"candidates":"198.51.100.7"}`: false,
		``:                              false,
		`{"refused":"` + strings.Repeat("x", maxOffer) + `"}`: false,
	} {
		o, err := ParseOffer([]byte(in))
		if (err == nil) != ok {
			t.Errorf("%.60s: %v", in, err)
		}
		for _, a := range o.Candidates {
			if a.Addr().Is4In6() {
				t.Errorf("%v is not unmapped", a)
			}
		}
	}
}

func FuzzParseOffer(f *testing.F) {
	f.Add([]byte(`{"candidates":["198.51.100.7:40000","[2001:db8::1]:5"],"refused":"x"}`))
	f.Add([]byte(`{"candidates":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := ParseOffer(b)
		if err != nil {
			return
		}
		if len(o.Candidates) > MaxCandidates || len(o.Refused) > 200 {
			t.Fatalf("%+v", o)
		}
		again, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseOffer(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
	})
}
