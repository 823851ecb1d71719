package e2e

import (
	"testing"
	"time"

	"sallyway/internal/lab"
)

// TestAllRelaysLost: both relays are away for 10 s under an open connection. It goes on soon after one of them is back.
func TestAllRelaysLost(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, 20*time.Second)
	for _, how := range []string{"cut", "killed"} {
		t.Run(how, func(t *testing.T) {
			healthy(t, s)
			pulse := must(s.Client.StartPulse(within(t, 10*time.Second), p.echo.Addr, 10*time.Millisecond))(t)
			defer pulse.Stop()
			check(t, pulse.WaitBeats(within(t, 10*time.Second), 300))
			if how == "cut" {
				check(t, s.Cut(s.Relay1, s.Relay2))
			} else {
				s.RelayA.Kill()
				s.RelayB.Kill()
			}
			away := time.NewTimer(10 * time.Second)
			<-away.C
			back := time.Now()
			if how == "cut" {
				check(t, s.Cut(s.Relay2))
			} else {
				check(t, s.RelayA.Proc.Start())
				check(t, s.RelayA.Proc.WaitReady(within(t, resume), 0, "Relay server started successfully"))
				t.Logf("the relay took %v to start", time.Since(back).Round(time.Millisecond))
				back = time.Now()
			}
			check(t, pulse.WaitBeats(within(t, resume), 1))
			took := time.Since(back)
			t.Logf("the connection goes on %v after the return of one relay", took.Round(time.Millisecond))
			if took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			check(t, pulse.WaitBeats(within(t, resume), 100))
			check(t, s.Cut())
			if how == "killed" {
				check(t, s.RelayB.Proc.Start())
			}
		})
	}
}
