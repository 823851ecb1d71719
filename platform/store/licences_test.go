package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"sallyway/internal/identity"
)

func testLicences(t *testing.T, s Store) {
	l := &Licence{Org: "a", Document: "x.y.z", ID: "e-1", Issuer: "i", Serial: 7, Bandwidth: 1 << 40, Expires: at, Source: "a file", Installed: at, Warned: 30}
	update(t, s, func(ctx context.Context, tx Tx) error {
		r, g := node("r-1", "a", "r", identity.Relay), node("g-1", "a", "g", identity.Gateway)
		r.Enrolled, g.Deleted = at, at
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertOrg(ctx, org("b")), tx.InsertNode(ctx, r), tx.InsertNode(ctx, g),
			tx.InsertNode(ctx, node("r-2", "a", "s", identity.Relay)), tx.InsertNode(ctx, node("c-1", "b", "c", identity.Client))); err != nil {
			return err
		}
		n, err := tx.CountNodes(ctx, "a")
		equal(t, "nodes", n, map[identity.Kind]Counted{identity.Relay: {2, 1}})
		if err != nil {
			return err
		}
		_, err = tx.Licence(ctx, "a")
		is(t, "none", err, ErrNotFound)
		return tx.PutLicence(ctx, l)
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		got, err := tx.Licence(ctx, "a")
		equal(t, "licence", got, l)
		if err != nil {
			return err
		}
		older := *l
		older.Serial, older.Expires = 3, at.Add(time.Hour)
		if err := tx.PutLicence(ctx, &older); err != nil {
			return err
		}
		all, err := tx.Licences(ctx)
		if err != nil {
			return err
		}
		equal(t, "licences", all, []*Licence{&older})
		if err := tx.DeleteLicence(ctx, "a"); err != nil {
			return err
		}
		is(t, "gone", tx.DeleteLicence(ctx, "a"), ErrNotFound)
		serial, err := tx.LicenceSerial(ctx, "a", "i")
		equal(t, "serial is remembered", serial, 7)
		if err != nil {
			return err
		}
		serial, err = tx.LicenceSerial(ctx, "a", "j")
		equal(t, "of another issuer", serial, 0)
		return err
	})
}
