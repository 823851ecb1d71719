package registry

import (
	"context"
	"crypto/x509"
	"slices"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// CertificateRecord is a certificate whose end somebody has to know of.
type CertificateRecord struct {
	Subject    string // what it is for: "root", "CA of gateways", or a node's name
	Kind       string // root, the kind of leaf that a CA issues, or the kind of a node
	CA         bool
	Generation int // of a CA
	State      store.AuthorityState
	Until      time.Time // when a CA that retires does not count any more
	Node       string
	Key        string // hash
	NotBefore  time.Time
	NotAfter   time.Time // zero is never, for SSH CAs
	Renews     bool      // by itself
	Denied     bool
}

// Certificates lists the CAs of an organization and the newest leaf of each of its enrolled nodes, those that end first at the top.
func (r *Registry) Certificates(ctx context.Context, org string) ([]CertificateRecord, error) {
	var out []CertificateRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		as, err := tx.Authorities(ctx, org)
		if err != nil {
			return err
		}
		for _, a := range as {
			if a.State == store.Gone || (org != identity.SharedOrg && a.Kind == pki.KindTLS) {
				continue
			}
			c := CertificateRecord{Kind: a.Kind, CA: true, Generation: a.Generation, NotBefore: a.Created, State: a.State, Until: a.Until}
			if a.State == store.Requested {
				out = append(out, c)
				continue
			}
			if a.Kind != pki.KindSSH {
				cert, err := x509.ParseCertificate(a.Certificate)
				if err != nil {
					return err
				}
				c.NotBefore, c.NotAfter, c.Key = cert.NotBefore, cert.NotAfter, identity.CertificateKeyHash(cert).String()
			}
			out = append(out, c)
		}
		nodes, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		keys, err := tx.OrgKeys(ctx, org)
		if err != nil {
			return err
		}
		newest := make(map[string]*store.Key, len(nodes))
		for _, k := range keys { // newest first
			if newest[k.Node] == nil {
				newest[k.Node] = k
			}
		}
		for _, n := range nodes {
			k := newest[n.ID]
			if k == nil || k.Enrolment != n.Enrolment {
				continue
			}
			out = append(out, CertificateRecord{
				Subject: n.Name, Kind: string(n.Kind), Node: n.ID, Key: k.Hash.String(), NotBefore: k.Created, NotAfter: k.NotAfter,
				Renews: n.Status == store.Active && !k.Denied, Denied: k.Denied,
			})
		}
		return nil
	})
	slices.SortStableFunc(out, func(a, b CertificateRecord) int {
		switch {
		case a.NotAfter.IsZero() != b.NotAfter.IsZero():
			if a.NotAfter.IsZero() {
				return 1
			}
			return -1
		}
		return a.NotAfter.Compare(b.NotAfter)
	})
	return out, err
}
