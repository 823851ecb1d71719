package e2e

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
	"sallyway/relay/relayd"
	"sallyway/relay/wire"
)

// overPath waits until the client's session with its gateway runs over a path whose name ends so.
func overPath(t *testing.T, n *lab.Node, suffix string, most time.Duration) (took time.Duration) {
	t.Helper()
	ctx := within(t, most)
	begin := time.Now()
	err := lab.Until(ctx, 50*time.Millisecond, func() error {
		var st client.Status
		if err := n.Status(ctx, &st); err != nil {
			return err
		}
		if len(st.Gateways) == 0 || !st.Gateways[0].Up || !strings.HasSuffix(" "+st.Gateways[0].Path, " "+suffix) {
			return fmt.Errorf("%+v, want %s", st.Gateways, suffix)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return time.Since(begin)
}

// upload sends n bytes through the tunnel and holds the sum that the other side made against theirs.
func upload(t *testing.T, s *lab.Site, p *private, n int64) (mbits float64) {
	t.Helper()
	begin := time.Now()
	resp := must(s.Client.HTTPClient().Post(p.web.URL("/sum"), "application/octet-stream", lab.Pattern(n)))(t)
	defer resp.Body.Close()
	b := must(io.ReadAll(resp.Body))(t)
	if !strings.HasPrefix(string(b), lab.PatternSum(n)) {
		t.Errorf("%d bytes up: %q", n, b)
	}
	return float64(n) * 8 / 1e6 / time.Since(begin).Seconds()
}

// TestLastRung: where 5349 does not pass at all, everything works over 2222 and 8443 by itself, whichever end is behind such a firewall,
// and goes back to UDP when that passes again, under an open connection.
func TestLastRung(t *testing.T) {
	l := newLab(t, lab.Config{})
	block := func(hosts ...*lab.Host) { check(t, l.BlockPort(wire.Port, hosts...)) }
	block(l.Client, l.Gateway)
	begin := time.Now()
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	t.Logf("blocked from the start: reached %v after the first program was started", time.Since(begin).Round(time.Millisecond))
	overPath(t, s.Laptop, string(legs.LastTLS), resume)
	for _, n := range []int64{1 << 20, 100 << 20} {
		t.Logf("%d MiB up over the last rung: %.0f Mbit/s", n>>20, upload(t, s, p, n))
	}
	var cs client.Status
	check(t, s.Laptop.Status(within(t, 5*time.Second), &cs))
	t.Logf("%d moves, the last one because %q", cs.Gateways[0].Moves, cs.Gateways[0].LastMove)
	var gs gateway.Status
	check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
	if len(gs.LastRung) == 0 || !gs.LastRung[0].Up || len(gs.Sessions) == 0 || !strings.HasSuffix(gs.Sessions[0].Path, string(legs.LastSSH)) {
		t.Errorf("the gateway shows %+v %+v", gs.LastRung, gs.Sessions)
	}
	connections := 0
	for _, n := range []*lab.Node{s.RelayA, s.RelayB} {
		var rs relayd.Status
		check(t, n.Status(within(t, 5*time.Second), &rs))
		if rs.LastRung == nil {
			t.Fatal("the relay's status has no last rung")
		}
		connections += rs.LastRung.Connections
	}
	if connections == 0 {
		t.Error("no relay shows SSH connections")
	}

	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 50))
	steps := rungs{t, s, pulse}
	steps.step("unblocked", "udp", 2*time.Minute)
	steps.step("the client's network", string(legs.LastTLS), 30*time.Second, l.Client)
	steps.step("unblocked again", "udp", 2*time.Minute)
	steps.step("the gateway's network", string(legs.LastTLS), 30*time.Second, l.Gateway)
	t.Logf("10 MiB up: %.0f Mbit/s", upload(t, s, p, 10<<20))
	steps.step("unblocked a third time", "udp", 2*time.Minute)
	steps.step("both networks", string(legs.LastTLS), 30*time.Second, l.Client, l.Gateway)
}

// rungs is a site with an open connection that must go on.
type rungs struct {
	t     *testing.T
	s     *lab.Site
	pulse *lab.Pulse
}

// step blocks 5349 for the hosts, and for nobody else, and waits until the session runs over what it should.
func (r *rungs) step(name, want string, most time.Duration, hosts ...*lab.Host) {
	r.t.Run(name, func(t *testing.T) {
		from := time.Now()
		check(t, r.s.BlockPort(wire.Port, hosts...))
		took := overPath(t, r.s.Laptop, want, most)
		check(t, r.pulse.WaitBeats(within(t, 20*time.Second), 50))
		gap, _ := r.pulse.LongestGap(from)
		t.Logf("over %s after %v, longest silence %v", want, took.Round(time.Millisecond), gap.Round(time.Millisecond))
	})
}

// TestLastRungWithoutStandby: with one relay each there is no SSH connection as long as it is not needed, and a session moves all the same.
func TestLastRungWithoutStandby(t *testing.T) {
	l := newLab(t, lab.Config{})
	one := []string{"--standby", "0"}
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true, GatewayArgs: one, ClientArgs: one}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	var gs gateway.Status
	check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
	if len(gs.LastRung) != 0 {
		t.Errorf("SSH connections without need: %+v", gs.LastRung)
	}
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 50))
	steps := rungs{t, s, pulse}
	steps.step("both networks", string(legs.LastTLS), 60*time.Second, l.Client, l.Gateway)
	steps.step("unblocked", "udp", 2*time.Minute)
	steps.step("the gateway's network", string(legs.LastTLS), 60*time.Second, l.Gateway)
	steps.step("unblocked again", "udp", 2*time.Minute)
}

// TestLastRungDrain: a relay that drains sends the sessions of its last rung to another relay's, and none of them stops.
func TestLastRungDrain(t *testing.T) {
	l := newLab(t, lab.Config{})
	check(t, l.BlockPort(wire.Port, l.Client, l.Gateway))
	s, err := l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true}, nil)
	check(t, err)
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 50))
	path := func() string {
		var st client.Status
		check(t, s.Laptop.Status(within(t, 5*time.Second), &st))
		return st.Gateways[0].Path
	}
	first := path()
	relay, other := s.RelayA, s.RelayB
	if strings.HasPrefix(first, s.RelayB.Record.Name+" ") {
		relay, other = other, relay
	}
	from := time.Now()
	ended := make(chan error, 1)
	go func() { ended <- relay.Stop() }() // SIGTERM: it drains
	overPath(t, s.Laptop, other.Record.Name+" "+string(legs.LastTLS), 40*time.Second)
	took := time.Since(from)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	check(t, pulse.WaitBeats(within(t, 20*time.Second), 50))
	gap, _ := pulse.LongestGap(from)
	t.Logf("from %s to %s after %v, longest silence %v", first, path(), took.Round(time.Millisecond), gap.Round(time.Millisecond))
}
