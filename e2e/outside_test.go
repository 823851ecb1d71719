package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/lab"
)

// TestRelayFromOutside: a relay that runs well behind a firewall without its UDP port is degraded, with the remedy; its other ports answer the platform
// as what they are.
func TestRelayFromOutside(t *testing.T) {
	l := newLab(t, lab.Config{})
	check(t, l.BlockUDP(true))
	must(l.StartPlatform(within(t, time.Minute), "--probe-relays", "private", "--region", "lab"))(t)
	check(t, l.Login(within(t, 30*time.Second)))
	must(l.Relay(within(t, time.Minute), l.Relay1, "fra-1"))(t)
	must(l.Sallyway(within(t, 10*time.Second), "relay", "update", "fra-1", "--region", "eu-central", "--failure-domain", "rack-7"))(t)
	ctx := within(t, time.Minute)
	check(t, lab.Until(ctx, 200*time.Millisecond, func() error {
		var r control.NodeRecord
		if err := l.SallywayJSON(ctx, &r, "relay", "show", "fra-1"); err != nil {
			return err
		}
		if r.State != control.StateDegraded || r.Outside == nil {
			return fmt.Errorf("it is %s: %+v", r.State, r.Outside)
		}
		// Wrong is wrong from here on: it is not waited for.
		answers := 0
		for _, c := range r.Outside.Checks {
			if c.OK != !strings.HasPrefix(c.Name, "STUN") {
				t.Errorf("%+v", c)
			}
			answers++
		}
		if answers != 4 || r.Outside.State != control.OutsidePartly || r.Region != "eu-central" || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "open 5349/udp in the firewall of fra-1") {
			t.Errorf("%+v %+v", r, r.Outside)
		}
		return nil
	}))
	out := must(l.Sallyway(within(t, 10*time.Second), "relay", "list"))(t)
	for _, want := range []string{"degraded", "eu-central", "open 5349/udp"} {
		if !strings.Contains(out.Stdout, want) {
			t.Errorf("the list lacks %q:\n%s", want, out.Stdout)
		}
	}
}
