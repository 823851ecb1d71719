package registry

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// Rotate starts, finishes or aborts a rotation, or says what would happen.
func (r *Registry) Rotate(ctx context.Context, org string, req control.RotateAuthority) (*control.RotationPlan, error) {
	do := r.update
	if req.Plan {
		do = func(ctx context.Context, fn func(*change) error) error { // nothing stays
			return r.Store.View(ctx, func(tx store.Tx) error {
				return fn(&change{Tx: tx, r: r, now: r.Now().UTC().Truncate(time.Microsecond)})
			})
		}
	}
	var out *control.RotationPlan
	err := do(ctx, func(c *change) error {
		out = nil
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		o, err := c.rotating(ctx, org)
		if err != nil {
			return err
		}
		if req.Kind != pki.KindRoot && req.Kind != pki.KindSSH && !slices.Contains(o.kinds(), req.Kind) {
			return invalid("body.kind", "see `sallyway ca list`", "organization %s has no CA of kind %.40q", org, req.Kind)
		}
		switch cmp.Or(req.Action, control.RotationStart) {
		case control.RotationStart:
			err = c.startRotation(ctx, o, req)
		case control.RotationFinish:
			err = c.finishRotation(ctx, o, req)
		case control.RotationAbort:
			err = c.abortRotation(ctx, o, req)
		default:
			err = invalid("body.action", "start, finish or abort", "action %.40q is unknown", req.Action)
		}
		if err != nil {
			return err
		}
		out, err = c.plan(ctx, o, req)
		return err
	})
	return out, err
}

func (c *change) startRotation(ctx context.Context, o *rotating, req control.RotateAuthority) error {
	kinds := []string{req.Kind}
	if req.Kind == pki.KindRoot {
		kinds = append(kinds, o.kinds()...)
	}
	for _, k := range kinds {
		if a := o.busy(k); a != nil {
			if req.Plan {
				return nil // what is under way
			}
			return refuse(http.StatusConflict, control.CodeConflict, "wait for its end, see `sallyway --org "+o.org+" ca list`; --finish goes on at once, --abort takes back one that is next",
				"a rotation of the %s CA of organization %s is under way: generation %d is %s", k, o.org, a.Generation, a.State)
		}
	}
	if err := c.checkCurrent(o, req); err != nil || req.Plan {
		return err
	}
	if err := c.checkPace(o, req.Kind); err != nil {
		return err
	}
	if err := c.bump(ctx, o.org); err != nil {
		return err
	}
	var made []*store.Authority
	var err error
	switch req.Kind {
	case pki.KindSSH:
		made, err = c.nextSSH(ctx, o)
	case pki.KindRoot:
		made, err = c.nextRoot(ctx, o, req)
	default:
		made, err = c.nextIntermediates(ctx, o, o.in(pki.KindRoot, store.Current), req.Kind)
	}
	if err != nil {
		return err
	}
	for _, a := range made {
		if err := c.audit(ctx, o.org, "authority.rotate", authorityName(a), audit.OK, authorityDetail(a)); err != nil {
			return err
		}
	}
	return nil
}

// maxStarts is how many rotations of a CA begin in a day: what was stays on record, and every node's configuration is made from it.
const maxStarts = 20

// checkPace refuses the start of more rotations than anybody needs.
func (c *change) checkPace(o *rotating, kind string) error {
	n := 0
	for _, a := range o.all {
		if a.Kind == kind && a.Generation > 1 && c.now.Sub(a.Created) < 24*time.Hour {
			n++
		}
	}
	if n < maxStarts {
		return nil
	}
	return refuse(http.StatusTooManyRequests, control.CodeRateLimited, "wait a day; see `sallyway --org "+o.org+" ca list --gone`",
		"%d rotations of the %s CA of organization %s began in the last 24 hours, which is the most", n, kind, o.org)
}

// checkCurrent refuses what can not be followed.
func (c *change) checkCurrent(o *rotating, req control.RotateAuthority) error {
	root := o.in(pki.KindRoot, store.Current)
	if root == nil || o.in(req.Kind, store.Current) == nil {
		return refuse(http.StatusConflict, control.CodeConflict, "have the owner sign: sallyway --org "+o.org+" ca sign --root-key FILE", "organization %s has no %s CA yet", o.org, req.Kind)
	}
	offline := len(root.Key) == 0
	switch {
	case req.Kind != pki.KindRoot && req.Root != "":
		return invalid("body.root", "leave it out", "only a rotation of the root takes a root")
	case req.Kind == pki.KindRoot && offline && req.Root == "" && !req.Plan:
		return invalid("body.root", "where the root's key is: sallyway --org "+o.org+" ca rotate --kind root --root-key FILE --new-root-key FILE",
			"the root of organization %s is kept offline: its owner makes the next one", o.org)
	case req.Kind == pki.KindRoot && !offline && req.Root != "":
		return invalid("body.root", "leave --new-root-key out", "the root of organization %s is kept by the platform", o.org)
	}
	return nil
}

func (c *change) nextSSH(ctx context.Context, o *rotating) ([]*store.Authority, error) {
	ca, err := pki.NewSSHAuthority()
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(ca.Key.Public())
	if err != nil {
		return nil, err
	}
	a, err := c.insert(ctx, o, pki.KindSSH, store.Next, public, ca.Key)
	return []*store.Authority{a}, err
}

func (c *change) nextRoot(ctx context.Context, o *rotating, req control.RotateAuthority) ([]*store.Authority, error) {
	current, err := c.r.open(o.in(pki.KindRoot, store.Current))
	if err != nil {
		return nil, err
	}
	next := &pki.Authority{}
	if current.Key == nil {
		certs, err := identity.DecodeCertificates([]byte(req.Root))
		if err != nil || len(certs) != 1 {
			return nil, invalid("body.root", "one certificate, PEM", "the next root is not a certificate")
		}
		if err := pki.CheckRoot(certs[0], o.org, current.Certificate, c.now); err != nil {
			return nil, invalid("body.root", "make it with `sallyway ca rotate --kind root --root-key FILE --new-root-key FILE`", "next root: %v", err)
		}
		next.Certificate = certs[0]
	} else if next, err = current.NextRoot(o.org, o.generation(pki.KindRoot), c.now); err != nil {
		return nil, err
	}
	root, err := c.insert(ctx, o, pki.KindRoot, store.Next, next.Certificate.Raw, next.Key)
	if err != nil {
		return nil, err
	}
	below, err := c.nextIntermediates(ctx, o, root, o.kinds()...)
	return append([]*store.Authority{root}, below...), err
}

// nextIntermediates makes the CAs that follow those of kinds, by root; where root's key is not here, they are to be signed by its owner.
func (c *change) nextIntermediates(ctx context.Context, o *rotating, root *store.Authority, kinds ...string) ([]*store.Authority, error) {
	ca, err := c.r.open(root)
	if err != nil {
		return nil, err
	}
	var out []*store.Authority
	for _, kind := range kinds {
		key, err := identity.NewKey()
		if err != nil {
			return nil, err
		}
		state, der := store.Requested, []byte(nil)
		if ca.Key != nil {
			cert, err := ca.SignIntermediate(o.org, identity.Kind(kind), o.generation(kind), key.Public(), c.now, pki.IntermediateLife)
			if err != nil {
				return nil, err
			}
			state, der = store.Next, cert.Raw
		}
		a, err := c.insert(ctx, o, kind, state, der, key)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// together are the CAs in states that a rotation of kind is about: of a root, all that are under it in the same state.
func (o *rotating) together(kind string, states ...store.AuthorityState) ([]*store.Authority, error) {
	a := o.in(kind, states...)
	if a == nil {
		return nil, nil
	}
	if kind != pki.KindRoot {
		return []*store.Authority{a}, nil
	}
	below, err := o.issued(a, states...)
	return append(below, a), err
}

func (c *change) finishRotation(ctx context.Context, o *rotating, req control.RotateAuthority) error {
	next, err := o.together(req.Kind, store.Next)
	if err != nil {
		return err
	}
	step := c.promote
	if len(next) == 0 {
		step = c.retire
		if next, err = o.together(req.Kind, store.Retiring); err != nil {
			return err
		}
	}
	if len(next) == 0 {
		return refuse(http.StatusConflict, control.CodeConflict, "see `sallyway --org "+o.org+" ca list`", "no rotation of the %s CA of organization %s waits for anything but its owner's signature", req.Kind, o.org)
	}
	if req.Plan {
		return nil
	}
	for _, a := range next {
		if a.Kind == pki.KindRoot && a.State == store.Retiring {
			if left, err := o.issued(a, store.Current, store.Next); err != nil || len(left) > 0 {
				return cmp.Or(err, error(refuse(http.StatusConflict, control.CodeConflict, "have the owner of the root sign what is requested: sallyway --org "+o.org+" ca sign --root-key FILE",
					"CAs that the former root of organization %s issued are still in use", o.org)))
			}
		}
		if err := step(ctx, o, a, true); err != nil {
			return err
		}
	}
	return nil
}

func (c *change) abortRotation(ctx context.Context, o *rotating, req control.RotateAuthority) error {
	next, err := o.together(req.Kind, store.Next, store.Requested)
	if err != nil {
		return err
	}
	if req.Kind == pki.KindRoot && len(next) > 0 {
		for _, k := range o.kinds() { // asked for in the name of the root that does not come
			if a := o.in(k, store.Requested); a != nil && !slices.Contains(next, a) {
				next = append(next, a)
			}
		}
	}
	for _, a := range next {
		if o.in(a.Kind, store.Current) == nil {
			next = nil // the first ones of an organization
			break
		}
	}
	if len(next) == 0 {
		return refuse(http.StatusConflict, control.CodeConflict, "what issues already is followed by a rotation of its own: `sallyway --org "+o.org+" ca rotate --kind "+req.Kind+"`",
			"organization %s has no next %s CA that could be taken back", o.org, req.Kind)
	}
	if req.Plan {
		return nil
	}
	for _, a := range next {
		a.State, a.Since, a.Key, a.Announced = store.Gone, c.now, nil, nil
		if err := errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.abort", authorityName(a), audit.OK, authorityDetail(a))); err != nil {
			return err
		}
	}
	return c.bump(ctx, o.org)
}

// plan words what is under way, or would be.
func (c *change) plan(ctx context.Context, o *rotating, req control.RotateAuthority) (*control.RotationPlan, error) {
	p := &control.RotationPlan{Kind: req.Kind, Steps: []control.RotationStep{}, Unheard: []control.Unheard{}}
	r, kind := c.r, req.Kind
	step := func(done bool, latest time.Time, format string, args ...any) {
		p.Steps = append(p.Steps, control.RotationStep{What: fmt.Sprintf(format, args...), Latest: latest, Done: done})
	}
	what := "the " + kind + " CA"
	if kind == pki.KindRoot {
		what = "the root, and with it a CA of every kind,"
	}
	requested, next, current, retiring := o.in(kind, store.Requested), o.in(kind, store.Next), o.in(kind, store.Current), o.in(kind, store.Retiring)
	waits := requested != nil
	if kind == pki.KindRoot {
		waits = slices.ContainsFunc(o.kinds(), func(k string) bool { return o.in(k, store.Requested) != nil })
	}
	fresh := requested == nil && next == nil && retiring == nil // nothing is under way: what a start would do
	since := c.now
	offline := false
	if rt := o.in(pki.KindRoot, store.Current); rt != nil && kind != pki.KindSSH {
		offline = len(rt.Key) == 0
	}
	switch {
	case fresh:
		step(false, c.now, "generation %d of %s is made", o.generation(kind), what)
	case next != nil:
		since = next.Since
		step(true, since, "generation %d of %s is made", next.Generation, what)
	case retiring != nil:
		step(true, time.Time{}, "generation %d of %s is made", current.Generation, what)
	default:
		step(true, since, "generation %d of %s is asked for", requested.Generation, what)
	}
	if offline && (fresh || waits) {
		step(false, time.Time{}, "the owner of the root signs: sallyway --org %s ca sign --root-key FILE", o.org)
	}
	switched := since.Add(r.patience())
	if retiring != nil && next == nil && requested == nil {
		switched = retiring.Since
	}
	if next != nil || (fresh && !offline) {
		a := next
		if a == nil {
			a = &store.Authority{Org: o.org, Since: c.now, Announced: map[string]uint64{o.org: ^uint64(0)}}
		}
		var err error
		if p.Unheard, err = c.unheard(ctx, a); err != nil {
			return nil, err
		}
		last := c.now
		for _, u := range p.Unheard {
			if u.Until.After(last) {
				last = u.Until
			}
		}
		if last.Before(switched) {
			switched = last
		}
	}
	done := retiring != nil && next == nil && requested == nil
	step(done, switched, "every node has heard of it, and accepts the former and the new one")
	step(done, switched, "it issues; nodes get certificates by it when they renew")
	gone := switched.Add(r.retirement())
	if retiring != nil {
		gone = retiring.Until
	}
	step(false, gone, "the last certificate by the former one has ended: it is not accepted any more, and its key is erased")
	return p, nil
}
