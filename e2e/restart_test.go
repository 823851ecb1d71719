package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// resume is how long service may take to come back after one part of it was restarted.
const resume = 20 * time.Second

// TestRestarts restarts gateway, relays and platform in every order, each in both manners, under a client that stays.
func TestRestarts(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "2s"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	parts := map[string][]*lab.Proc{"gateway": {s.GatewayA.Proc}, "relays": {s.RelayA.Proc, s.RelayB.Proc}, "platform": {s.PlatformD}}
	for i, order := range [][]string{
		{"gateway", "relays", "platform"},
		{"gateway", "platform", "relays"},
		{"relays", "gateway", "platform"},
		{"relays", "platform", "gateway"},
		{"platform", "gateway", "relays"},
		{"platform", "relays", "gateway"},
	} {
		kill := i%2 == 1
		t.Run(fmt.Sprintf("%s killed=%v", strings.Join(order, ", "), kill), func(t *testing.T) {
			for _, name := range order {
				for _, proc := range parts[name] {
					if kill {
						proc.Kill()
					} else if err := proc.Stop(); err != nil {
						t.Error(err)
					}
				}
				for _, proc := range parts[name] {
					check(t, proc.Start())
				}
				took := reach(t, s.Client, p.echo.Addr, resume)
				t.Logf("%s: back after %v", name, took.Round(time.Millisecond))
			}
			check(t, s.WaitPlatform(within(t, resume), s.PlatformD))
		})
	}
	t.Run("all at once, platform last", func(t *testing.T) {
		for _, procs := range parts {
			for _, proc := range procs {
				proc.Kill()
			}
		}
		for _, name := range []string{"gateway", "relays", "platform"} {
			for _, proc := range parts[name] {
				check(t, proc.Start())
			}
		}
		t.Logf("back after %v", reach(t, s.Client, p.echo.Addr, 2*resume).Round(time.Millisecond))
	})
}

// TestSurvival is about connections that are open while something happens beneath them.
func TestSurvival(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "5s"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	lives := func(t *testing.T, what string, most time.Duration, act func()) {
		t.Helper()
		pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
		defer pulse.Stop()
		check(t, pulse.WaitBeats(within(t, 10*time.Second), 20))
		since := time.Now()
		act()
		check(t, pulse.WaitBeats(within(t, most+resume), 50))
		gap, _ := pulse.LongestGap(since)
		t.Logf("%s: longest silence %v", what, gap.Round(time.Millisecond))
		if gap > most {
			t.Errorf("%s: longest silence %v, want at most %v", what, gap, most)
		}
	}
	t.Run("the platform restarts", func(t *testing.T) {
		lives(t, "platform restarted", time.Second, func() {
			s.PlatformD.Kill()
			check(t, s.PlatformD.Start())
			check(t, s.WaitPlatform(within(t, resume), s.PlatformD))
		})
	})
	t.Run("the client's address changes", func(t *testing.T) {
		for range 2 {
			lives(t, "address changed", 10*time.Second, func() { must(s.MoveClient())(t) })
		}
	})
	// Far above what an idle machine needs, and far below what another way of noticing would take.
	for how, most := range map[string]time.Duration{"killed": time.Second, "cut": 2 * time.Second, "drained": time.Second} {
		t.Run("the relay in use is "+how, func(t *testing.T) {
			healthy(t, s)
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 5*time.Millisecond))(t)
			defer pulse.Stop()
			used := must(lab.Busier(time.Second, s.Relay1, s.Relay2))(t)
			victim := s.RelayA
			if used == s.Relay2 {
				victim = s.RelayB
			}
			lives(t, "relay "+how, most, func() {
				switch how {
				case "killed":
					victim.Kill()
				case "cut":
					check(t, s.Cut(used))
				case "drained":
					check(t, victim.Stop())
				}
			})
			check(t, s.Cut())
			if how != "cut" {
				check(t, victim.Proc.Start())
				check(t, victim.WaitReady(within(t, resume)))
			}
		})
	}
}

// healthy waits until both relays, the gateway and the client are ready again, and the client's session has a standby path.
func healthy(t *testing.T, s *lab.Site) {
	t.Helper()
	for _, n := range []*lab.Node{s.RelayA, s.RelayB, s.GatewayA, s.Laptop} {
		check(t, n.WaitReady(within(t, resume)))
	}
	check(t, lab.Until(within(t, resume), 50*time.Millisecond, func() error {
		var doc struct {
			Gateways []struct {
				Path    string `json:"path"`
				Standby string `json:"standby"`
			} `json:"gateways"`
		}
		if err := s.Laptop.Status(t.Context(), &doc); err != nil {
			return err
		}
		if len(doc.Gateways) != 1 || doc.Gateways[0].Path == "" || doc.Gateways[0].Standby == "" {
			return fmt.Errorf("paths of the client: %+v", doc.Gateways)
		}
		return nil
	}))
}

// TestOneRelayAway: the only relay is gone for 30 s. One try every 5 s (±20 %), and service within 6 s of its return.
func TestOneRelayAway(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "2s"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	check(t, s.RelayB.Stop()) // the lab has one relay from now on
	reach(t, s.Client, p.echo.Addr, resume)
	mark := s.GatewayA.Log.Mark()
	s.RelayA.Kill()
	gone := time.Now()
	wait := time.NewTimer(30 * time.Second)
	<-wait.C
	tries := s.GatewayA.Log.Since(mark, `dialling relay`)
	var times []time.Time
	for _, l := range tries {
		if strings.Contains(l.Text, s.RelayA.Name) || strings.Contains(l.Text, s.RelayA.Record.ID) {
			times = append(times, l.At)
		}
	}
	if len(times) == 0 {
		t.Fatalf("no try of the relay in %v in the gateway's log", time.Since(gone).Round(time.Second))
	}
	first := times[0].Sub(gone)
	t.Logf("%d tries, the first %v after the loss", len(times), first.Round(time.Millisecond))
	if first > 4*time.Second { // one keepalive and the check behind it
		t.Errorf("the first try came %v after the loss", first)
	}
	if span := 30*time.Second - first; len(times) < int(span/(6*time.Second))+1 || len(times) > int(span/(4*time.Second))+1 {
		t.Errorf("%d tries of the relay in %v in the gateway's log", len(times), span)
	}
	for i := 1; i < len(times); i++ { // the first is the try at once
		if d := times[i].Sub(times[i-1]); d < 4*time.Second || d > 6*time.Second {
			t.Errorf("try %d came %v after the one before, want 5 s ± 20 %%", i, d)
		}
	}
	check(t, s.RelayA.Proc.Start())
	check(t, s.RelayA.Proc.WaitReady(within(t, resume), 0, "Relay server started successfully"))
	if took := reach(t, s.Client, p.echo.Addr, resume); took > 6*time.Second {
		t.Errorf("back %v after the relay's return, want within 6 s", took)
	} else {
		t.Logf("back %v after the relay's return", took.Round(time.Millisecond))
	}
}

// TestPlatformDown: a client and a gateway start from what they have cached, while there is no platform.
func TestPlatformDown(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, RelayArgs: []string{"--drain-timeout", "2s"}})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	named(t, s)
	s.PlatformD.Kill()
	for _, part := range []struct {
		name string
		node *lab.Node
	}{{"client", s.Laptop}, {"gateway", s.GatewayA}, {"relay", s.RelayA}, {"other relay", s.RelayB}} {
		t.Run(part.name, func(t *testing.T) {
			if err := part.node.Stop(); err != nil {
				t.Error(err)
			}
			check(t, part.node.Proc.Start())
			t.Logf("back after %v", reach(t, s.Client, p.echo.Addr, resume).Round(time.Millisecond))
		})
	}
	r, err := s.Client.Run(within(t, resume), program(t, "curl"), "-sS", "http://"+lab.FQDN("web", lab.DefaultOrg)+"/")
	if err != nil || r.Stdout != page {
		t.Errorf("page by name: %q, %v", r.Stdout, err)
	}
}

// TestRevokedClient: its open connection ends within 5 s, new ones do not work, and the log says why.
func TestRevokedClient(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	for _, verb := range []string{"disable", "revoke"} {
		t.Run(verb, func(t *testing.T) {
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 20*time.Millisecond))(t)
			defer pulse.Stop()
			check(t, pulse.WaitBeats(within(t, 10*time.Second), 10))
			must(s.Sallyway(within(t, 10*time.Second), "client", verb, lab.Laptop))(t)
			start := time.Now()
			last := start
			// The connection is over when no answer comes for longer than any hiccup.
			err := lab.Until(within(t, 15*time.Second), 20*time.Millisecond, func() error {
				n := pulse.Beats()
				if pulse.WaitBeats(within(t, time.Second), 1) == nil || pulse.Beats() > n {
					last = time.Now()
					return fmt.Errorf("answers still come %v after", last.Sub(start))
				}
				return nil
			})
			if err != nil || last.Sub(start) > 5*time.Second {
				t.Errorf("%s: last answer %v later, %v", verb, last.Sub(start), err)
			}
			if err := dialOnce(t.Context(), s.Client, p.echo.Addr.String(), 2*time.Second); err == nil {
				t.Errorf("%s: a new connection works", verb)
			}
			if verb == "disable" {
				must(s.Sallyway(within(t, 10*time.Second), "client", "enable", lab.Laptop))(t)
				reach(t, s.Client, p.echo.Addr, resume)
			}
		})
	}
}

// TestNarrowAndHidden: an underlay of 1280 bytes behind NAT on both sides.
func TestNarrowAndHidden(t *testing.T) {
	s := newSite(t, lab.Config{MTU: 1280, NAT: true}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	named(t, s)
	r, err := s.Client.Run(within(t, 20*time.Second), program(t, "curl"), "-sS", "http://"+lab.FQDN("web", lab.DefaultOrg)+"/")
	if err != nil || r.Stdout != page {
		t.Errorf("page by name: %q, %v", r.Stdout, err)
	}
	const n = 20 << 20
	resp := must(s.Client.HTTPClient().Post(p.web.URL("/sum"), "application/octet-stream", lab.Pattern(n)))(t)
	defer resp.Body.Close()
	b := make([]byte, 64)
	if k, _ := resp.Body.Read(b); string(b[:k]) != lab.PatternSum(n) {
		t.Errorf("20 MiB up: %q", b[:k])
	}
	c := must(s.Client.Dial(within(t, 10*time.Second), "udp", p.udp.Addr.String()))(t)
	defer c.Close()
	for _, size := range []int{100, 1200, 1472} {
		if err := echoUDP(c, size); err != nil {
			t.Errorf("UDP of %d bytes: %v", size, err)
		}
	}
	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
	defer pulse.Stop()
	must(s.MoveClient())(t) // the NAT's public address
	check(t, pulse.WaitBeats(within(t, resume), 20))
}

// TestStandbyZero: with --standby 0 a gateway holds one leg only.
func TestStandbyZero(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true, GatewayArgs: []string{"--standby", "0"}})
	servePrivate(t, s)
	reach(t, s.Client, netip.AddrPortFrom(lab.WebAddr, webPort), 20*time.Second)
	var doc struct {
		Relays []struct {
			Name string `json:"name"`
			Up   bool   `json:"up"`
		} `json:"relays"`
	}
	check(t, s.GatewayA.Status(within(t, 5*time.Second), &doc))
	if len(doc.Relays) != 1 || !doc.Relays[0].Up {
		t.Errorf("legs of the gateway: %+v", doc.Relays)
	}
}
