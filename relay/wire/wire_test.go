package wire

import (
	"testing"
	"time"

	"sallyway/internal/identity"
)

func TestUsername(t *testing.T) {
	n := identity.Node{Org: "acme", Kind: identity.Client, ID: "c1"}
	expiry, outage := time.Unix(1_900_000_000, 0), time.Unix(1_900_086_400, 0)
	for _, tc := range []struct {
		u    Username
		text string
	}{
		{Username{Expiry: expiry, Node: n}, "1900000000:acme:client:c1:"},
		{Username{Expiry: expiry, Node: n, Flags: FlagPlainData}, "1900000000:acme:client:c1:d"},
		{Username{Expiry: expiry, Outage: outage, Node: n, Flags: FlagPlainData}, "1900000000-1900086400:acme:client:c1:d"},
	} {
		if got := tc.u.String(); got != tc.text {
			t.Errorf("%q, want %q", got, tc.text)
		}
		if got, err := ParseUsername(tc.text); err != nil || got != tc.u {
			t.Errorf("%q: %+v, %v", tc.text, got, err)
		}
	}
	for _, bad := range []string{
		"", "acme:client:c1:d", "x:acme:client:c1:d", "-1:acme:client:c1:d", "01:acme:client:c1:d", "1900000000-:acme:client:c1:d", "-1900000000:acme:client:c1:d",
		"1900000000-1900000000:acme:client:c1:d", "1900000000-5:acme:client:c1:d", "1900000000-1900086400-1:acme:client:c1:d", "1900000000-+1900086400:acme:client:c1:d",
		"1900000000:acme:client:c1:x", "1900000000:acme:king:c1:d",
	} {
		if u, err := ParseUsername(bad); err == nil {
			t.Errorf("%q is taken for %+v", bad, u)
		}
	}
}

func TestCredentialEnd(t *testing.T) {
	expiry, outage := time.Unix(1_900_000_000, 0), time.Unix(1_900_086_400, 0)
	for _, tc := range []struct {
		outage       time.Time
		here, absent time.Time
	}{{time.Time{}, expiry, expiry}, {expiry.Add(-time.Hour), expiry, expiry}, {outage, expiry, outage}} {
		u := Username{Expiry: expiry, Outage: tc.outage}
		if u.End(false) != tc.here || u.End(true) != tc.absent {
			t.Errorf("%v: %v and %v", tc.outage, u.End(false), u.End(true))
		}
	}
}
