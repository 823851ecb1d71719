package leg_test

import (
	"net"
	"net/netip"
	"testing"

	"sallyway/stun"
)

// A relay tells who asks where it sees them, and what it sends is no larger than what was asked with.
func TestRelayAnswersBinding(t *testing.T) {
	key := newPKI(t, relayNode)
	a, b := startRelay(t, key), startRelay(t, key)
	d, err := stun.Discover(t.Context(), []netip.AddrPort{a.addr, b.addr})
	if err != nil {
		t.Fatal(err)
	}
	if d.NAT != stun.NATNone || len(d.Bindings) != 2 || d.Bindings[0].RTT <= 0 {
		t.Errorf("discovery %+v", d)
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got, err := stun.Reflexive(t.Context(), conn, a.addr)
	if err != nil || got.Reflexive != conn.LocalAddr().(*net.UDPAddr).AddrPort() {
		t.Errorf("seen as %v (%v), is %v", got.Reflexive, err, conn.LocalAddr())
	}
}
