//go:build linux

package browser

import (
	"net/netip"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
)

// placed says where the estate's relays and gateways are, what they wish, and what was found from outside.
func placed(t *testing.T, reg *registry.Registry) {
	t.Helper()
	ctx := t.Context()
	const org = registry.DefaultOrg
	text := func(s string) *string { return &s }
	for name, p := range map[string]control.UpdatePlaces{
		"fra-1": {Region: text("eu-central"), FailureDomain: text("provider-a")}, "ams-2": {Region: text("eu-west"), FailureDomain: text("provider-b")},
		"lon-1": {Region: text("eu-west"), FailureDomain: text("provider-a")}, "sin-1": {Region: text("ap-southeast")}, "nyc-1": {Region: text("us-east")},
	} {
		_, err := reg.UpdateNode(ctx, org, identity.Relay, name, control.UpdateNode{UpdatePlaces: p})
		check(t, err)
	}
	_, err := reg.UpdateNode(ctx, org, identity.Gateway, "office", control.UpdateNode{UpdatePlaces: control.UpdatePlaces{
		Region: text("eu-central"), PinRelays: &[]string{"fra-1"}, ExcludeRelays: &[]string{"nyc-1"},
	}})
	check(t, err)
	found := make(map[string]control.Outside)
	for name, s := range map[string]string{"fra-1": "203.0.113.7", "sin-1": "2001:db8::17"} {
		n, err := reg.Node(ctx, org, identity.Relay, name)
		check(t, err)
		addr := netip.MustParseAddr(s)
		o := control.Outside{State: control.OutsideReached, At: time.Now(), Address: &addr, RTT: 11 * time.Millisecond, Checks: []control.OutsideCheck{
			{Name: "STUN 5349/udp", OK: true, Detail: "answers in 11.2 ms"},
			{Name: "TLS 5349/tcp", OK: true, Detail: "handshake in 24.0 ms"},
			{Name: "TLS 8443/tcp", OK: true, Detail: "handshake in 23.6 ms"},
			{Name: "SSH 2222/tcp", OK: true, Detail: "answers"},
		}}
		if name == "sin-1" {
			o.State, o.Checks[0] = control.OutsidePartly, control.OutsideCheck{Name: "STUN 5349/udp", Detail: "no answer in 3s"}
			o.Why, o.Remedy = "not reached from outside by STUN 5349/udp (no answer in 3s)", "open 5349/udp in the firewall of sin-1"
		}
		found[n.ID] = o
	}
	check(t, reg.FoundOutside(ctx, found))
}
