package registry

import (
	"context"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// Refusals are audited one by one as long as they are few: the first of its sort in a window at once, the rest as a number when the window
// ends, so that somebody who knocks all day does not fill the chain.
const (
	refusalWindow = time.Minute
	refusalSorts  = 1024 // sorts told apart in a window; more are counted together
)

type sort struct{ org, action, object, code, source string }

// aggregate counts refusals. The zero value is ready.
type aggregate struct {
	mu    sync.Mutex
	since time.Time    // start of the window; guarded by mu
	count map[sort]int // guarded by mu
}

// note counts a refusal and says whether it is the first of its sort.
func (a *aggregate) note(s sort, now time.Time) (first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.count == nil {
		a.count, a.since = make(map[sort]int), now
	}
	if _, known := a.count[s]; !known && len(a.count) >= refusalSorts {
		s = sort{org: identity.SharedOrg, action: "refusals", object: "many", source: "many"}
	}
	a.count[s]++
	return a.count[s] == 1
}

// take ends the window when it is over (or always) and returns what was counted beyond the first of each sort.
func (a *aggregate) take(now time.Time, always bool) map[sort]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.count) == 0 || (!always && now.Sub(a.since) < refusalWindow) {
		return nil
	}
	out := a.count
	a.count = nil
	return out
}

// refused audits a refusal in the organization that it claims to be of, or in the platform's own chain where there is none.
func (r *Registry) refused(ctx context.Context, org, action, object, code, source string) error {
	if !r.failed.note(sort{org, action, object, code, source}, r.Now()) {
		return nil
	}
	return r.writeRefusal(ctx, org, action, object, code, source, 1)
}

func (r *Registry) writeRefusal(ctx context.Context, org, action, object, code, source string, count int) error {
	return r.update(WithActor(ctx, source), func(c *change) error {
		if _, err := c.Org(ctx, org); err != nil {
			org = identity.SharedOrg
		}
		return c.audit(WithActor(ctx, source), org, action, object, audit.Refused, map[string]any{"reason": code, "count": count})
	})
}

// APITokenRefused counts a request with a bad API token.
func (r *Registry) APITokenRefused(ctx context.Context, code, source string) error {
	return r.refused(ctx, identity.SharedOrg, "api.login", "", code, source)
}

// FlushRefusals audits the numbers of a window that is over, or of the current one at the end of the process.
func (r *Registry) FlushRefusals(ctx context.Context, always bool) error {
	for s, n := range r.failed.take(r.Now(), always) {
		if n <= 1 {
			continue
		}
		if err := r.writeRefusal(ctx, s.org, s.action, s.object, s.code, s.source, n-1); err != nil {
			return err
		}
	}
	return nil
}

// Audit returns a page of an organization's chain.
func (r *Registry) Audit(ctx context.Context, org string, after int64, limit int) (out []control.AuditEntry, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		out, err = audit.Page(ctx, tx, org, after, limit)
		return err
	})
	return out, err
}
