package bench

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
)

// freePort is a port of loopback that was free a moment ago, for UDP and TCP.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	for range 100 {
		u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
		if err != nil {
			t.Fatal(err)
		}
		addr := u.LocalAddr().(*net.UDPAddr).AddrPort()
		ln, err := net.Listen("tcp4", addr.String())
		if cerr := u.Close(); cerr != nil {
			t.Fatal(cerr)
		}
		if err != nil {
			continue
		}
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		return addr
	}
	t.Fatal("no port is free")
	return netip.AddrPort{}
}

// run runs f until the test ends; it must end as it was asked to.
func run(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestLegs moves bytes both ways through a session of ours over a relay of ours: certificates, DTLS, legs, QUIC, sink and source.
func TestLegs(t *testing.T) {
	dir, key := t.TempDir(), newRelayKey()
	t.Setenv(keyVariable, hex.EncodeToString(key))
	if err := writePKI(dir, identity.Relay, identity.Gateway, identity.Client); err != nil {
		t.Fatal(err)
	}
	server, orders := freePort(t), freePort(t)
	config, err := json.Marshal(legEnd{Relay: server, Dir: dir, Listen: orders})
	if err != nil {
		t.Fatal(err)
	}
	run(t, func(ctx context.Context) error { return RelayServer(ctx, TurnConfig{Server: server, Dir: dir}) })
	// Each end needs the one before it: the next attempt may find it.
	for _, part := range []string{"leg-gateway", "leg-client"} {
		run(t, func(ctx context.Context) (err error) {
			for end := time.Now().Add(legWait); ctx.Err() == nil && time.Now().Before(end); {
				if err = Part(ctx, part, config); err == nil {
					return nil
				}
				select {
				case <-time.After(250 * time.Millisecond): // a relay answers five requests for a peer a second
				case <-ctx.Done():
				}
			}
			return err
		})
	}
	for _, down := range []bool{false, true} {
		o := legOrder{Down: down, Time: 50 * time.Millisecond}
		var a legAnswer
		var err error
		for end := time.Now().Add(legWait); time.Now().Before(end); {
			a, err = o.order(t.Context(), func(ctx context.Context) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "tcp4", orders.String())
			})
			if err == nil {
				break
			}
			time.Sleep(50 * time.Millisecond) // a poll: of thousands of attempts at a free port, one would connect to itself
		}
		if err != nil || a.Bytes == 0 || a.Took < o.Time {
			t.Errorf("%+v: %+v, %v", o, a, err)
		}
	}
}

// TestPart names what there is.
func TestPart(t *testing.T) {
	if err := Part(t.Context(), "nothing", nil); err == nil || !strings.Contains(err.Error(), "leg-client") {
		t.Error(err)
	}
}

func TestLayersTable(t *testing.T) {
	sample := func(way string, down bool, gbit float64, client, relay, gateway float64) layerSample {
		s := layerSample{way: way, down: down, bits: gbit * 1e9, perGB: map[string]float64{relayRole: relay}}
		if client > 0 {
			s.perGB[clientRole], s.perGB[gatewayRole] = client, gateway
		}
		return s
	}
	raw := layerSample{way: Raw, bits: 50e9}
	r := &Result{Alone: Alone{Layers: sumLayers([]layerSample{
		raw, sample(RelayLayer, false, 20, 0, 0.25, 0), sample(LegLayer, false, 6, 1, 0.25, 0.75), sample(Sallyway, false, 4, 2, 0.5, 1.5),
		sample(RelayLayer, false, 10, 0, 0.25, 0), sample(RelayLayer, false, 30, 0, 0.25, 0), sample(RelayLayer, true, 9, 0, 0.2, 0),
	})}}
	md := r.Markdown()
	for _, want := range []string{
		"| " + Raw + " | up | 50000 | 50000–50000 | – | – | – | – | – | – |",
		"| " + RelayLayer + " | up | 20000 | 10000–30000 | 0.25 | – | 0.25 | – | 0.25 | 6 % |",
		"| " + LegLayer + " | up | 6000 | 6000–6000 | 2.00 | 1.00 | 0.25 | 0.75 | 1.75 | 44 % |",
		"| " + Sallyway + " | up | 4000 | 4000–4000 | 4.00 | 2.00 | 0.50 | 1.50 | 2.00 | 50 % |",
		"| " + RelayLayer + " | down | 9000 | 9000–9000 | 0.20 | – | 0.20 | – | 0.20 | – |",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing in\n%s", want, md)
		}
	}
}
