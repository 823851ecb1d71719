package registry

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// A CA is followed by another in steps, so that both ends of every connection accept the old one and the new one for as long as either is
// in use:
//
//	requested   the owner of an offline root is to sign it (platforms that have the root's key skip this)
//	next        nodes are told to accept it; it issues nothing. Ends when every node whose certificate is good has said that it was told
//	current     it issues; the one before retires
//	retiring    nodes still accept what it issued. Ends when the last certificate by it has ended
//	gone        its key is erased
//
// A root is followed together with all that it issued. Each step is one transaction; one replica takes them (AdvanceAuthorities).

// life is how long leaves are valid.
func (r *Registry) life() time.Duration { return cmp.Or(r.LeafLife, control.LeafLife) }

// documents is how long snapshots and grants are valid.
func (r *Registry) documents() time.Duration { return cmp.Or(r.DocumentLife, 24*time.Hour) }

// patience is how long a next CA waits for nodes at most: by then those that have heard nothing have neither certificate nor policies.
func (r *Registry) patience() time.Duration { return r.life() + r.documents() }

// margin is what clocks may differ by.
func (r *Registry) margin() time.Duration { return min(view.DeniedMargin, r.life()/10) }

// retirement is how long after its last certificate was issued a CA is accepted. That of kind policy certified keys that have changed at once, and
// nodes keep a document together with the pins that it came with: for it this is more than enough.
func (r *Registry) retirement() time.Duration { return r.life() + r.margin() }

// rotating is what an organization has, for the steps of a rotation.
type rotating struct {
	org string
	all []*store.Authority // newest generation of a kind first
}

func (c *change) rotating(ctx context.Context, org string) (*rotating, error) {
	all, err := c.Authorities(ctx, org)
	return &rotating{org, all}, err
}

// in returns the newest CA of a kind in a state, or nil.
func (o *rotating) in(kind string, states ...store.AuthorityState) *store.Authority {
	for _, a := range o.all {
		if a.Kind == kind && slices.Contains(states, a.State) {
			return a
		}
	}
	return nil
}

// kinds are those of all but the root, with ssh where withSSH is set.
func (o *rotating) kinds() []string {
	kinds := orgKinds
	if o.org == identity.SharedOrg {
		kinds = sharedKinds
	}
	out := make([]string, len(kinds))
	for i, k := range kinds {
		out[i] = string(k)
	}
	return out
}

// busy returns a CA of a kind that is neither current nor gone.
func (o *rotating) busy(kind string) *store.Authority {
	return o.in(kind, store.Requested, store.Next, store.Retiring)
}

// issued are the CAs in one of states that a root issued. Those that are requested have no issuer yet.
func (o *rotating) issued(root *store.Authority, states ...store.AuthorityState) ([]*store.Authority, error) {
	rc, err := x509.ParseCertificate(root.Certificate)
	if err != nil {
		return nil, fmt.Errorf("certificate of the root of %s: %w", o.org, err)
	}
	var out []*store.Authority
	for _, a := range o.all {
		if !slices.Contains(states, a.State) || !slices.Contains(o.kinds(), a.Kind) || len(a.Certificate) == 0 {
			continue
		}
		c, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate of the %s CA of %s: %w", a.Kind, o.org, err)
		}
		if pki.IssuedBy(c, rc) {
			out = append(out, a)
		}
	}
	return out, nil
}

// open returns a CA with its key; the key is nil when it is kept elsewhere.
func (r *Registry) open(a *store.Authority) (*pki.Authority, error) {
	out := &pki.Authority{}
	var err error
	if a.Kind != pki.KindSSH && len(a.Certificate) > 0 {
		if out.Certificate, err = x509.ParseCertificate(a.Certificate); err != nil {
			return nil, fmt.Errorf("certificate of the %s CA of %s: %w", a.Kind, a.Org, err)
		}
	}
	if len(a.Key) == 0 {
		return out, nil
	}
	pem, err := r.Seal.Open(authorityLabel(a.Org, a.Kind, a.Generation), a.Key)
	if err != nil {
		return nil, err
	}
	if out.Key, err = identity.DecodeKey(pem); err != nil {
		return nil, fmt.Errorf("key of the %s CA of %s: %w", a.Kind, a.Org, err)
	}
	return out, nil
}

// insert puts a CA of the next generation of its kind in place. public is its certificate, or what an SSH CA has in its place; empty for
// one that is requested. key is nil for one that is kept elsewhere.
func (c *change) insert(ctx context.Context, o *rotating, kind string, state store.AuthorityState, public []byte, key crypto.Signer) (*store.Authority, error) {
	a := &store.Authority{Org: o.org, Kind: kind, Generation: 1, Certificate: public, Created: c.now, State: state, Since: c.now}
	for _, b := range o.all {
		if b.Kind == kind {
			a.Generation = max(a.Generation, b.Generation+1)
		}
	}
	if state == store.Next {
		a.Announced = maps.Clone(c.version)
	}
	if key != nil {
		pem, err := identity.EncodeKey(key)
		if err != nil {
			return nil, err
		}
		a.Key = c.r.Seal.Seal(authorityLabel(a.Org, kind, a.Generation), pem)
	}
	o.all = append([]*store.Authority{a}, o.all...)
	return a, c.InsertAuthority(ctx, a)
}

// generation is the one that the next CA of a kind gets.
func (o *rotating) generation(kind string) int {
	n := 0
	for _, a := range o.all {
		if a.Kind == kind {
			n = max(n, a.Generation)
		}
	}
	return n + 1
}

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

// promote has a next CA issue, and the one that did so far retire.
func (c *change) promote(ctx context.Context, o *rotating, a *store.Authority, early bool) error {
	if old := o.in(a.Kind, store.Current); old != nil {
		old.State, old.Since, old.Until = store.Retiring, c.now, c.now.Add(c.r.retirement())
		if err := c.UpdateAuthority(ctx, old); err != nil {
			return err
		}
	}
	a.State, a.Since, a.Announced = store.Current, c.now, nil
	detail := authorityDetail(a)
	if early {
		detail["early"] = true
	}
	if err := errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.current", authorityName(a), audit.OK, detail)); err != nil {
		return err
	}
	c.r.Log.Info("a CA took over", "org", o.org, "kind", a.Kind, "generation", a.Generation)
	return c.bump(ctx, o.org)
}

// retire ends a CA: nodes do not accept it any more, and its key is erased.
func (c *change) retire(ctx context.Context, o *rotating, a *store.Authority, early bool) error {
	a.State, a.Since, a.Key, a.Until = store.Gone, c.now, nil, c.now
	detail := authorityDetail(a)
	if early {
		detail["early"] = true
	}
	if err := errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.gone", authorityName(a), audit.OK, detail)); err != nil {
		return err
	}
	c.r.Log.Info("a CA is gone", "org", o.org, "kind", a.Kind, "generation", a.Generation)
	return c.bump(ctx, o.org)
}

func authorityName(a *store.Authority) string { return fmt.Sprintf("%s CA %d", a.Kind, a.Generation) }

func authorityDetail(a *store.Authority) map[string]any {
	d := map[string]any{"state": string(a.State)}
	if a.Kind != pki.KindSSH && len(a.Certificate) > 0 {
		if c, err := x509.ParseCertificate(a.Certificate); err == nil {
			d["key"], d["not_after"] = identity.CertificateKeyHash(c).String(), c.NotAfter.UTC().Format(time.RFC3339)
		}
	}
	return d
}

// AdvanceAuthorities takes the steps of rotations that are due. One replica calls it; that several do harms nobody.
func (r *Registry) AdvanceAuthorities(ctx context.Context) error {
	var orgs []string
	if err := r.Store.View(ctx, func(tx store.Tx) error {
		orgs = nil
		moving, err := tx.MovingAuthorities(ctx)
		if err != nil {
			return err
		}
		for _, a := range moving {
			if slices.Contains(orgs, a.Org) {
				continue
			}
			c := &change{Tx: tx, r: r, now: r.Now().UTC()}
			o, err := c.rotating(ctx, a.Org)
			if err != nil {
				return err
			}
			due, err := c.due(ctx, o)
			if err != nil {
				return err
			}
			if len(due) > 0 {
				orgs = append(orgs, a.Org)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	var errs []error
	for _, org := range orgs {
		errs = append(errs, r.update(ctx, func(c *change) error {
			o, err := c.rotating(ctx, org)
			if err != nil {
				return err
			}
			due, err := c.due(ctx, o)
			if err != nil {
				return err
			}
			for _, a := range due {
				step := c.promote
				if a.State == store.Retiring {
					step = c.retire
				}
				if err := step(ctx, o, a, false); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// due are the CAs whose next step is due: intermediates before their root.
func (c *change) due(ctx context.Context, o *rotating) ([]*store.Authority, error) {
	var out, roots []*store.Authority
	heard := make(map[string]bool) // by what is announced: CAs of one rotation share it
	for _, a := range o.all {
		switch a.State {
		case store.Next:
			key := fmt.Sprint(a.Announced)
			if _, known := heard[key]; !known {
				left, err := c.unheard(ctx, a)
				if err != nil {
					return nil, err
				}
				heard[key] = len(left) == 0
			}
			if !heard[key] && c.now.Before(a.Since.Add(c.r.patience())) {
				continue
			}
		case store.Retiring:
			if c.now.Before(a.Until) {
				continue
			}
			if a.Kind == pki.KindRoot {
				left, err := o.issued(a, store.Next, store.Current, store.Retiring)
				if err != nil {
					return nil, err
				}
				if slices.ContainsFunc(left, func(i *store.Authority) bool { return !slices.Contains(out, i) || i.State != store.Retiring }) {
					continue
				}
				roots = append(roots, a)
				continue
			}
		default:
			continue
		}
		out = append(out, a)
	}
	return append(out, roots...), nil
}

// unheard are the nodes that have not said that they accept a, and hold a certificate that is good.
func (c *change) unheard(ctx context.Context, a *store.Authority) ([]control.Unheard, error) {
	out := []control.Unheard{}
	for _, org := range slices.Sorted(maps.Keys(a.Announced)) {
		nodes, err := c.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return nil, err
		}
		keys, err := c.OrgKeys(ctx, org)
		if err != nil {
			return nil, err
		}
		ends := make(map[string]time.Time, len(nodes))
		for _, k := range keys {
			if !k.Denied && k.NotAfter.After(ends[k.Node]) {
				ends[k.Node] = k.NotAfter
			}
		}
		for _, n := range nodes {
			end := ends[n.ID].Add(c.r.margin())
			if n.Status != store.Active || n.Enrolled.IsZero() || !end.After(c.now) {
				continue
			}
			if beat, ok := c.r.Board.Get(n.ID); ok && beat.ConfigVersion >= a.Announced[org] {
				continue
			}
			until := end
			if most := a.Since.Add(c.r.patience()); until.After(most) {
				until = most
			}
			out = append(out, control.Unheard{Node: n.Identity(), Name: n.Name, LastSeen: c.r.Board.LastSeen(n), Until: until})
		}
	}
	return out, nil
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

// Authorities lists the CAs of an organization, newest generation of a kind first.
func (r *Registry) Authorities(ctx context.Context, org string) ([]control.AuthorityRecord, error) {
	var out []control.AuthorityRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = []control.AuthorityRecord{}
		c := &change{Tx: tx, r: r, now: r.Now().UTC()}
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		o, err := c.rotating(ctx, org)
		if err != nil {
			return err
		}
		for _, a := range o.all {
			if a.Kind == pki.KindTLS {
				continue // of the platform's own server
			}
			rec, err := r.authorityRecord(o, a)
			if err != nil {
				return err
			}
			out = append(out, *rec)
		}
		return nil
	})
	return out, err
}

func (r *Registry) authorityRecord(o *rotating, a *store.Authority) (*control.AuthorityRecord, error) {
	out := &control.AuthorityRecord{
		Kind: a.Kind, Generation: a.Generation, State: control.AuthorityState(a.State), Created: a.Created, Since: a.Since, Until: a.Until,
		Offline: len(a.Key) == 0 && a.State != store.Gone,
	}
	switch {
	case a.State == store.Next:
		out.Until = a.Since.Add(r.patience())
	case a.State == store.Current, a.State == store.Gone:
		out.Until = time.Time{}
	}
	switch {
	case a.Kind == pki.KindSSH:
		pub, err := x509.ParsePKIXPublicKey(a.Certificate)
		if err != nil {
			return nil, fmt.Errorf("key of the SSH CA: %w", err)
		}
		out.Key = identity.HashKey(pub).String()
	case len(a.Certificate) > 0:
		c, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate of the %s CA: %w", a.Kind, err)
		}
		out.Key, out.NotAfter, out.Certificate = identity.CertificateKeyHash(c).String(), c.NotAfter.UTC(), string(identity.EncodeCertificates(c))
		for _, root := range o.all {
			if root.Kind != pki.KindRoot || root == a {
				continue
			}
			rc, err := x509.ParseCertificate(root.Certificate)
			if err != nil {
				return nil, fmt.Errorf("certificate of the root: %w", err)
			}
			if pki.IssuedBy(c, rc) {
				out.Issuer = identity.CertificateKeyHash(rc).String()
				break
			}
		}
	case a.State == store.Requested:
		ca, err := r.open(a)
		if err != nil {
			return nil, err
		}
		csr, err := pki.IntermediateRequest(a.Org, identity.Kind(a.Kind), a.Generation, ca.Key)
		if err != nil {
			return nil, err
		}
		out.Request, out.Key, out.Offline = string(csr), identity.HashKey(ca.Key.Public()).String(), false
	}
	return out, nil
}
