package bench

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/relay/udpio"
)

// TestRelayClientsMeet binds two clients of our relay to each other and passes a datagram.
func TestRelayClientsMeet(t *testing.T) {
	key := newRelayKey()
	t.Setenv(keyVariable, hex.EncodeToString(key))
	addr := freePort(t)
	run(t, func(ctx context.Context) error { return RelayServer(ctx, TurnConfig{Server: addr}) })
	dial := func(server netip.AddrPort) (*net.UDPConn, error) {
		return net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(server))
	}
	var p *relayPair
	var err error
	for end := time.Now().Add(10 * time.Second); ; {
		if p, err = newRelayPair(addr, 0, true, dial, dial, credentialsOf(OwnRelay, key)); err == nil || time.Now().After(end) {
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
		{Server: OwnRelay, Link: Veth, Pairs: 1, Segments: 44, Runs: 5, BitsPerSecond: 8e9, Low: 7e9, High: 9e9, PacketsPerS: 7e5, CPUPerGB: 0.5, CPUPerGbit: 0.0625, PerCore: 16e9},
		{Server: PionRelay, Link: Veth, Pairs: 1, Segments: 44, Runs: 5, BitsPerSecond: 0.5e9, Low: 0.5e9, High: 0.5e9, PacketsPerS: 4e4, CPUPerGB: 16, CPUPerGbit: 2, PerCore: 0.5e9, Lost: 0.01},
		{Server: OwnRelay, Link: Loopback, Pairs: 1, Segments: 13, Runs: 5, BitsPerSecond: 8e9, PacketsPerS: 7e5, CPUPerGB: 4, CPUPerGbit: 0.5, PerCore: 2e9},
	}, Alone: Alone{
		RelayDelay:  []Delay{{Server: OwnRelay, Link: Veth, Load: 4e9, P50: 60, P99: 120, Added50: -2, Added99: 20}, {Server: Forwarder, Link: Veth, P50: 62, P99: 100, Lost: 1}},
		RelayMemory: []RelayMemory{{Server: OwnRelay, Control: "DTLS", Allocations: 10000, Empty: 20 << 20, Idle: 620 << 20, Settled: 420 << 20, Lost: 7}, {Server: PionRelay, Control: "UDP", Allocations: 100, Empty: 10 << 20, Idle: 20 << 20}},
	}}
	md := r.Markdown()
	for _, want := range []string{
		"| " + OwnRelay + " | veth | 1 | 44 | 8.00 | 7.00–9.00 | 700000 | 0.50 | 0.062 | 16.0 | 0.0 % | 16.0 × |",
		"| " + PionRelay + " | veth | 1 | 44 | 0.50 | 0.50–0.50 | 40000 | 16.00 | 2.000 | 0.5 | 1.0 % | 1.0 × |",
		"| veth, 1 pairs, 44 segments | ≥ 5.0 Gbit/s per core | 16.0 Gbit/s per core | holds |",
		"| veth, 1 pairs, 44 segments | ≥ 5.0 × pion | 16.0 × pion | holds |",
		"| loopback, 1 pairs, 13 segments | ≥ 2.5 Gbit/s per core | 2.0 Gbit/s per core | missed |",
		"| loopback, 1 pairs, 13 segments | ≤ 1.50 CPU s/GB | 4.00 CPU s/GB | missed |",
		"| " + OwnRelay + " | veth | 4.0 | 60 | 120 | -2 | 20 | 0 |",
		"| " + Forwarder + " | veth | 0.0 | 62 | 100 | – | – | 1 |",
		"| " + OwnRelay + " | DTLS | 10000 | 20 | 620 | 420 | 7 | 41.0 |",
		"| 10000 idle allocations, DTLS | ≤ 300 MiB | 420 MiB | missed |",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing in\n%s", want, md)
		}
	}
	for _, unwanted := range []string{"MTU", "raw TCP", "13 segments | ≥ 5.0 × pion", "100 idle allocations"} {
		if strings.Contains(md, unwanted) {
			t.Errorf("%q is in\n%s", unwanted, md)
		}
	}
}

// TestMedianForwarded: the run in the middle, the spread of all, and a CPU figure of its own.
func TestMedianForwarded(t *testing.T) {
	f := medianForwarded([]Forwarded{
		{BitsPerSecond: 3e9, CPUPerGB: 1, Window: 3},
		{BitsPerSecond: 1e9, CPUPerGB: 2, Window: 1},
		{BitsPerSecond: 2e9, CPUPerGB: 4, Window: 2},
	})
	want := Forwarded{Runs: 3, Window: 2, BitsPerSecond: 2e9, Low: 1e9, High: 3e9, CPUPerGB: 2, CPUPerGbit: 0.25, PerCore: 4e9}
	if f != want {
		t.Errorf("got %+v, want %+v", f, want)
	}
}

// TestForwarder: what one sends the other gets.
func TestForwarder(t *testing.T) {
	addr := net.UDPAddrFromAddrPort(freePort(t))
	run(t, func(ctx context.Context) error { return forwardPart(ctx, fmt.Appendf(nil, `{"Listen": %q}`, addr)) })
	ask := func(c net.Conn, say string) string {
		buf := make([]byte, 64)
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); { // it may not listen yet
			if _, err := c.Write([]byte(say)); err != nil {
				continue
			}
			if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		return "nothing"
	}
	var ends [2]*net.UDPConn
	var err error
	for i := range ends {
		if ends[i], err = net.DialUDP("udp4", nil, addr); err != nil {
			t.Fatal(err)
		}
		defer ends[i].Close()
		if got := ask(ends[i], "hello"); got != "hello" {
			t.Errorf("the greeting came back as %q", got)
		}
	}
	p := &relayPair{}
	for i, c := range []**relayClient{&p.a, &p.b} {
		sock, _, err := udpio.New(ends[i], udpio.Config{})
		if err != nil {
			t.Fatal(err)
		}
		*c = &relayClient{udp: ends[i], sock: sock}
	}
	times, lost, err := p.ping(t.Context(), 20*time.Millisecond)
	if err != nil || lost > 0 || len(times) == 0 {
		t.Errorf("%d pings, %d lost: %v", len(times), lost, err)
	}
}
