package e2e

import (
	"fmt"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
)

// transports waits until every leg of a node is up over the transport.
func transports(t *testing.T, n *lab.Node, want string, most time.Duration) {
	t.Helper()
	ctx := within(t, most)
	err := lab.Until(ctx, 100*time.Millisecond, func() error {
		var st struct {
			Relays []legs.Status `json:"relays"`
		}
		if err := n.Status(ctx, &st); err != nil {
			return err
		}
		for _, r := range st.Relays {
			if !r.Up || string(r.Transport) != want {
				return fmt.Errorf("%s: relay %s up %v over %q, want %s: %s", n.Name, r.Name, r.Up, r.Transport, want, r.Error)
			}
		}
		if len(st.Relays) == 0 {
			return fmt.Errorf("%s has no legs", n.Name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestUDPBlocked: where UDP does not pass, everything works over TLS by itself, and goes back to UDP when that passes again, under an
// open connection.
func TestUDPBlocked(t *testing.T) {
	l := newLab(t, lab.Config{})
	check(t, l.BlockUDP(true))
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, resume)
	transports(t, s.GatewayA, "tls", resume)
	transports(t, s.Laptop, "tls", resume)
	const n = 20 << 20
	resp := must(s.Client.HTTPClient().Post(p.web.URL("/sum"), "application/octet-stream", lab.Pattern(n)))(t)
	defer resp.Body.Close()
	b := make([]byte, 64)
	if k, _ := resp.Body.Read(b); string(b[:k]) != lab.PatternSum(n) {
		t.Errorf("20 MiB up: %q", b[:k])
	}
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 20))
	open := time.Now()
	check(t, l.BlockUDP(false))
	transports(t, s.GatewayA, "udp", 45*time.Second)
	transports(t, s.Laptop, "udp", 45*time.Second)
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 20))
	gap, _ := pulse.LongestGap(open)
	t.Logf("moved up to UDP: longest silence %v", gap.Round(time.Millisecond))
	blocked := time.Now()
	check(t, l.BlockUDP(true))
	check(t, pulse.WaitBeats(within(t, 60*time.Second), 50))
	transports(t, s.Laptop, "tls", 60*time.Second)
	check(t, pulse.WaitBeats(within(t, 60*time.Second), 50))
	gap, _ = pulse.LongestGap(blocked)
	t.Logf("UDP blocked under an open connection: longest silence %v", gap.Round(time.Millisecond))
}

// mostSilence bounds the silence of an open connection when one way to the relays stops passing and another one works. It is what such a move
// takes, several times over: this tells whether it happens at all by what notices, not how quick this machine is.
const mostSilence = 3 * time.Second

// TestUDPBlockedInFlow: UDP stops passing under an open connection, at one end or at both. It goes on over TLS, and back over UDP within a minute
// of its return.
func TestUDPBlockedInFlow(t *testing.T) {
	l := newLab(t, lab.Config{})
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	healthy(t, s)
	transports(t, s.Laptop, "udp", resume)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 300))
	for _, where := range []struct {
		name  string
		hosts []*lab.Host
		nodes []*lab.Node
	}{
		{"the client's network", []*lab.Host{l.Client}, []*lab.Node{s.Laptop}},
		{"the gateway's network", []*lab.Host{l.Gateway}, []*lab.Node{s.GatewayA}},
		{"both networks", []*lab.Host{l.Client, l.Gateway}, []*lab.Node{s.Laptop, s.GatewayA}},
	} {
		t.Run(where.name, func(t *testing.T) {
			from := time.Now()
			check(t, l.BlockUDPOf(where.hosts...))
			check(t, pulse.WaitBeats(within(t, 30*time.Second), 50))
			gap, _ := pulse.LongestGap(from)
			t.Logf("blocked: longest silence %v", gap.Round(time.Millisecond))
			if gap > mostSilence {
				t.Errorf("silence of %v", gap)
			}
			for _, n := range where.nodes {
				transports(t, n, "tls", resume)
			}
			check(t, pulse.WaitBeats(within(t, 30*time.Second), 200))
			gap, _ = pulse.LongestGap(from)
			t.Logf("until all legs are on TLS: longest silence %v", gap.Round(time.Millisecond))
			from = time.Now()
			check(t, l.BlockUDPOf())
			for _, n := range where.nodes {
				transports(t, n, "udp", time.Minute)
			}
			took := time.Since(from)
			overPath(t, s.Laptop, "udp", time.Minute-took)
			check(t, pulse.WaitBeats(within(t, 30*time.Second), 500))
			gap, _ = pulse.LongestGap(from)
			t.Logf("unblocked: back on UDP after %v, longest silence %v", took.Round(time.Millisecond), gap.Round(time.Millisecond))
		})
	}
}

// TestLossMovesNothing: with two packets in a hundred lost each way nobody leaves UDP, under load.
func TestLossMovesNothing(t *testing.T) {
	l := newLab(t, lab.Config{})
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	healthy(t, s)
	transports(t, s.Laptop, "udp", resume)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 20*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, l.Impair(l.Client, 2, 2))
	from := time.Now()
	for time.Since(from) < 20*time.Second {
		upload(t, s, p, 4<<20)
	}
	gap, _ := pulse.LongestGap(from)
	var cs client.Status
	check(t, s.Laptop.Status(within(t, 5*time.Second), &cs))
	var gs gateway.Status
	check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
	for _, r := range append(cs.Relays, gs.Relays...) {
		if r.Moves != 0 || r.Transport != "udp" {
			t.Errorf("leg on %s: %d moves, over %s, because %q", r.Name, r.Moves, r.Transport, r.LastMove)
		}
	}
	t.Logf("20 s of load at 2 %% loss: longest silence %v, %d moves of the session: %s", gap.Round(time.Millisecond), cs.Gateways[0].Moves, cs.Gateways[0].LastMove)
}
