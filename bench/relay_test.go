package bench

import (
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/relay/udpio"
	"sallyway/relay/wire"
)

// TestRelayClientsMeet binds two clients of our relay to each other and passes a datagram.
func TestRelayClientsMeet(t *testing.T) {
	key := []byte("an HMAC key of exactly 32 bytes!")
	t.Setenv(keyVariable, hex.EncodeToString(key))
	addr := netip.MustParseAddrPort("127.0.0.1:0")
	probe, _, err := udpio.Listen(t.Context(), addr, udpio.Config{})
	if err != nil {
		t.Fatal(err)
	}
	addr = probe.LocalAddr()
	if err := probe.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- RelayServer(ctx, TurnConfig{Server: addr}) }()
	defer func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	credentials := func(k identity.Kind, _ int) (string, string, string) {
		u := wire.Username{Expiry: time.Now().Add(time.Hour), Node: identity.Node{Org: relayOrg, Kind: k, ID: "n0"}, Flags: wire.FlagPlainData}.String()
		return u, wire.Realm, wire.Password(key, u)
	}
	var p *relayPair
	for end := time.Now().Add(10 * time.Second); ; {
		if p, err = newRelayPair(addr, 0, true, credentials); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	message := append([]byte{relayChannel >> 8, relayChannel & 0xff, 0, 5}, "hello"...)
	if err := p.a.sock.Write(message, 0, 0, udpio.Peer{}); err != nil {
		t.Fatal(err)
	}
	if err := p.b.udp.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, udpio.MaxRead)
	m, err := p.b.sock.Read(buf)
	if err != nil || string(buf[:m.N]) != string(message) {
		t.Errorf("%q, %v", buf[:m.N], err)
	}
}

func TestRelayTable(t *testing.T) {
	r := &Result{Relay: []Forwarded{
		{Server: OwnRelay, Pairs: 1, Segments: 44, BitsPerSecond: 8e9, PacketsPerS: 7e5, CPUPerGB: 0.5},
		{Server: PionRelay, Pairs: 1, Segments: 44, BitsPerSecond: 0.5e9, PacketsPerS: 4e4, CPUPerGB: 16, Lost: 0.01},
	}}
	md := r.Markdown()
	for _, want := range []string{
		"| " + OwnRelay + " | 1 | 44 | 8.00 | 700000 | 0.50 | 0.0 % | 16.0 × |",
		"| " + PionRelay + " | 1 | 44 | 0.50 | 40000 | 16.00 | 1.0 % | 1.0 × |",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing in\n%s", want, md)
		}
	}
	if strings.Contains(md, "MTU") || strings.Contains(md, "raw TCP") {
		t.Errorf("a run of relays tells of the lab:\n%s", md)
	}
}
