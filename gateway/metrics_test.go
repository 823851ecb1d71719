package gateway

import (
	"maps"
	"testing"

	"sallyway/internal/legs"
	"sallyway/relay/leg"
)

func TestCountWays(t *testing.T) {
	up := []legs.Status{
		{Name: "fra-1", Up: true, Transport: leg.UDP},
		{Name: "ams-2", Up: true, Transport: leg.TLS},
		{Name: "par-3", Transport: leg.UDP}, // was
		{Name: "spare", Up: true, Transport: leg.UDP},
	}
	paths := []string{"fra-1", "fra-1", "ams-2", "par-3", "direct 192.0.2.1:4444", "direct [2001:db8::1]:4444", "ams-2 ssh-2222"}
	want := map[way]int{
		{"udp", "fra-1"}: 2, {"tls", "ams-2"}: 1, {"down", "par-3"}: 1, {"direct", ""}: 2, {"ssh-2222", "ams-2"}: 1, {"udp", "spare"}: 0,
	}
	if got := countWays(paths, up); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
