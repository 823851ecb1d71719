package registry

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// AuditKeyLabel names the place of the private key that signs an audit chain, for Seal.
func AuditKeyLabel(id string) string { return "audit-key/" + id }

// auditKeyMargin is how long before its end a key signs no more.
const auditKeyMargin = time.Hour

// SignAudit signs the head of every chain that has grown since its last signature. A chain that can not be signed keeps none of the others from it.
func (r *Registry) SignAudit(ctx context.Context) error {
	var open []store.ChainHead
	if err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		open, err = tx.Unsigned(ctx)
		return err
	}); err != nil {
		return err
	}
	var all error
	for _, c := range open {
		if err := r.signChain(ctx, c.Org); err != nil {
			all = errors.Join(all, fmt.Errorf("sign the audit log of %s: %w", c.Org, err))
		}
	}
	return all
}

func (r *Registry) signChain(ctx context.Context, org string) error {
	return r.update(ctx, func(c *change) error {
		id, key, err := c.auditKey(ctx, org)
		if err != nil || key == nil {
			return err
		}
		return audit.Sign(ctx, c.Tx, org, id, key, c.now)
	})
}

// auditKey returns the key that signs the chain of org, and makes one when there is none or its certificate is half over. A deleted organization
// keeps the one that it had; when that is over its chain, which does not grow any more, is not signed again: the key is nil.
func (c *change) auditKey(ctx context.Context, org string) (id string, key ed25519.PrivateKey, err error) {
	ks, err := c.AuditKeys(ctx, org)
	if err != nil {
		return "", nil, err
	}
	as, err := c.Authorities(ctx, org)
	if err != nil {
		return "", nil, err
	}
	var live *store.AuditKey
	for _, k := range ks { // newest first
		if len(k.Sealed) > 0 && c.now.Add(auditKeyMargin).Before(k.NotAfter) && ownKey(k, as) {
			live = k
			break
		}
	}
	if live == nil || c.now.Sub(live.Created) > live.NotAfter.Sub(live.Created)/2 {
		id, key, err := c.newAuditKey(ctx, org)
		switch {
		case err == nil:
			return id, key, c.retireAuditKeys(ctx, ks)
		case errors.Is(err, store.ErrNotFound) && live == nil:
			return "", nil, nil
		case live == nil:
			return "", nil, err
		}
		c.r.Log.Warn("the key of an audit log is not renewed, the old one goes on", "org", org, "until", live.NotAfter, "error", err)
	}
	b, err := c.r.Seal.Open(AuditKeyLabel(live.ID), live.Sealed)
	if err != nil {
		return "", nil, err
	}
	return live.ID, ed25519.NewKeyFromSeed(b), nil
}

// ownKey says whether a key is certified under one of an organization's roots, and not under those of one of the same name that was deleted before.
// Without CAs the organization is gone, and its key signs its last entries.
func ownKey(k *store.AuditKey, as []*store.Authority) bool {
	certs, err := identity.DecodeCertificates(k.Chain)
	return len(as) == 0 || err == nil && slices.ContainsFunc(as, func(a *store.Authority) bool {
		return a.Kind == pki.KindRoot && bytes.Equal(a.Certificate, certs[len(certs)-1].Raw)
	})
}

func (c *change) retireAuditKeys(ctx context.Context, ks []*store.AuditKey) error {
	for _, k := range ks {
		if len(k.Sealed) > 0 {
			if err := c.SealAuditKey(ctx, k.ID, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// newAuditKey makes a key with a certificate of kind policy, kept with the certificates up to the root.
func (c *change) newAuditKey(ctx context.Context, org string) (string, ed25519.PrivateKey, error) {
	if _, err := c.Org(ctx, org); err != nil {
		return "", nil, err
	}
	ca, err := c.r.Authority(ctx, c.Tx, org, string(identity.Policy))
	if err != nil {
		return "", nil, err
	}
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", nil, err
	}
	leaf, err := ca.Leaf(identity.Node{Org: org, Kind: identity.Policy, ID: identity.NewID(identity.Policy)}, public, c.now, pki.PolicyLife)
	if err != nil {
		return "", nil, err
	}
	chain := []*x509.Certificate{leaf, ca.Certificate}
	as, err := c.Authorities(ctx, org)
	if err != nil {
		return "", nil, err
	}
	for _, a := range as {
		if a.Kind != pki.KindRoot {
			continue
		}
		root, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return "", nil, err
		}
		if ca.Certificate.CheckSignatureFrom(root) == nil {
			chain = append(chain, root)
			break
		}
	}
	if len(chain) < 3 {
		return "", nil, fmt.Errorf("the policy CA of %s leads to no root of its own", org)
	}
	id := identity.HashKey(public).String()
	if err := c.InsertAuditKey(ctx, &store.AuditKey{
		ID: id, Org: org, Chain: identity.EncodeCertificates(chain...), Sealed: c.r.Seal.Seal(AuditKeyLabel(id), key.Seed()), Created: c.now, NotAfter: leaf.NotAfter,
	}); err != nil {
		return "", nil, err
	}
	return id, key, c.audit(WithActor(ctx, "platform"), org, "certificate.issue", "audit key", audit.OK, map[string]any{
		"key": id, "not_after": leaf.NotAfter.UTC().Format(time.RFC3339),
	})
}

// ExportAudit writes the chain of org, or of a deleted organization, with its signatures (package auditfile). alive may be nil; see audit.Export.
func (r *Registry) ExportAudit(ctx context.Context, org string, w io.Writer, alive func()) error {
	return audit.Export(ctx, r.Store, org, r.Now(), w, alive)
}

// Checkpoints lists signatures of the chain of org after a sequence number, oldest first.
func (r *Registry) Checkpoints(ctx context.Context, org string, after int64, limit int) ([]control.AuditCheckpoint, error) {
	out := []control.AuditCheckpoint{}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = out[:0]
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		ks, err := tx.AuditKeys(ctx, org)
		if err != nil {
			return err
		}
		chains := make(map[string]string, len(ks))
		for _, k := range ks {
			chains[k.ID] = string(k.Chain)
		}
		cs, err := tx.Checkpoints(ctx, org, after, limit)
		for _, c := range cs {
			out = append(out, control.AuditCheckpoint{Seq: c.Seq, Hash: c.Hash, At: c.At, Key: c.Key, Signature: c.Signature, Certificates: chains[c.Key]})
		}
		return err
	})
	return out, err
}

// resealTrail is the part of Reseal for the keys of audit chains and the secrets of webhooks.
func resealTrail(ctx context.Context, tx store.Tx, again func(label string, b []byte) ([]byte, error)) error {
	chains, err := tx.AuditOrgs(ctx)
	if err != nil {
		return err
	}
	for _, org := range chains {
		ks, err := tx.AuditKeys(ctx, org)
		if err != nil {
			return err
		}
		for _, k := range ks {
			if len(k.Sealed) == 0 {
				continue
			}
			b, err := again(AuditKeyLabel(k.ID), k.Sealed)
			if err != nil {
				return err
			}
			if err := tx.SealAuditKey(ctx, k.ID, b); err != nil {
				return err
			}
		}
	}
	orgs, err := tx.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	for _, o := range orgs {
		ws, err := tx.Webhooks(ctx, o.Name, store.Page{})
		if err != nil {
			return err
		}
		for _, w := range ws {
			if w.Secret, err = again(WebhookLabel(w.ID), w.Secret); err != nil {
				return err
			}
			if err := tx.UpdateWebhook(ctx, w); err != nil {
				return err
			}
		}
	}
	return nil
}

// WebhookLabel names the place of a webhook's secret, for Seal.
func WebhookLabel(id string) string { return "webhook/" + id }
