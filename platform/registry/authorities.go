package registry

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
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
