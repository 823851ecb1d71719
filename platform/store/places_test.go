package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"sallyway/internal/identity"
)

func testPlaces(t *testing.T, s Store) {
	full := Wishes{Node: "g-1", Region: "eu", Pin: []string{"r-1"}, Exclude: []string{}, Prefer: []string{"r-2", "r-1"}}
	relay := Wishes{Node: "r-1", Region: "eu", Domain: "rack-7"}
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertOrg(ctx, org("b")), tx.InsertNode(ctx, node("g-1", "a", "g", identity.Gateway)),
			tx.InsertNode(ctx, node("r-1", "a", "r", identity.Relay)), tx.InsertNode(ctx, node("r-2", "b", "r", identity.Relay))); err != nil {
			return err
		}
		none, err := tx.NodeWishes(ctx, "g-1")
		is(t, "no wishes", err, nil)
		equal(t, "no wishes", none.Empty(), true)
		region, err := tx.OrgRegion(ctx, "a")
		is(t, "no region", err, nil)
		equal(t, "no region", *region, OrgRegion{Org: "a"})
		is(t, "wishes", tx.PutWishes(ctx, &Wishes{Node: "g-1", Region: "us"}), nil)
		is(t, "wishes, again", tx.PutWishes(ctx, &full), nil)
		is(t, "a relay's place", tx.PutWishes(ctx, &relay), nil)
		is(t, "a region", tx.PutOrgRegion(ctx, &OrgRegion{Org: "a", Region: "eu"}), nil)
		is(t, "a region, again", tx.PutOrgRegion(ctx, &OrgRegion{Org: "a", Region: "eu", Relays: []string{"eu", "us"}}), nil)
		is(t, "a probe", tx.PutRelayProbe(ctx, &RelayProbe{Relay: "r-1", At: at, Found: []byte(`{"state":"unreached"}`)}), nil)
		is(t, "a probe, again", tx.PutRelayProbe(ctx, &RelayProbe{Relay: "r-1", At: at.Add(time.Minute), Found: []byte(`{"state":"reached"}`)}), nil)
		is(t, "another", tx.PutRelayProbe(ctx, &RelayProbe{Relay: "r-2", At: at, Found: []byte(`{}`)}), nil)
		is(t, "none to drop", tx.DropRelayProbe(ctx, "r-9"), nil)
		return nil
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		got, err := tx.NodeWishes(ctx, "g-1")
		is(t, "wishes", err, nil)
		equal(t, "wishes", *got, full)
		all, err := tx.Wishes(ctx, "a")
		is(t, "all wishes", err, nil)
		equal(t, "all wishes", map[string]Wishes{"g-1": *all["g-1"], "r-1": *all["r-1"]}, map[string]Wishes{"g-1": full, "r-1": relay})
		other, err := tx.Wishes(ctx, "b")
		is(t, "another organization's", err, nil)
		equal(t, "another organization's", len(other), 0)
		regions, err := tx.OrgRegions(ctx)
		is(t, "regions", err, nil)
		equal(t, "regions", regions, map[string]OrgRegion{"a": {Org: "a", Region: "eu", Relays: []string{"eu", "us"}}})
		probes, err := tx.RelayProbes(ctx)
		is(t, "probes", err, nil)
		equal(t, "probes", len(probes), 2)
		for _, p := range probes {
			if p.Relay == "r-1" {
				equal(t, "the newer probe", *p, RelayProbe{Relay: "r-1", At: at.Add(time.Minute), Found: []byte(`{"state":"reached"}`)})
			}
		}
		is(t, "drop", tx.DropRelayProbe(ctx, "r-1"), nil)
		n, err := tx.Node(ctx, "r-2")
		is(t, "a relay", err, nil)
		n.Deleted = at
		return tx.UpdateNode(ctx, n)
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		probes, err := tx.RelayProbes(ctx)
		is(t, "probes of deleted relays", err, nil)
		equal(t, "probes of deleted relays", len(probes), 0)
		// What belongs to a node or an organization goes with it.
		is(t, "purge", tx.PurgeNode(ctx, "g-1"), nil)
		w, err := tx.NodeWishes(ctx, "g-1")
		is(t, "wishes of a purged node", err, nil)
		equal(t, "wishes of a purged node", w.Empty(), true)
		is(t, "delete", tx.DeleteOrg(ctx, "a"), nil)
		regions, err := tx.OrgRegions(ctx)
		is(t, "regions of a deleted organization", err, nil)
		equal(t, "regions of a deleted organization", len(regions), 0)
		return nil
	})
}
