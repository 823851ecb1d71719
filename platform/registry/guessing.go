package registry

import (
	"context"
	"sync"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/audit"
)

// Whoever guesses passwords, codes or tokens is slowed down by those who check them, and stands in the audit once in a while: an alert, which a
// webhook can carry on, and no diary.
const (
	guessingWindow = time.Hour
	guessingMost   = 100 // alerts in a window; what is more is one alert for all
)

// guessers are who was told of. The zero value is ready.
type guessers struct {
	mu    sync.Mutex
	since time.Time       // start of the window; guarded by mu
	told  map[string]bool // guarded by mu
}

// note says whether to tell of a guesser, and whether it stands for all that are too many.
func (g *guessers) note(key string, now time.Time) (tell, many bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Sub(g.since) >= guessingWindow || g.told == nil {
		g.told, g.since = make(map[string]bool), now
	}
	if len(g.told) > guessingMost || g.told[key] {
		return false, false
	}
	g.told[key] = true
	return true, len(g.told) > guessingMost
}

// Guessing audits that a source was told to wait because of too many wrong tries at what (a password, say) of an object: once for each source and sort
// in an hour. The chain is that of org, or the platform's own where there is no such organization.
func (r *Registry) Guessing(ctx context.Context, org, what, object, source string) error {
	tell, many := r.guessers.note(what+"|"+source, r.Now())
	if !tell {
		return nil
	}
	detail := map[string]any{"what": what}
	if many {
		org, object, source = identity.SharedOrg, "many", "many sources"
	}
	ctx = WithActor(ctx, source)
	err := r.update(ctx, func(c *change) error {
		chain := org
		if _, err := c.Org(ctx, org); err != nil {
			chain = identity.SharedOrg
		}
		return c.audit(ctx, chain, "guessing.slow-down", object, audit.Refused, detail)
	})
	if err == nil {
		r.Log.Warn("somebody guesses, and was told to wait", "what", what, "object", object, "source", source)
	}
	return err
}
