package agent

import (
	"strings"
	"testing"
	"time"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

func TestShow(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	good := Status{
		Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, Name: "fra-1", Platform: "https://p.example",
		Connected: true, Since: now, CertificateExpiry: now.Add(time.Hour),
	}
	tests := []struct {
		name   string
		change func(*Status)
		worst  daemon.Result
		text   []string
	}{
		{"good", func(*Status) {}, daemon.Pass, []string{"fra-1 (acme/relay/r-1)", "https://p.example connected since"}},
		{"starting", func(s *Status) { s.Connected = false }, daemon.Warn, []string{"not connected yet"}},
		{"away", func(s *Status) { s.Connected, s.Error, s.Remedy = false, "no route", "check the network" }, daemon.Warn, []string{"not connected since", "no route", "remedy     check the network"}},
		{"disabled", func(s *Status) {
			s.Connected, s.Error, s.Blocked, s.Remedy = false, "it is disabled", "it is disabled", "enable it"
		}, daemon.Fail, []string{"refuses this node", "enable it"}},
		{"clock", func(s *Status) { s.ClockOffset = -2 * time.Minute }, daemon.Warn, nil},
		{"expired", func(s *Status) { s.CertificateExpiry = now.Add(-time.Second) }, daemon.Fail, nil},
		{"set back", func(s *Status) { s.ConfigError = "version 3 after 5" }, daemon.Fail, []string{"config     version 3 after 5"}},
	}
	rank := map[daemon.Result]int{daemon.Pass: 0, daemon.Warn: 1, daemon.Fail: 2}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := good
			tt.change(&st)
			worst := daemon.Pass
			for _, c := range checks(st, now) {
				if rank[c.Result] > rank[worst] {
					worst = c.Result
				}
				if c.Detail == "" || (c.Result == daemon.Pass) != (c.Remedy == "") {
					t.Errorf("row %+v", c)
				}
			}
			if worst != tt.worst {
				t.Errorf("worst row is %s, want %s", worst, tt.worst)
			}
			var b strings.Builder
			Render(&b, st)
			for _, w := range tt.text {
				if !strings.Contains(b.String(), w) {
					t.Errorf("status lacks %q:\n%s", w, &b)
				}
			}
			if st.Error != "" && strings.Count(b.String(), st.Error) != 1 {
				t.Errorf("the reason does not stand once:\n%s", &b)
			}
		})
	}
}
