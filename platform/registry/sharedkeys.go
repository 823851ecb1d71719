package registry

import (
	"context"
	"errors"
	"strconv"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/store"
)

// sharedKeysDue is the key under which the database has how many changes of the shared relays' TURN keys are still to be made for the sake of keys
// that were revoked.
const sharedKeysDue = "shared-relay-keys-due"

// sharedKeyLeast is how old the newest TURN key of a shared relay is at the least when a revocation changes it: every tenant's nodes get new
// credentials then, and none of them may have the others do so all the time.
const sharedKeyLeast = time.Minute

// lostKey changes the TURN keys of the relays at which a revoked key of org may hold credentials. The organization's own relays have a new one at
// once. Shared relays, too, but not more often than every sharedKeyLeast: what is too early waits for RotateSharedKeys.
func (c *change) lostKey(ctx context.Context, org string) error {
	if err := c.rotateRelayKeys(ctx, org, 0); err != nil || org == identity.SharedOrg {
		return err
	}
	relays, err := c.Nodes(ctx, identity.SharedOrg, identity.Relay, store.Page{Limit: 1})
	if err != nil || len(relays) == 0 {
		return err
	}
	due, err := c.sharedDue(ctx)
	if err != nil {
		return err
	}
	// Two changes leave no key that was there before.
	return c.rotateShared(ctx, min(due+1, liveRelayKeys))
}

func (c *change) sharedDue(ctx context.Context) (int, error) {
	b, err := c.Meta(ctx, sharedKeysDue)
	if errors.Is(err, store.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

// rotateShared makes one change of those that are due, if it is not too early, and notes how many are left.
func (c *change) rotateShared(ctx context.Context, due int) error {
	relays, err := c.Nodes(ctx, identity.SharedOrg, identity.Relay, store.Page{})
	if err != nil {
		return err
	}
	early := false
	for _, n := range relays {
		keys, err := c.RelayKeys(ctx, n.ID)
		if err != nil {
			return err
		}
		early = early || len(keys) > 0 && c.now.Sub(keys[0].Created) < sharedKeyLeast
	}
	if !early && due > 0 {
		if err := c.rotateRelayKeys(ctx, identity.SharedOrg, 0); err != nil {
			return err
		}
		due--
	}
	return c.PutMeta(ctx, sharedKeysDue, []byte(strconv.Itoa(due)))
}

// RotateSharedKeys makes a change of the shared relays' TURN keys that was too early before, if any is due.
func (r *Registry) RotateSharedKeys(ctx context.Context) error {
	due := 0
	if err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		due, err = (&change{Tx: tx}).sharedDue(ctx)
		return err
	}); err != nil || due == 0 {
		return err
	}
	return r.update(ctx, func(c *change) error {
		due, err := c.sharedDue(ctx)
		if err != nil || due == 0 {
			return err
		}
		return c.rotateShared(ctx, due)
	})
}
