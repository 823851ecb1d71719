package platform

import (
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
)

// TestExpiryWarnings: what lives long is warned of 30, 7 and 1 days before its end and at its end, each once, in the log, the audit and the
// metric; a node that is there and does not renew is told of, one that is away is not.
func TestExpiryWarnings(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	reg := l.srv.Registry()
	warnings := func(action, object string) (days []float64) {
		t.Helper()
		must(t, reg.WarnExpiring(t.Context(), "default"))
		must(t, reg.WarnExpiring(t.Context(), "default")) // nobody is told twice
		for _, e := range l.auditDirect("default") {
			if e.Action == action && strings.Contains(e.Object, object) {
				d, _ := e.Detail["days"].(float64)
				days = append(days, d)
				if s, _ := e.Detail["remedy"].(string); s == "" {
					t.Errorf("no remedy in %+v", e)
				}
			}
		}
		return days
	}
	n := l.create(identity.Gateway, "there").join()
	away := l.create(identity.Client, "away").join()
	if got := warnings("", ""); len(got) != 0 {
		t.Errorf("warned at once: %v", got)
	}
	c.advance(control.LeafLife * 9 / 10)
	n.loginAt(c)
	n.beat(control.Heartbeat{})
	if got := warnings("certificate.renewal-late", n.id.String()); len(got) != 1 {
		t.Errorf("a node that does not renew: %v", got)
	}
	if got := warnings("certificate.renewal-late", away.id.String()); len(got) != 0 {
		t.Errorf("a node that is away: %v", got)
	}
	n.renewAt(c)
	if found, err := reg.Expiring(t.Context(), "default"); err != nil || len(found) != 0 {
		t.Errorf("after its renewal: %+v, %v", found, err)
	}

	const day = 24 * time.Hour
	c.advance(pki.IntermediateLife - control.LeafLife*9/10 - 31*day)
	if got := warnings("authority.expiring", "gateway CA"); len(got) != 0 {
		t.Errorf("31 days before: %v", got)
	}
	var want []float64
	for _, step := range []struct {
		by   time.Duration
		days float64
	}{{2 * day, 30}, {10 * day, -1}, {13 * day, 7}, {5 * day, 1}, {2 * day, 0}} {
		c.advance(step.by)
		if step.days >= 0 {
			want = append(want, step.days)
		}
		got := warnings("authority.expiring", "gateway CA")
		if len(got) != len(want) || (len(got) > 0 && got[len(got)-1] != want[len(want)-1]) {
			t.Fatalf("warnings %v, want %v", got, want)
		}
	}
	if ends, err := reg.Ends(t.Context(), "default"); err != nil || !ends[[2]string{"ca", "gateway"}].Before(c.now()) || !ends[[2]string{"ca", "root"}].After(c.now()) {
		t.Errorf("ends %v, %v", ends, err)
	}
	if !strings.Contains(l.logs.String(), "a certificate ends soon") {
		t.Error("nothing in the log")
	}
	// A rotation is the remedy.
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "gateway"}, nil)
	l.advanceAuthorities()
	if a := l.authorities(control.AuthorityCurrent)["gateway"]; a.Generation != 2 || !a.NotAfter.After(c.now().Add(365*day)) {
		t.Errorf("after a rotation: %+v", a)
	}
}
