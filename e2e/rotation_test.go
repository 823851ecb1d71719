package e2e

import (
	"fmt"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// TestRotation: the root and every CA of the organization are followed by new ones, to the end, while a connection is open that was there before and
// stays. New sessions are there at every step, also between ends of which one has a certificate by the new CA already, and a client that was
// away for all of it comes back.
func TestRotation(t *testing.T) {
	const life = 14 * time.Second
	s := newSite(t, lab.Config{}, lab.SiteConfig{PlatformArgs: []string{"--leaf-life", life.String()}})
	visitor := must(s.StartNode(within(t, time.Minute), lab.NodeSpec{Kind: identity.Client, Name: "visitor", Host: s.Peer}))(t)
	p := servePrivate(t, s, "client:"+lab.Laptop, "client:visitor")
	reach(t, s.Client, p.echo.Addr, resume)
	reach(t, s.Peer, p.echo.Addr, resume)
	check(t, visitor.Stop())
	open := startFlow(t, s.Client, p.echo.Addr)

	began := time.Now()
	must(s.Sallyway(within(t, resume), "ca", "rotate", "--kind", "root"))(t)
	wait := func(what string, most time.Duration, want map[control.AuthorityState]int) {
		t.Helper()
		check(t, lab.Until(within(t, most), 200*time.Millisecond, func() error {
			var cas control.List[control.AuthorityRecord]
			if err := s.SallywayJSON(t.Context(), &cas, "ca", "list", "--gone"); err != nil {
				return err
			}
			got := map[control.AuthorityState]int{}
			for _, a := range cas.Items {
				if a.Kind != control.AuthoritySSH {
					got[a.State]++
				}
			}
			for state, n := range want {
				if got[state] != n {
					return fmt.Errorf("%s: %v", what, got)
				}
			}
			return nil
		}))
		t.Logf("%s after %v", what, time.Since(began).Round(100*time.Millisecond))
		open.goesOn(t, resume)
	}
	const all = 1 + 6 // the root, and a CA of each kind
	wait("the new ones issue", time.Minute, map[control.AuthorityState]int{control.AuthorityCurrent: all, control.AuthorityNext: 0, control.AuthorityRetiring: all})
	// A client that begins now has a leaf by the new CA; the gateways' may be by the former one.
	guest := must(s.StartNode(within(t, time.Minute), lab.NodeSpec{Kind: identity.Client, Name: "guest", Host: s.Peer}))(t)
	must(s.Sallyway(within(t, resume), "policy", "allow", "--client", "guest", "--resource", "web"))(t)
	t.Logf("a new client has a session after %v", reach(t, s.Peer, p.echo.Addr, resume).Round(time.Millisecond))
	check(t, guest.Stop())
	wait("the former ones are gone", time.Minute, map[control.AuthorityState]int{control.AuthorityCurrent: all, control.AuthorityRetiring: 0, control.AuthorityGone: all})

	check(t, visitor.Proc.Start())
	t.Logf("the client that was away has a session after %v", reach(t, s.Peer, p.echo.Addr, resume).Round(time.Millisecond))
	// A client that starts anew, and the ends that stayed: sessions under the new root alone.
	open.end(t)
	check(t, s.Laptop.Stop())
	check(t, s.Laptop.Proc.Start())
	reach(t, s.Client, p.echo.Addr, resume)
}
