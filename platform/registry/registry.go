// Package registry is what administrators and nodes may do to what the platform keeps: organizations, nodes, resources, policies,
// tokens, enrolment. Every method is one transaction with its audit entry; what was committed is announced by Changed and Dropped, so
// that the control streams push it. It knows nothing of HTTP: refusals are *Error, a control.Problem with its status.
package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/awsauth"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// Registry serves all organizations. The fields are set before its first use; methods may be called concurrently.
type Registry struct {
	Store store.Store
	Seal  *pki.Sealer
	Board *presence.Board
	Log   *slog.Logger
	Now   func() time.Time
	// URL and Pin are what enrolment tokens carry, TokenLife is how long they work: zero is control.TokenLife.
	URL, Pin  string
	TokenLife time.Duration
	// Region is that of the deployment, "" for one without a name. BindRegion sets it.
	Region string
	// LeafLife is how long certificates of nodes are valid, DocumentLife how long snapshots and grants: zero is 24 h.
	LeafLife, DocumentLife time.Duration
	// Server tells of the platform's own HTTPS certificate; nil: it has none. The zero time is not known.
	Server func() ServerCertificate
	// Audiences are the URLs under which the platform may be addressed by assertions, canonical (see CanonicalURL).
	Audiences []string
	// Changed is called after a commit that changed what nodes of org are told, with the version that it has since. It must not block.
	Changed func(org string, version uint64)
	// Dropped is called after a commit that took a node its right to talk to the platform. It must not block.
	Dropped func(node string)

	// AWS asks whose AWS identity a node has; nil: no node can enrol by one.
	AWS *awsauth.Verifier

	// LicenceTrust are the keys of issuers of licences; without any no licence can be installed, and nothing is limited.
	LicenceTrust entitlement.Trust

	access accessKey
	// expiryLooked is when certificates were last looked at for their end, in Unix nanoseconds.
	expiryLooked atomic.Int64
	failed       aggregate
	guessers     guessers
	places       places
	// nextMove is when the next announced address of a relay comes into force, in Unix microseconds; 0 is not known or never.
	nextMove atomic.Int64
}

// Error is a refusal that the caller is told.
type Error struct{ control.Problem }

// Error implements error.
func (e *Error) Error() string { return e.Detail }

// Code of a refusal, "" when err is none.
func Code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Problem.Code
	}
	return ""
}

func refuse(status int, code, remedy, format string, args ...any) *Error {
	return &Error{control.Problem{Status: status, Code: code, Title: http.StatusText(status), Detail: fmt.Sprintf(format, args...), Remedy: remedy}}
}

func invalid(location, remedy, format string, args ...any) *Error {
	e := refuse(http.StatusUnprocessableEntity, control.CodeInvalid, remedy, format, args...)
	e.Errors = []control.ProblemPart{{Message: e.Detail, Location: location}}
	return e
}

// actorKey is the key of the actor in a context.
type actorKey struct{}

// WithActor says in a context who does what follows: it stands in the audit.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

func actor(ctx context.Context) string {
	if a, ok := ctx.Value(actorKey{}).(string); ok {
		return a
	}
	return "platform"
}

// change is a transaction of the registry.
type change struct {
	store.Tx
	r       *Registry
	now     time.Time
	bumped  []string
	version map[string]uint64 // of those in bumped
	dropped []string
}

// update runs fn in a transaction and announces what it changed.
func (r *Registry) update(ctx context.Context, fn func(c *change) error) error {
	var last *change
	first, _ := ctx.Value(beforeKey{}).(*before)
	err := r.Store.Update(ctx, func(tx store.Tx) error {
		last = &change{Tx: tx, r: r, now: r.Now().UTC().Truncate(time.Microsecond)}
		if first != nil && !first.done {
			if err := first.fn(store.Join(ctx, tx), tx, last.now); err != nil {
				return err
			}
		}
		return fn(last)
	})
	if err != nil {
		return err
	}
	if first != nil {
		first.done = true
	}
	for _, org := range last.bumped {
		if r.Changed != nil {
			r.Changed(org, last.version[org])
		}
	}
	for _, id := range last.dropped {
		r.Board.Drop(id)
		if r.Dropped != nil {
			r.Dropped(id)
		}
	}
	return nil
}

// audit adds to the organization's chain in the same transaction.
func (c *change) audit(ctx context.Context, org, action, object, result string, detail map[string]any) error {
	return audit.Append(ctx, c.Tx, org, c.now, audit.Entry{Actor: actor(ctx), Action: action, Object: object, Result: result, Detail: withRequest(ctx, detail)})
}

// bump raises the version of what the nodes of org are told. Versions follow the clock in seconds where that is ahead, so that they grow
// even past a restored backup. Shared relays serve every organization: either's change concerns the other.
func (c *change) bump(ctx context.Context, org string) error {
	orgs := []string{org}
	if org != identity.SharedOrg {
		orgs = append(orgs, identity.SharedOrg)
	} else {
		all, err := c.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range all {
			orgs = append(orgs, o.Name)
		}
	}
	for _, o := range orgs {
		if slices.Contains(c.bumped, o) {
			continue
		}
		v, err := c.BumpVersion(ctx, o, uint64(c.now.Unix()))
		if err != nil {
			return err
		}
		if c.version == nil {
			c.version = make(map[string]uint64)
		}
		c.bumped, c.version[o] = append(c.bumped, o), v
	}
	return nil
}

// notFound words ErrNotFound; other errors pass.
func notFound(err error, what, name, org string) error {
	if errors.Is(err, store.ErrNotFound) {
		return refuse(http.StatusNotFound, control.CodeNotFound, fmt.Sprintf("see `sallyway --org %s %s list`", org, what),
			"organization %s has no %s %.80q", org, what, name)
	}
	return err
}

// taken words ErrExists; other errors pass.
func taken(err error, what, name, org string) error {
	if errors.Is(err, store.ErrExists) {
		return refuse(http.StatusConflict, control.CodeConflict, "choose another name, or delete the old one first",
			"organization %s already has a %s named %.80q", org, what, name)
	}
	return err
}

// idLike matches ids as identity.NewID makes them: not allowed as names, because everything may be addressed by either.
var idLike = regexp.MustCompile(`^[a-z]-[a-z2-7]{12}$`)

func checkName(what, name string) error {
	if !identity.ValidLabel(name) || idLike.MatchString(name) {
		return invalid("body.name", "use lower-case letters, digits and hyphens, such as db-1",
			"%s name %.80q is not a DNS label in lower case (a-z, 0-9, hyphen; at most 63), or looks like an id", what, name)
	}
	return nil
}

// org reads an organization for a public method.
func (c *change) org(ctx context.Context, name string) (*store.Org, error) {
	return findOrg(ctx, c.Tx, name)
}

func findOrg(ctx context.Context, tx store.Tx, name string) (*store.Org, error) {
	o, err := tx.Org(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, refuse(http.StatusNotFound, control.CodeNotFound, "see `sallyway organization list`", "there is no organization %.80q", name)
	}
	return o, err
}

// trim cuts a list that was read with one row more than asked, and returns the cursor of the next page.
func trim[T any](items []T, limit int, name func(T) string) ([]T, string) {
	if limit <= 0 || len(items) <= limit {
		return items, ""
	}
	items = items[:limit]
	return items, name(items[limit-1])
}

// more asks for one row more than a page has, to know whether another follows.
func more(p store.Page) store.Page {
	if p.Limit > 0 {
		p.Limit++
	}
	return p
}
