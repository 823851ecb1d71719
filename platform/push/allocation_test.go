package push

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

// TestRelaysByRoundTrip: what a gateway tells of its round trips gives it the nearer relay first, not at once, and the record says why.
func TestRelaysByRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Config{})
		var relays []string
		for _, name := range []string{"fra-1", "ams-1"} {
			who, _, _ := b.join(identity.Relay, name)
			relays = append(relays, who.Node.ID)
		}
		gw, _, _ := b.join(identity.Gateway, "gw")
		rtts := map[string]time.Duration{}
		beat := func() []string {
			for _, id := range relays {
				b.hub.Heartbeat(id, control.Heartbeat{State: "ready"})
			}
			b.hub.Heartbeat(gw.Node.ID, control.Heartbeat{State: "ready", RelayRTT: rtts})
			must(t, b.reg.Allocate(t.Context(), "default", b.hub.started))
			rec, err := b.reg.Node(t.Context(), "default", identity.Gateway, "gw")
			must(t, err)
			if len(rec.RelayReasons) != len(rec.Relays) {
				t.Fatalf("%d reasons for %v: %q", len(rec.RelayReasons), rec.Relays, rec.RelayReasons)
			}
			return append(rec.Relays, rec.RelayReasons...)
		}
		first := beat()
		far, near := first[0], first[1]
		rtts[relays[0]], rtts[relays[1]] = 52*time.Millisecond, 12*time.Millisecond
		if far == "ams-1" {
			rtts[relays[0]], rtts[relays[1]] = rtts[relays[1]], rtts[relays[0]]
		}
		began := time.Now()
		for {
			time.Sleep(30 * time.Second)
			got := beat()
			if got[0] != near {
				if time.Since(began) > 12*time.Minute {
					t.Fatalf("still %q", got)
				}
				continue
			}
			if time.Since(began) < 10*time.Minute {
				t.Errorf("moved after %v", time.Since(began))
			}
			if !slices.Equal(got[:2], []string{near, far}) || !strings.Contains(got[2], "12 ms, 40 ms better than "+far) {
				t.Errorf("%q", got)
			}
			return
		}
	})
}
