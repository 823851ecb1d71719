package registry

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// Signer makes a signer of org's snapshots and grants, good for pki.PolicyLife, and has the chain audited. The caller keeps it.
func (r *Registry) Signer(ctx context.Context, org string) (*policy.Signer, error) {
	leaf, ca, err := r.newPolicyLeaf(ctx, org, pki.PolicyLife)
	if err != nil {
		return nil, err
	}
	err = r.update(ctx, func(c *change) error {
		return c.audit(ctx, org, "certificate.issue", "policy key", audit.OK, map[string]any{
			"key": identity.CertificateKeyHash(leaf.Certificate).String(), "not_after": leaf.Certificate.NotAfter.UTC().Format(time.RFC3339),
		})
	})
	if err != nil {
		return nil, err
	}
	return &policy.Signer{Key: leaf.Key, Chain: []*x509.Certificate{leaf.Certificate, ca}}, nil
}

// newRelayKey adds a TURN key to a relay, sealed.
func (c *change) newRelayKey(ctx context.Context, relay string) error {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return err
	}
	id := identity.NewID("key")
	return c.InsertRelayKey(ctx, &store.RelayKey{Relay: relay, ID: id, Secret: c.r.Seal.Seal(view.RelayKeyLabel(relay, id), secret), Created: c.now})
}

// liveRelayKeys is how many TURN keys of a relay work at once: the newest, and the one before for credentials that are out.
const liveRelayKeys = 2

// RotateRelayKeys gives every relay of org whose newest key is older than age a new one, and takes away all but the newest two.
func (r *Registry) RotateRelayKeys(ctx context.Context, org string, age time.Duration) error {
	return r.update(ctx, func(c *change) error { return c.rotateRelayKeys(ctx, org, age) })
}

func (c *change) rotateRelayKeys(ctx context.Context, org string, age time.Duration) error {
	relays, err := c.Nodes(ctx, org, identity.Relay, store.Page{})
	if err != nil {
		return err
	}
	for _, n := range relays {
		keys, err := c.RelayKeys(ctx, n.ID)
		if err != nil {
			return err
		}
		if len(keys) > 0 && c.now.Sub(keys[0].Created) < age {
			continue
		}
		if err := c.newRelayKey(ctx, n.ID); err != nil {
			return err
		}
		for i, k := range keys {
			if i < liveRelayKeys-1 {
				continue
			}
			if err := c.DeleteRelayKey(ctx, n.ID, k.ID); err != nil {
				return err
			}
		}
		if err := c.audit(ctx, org, "relay.key.rotate", n.Identity().String(), audit.OK, nil); err != nil {
			return err
		}
		if err := c.bump(ctx, org); err != nil {
			return err
		}
	}
	return nil
}

// touched is how many nodes one transaction writes down as seen: others wait for as long.
const touched = 500

// Housekeeping writes down when nodes were seen and removes what has lost its use.
func (r *Registry) Housekeeping(ctx context.Context) error {
	var seen []store.Seen
	if err := r.Store.View(ctx, func(tx store.Tx) error {
		seen = nil
		orgs, err := tx.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range orgs {
			nodes, err := tx.Nodes(ctx, o.Name, "", store.Page{})
			if err != nil {
				return err
			}
			for _, n := range nodes {
				if beat, ok := r.Board.Get(n.ID); ok && beat.At.After(n.LastSeen) {
					seen = append(seen, store.Seen{Node: n.ID, At: beat.At, Version: clip(beat.Version, 64)})
				}
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for part := range slices.Chunk(seen, touched) {
		if err := r.update(ctx, func(c *change) error { return c.TouchNodes(ctx, part) }); err != nil {
			return err
		}
	}
	return r.update(ctx, func(c *change) error {
		orgs, err := c.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range orgs {
			if err := c.purgeDeleted(ctx, o.Name); err != nil {
				return err
			}
		}
		return c.Purge(ctx, c.now, c.now.Add(-control.LeafLife-view.DeniedMargin))
	})
}

// purgeDeleted forgets deleted nodes whose certificates are all long over.
func (c *change) purgeDeleted(ctx context.Context, org string) error {
	gone, err := c.DeletedNodes(ctx, org)
	if err != nil {
		return err
	}
	for _, n := range gone {
		keys, err := c.Keys(ctx, n.ID)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(keys, func(k *store.Key) bool { return k.NotAfter.Add(view.DeniedMargin).After(c.now) }) {
			continue
		}
		if err := c.PurgeNode(ctx, n.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return nil
}

// clip bounds foreign text.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// Restored raises the versions of all organizations after a backup was put in place: nodes may have seen higher ones than it holds, and
// refuse to go back.
func (r *Registry) Restored(ctx context.Context, backup string) error {
	// What the organizations may have got to since the backup: far more changes than one a second for as long as it is old.
	const leap = 1_000_000
	return r.update(ctx, func(c *change) error {
		orgs, err := c.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range orgs {
			if _, err := c.BumpVersion(ctx, o.Name, max(o.Version, uint64(c.now.Unix()))+leap); err != nil {
				return err
			}
			if err := c.audit(ctx, o.Name, "database.restore", o.Name, audit.OK, map[string]any{"backup": backup}); err != nil {
				return err
			}
		}
		return nil
	})
}
