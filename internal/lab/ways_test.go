package lab_test

import (
	"net/netip"
	"testing"

	"sallyway/internal/lab"
)

func TestCutWays(t *testing.T) {
	l := newLab(t, lab.Config{})
	reaches := func(from *lab.Host) bool {
		return sends(t, from, l.Relay1, "udp", netip.AddrPortFrom(l.Addr(l.Relay1), 5349))
	}
	for _, c := range []struct {
		name            string
		ways            []lab.Way
		client, gateway bool
	}{
		{"none", nil, true, true},
		{"one", []lab.Way{{From: l.Client, To: l.Relay1}}, false, true},
		{"two", []lab.Way{{From: l.Client, To: l.Relay1}, {From: l.Gateway, To: l.Relay1}}, false, false},
		{"back", []lab.Way{{From: l.Relay1, To: l.Client}}, true, true},
		{"none again", nil, true, true},
	} {
		if err := l.CutWays(c.ways...); err != nil {
			t.Fatal(err)
		}
		if got := reaches(l.Client); got != c.client {
			t.Errorf("%s: the client reaches the relay %v", c.name, got)
		}
		if got := reaches(l.Gateway); got != c.gateway {
			t.Errorf("%s: the gateway reaches the relay %v", c.name, got)
		}
	}
}
