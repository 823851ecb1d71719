package registry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// installationMeta is the key under which the database has the platform's id, to which a licence can be bound.
const installationMeta = "installation"

// licenceWarnings are the days before the end of a licence at which a warning is written, the first first.
var licenceWarnings = []int{30, 7, 1}

// licenceEnded stands in store.Licence.Warned when the end was told, licenceFresh when nothing was.
const (
	licenceEnded = -1
	licenceFresh = math.MaxInt32
)

// Installation is the platform's id: all that share its database have it, a restored backup too.
func (r *Registry) Installation(ctx context.Context) (string, error) {
	id := ""
	err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		id, err = installation(ctx, tx)
		return err
	})
	if err != nil || id != "" {
		return id, err
	}
	err = r.update(ctx, func(c *change) (err error) {
		if id, err = installation(ctx, c.Tx); err != nil || id != "" {
			return err
		}
		id = identity.NewID("installation")
		return c.PutMeta(ctx, installationMeta, []byte(id))
	})
	return id, err
}

func installation(ctx context.Context, tx store.Tx) (string, error) {
	b, err := tx.Meta(ctx, installationMeta)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	return string(b), err
}

// licensed is the licence of org as it holds at now: nil when it has none. Its second result says why nothing can be added, nil when more can be.
func (r *Registry) licensed(ctx context.Context, tx store.Tx, org string, now time.Time) (*licence, error) {
	l, err := tx.Licence(ctx, org)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := &licence{Licence: l}
	id, err := installation(ctx, tx)
	if err != nil {
		return nil, err
	}
	e, err := r.LicenceTrust.Open(l.Document)
	if err == nil {
		out.e = e
		if err = e.For(id, org); err == nil {
			err = e.Valid(now)
		}
	}
	out.why = err
	return out, nil
}

// licence is the one that an organization has.
type licence struct {
	*store.Licence
	e   *entitlement.Entitlement // nil when it can not be believed
	why error                    // nothing can be added; nil: something can, as far as limits go
}

// limit is how many nodes of a kind there may be; nil is any number.
func (l *licence) limit(kind identity.Kind) *int64 {
	switch {
	case l.e == nil:
	case kind == identity.Gateway:
		return l.e.Limits.Gateways
	case kind == identity.Relay:
		return l.e.Limits.Relays
	case kind == identity.Client:
		return l.e.Limits.Clients
	}
	return nil
}

// ask is what to do about a limit.
func (l *licence) ask(org string) string {
	who := "whoever gave you the licence"
	if l.e != nil && l.e.Contact != "" {
		who = l.e.Contact
	}
	return fmt.Sprintf("ask %s for another licence (this is %s), then: sallyway --org %s licence install FILE", who, l.ID, org)
}

// room refuses when the licence of org allows no further node of a kind. A node is counted from its making on; enrolled asks about the first enrolment of
// one that was made before: those that have enrolled are counted then.
func (c *change) room(ctx context.Context, org string, kind identity.Kind, enrolled bool) error {
	if kind != identity.Gateway && kind != identity.Relay && kind != identity.Client {
		return nil
	}
	l, err := c.r.licensed(ctx, c.Tx, org, c.now)
	if err != nil || l == nil {
		return err
	}
	if l.why != nil {
		return refuse(http.StatusForbidden, control.CodeLicenceLimit, l.ask(org)+"; what runs goes on", "organization %s can add no %s: %v", org, kind, l.why)
	}
	limit := l.limit(kind)
	if limit == nil {
		return nil
	}
	n, err := c.CountNodes(ctx, org)
	if err != nil {
		return err
	}
	have, what := n[kind].All, string(kind)
	if enrolled {
		have, what = n[kind].Enrolled, "enrolled "+what
	}
	if have < *limit {
		return nil
	}
	if have != 1 {
		what += "s"
	}
	return refuse(http.StatusForbidden, control.CodeLicenceLimit, "delete one that is not needed any more, or "+l.ask(org),
		"organization %s has %d %s, and its licence allows %d", org, have, what, *limit)
}

// Licence is what an organization may have, and has.
func (r *Registry) Licence(ctx context.Context, org string) (*control.Licence, error) {
	var out *control.Licence
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		var err error
		out, err = r.licenceRecord(ctx, tx, org, r.Now())
		return err
	})
	return out, err
}

func (r *Registry) licenceRecord(ctx context.Context, tx store.Tx, org string, now time.Time) (*control.Licence, error) {
	out := &control.Licence{State: control.LicenceNone}
	var err error
	if out.Installation, err = installation(ctx, tx); err != nil {
		return nil, err
	}
	n, err := tx.CountNodes(ctx, org)
	if err != nil {
		return nil, err
	}
	l, err := r.licensed(ctx, tx, org, now)
	if err != nil {
		return nil, err
	}
	for _, k := range []identity.Kind{identity.Gateway, identity.Relay, identity.Client} {
		u := control.LicenceUse{What: string(k) + "s", Used: n[k].All}
		if l != nil {
			u.Limit = l.limit(k)
		}
		out.Use = append(out.Use, u)
	}
	if l == nil {
		return out, nil
	}
	out.Entitlement, out.Source, out.Installed = l.e, l.Source, &l.Installed
	out.State, out.Problem = l.state(org, now)
	return out, nil
}

// state is how the licence is, and why nothing can be added, or what will be soon.
func (l *licence) state(org string, now time.Time) (state, problem string) {
	switch {
	case l.why == nil && daysLeft(l.Expires, now) > licenceWarnings[0]:
		return control.LicenceValid, ""
	case l.why == nil:
		return control.LicenceExpiring, fmt.Sprintf("the licence ends on %s: after that nothing can be added; what runs goes on", l.Expires.Format(time.DateOnly))
	case errors.Is(l.why, entitlement.ErrExpired):
		state = control.LicenceExpired
	case errors.Is(l.why, entitlement.ErrEarly):
		state = control.LicenceEarly
	default:
		state = control.LicenceUntrusted
	}
	return state, fmt.Sprintf("nothing can be added: %v; %s", l.why, l.ask(org))
}

// daysLeft counts begun days until a moment.
func daysLeft(end, now time.Time) int {
	return int(math.Ceil(end.Sub(now).Hours() / 24))
}

// InstallLicence puts a signed licence in the place of the one that an organization has. It is refused when it is not for this platform and
// organization, not signed by a trusted key, over, or older than one that was here. The same one again changes nothing.
func (r *Registry) InstallLicence(ctx context.Context, org string, req control.InstallLicence) (*control.Licence, error) {
	return r.installLicence(ctx, org, req, true)
}

// TakeLicence is InstallLicence for what comes by itself, from a file or a service: one that was removed does not come back so.
func (r *Registry) TakeLicence(ctx context.Context, org string, req control.InstallLicence) (*control.Licence, error) {
	return r.installLicence(ctx, org, req, false)
}

func (r *Registry) installLicence(ctx context.Context, org string, req control.InstallLicence, byHand bool) (*control.Licence, error) {
	if len(r.LicenceTrust) == 0 {
		return nil, refuse(http.StatusConflict, control.CodeConflict, "start platformd with --licence-trust KEY: the issuer's key, as `sallyway-license admin keys` prints it",
			"this platform trusts no issuer of licences, so nothing is limited")
	}
	e, err := r.LicenceTrust.Open(req.Licence)
	if err != nil {
		return nil, invalid("body.licence", "use the licence as the issuer gave it out", "%v", err)
	}
	if req.Source == "" {
		req.Source = "API"
	}
	id, err := r.Installation(ctx)
	if err != nil {
		return nil, err
	}
	var out *control.Licence
	err = r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		if err := e.For(id, org); err != nil {
			return invalid("body.licence", "ask the issuer for one for this organization of this platform", "%v", err)
		}
		old, err := c.Tx.Licence(ctx, org)
		removed := errors.Is(err, store.ErrNotFound)
		if err != nil && !removed {
			return err
		}
		if err == nil && old.ID == e.ID && old.Issuer == e.Issuer && old.Serial == e.Serial {
			out, err = r.licenceRecord(ctx, c.Tx, org, c.now)
			return err
		}
		if err := c.acceptable(ctx, e, removed && byHand); err != nil {
			return err
		}
		l := &store.Licence{
			Org: org, Document: req.Licence, ID: e.ID, Issuer: e.Issuer, Serial: e.Serial, Expires: e.Expires, Source: clip(req.Source, entitlement.MaxText), Installed: c.now, Warned: licenceFresh,
		}
		if e.Limits.Bandwidth != nil {
			l.Bandwidth = *e.Limits.Bandwidth
		}
		if err := c.PutLicence(ctx, l); err != nil {
			return err
		}
		detail := map[string]any{
			"issuer": e.Issuer, "serial": e.Serial, "customer": e.Customer, "expires": e.Expires.Format(time.RFC3339), "source": l.Source,
		}
		for name, n := range map[string]*int64{"gateways": e.Limits.Gateways, "relays": e.Limits.Relays, "clients": e.Limits.Clients, "bandwidth": e.Limits.Bandwidth} {
			if n != nil {
				detail[name] = *n
			}
		}
		if err := c.audit(ctx, org, "licence.install", e.ID, audit.OK, detail); err != nil {
			return err
		}
		if err := c.bump(ctx, org); err != nil { // relays hold the bandwidth
			return err
		}
		out, err = r.licenceRecord(ctx, c.Tx, org, c.now)
		return err
	})
	if err == nil {
		r.Log.Info("licence installed", "org", org, "licence", e.ID, "serial", e.Serial, "expires", e.Expires, "source", req.Source)
	}
	return out, err
}

// acceptable refuses a licence that is older than one that was here, or whose time is not now. One that takes a licence back ends as it begins, so it is
// accepted although it is over. again lets the newest that was here come back.
func (c *change) acceptable(ctx context.Context, e *entitlement.Entitlement, again bool) error {
	highest, err := c.LicenceSerial(ctx, e.Organization, e.Issuer)
	if err != nil {
		return err
	}
	if e.Serial < highest || e.Serial == highest && !again {
		return refuse(http.StatusConflict, control.CodeConflict, "install the newest one that the issuer gave you",
			"licence %s has the serial %d, and organization %s has had %d: an older one does not come back", e.ID, e.Serial, e.Organization, highest)
	}
	err = e.Valid(c.now)
	if errors.Is(err, entitlement.ErrExpired) && e.Reason != "" {
		return nil
	}
	if err != nil {
		return invalid("body.licence", "see that this host's clock is right; ask the issuer for one that is valid now", "%v", err)
	}
	return nil
}

// RemoveLicence takes an organization's licence away: nothing is limited then.
func (r *Registry) RemoveLicence(ctx context.Context, org string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		l, err := c.Tx.Licence(ctx, org)
		if errors.Is(err, store.ErrNotFound) {
			return refuse(http.StatusNotFound, control.CodeNotFound, "nothing is limited", "organization %s has no licence", org)
		}
		if err != nil {
			return err
		}
		if err := c.DeleteLicence(ctx, org); err != nil {
			return err
		}
		if err := c.audit(ctx, org, "licence.remove", l.ID, audit.OK, map[string]any{"issuer": l.Issuer, "serial": l.Serial}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
}

// WarnLicences writes an entry into the audit of every organization whose licence ends in 30, 7 or 1 days, or has ended: once for each, whoever of several
// platforms comes first.
func (r *Registry) WarnLicences(ctx context.Context) error {
	var due []*store.Licence
	if err := r.Store.View(ctx, func(tx store.Tx) error {
		due = nil
		all, err := tx.Licences(ctx)
		for _, l := range all {
			if warning(l, r.Now()) != l.Warned {
				due = append(due, l)
			}
		}
		return err
	}); err != nil {
		return err
	}
	for _, d := range due {
		told := licenceFresh
		if err := r.update(ctx, func(c *change) error {
			told = licenceFresh
			l, err := c.Tx.Licence(ctx, d.Org)
			if errors.Is(err, store.ErrNotFound) {
				return nil
			}
			if err != nil {
				return err
			}
			w := warning(l, c.now)
			if w == l.Warned {
				return nil
			}
			l.Warned, told = w, w
			if err := c.PutLicence(ctx, l); err != nil {
				return err
			}
			detail := map[string]any{"expires": l.Expires.Format(time.RFC3339), "issuer": l.Issuer}
			action := "licence.expired"
			if w != licenceEnded {
				action, detail["days"] = "licence.expiring", w
			}
			return c.audit(ctx, d.Org, action, l.ID, audit.OK, detail)
		}); err != nil {
			return err
		}
		switch told {
		case licenceFresh:
		case licenceEnded:
			r.Log.Warn("the licence has ended: what runs goes on, nothing can be added", "org", d.Org, "licence", d.ID, "expired", d.Expires)
		default:
			r.Log.Warn("the licence ends soon", "org", d.Org, "licence", d.ID, "expires", d.Expires, "days", told)
		}
	}
	return nil
}

// warning is what Warned should be at now: the last step that is reached, never one before that which was told.
func warning(l *store.Licence, now time.Time) int {
	out := licenceFresh
	for _, days := range licenceWarnings {
		if daysLeft(l.Expires, now) <= days {
			out = days
		}
	}
	if !now.Before(l.Expires) {
		out = licenceEnded
	}
	return min(out, l.Warned)
}

// Licences are the licences of all organizations that have one.
func (r *Registry) Licences(ctx context.Context) (map[string]*control.Licence, error) {
	var out map[string]*control.Licence
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = make(map[string]*control.Licence)
		all, err := tx.Licences(ctx)
		if err != nil {
			return err
		}
		for _, l := range all {
			if out[l.Org], err = r.licenceRecord(ctx, tx, l.Org, r.Now()); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// LicenceProblem says why nothing can be added to an organization, or what will be soon; "" when all is well. It counts nothing: every page asks it.
func (r *Registry) LicenceProblem(ctx context.Context, org string) (why string, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		l, err := r.licensed(ctx, tx, org, r.Now())
		if err != nil || l == nil {
			why = ""
			return err
		}
		_, why = l.state(org, r.Now())
		return nil
	})
	return why, err
}
