package registry

import (
	"context"
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// Change is a transaction of a package beside the registry, with what every change needs: its audit entry, and word to the nodes.
type Change struct{ *change }

// Transact runs fn in a transaction, and announces what it changed after the commit. fn may run again when the database asks for it.
func (r *Registry) Transact(ctx context.Context, fn func(c *Change) error) error {
	return r.update(ctx, func(c *change) error { return fn(&Change{c}) })
}

// Now is the time of the transaction, in microseconds.
func (c *Change) Now() time.Time { return c.now }

// Record adds what was done to the chain of org. The actor comes from the context.
func (c *Change) Record(ctx context.Context, org, action, object string, detail map[string]any) error {
	return c.audit(ctx, org, action, object, audit.OK, detail)
}

// Bump has the nodes of org told of the change.
func (c *Change) Bump(ctx context.Context, org string) error { return c.bump(ctx, org) }

// FindOrg reads an organization, and refuses in words when there is none.
func (c *Change) FindOrg(ctx context.Context, org string) (*store.Org, error) { return c.org(ctx, org) }

// Revoke denies all keys of a node, as RevokeNode does, and its unused enrolment tokens. why stands in the audit.
func (c *Change) Revoke(ctx context.Context, n *store.Node, why string) error {
	keys, err := c.denyKeys(ctx, n.ID)
	if err != nil {
		return err
	}
	if err := c.DropEnrolmentTokens(ctx, n.ID); err != nil {
		return err
	}
	n.Status = store.Revoked
	if err := c.UpdateNode(ctx, n); err != nil {
		return err
	}
	c.dropped = append(c.dropped, n.ID)
	if err := c.lostKey(ctx, n.Org); err != nil { // see RevokeNode
		return err
	}
	if err := c.audit(ctx, n.Org, "node.revoke", n.Identity().String(), audit.OK, map[string]any{"name": n.Name, "keys": keys, "reason": why}); err != nil {
		return err
	}
	return c.bump(ctx, n.Org)
}

// Refused counts and audits a refusal in the chain of org, the first of its sort in a minute at once.
func (r *Registry) Refused(ctx context.Context, org, action, object, code, source string) error {
	return r.refused(ctx, org, action, object, code, source)
}

// Actor is who acts in a context, as WithActor said.
func Actor(ctx context.Context) string { return actor(ctx) }

// Refuse makes a refusal that the caller is told: what and why in the text, what to do in the remedy.
func Refuse(status int, code, remedy, format string, args ...any) *Error {
	return refuse(status, code, remedy, format, args...)
}

// Invalid makes a refusal of a part of a request, such as body.name.
func Invalid(location, remedy, format string, args ...any) *Error {
	return invalid(location, remedy, format, args...)
}

// NotFound words store.ErrNotFound for an object of org; other errors pass.
func NotFound(err error, what, name, org string) error { return notFound(err, what, name, org) }

// Taken words store.ErrExists for an object of org; other errors pass.
func Taken(err error, what, name, org string) error { return taken(err, what, name, org) }

// CheckName refuses what is no name of an object.
func CheckName(what, name string) error { return checkName(what, name) }

// Conflict refuses what something else stands in the way of.
func Conflict(remedy, format string, args ...any) *Error {
	return refuse(http.StatusConflict, control.CodeConflict, remedy, format, args...)
}
