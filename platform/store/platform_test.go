package store

import (
	"context"
	"testing"
	"time"

	"sallyway/internal/identity"
)

func testPlatformKeys(t *testing.T, s Store) {
	k := &PlatformKey{Hash: identity.KeyHash{7}, Org: "a", Node: "p-1", NotAfter: at.Add(time.Hour)}
	update(t, s, func(ctx context.Context, tx Tx) error {
		o := org("a")
		o.PlatformDial = true
		is(t, "an organization", tx.InsertOrg(ctx, o), nil)
		is(t, "a key", tx.PutPlatformKey(ctx, k), nil)
		renewed := *k
		renewed.NotAfter, renewed.Denied = at.Add(2*time.Hour), true
		is(t, "the same, renewed and denied", tx.PutPlatformKey(ctx, &renewed), nil)
		is(t, "an older one", tx.PutPlatformKey(ctx, &PlatformKey{Hash: identity.KeyHash{8}, Org: "a", Node: "p-2", NotAfter: at}), nil)
		ks, err := tx.PlatformKeys(ctx, "a")
		if err != nil || len(ks) != 2 || *ks[0] != renewed || ks[1].Node != "p-2" {
			t.Errorf("keys %+v, %v", ks, err)
		}
		if got, err := tx.Org(ctx, "a"); err != nil || !got.PlatformDial {
			t.Errorf("organization %+v, %v", got, err)
		}
		o.PlatformDial = false
		is(t, "switched off", tx.UpdateOrg(ctx, o), nil)
		if got, err := tx.Org(ctx, "a"); err != nil || got.PlatformDial {
			t.Errorf("organization %+v, %v", got, err)
		}
		is(t, "purge", tx.Purge(ctx, at.Add(time.Minute), at.Add(time.Minute)), nil)
		if ks, err := tx.PlatformKeys(ctx, "a"); err != nil || len(ks) != 1 {
			t.Errorf("keys after a purge %+v, %v", ks, err)
		}
		return nil
	})
}
