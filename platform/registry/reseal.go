package registry

import (
	"context"
	"errors"

	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// ACMEMeta is where the platform's own certificates by ACME and their keys are kept, sealed with this label.
const ACMEMeta = "acme"

// Reseal seals the platform's own keys, every CA key, TURN key, secret of people's logins, key of an audit chain, secret of a webhook and the key of access tokens anew. It is a keyring.Reseal.
func Reseal(ctx context.Context, tx store.Tx, from, to *pki.Sealer) error {
	again := func(label string, b []byte) ([]byte, error) {
		clear, err := from.Open(label, b)
		if err != nil {
			return nil, err
		}
		return to.Seal(label, clear), nil
	}
	for _, key := range []string{accessMeta, ACMEMeta} {
		b, err := tx.Meta(ctx, key)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err == nil {
			b, err = again(key, b)
		}
		if err == nil {
			err = tx.PutMeta(ctx, key, b)
		}
		if err != nil {
			return err
		}
	}
	orgs, err := tx.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	for _, o := range orgs {
		as, err := tx.Authorities(ctx, o.Name)
		if err != nil {
			return err
		}
		for _, a := range as {
			if len(a.Key) == 0 {
				continue // its key is kept elsewhere
			}
			if a.Key, err = again(authorityLabel(a.Org, a.Kind, a.Generation), a.Key); err != nil {
				return err
			}
			if err := tx.UpdateAuthorityKey(ctx, a); err != nil {
				return err
			}
		}
		relays, err := tx.Nodes(ctx, o.Name, identity.Relay, store.Page{})
		if err != nil {
			return err
		}
		deleted, err := tx.DeletedNodes(ctx, o.Name)
		if err != nil {
			return err
		}
		for _, n := range append(relays, deleted...) {
			if err := resealRelay(ctx, tx, n.ID, again); err != nil {
				return err
			}
		}
	}
	if err := resealTrail(ctx, tx, again); err != nil {
		return err
	}
	return resealPeople(ctx, tx, again)
}

func resealRelay(ctx context.Context, tx store.Tx, relay string, again func(label string, b []byte) ([]byte, error)) error {
	keys, err := tx.RelayKeys(ctx, relay)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if k.Secret, err = again(view.RelayKeyLabel(k.Relay, k.ID), k.Secret); err != nil {
			return err
		}
		if err := errors.Join(tx.DeleteRelayKey(ctx, k.Relay, k.ID), tx.InsertRelayKey(ctx, k)); err != nil {
			return err
		}
	}
	return nil
}
