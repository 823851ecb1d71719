package registry

import (
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"slices"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// SignAuthorities takes the certificates that the owner of an offline root signed for CAs which were requested. All are taken or none.
func (r *Registry) SignAuthorities(ctx context.Context, org string, req control.SignedAuthorities) ([]control.AuthorityRecord, error) {
	var certs []*x509.Certificate
	for _, p := range req.Certificates {
		c, err := identity.DecodeCertificates([]byte(p))
		if err != nil || len(c) != 1 {
			return nil, invalid("body.certificates", "one certificate (PEM) in each entry", "what was signed is not a certificate")
		}
		certs = append(certs, c[0])
	}
	if len(certs) == 0 {
		return nil, invalid("body.certificates", "sallyway --org "+org+" ca sign --root-key FILE", "no certificate was given")
	}
	err := r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		o, err := c.rotating(ctx, org)
		if err != nil {
			return err
		}
		if err := c.bump(ctx, org); err != nil {
			return err
		}
		for _, cert := range certs {
			if err := c.takeSigned(ctx, o, cert); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return r.Authorities(ctx, org)
}

// takeSigned completes the CA that a certificate was requested for.
func (c *change) takeSigned(ctx context.Context, o *rotating, cert *x509.Certificate) error {
	// What the former root would sign now would end with it.
	top := o.in(pki.KindRoot, store.Next, store.Current)
	if top == nil {
		return invalid("body.certificates", "", "organization %s has no root", o.org)
	}
	root, err := x509.ParseCertificate(top.Certificate)
	if err != nil {
		return err
	}
	var opened *pki.Authority
	i := slices.IndexFunc(o.all, func(a *store.Authority) bool {
		if a.State != store.Requested {
			return false
		}
		ca, e := c.r.open(a)
		err = errors.Join(err, e)
		if e != nil || identity.HashKey(ca.Key.Public()) != identity.CertificateKeyHash(cert) {
			return false
		}
		opened = ca
		return true
	})
	if err != nil {
		return err
	}
	if i < 0 {
		return invalid("body.certificates", "see what is asked for with `sallyway --org "+o.org+" ca list`; `ca sign` signs it", "no CA of organization %s asked for a certificate of the key %v", o.org, identity.CertificateKeyHash(cert))
	}
	a := o.all[i]
	if err := pki.CheckIntermediate(cert, root, o.org, identity.Kind(a.Kind), opened.Key.Public(), c.now); err != nil {
		return invalid("body.certificates", "sign with `sallyway --org "+o.org+" ca sign --root-key FILE` and the key of the newest root", "%s CA: %v", a.Kind, err)
	}
	a.State, a.Since, a.Certificate = store.Next, c.now, cert.Raw
	a.Announced = maps.Clone(c.version)
	if o.in(a.Kind, store.Current) == nil {
		a.State, a.Announced = store.Current, nil // the first one: there is nobody who would not know it
	}
	return errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.sign", authorityName(a), audit.OK, authorityDetail(a)))
}
