package e2e

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
)

// onPath waits until the client's session with its gateway runs over a direct path, or over none.
func onPath(t *testing.T, n *lab.Node, direct bool, most time.Duration) (took time.Duration, st client.GatewayStatus) {
	t.Helper()
	ctx := within(t, most)
	begin := time.Now()
	err := lab.Until(ctx, 20*time.Millisecond, func() error {
		var all client.Status
		if err := n.Status(ctx, &all); err != nil {
			return err
		}
		if len(all.Gateways) != 1 || !all.Gateways[0].Up {
			return errors.New("no session")
		}
		if st = all.Gateways[0]; strings.HasPrefix(st.Path, "direct ") != direct {
			return fmt.Errorf("over %s, last move %q, direct %+v", st.Path, st.LastMove, st.Direct)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(begin), st
}

// transfers run uploads, each held against its sum, until stopped.
type transfers struct {
	stop chan struct{}
	done chan error
	n    int
}

func startTransfers(s *lab.Site, p *private, size int64) *transfers {
	x := &transfers{stop: make(chan struct{}), done: make(chan error, 1)}
	hc := s.Client.HTTPClient()
	go func() {
		for {
			select {
			case <-x.stop:
				x.done <- nil
				return
			default:
			}
			resp, err := hc.Post(p.web.URL("/sum"), "application/octet-stream", lab.Pattern(size))
			if err != nil {
				x.done <- err
				return
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err == nil && !strings.HasPrefix(string(b), lab.PatternSum(size)) {
				err = fmt.Errorf("%d bytes arrived as others: %q", size, b)
			}
			if err != nil {
				x.done <- err
				return
			}
			x.n++
		}
	}()
	return x
}

func (x *transfers) end(t *testing.T) {
	t.Helper()
	close(x.stop)
	if err := <-x.done; err != nil {
		t.Error(err)
	}
	if x.n == 0 {
		t.Error("no upload has ended")
	}
}

// TestDirect: behind a NAT each, client and gateway find a direct path, and running connections move to it, off it when it is blocked and
// back when it is not any more. The organization's setting keeps every packet on relays.
func TestDirect(t *testing.T) {
	for name, cfg := range map[string]lab.Config{
		"behind NATs": {NAT: true, Direct: true}, "no NAT": {Direct: true},
	} {
		t.Run(name, func(t *testing.T) { testDirect(t, cfg) })
	}
}

func testDirect(t *testing.T, cfg lab.Config) {
	s := newSite(t, cfg, lab.SiteConfig{NoBranch: true})
	set := func(on string) {
		t.Helper()
		must(s.Sallyway(within(t, 20*time.Second), "organization", "update", "--direct", on))(t)
	}
	set("off")
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	onPath(t, s.Laptop, false, 10*time.Second)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	goesOn := func() {
		t.Helper()
		check(t, pulse.WaitBeats(within(t, 20*time.Second), 50))
	}
	silence := func(since time.Time) time.Duration {
		gap, _ := pulse.LongestGap(since)
		return gap.Round(time.Millisecond)
	}
	check(t, s.CountDirect())
	const size = 64 << 20
	for range 3 {
		t.Logf("%d MiB up over a relay: %.0f Mbit/s", size>>20, upload(t, s, p, size))
	}
	goesOn()
	if n := must(s.DirectPackets())(t); n != 0 {
		t.Errorf("%d direct packets where the organization allows none", n)
	}

	load := startTransfers(s, p, 16<<20)
	began := time.Now()
	set("on")
	took, st := onPath(t, s.Laptop, true, 20*time.Second)
	goesOn()
	t.Logf("over %s, RTT %v, %v after it was allowed; longest silence %v", st.Path, st.RTT, took.Round(time.Millisecond), silence(began))
	if !strings.Contains(st.LastMove, "direct") || st.RTT == 0 {
		t.Errorf("status shows %+v", st)
	}
	load.end(t)
	var gs gateway.Status
	check(t, s.GatewayA.Status(within(t, 5*time.Second), &gs))
	if len(gs.Sessions) != 1 || !strings.HasPrefix(gs.Sessions[0].Path, "direct ") || gs.Direct.Links == 0 {
		t.Errorf("the gateway shows %+v, %+v", gs.Sessions, gs.Direct)
	}
	for range 3 {
		t.Logf("%d MiB up without a relay: %.0f Mbit/s", size>>20, upload(t, s, p, size))
	}
	if n := must(s.DirectPackets())(t); n < 3*size/(64<<10) { // the router may see 64 KiB as one
		t.Errorf("%d direct packets for %d bytes", n, 3*size)
	}
	_, st = onPath(t, s.Laptop, true, time.Second)
	if st.Standby == "" {
		t.Error("no standby on a relay")
	}

	load = startTransfers(s, p, 16<<20)
	began = time.Now()
	check(t, s.BlockDirect(true))
	took, st = onPath(t, s.Laptop, false, 10*time.Second)
	goesOn()
	t.Logf("blocked under load: over %s (%s) after %v, longest silence %v", st.Path, st.LastMove, took.Round(time.Millisecond), silence(began))
	if gap := silence(began); gap > 2*time.Second {
		t.Errorf("silent for %v", gap)
	}
	began = time.Now()
	check(t, s.BlockDirect(false))
	took, st = onPath(t, s.Laptop, true, 90*time.Second)
	goesOn()
	t.Logf("unblocked under load: over %s after %v, longest silence %v", st.Path, took.Round(time.Millisecond), silence(began))
	load.end(t)

	began = time.Now()
	set("off")
	took, st = onPath(t, s.Laptop, false, 5*time.Second)
	goesOn()
	t.Logf("not allowed any more: over %s (%s) after %v, longest silence %v", st.Path, st.LastMove, took.Round(time.Millisecond), silence(began))
	check(t, lab.Until(within(t, 10*time.Second), 50*time.Millisecond, func() error {
		var gs gateway.Status
		if err := s.GatewayA.Status(t.Context(), &gs); err != nil {
			return err
		}
		if gs.Direct.Links > 0 || gs.Direct.Peers > 0 {
			return fmt.Errorf("%+v", gs.Direct)
		}
		return nil
	}))
	before := must(s.DirectPackets())(t)
	upload(t, s, p, 16<<20)
	goesOn()
	if n := must(s.DirectPackets())(t); n != before {
		t.Errorf("%d direct packets after it was forbidden", n-before)
	}
}

// TestDirectOff: neither a client nor a gateway that is told not to sends or answers anything without a relay.
func TestDirectOff(t *testing.T) {
	for name, sc := range map[string]lab.SiteConfig{
		"client": {NoBranch: true, ClientArgs: []string{"--direct", "off"}}, "gateway": {NoBranch: true, GatewayArgs: []string{"--direct", "off"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, lab.Config{Direct: true})
			check(t, l.CountDirect())
			s := must(l.Build(within(t, 2*time.Minute), sc, nil))(t)
			p := servePrivate(t, s)
			reach(t, s.Client, p.echo.Addr, 30*time.Second)
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
			defer pulse.Stop()
			check(t, pulse.WaitBeats(within(t, 20*time.Second), 400)) // the first try is a second after the session's begin
			if n := must(s.DirectPackets())(t); n != 0 {
				t.Errorf("%d direct packets", n)
			}
		})
	}
}

// TestDirectWithoutStandby: a client that holds one relay only moves to a direct path, too, and back to the relay when that is blocked.
func TestDirectWithoutStandby(t *testing.T) {
	s := newSite(t, lab.Config{NAT: true, Direct: true}, lab.SiteConfig{NoBranch: true, ClientArgs: []string{"--standby", "0"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	load := startTransfers(s, p, 16<<20)
	took, st := onPath(t, s.Laptop, true, 20*time.Second)
	check(t, pulse.WaitBeats(within(t, 20*time.Second), 100))
	t.Logf("over %s after %v, standby %q", st.Path, took.Round(time.Millisecond), st.Standby)
	began := time.Now()
	check(t, s.BlockDirect(true))
	took, st = onPath(t, s.Laptop, false, 10*time.Second)
	check(t, pulse.WaitBeats(within(t, 20*time.Second), 100))
	gap, _ := pulse.LongestGap(began)
	t.Logf("blocked under load: over %s (%s) after %v, longest silence %v", st.Path, st.LastMove, took.Round(time.Millisecond), gap.Round(time.Millisecond))
	if gap > 2*time.Second {
		t.Errorf("silent for %v", gap)
	}
	load.end(t)
}

// TestDirectIdle: a direct path that dies while nothing is said is left with the next byte.
func TestDirectIdle(t *testing.T) {
	const metrics = "127.0.0.1:9464"
	s := newSite(t, lab.Config{NAT: true, Direct: true}, lab.SiteConfig{
		NoBranch: true, ClientArgs: []string{"--metrics-listen", metrics}, GatewayArgs: []string{"--metrics-listen", metrics},
	})
	shows := func(h *lab.Host, lines ...string) {
		t.Helper()
		check(t, lab.Until(within(t, 5*time.Second), 50*time.Millisecond, func() error {
			resp, err := h.HTTPClient().Get("http://" + metrics + "/metrics")
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				return err
			}
			for _, l := range lines {
				if !strings.Contains("\n"+string(b), "\n"+l+"\n") {
					return fmt.Errorf("the metrics have no line %s", l)
				}
			}
			return nil
		}))
	}
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	c := must(s.Client.Dial(within(t, 10*time.Second), "tcp", p.echo.Addr.String()))(t)
	defer c.Close()
	echoes(t, c, []byte("hello"))
	onPath(t, s.Laptop, true, 20*time.Second)
	echoes(t, c, []byte("without a relay"))
	shows(s.Client, `sallyway_path_active{gateway="office",relay="",rung="direct"} 1`, `sallyway_path_moves_total{reason="direct_works"} 1`,
		`sallyway_legs_up{for="dialling",transport="udp"} 2`, `sallyway_last_rung_sessions 0`)
	shows(s.Gateway, `sallyway_gateway_sessions{relay="",rung="direct"} 1`, `sallyway_legs_up{for="serving",transport="udp"} 2`)
	<-time.After(3 * time.Second) // a session is idle, and probes seldom, 2 s after its last byte
	onPath(t, s.Laptop, true, time.Second)
	check(t, s.BlockDirect(true))
	began := time.Now()
	echoes(t, c, []byte("over a relay again"))
	took := time.Since(began)
	t.Logf("the next byte was answered after %v", took.Round(time.Millisecond))
	if took > 2*time.Second {
		t.Errorf("answered after %v", took)
	}
	onPath(t, s.Laptop, false, time.Second)
	shows(s.Client, `sallyway_path_moves_total{reason="unanswered"} 1`)
}
