package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
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

// binds waits until a relay answers a Binding request (RFC 8489 §5) of a host.
func binds(t *testing.T, h *lab.Host, relay netip.AddrPort) {
	t.Helper()
	c := must(h.Dial(within(t, 5*time.Second), "udp", relay.String()))(t)
	defer c.Close()
	request := append([]byte{0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42}, make([]byte, 12)...)
	check(t, lab.Until(within(t, 20*time.Second), time.Millisecond, func() error {
		if _, err := c.Write(request); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1500))
		return err
	}))
}

// TestDirectIPv6: nodes find a direct path over IPv6, whether their relays are reached over it or not.
func TestDirectIPv6(t *testing.T) {
	// Where the relays' names lead: the relays themselves and the platform always know both families.
	const both, six = "both families", "IPv6 alone"
	for _, names := range []string{both, six} {
		t.Run(names, func(t *testing.T) {
			l := newLab(t, lab.Config{Direct: true})
			v6 := func(n int) string { return fmt.Sprintf("2001:db8:%x::2", n) } // of a host's site, as its IPv4 address 203.0.113.(16n+2)
			relays := map[string]int{"relay-1.test": 3, "relay-2.test": 4}
			for _, h := range []*lab.Host{l.Client, l.Gateway, l.Relay1, l.Relay2, l.Platform} {
				var lines strings.Builder
				lines.WriteString("127.0.0.1 localhost\n::1 localhost\n")
				for name, n := range relays {
					fmt.Fprintf(&lines, "%s %s\n", v6(n), name)
					if end := h == l.Client || h == l.Gateway; names == both || !end {
						fmt.Fprintf(&lines, "203.0.113.%d %s\n", 16*n+2, name)
					}
				}
				check(t, os.WriteFile(filepath.Join(h.Dir(), "hosts"), []byte(lines.String()), 0o644))
			}
			s := must(l.Build(within(t, 2*time.Minute), lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--listen-ip", "::"}}, nil))(t)
			org := func(args ...string) { t.Helper(); must(s.Sallyway(within(t, 20*time.Second), args...))(t) }
			org("organization", "update", "--direct", "off")
			for name := range relays {
				org("relay", "update", strings.TrimSuffix(name, ".test"), "--host", name)
			}
			p := servePrivate(t, s)
			reach(t, s.Client, p.echo.Addr, 30*time.Second)
			for _, n := range []*lab.Node{s.Laptop, s.GatewayA} {
				for name := range relays { // the neighbours are found by then
					binds(t, n.Host, netip.AddrPortFrom(netip.MustParseAddr(v6(relays[name])), 5349))
				}
				check(t, n.Proc.Restart()) // a leg that works stays where it is
				check(t, n.WaitReady(within(t, 30*time.Second)))
				ctx := within(t, 30*time.Second)
				check(t, lab.Until(ctx, 100*time.Millisecond, func() error {
					var st struct{ Relays []legs.Status }
					if err := n.Status(ctx, &st); err != nil {
						return err
					}
					for _, r := range st.Relays {
						if !strings.HasSuffix(r.Host, ".test") || !r.Up || r.Reflexive.Addr().Is6() != (names == six) {
							return fmt.Errorf("%s has %+v", n.Name, r)
						}
					}
					return nil
				}))
			}
			reach(t, s.Client, p.echo.Addr, 30*time.Second)
			if names == both { // what a NAT in the way of IPv4 does
				for _, h := range []struct {
					*lab.Host
					site int
				}{{s.Client, 5}, {s.Gateway, 1}} {
					check(t, h.Do(func() error {
						return netlink.RouteAdd(&netlink.Route{
							Dst: &net.IPNet{IP: net.IPv4(203, 0, 113, byte(16*h.site)).To4(), Mask: net.CIDRMask(28, 32)}, Type: unix.RTN_BLACKHOLE,
						})
					}))
				}
			}
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
			defer pulse.Stop()
			org("organization", "update", "--direct", "on")
			took, st := onPath(t, s.Laptop, true, 30*time.Second)
			if !strings.HasPrefix(st.Path, "direct ["+v6(5)+"]:") {
				t.Errorf("over %s", st.Path)
			}
			check(t, pulse.WaitBeats(within(t, 20*time.Second), 100))
			onPath(t, s.Laptop, true, time.Second)
			gap, _ := pulse.LongestGap(time.Time{})
			t.Logf("over %s, RTT %v, %v after it was allowed; longest silence %v", st.Path, st.RTT, took.Round(time.Millisecond), gap.Round(time.Millisecond))
		})
	}
}

// TestDirectNetworkChange: a client that changes networks goes on over its relays, and finds a new direct path by itself.
func TestDirectNetworkChange(t *testing.T) {
	for name, nat := range map[string]bool{"its own address": false, "its NAT's address": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, lab.Config{NAT: nat, Direct: true}, lab.SiteConfig{NoBranch: true})
			p := servePrivate(t, s)
			reach(t, s.Client, p.echo.Addr, 30*time.Second)
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
			defer pulse.Stop()
			_, st := onPath(t, s.Laptop, true, 20*time.Second)
			moves := st.Moves
			<-time.After(16 * time.Second) // the first change of network in 15 s is heeded at once
			began := time.Now()
			must(s.MoveClient())(t)
			took, st := onPath(t, s.Laptop, false, 20*time.Second)
			check(t, pulse.WaitBeats(within(t, 20*time.Second), 50))
			gap, _ := pulse.LongestGap(began)
			t.Logf("over %s (%s) after %v, longest silence %v", st.Path, st.LastMove, took.Round(time.Millisecond), gap.Round(time.Millisecond))
			again := 20 * time.Second // the client sees the change, and tries when it has left the old path
			if nat {
				again = time.Minute // it does not
			}
			took, st = onPath(t, s.Laptop, true, again)
			check(t, pulse.WaitBeats(within(t, 20*time.Second), 100))
			gap, _ = pulse.LongestGap(began)
			t.Logf("over %s again after %v, longest silence %v", st.Path, took.Round(time.Millisecond), gap.Round(time.Millisecond))
			if st.Moves < moves+2 {
				t.Errorf("%d moves, were %d: the session never left its direct path", st.Moves, moves)
			}
			onPath(t, s.Laptop, true, time.Second)
		})
	}
}

// TestDirectWorse: a direct path that works and loses much is left for the relay, under load and with nothing lost above it.
func TestDirectWorse(t *testing.T) {
	s := newSite(t, lab.Config{Direct: true}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 30*time.Second)
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	onPath(t, s.Laptop, true, 20*time.Second)
	check(t, s.ImpairDirect(20))
	took, st := onPath(t, s.Laptop, false, 60*time.Second)
	check(t, pulse.WaitBeats(within(t, 20*time.Second), 50))
	t.Logf("over %s (%s) after %v", st.Path, st.LastMove, took.Round(time.Millisecond))
	check(t, s.ImpairDirect(0))
	took, st = onPath(t, s.Laptop, true, 3*time.Minute)
	check(t, pulse.WaitBeats(within(t, 20*time.Second), 50))
	t.Logf("over %s again %v after it was good again", st.Path, took.Round(time.Millisecond))
}
