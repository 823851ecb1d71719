package probe

import (
	"net/netip"
	"testing"

	"sallyway/internal/identity"
)

// TestPermit: which addresses of relays the platform dials as a client.
func TestPermit(t *testing.T) {
	own, shared := identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, identity.Node{Org: identity.SharedOrg, Kind: identity.Relay, ID: "r-1"}
	for _, c := range []struct {
		mode  Mode
		relay identity.Node
		addr  string
		want  bool
	}{
		{"", own, "8.8.8.8", true},
		{Auto, own, "2606:4700::1", true},
		{Auto, own, "10.0.0.1", false},
		{Auto, own, "127.0.0.1", false},
		{Off, own, "10.0.0.1", false},
		{Off, own, "8.8.8.8", true},
		{Private, own, "10.0.0.1", true},
		{Private, own, "127.0.0.1", true},
		{Private, own, "169.254.169.254", false},
		{Auto, shared, "10.0.0.1", true},
		{Auto, shared, "169.254.169.254", false},
		{Auto, own, "::ffff:10.0.0.1", false},
		{Auto, own, "64:ff9b::a00:1", false},
	} {
		if err := c.mode.Permit(c.relay, netip.MustParseAddr(c.addr)); (err == nil) != c.want {
			t.Errorf("%s, %v, %s: %v", c.mode, c.relay, c.addr, err)
		}
	}
}
