package leg_test

import (
	"net/netip"
	"os"
	"testing"
	"time"

	world "sallyway/internal/lab"
	"sallyway/relay/leg"
	"sallyway/relay/wire"
	"sallyway/stun"
)

// Client and gateway behind masquerading routers of their own: what they find out about these, what passes over the relay, and how soon a
// cut is noticed.
func TestBehindNAT(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	w, err := world.New(world.Config{NAT: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	key := newPKI(t, relayNode)
	at := func(h *world.Host) netip.AddrPort { return netip.AddrPortFrom(w.Addr(h), wire.Port) }
	one := startRelayOn(t, key, at(w.Relay1), w.Relay1.Do)
	two := startRelayOn(t, key, at(w.Relay2), w.Relay2.Do)

	var d *stun.Discovery
	if err := w.Client.Do(func() (err error) {
		d, err = stun.Discover(t.Context(), []netip.AddrPort{one.addr, two.addr})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Log(d)
	if d.NAT != stun.NATEndpointIndependent || len(d.Bindings) != 2 || d.Bindings[0].Reflexive.Addr() == d.Local.Addr() {
		t.Errorf("discovery %+v", d)
	}

	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		client, gateway := one.config(clientNode, tr), one.config(gatewayNode, tr)
		p := connectFrom(t, client, gateway, w.Client.Do, w.Gateway.Do)
		if p.client.ReflexiveAddr().Addr() == p.client.LocalAddr().Addr() {
			t.Errorf("no NAT: %v", p.client.ReflexiveAddr())
		}
		exchange(t, p.out, p.in, 4<<20, 128<<10, 1452)
		exchange(t, p.in, p.out, 4<<20, 128<<10, 1452)
		if tr == leg.UDP {
			if err := w.Cut(w.Relay1); err != nil {
				t.Fatal(err)
			}
			p.client.Suspect()
			lost(t, p, 2*time.Second)
			if err := w.Cut(); err != nil {
				t.Fatal(err)
			}
		}
		p.client.Close()
		p.gateway.Close()
	}
}
