package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
	"sallyway/internal/legs"
	"sallyway/relay/relayd"
	"sallyway/relay/wire"
)

// TestPlatformOutage: the platform is away for longer than three lives of the credentials for relays, and of the allocations that were made
// with them. No flow is lost, restarted nodes open new sessions from what they have cached, everybody goes back to relays that were killed,
// and the platform's return is no event.
func TestPlatformOutage(t *testing.T) {
	const life = 10 * time.Second
	s := newSite(t, lab.Config{}, lab.SiteConfig{
		PlatformArgs: []string{"--relay-credential-life", life.String()},
		RelayArgs:    []string{"--allocation-lifetime", life.String(), "--drain-timeout", "2s"},
	})
	visitor := must(s.StartNode(within(t, time.Minute), lab.NodeSpec{Kind: identity.Client, Name: "visitor", Host: s.Peer}))(t)
	p := servePrivate(t, s, "client:"+lab.Laptop, "client:visitor")
	branch := must(s.Private2.Echo(at(lab.Private2Web, echoPort)))(t).Addr
	check(t, s.AddResource(within(t, resume), lab.Resource{Name: "depot", Gateway: lab.Branch, Address: lab.Private2Web.String(), TCP: fmt.Sprint(echoPort)}, "client:"+lab.Laptop))
	for h, addrs := range map[*lab.Host][]netip.AddrPort{s.Client: {p.echo.Addr, branch}, s.Peer: {p.echo.Addr}} {
		for _, a := range addrs {
			reach(t, h, a, resume)
		}
	}
	dialling := []*lab.Node{s.GatewayA, s.GatewayB, s.Laptop, visitor}
	everybody := append([]*lab.Node{s.RelayA, s.RelayB}, dialling...)
	rejoined(t, s, dialling...)
	open := startFlow(t, s.Client, p.echo.Addr)

	s.PlatformD.Kill()
	away := time.Now()
	waitUntil := func(at time.Time) {
		t.Helper()
		select {
		case <-time.After(time.Until(at)):
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
		open.goesOn(t, resume)
	}
	for _, n := range everybody {
		check(t, lab.Until(within(t, resume), 50*time.Millisecond, func() error {
			if up, _, err := platformState(t.Context(), n); err != nil || up {
				return fmt.Errorf("%s: connected to its platform %v, %w", n.Name, up, err)
			}
			return nil
		}))
	}
	// Without a credential that is past its expiry this were the test of something else.
	expiry := away
	for _, n := range dialling {
		for _, u := range credentials(t, n) {
			if left := u.Expiry.Sub(away); left > life || !u.Outage.After(away.Add(8*time.Hour)) {
				t.Errorf("%s has a credential for another %v, in an outage until %v", n.Name, left, u.Outage)
			}
			if u.Expiry.After(expiry) {
				expiry = u.Expiry
			}
		}
	}
	waitUntil(expiry.Add(time.Second))
	restartRelay := func(r *lab.Node) {
		t.Helper()
		killed := time.Now()
		r.Kill()
		open.goesOn(t, resume)
		check(t, r.Proc.Start())
		check(t, r.WaitReady(within(t, resume)))
		rejoined(t, s, dialling...)
		t.Logf("%s killed and started: everybody is back on it after %v, longest silence of the open connection %v", r.Name,
			time.Since(killed).Round(time.Millisecond), open.silence(killed).Round(time.Millisecond))
	}
	restartRelay(s.RelayA)
	waitUntil(away.Add(3*life + time.Second))
	for _, again := range []struct {
		what string
		node *lab.Node
		from *lab.Host
		to   netip.AddrPort
	}{{"a client", visitor, s.Peer, p.echo.Addr}, {"a gateway", s.GatewayB, s.Client, branch}} {
		if err := again.node.Stop(); err != nil {
			t.Error(err)
		}
		check(t, again.node.Proc.Start())
		t.Logf("%s started anew has a session after %v", again.what, reach(t, again.from, again.to, resume).Round(time.Millisecond))
	}
	restartRelay(s.RelayB)

	back := time.Now()
	check(t, s.PlatformD.Start())
	check(t, s.WaitPlatform(within(t, resume), s.PlatformD))
	t.Logf("the platform was away for %v", time.Since(away).Round(time.Second))
	// Ten seconds more than everybody needs, on a machine that does other things as well.
	const everybodyBack = 40 * time.Second
	first, last := time.Time{}, time.Time{}
	for _, n := range everybody {
		check(t, lab.Until(within(t, everybodyBack), 50*time.Millisecond, func() error {
			up, since, err := platformState(t.Context(), n)
			if err != nil || !up {
				return fmt.Errorf("%s: connected to its platform %v, %w", n.Name, up, err)
			}
			if first.IsZero() || since.Before(first) {
				first = since
			}
			if since.After(last) {
				last = since
			}
			return nil
		}))
	}
	t.Logf("everybody is back with the platform, the first after %v, the last after %v", first.Sub(back).Round(time.Millisecond), last.Sub(back).Round(time.Millisecond))
	if spread := last.Sub(first); spread < 100*time.Millisecond {
		t.Errorf("all %d came back within %v of each other: at once", len(everybody), spread)
	}
	for _, n := range dialling {
		check(t, lab.Until(within(t, resume), 50*time.Millisecond, func() error {
			for _, u := range credentials(t, n) {
				if !u.Expiry.After(time.Now()) {
					return fmt.Errorf("%s still has a credential of %v", n.Name, u.Expiry)
				}
			}
			return nil
		}))
	}
	for _, to := range []netip.AddrPort{p.echo.Addr, branch} {
		reach(t, s.Client, to, resume)
	}
	open.goesOn(t, resume)
	t.Logf("longest silence of the open connection in all: %v", open.silence(away).Round(time.Millisecond))
	open.end(t)
}

// credentials are those for relays that a node has in its state folder.
func credentials(t *testing.T, n *lab.Node) []wire.Username {
	t.Helper()
	c, err := agent.ReadCached(n.State)
	check(t, err)
	var refs []control.RelayRef
	if g := c.Config.Gateway; g != nil {
		refs = append(refs, g.Relays...)
	}
	if d := c.Config.Dialling; d != nil {
		for _, g := range d.Gateways {
			refs = append(refs, g.Relays...)
		}
	}
	var out []wire.Username
	for _, r := range refs {
		u, err := wire.ParseUsername(r.Username)
		check(t, err)
		out = append(out, u)
	}
	if len(out) == 0 {
		t.Fatalf("%s has no credential for a relay", n.Name)
	}
	return out
}

// rejoined waits until the nodes have their legs on both relays, as they and the relays see it.
func rejoined(t *testing.T, s *lab.Site, nodes ...*lab.Node) {
	t.Helper()
	ctx := within(t, resume)
	for _, n := range nodes {
		check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
			var st struct {
				Relays []legs.Status `json:"relays"`
			}
			if err := n.Status(ctx, &st); err != nil {
				return err
			}
			if len(st.Relays) != 2 {
				return fmt.Errorf("%s has legs %+v", n.Name, st.Relays)
			}
			for _, r := range st.Relays {
				if !r.Up {
					return fmt.Errorf("%s is not on %s: %s", n.Name, r.Name, r.Error)
				}
			}
			return nil
		}))
	}
	// A node that is idle finds out with its next refresh that a relay is another one than before.
	for _, r := range []*lab.Node{s.RelayA, s.RelayB} {
		check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
			var st relayd.Status
			if err := r.Status(ctx, &st); err != nil {
				return err
			}
			if st.Relay == nil || st.Relay.Allocations < len(nodes) {
				return fmt.Errorf("%s has allocations of %+v, want at least %d", r.Name, st.Relay, len(nodes))
			}
			return nil
		}))
	}
}
