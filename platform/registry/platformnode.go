package registry

import (
	"context"
	"crypto"
	"crypto/x509"
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// PlatformLeafLife is how long the platform's own certificates for dialling gateways live.
const PlatformLeafLife = time.Hour

// CodeSwitchedOff says that the organization does not let the platform dial its gateways.
const CodeSwitchedOff = "platform_dial_off"

// DialOff is the refusal of an organization that has switched it off.
func DialOff(org string) *Error {
	return refuse(http.StatusForbidden, CodeSwitchedOff, "sallyway organization update "+org+" --platform-dial on",
		"organization %s does not let the platform dial its gateways", org)
}

// IssuePlatform issues a certificate of kind platform for a node of this process, whose key does not leave it: leaf first, then its CA.
func (r *Registry) IssuePlatform(ctx context.Context, n identity.Node, public crypto.PublicKey) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	err := r.update(WithActor(ctx, "platform"), func(c *change) error {
		o, err := c.org(ctx, n.Org)
		if err != nil {
			return err
		}
		if !o.PlatformDial {
			return DialOff(n.Org)
		}
		ca, err := r.Authority(ctx, c.Tx, n.Org, string(identity.Platform))
		if err != nil {
			return err
		}
		leaf, err := ca.Leaf(n, public, c.now, PlatformLeafLife)
		if err != nil {
			return err
		}
		out = []*x509.Certificate{leaf, ca.Certificate}
		key := identity.CertificateKeyHash(leaf)
		if err := c.PutPlatformKey(ctx, &store.PlatformKey{Hash: key, Org: n.Org, Node: n.ID, NotAfter: leaf.NotAfter.UTC()}); err != nil {
			return err
		}
		return c.audit(ctx, n.Org, "certificate.issue", n.String(), audit.OK, map[string]any{
			"key": key.String(), "serial": leaf.SerialNumber.Text(16), "not_after": leaf.NotAfter.UTC().Format(time.RFC3339),
		})
	})
	return out, err
}

// setPlatformDial switches it, when on is not nil. Off revokes the certificates that are out.
func (c *change) setPlatformDial(ctx context.Context, o *store.Org, on *bool) error {
	if on == nil || *on == o.PlatformDial {
		return nil
	}
	o.PlatformDial = *on
	if *on {
		return nil
	}
	keys, err := c.PlatformKeys(ctx, o.Name)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if k.Denied {
			continue
		}
		k.Denied = true
		if err := c.PutPlatformKey(ctx, k); err != nil {
			return err
		}
		n := identity.Node{Org: o.Name, Kind: identity.Platform, ID: k.Node}
		if err := c.audit(ctx, o.Name, "certificate.revoke", n.String(), audit.OK, map[string]any{"key": k.Hash.String()}); err != nil {
			return err
		}
	}
	return nil
}

// ResourceTested writes down that the platform opened a session to a resource, and what came of it.
func (r *Registry) ResourceTested(ctx context.Context, org string, t *control.ResourceTest) error {
	result, detail := audit.OK, map[string]any{"resource": t.Resource, "target": t.Target}
	if !t.OK {
		result = "failed"
		if t.Refused {
			result = "refused"
		}
		detail["reason"] = clip(t.Verdict, 512)
	}
	var gateways []string
	for _, g := range t.Gateways {
		word := g.Gateway + ": " + g.Path
		if !g.OK {
			word = g.Gateway + ": failed"
		}
		gateways = append(gateways, word)
	}
	detail["gateways"] = gateways
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		return c.audit(ctx, org, "resource.test", "resource/"+t.Resource, result, detail)
	})
}
