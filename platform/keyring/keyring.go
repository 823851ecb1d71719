// Package keyring keeps the data keys: the keys that CA keys and other secrets of the database are sealed under. They lie in the database,
// wrapped by the master key, which does not, so that a copy of the database alone is worth nothing, and the master key can be changed by wrapping
// a few bytes anew while the platform runs.
//
// The database's value "data-keys" is JSON, newest key first; a key can be wrapped by two master keys while one follows the other:
//
//	[{"created": "…", "wraps": {"<id of the master key>": "<base64>"}}]
package keyring

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyway/platform/pki"
	"sallyway/platform/store"
)

const (
	meta     = "data-keys"
	label    = "data-key" // under which a data key is sealed
	dataSize = 32         // bytes: AES-256
)

// ErrOtherMaster says that the data keys are wrapped by another master key.
var ErrOtherMaster = errors.New("the database is sealed under another master key")

// key is a data key as the database has it.
type key struct {
	Created time.Time         `json:"created"`
	Wraps   map[string][]byte `json:"wraps"` // by master key
}

// Reseal seals what tx holds anew: it opens with from and seals with to.
type Reseal func(ctx context.Context, tx store.Tx, from, to *pki.Sealer) error

func read(ctx context.Context, tx store.Tx) ([]key, error) {
	b, err := tx.Meta(ctx, meta)
	if err != nil {
		return nil, err
	}
	var keys []key
	if err := json.Unmarshal(b, &keys); err != nil || len(keys) == 0 {
		return nil, fmt.Errorf("the data keys in the database are damaged: restore a backup (%w)", err)
	}
	return keys, nil
}

func write(ctx context.Context, tx store.Tx, keys []key) error {
	b, err := json.Marshal(keys)
	if err != nil {
		return err
	}
	return tx.PutMeta(ctx, meta, b)
}

// fresh makes a data key that master wraps.
func fresh(master *pki.Master, now time.Time) (key, []byte) {
	k := make([]byte, dataSize)
	_, _ = rand.Read(k) // never fails (crypto/rand)
	return key{Created: now.UTC(), Wraps: map[string][]byte{master.ID(): master.Sealer().Seal(label, k)}}, k
}

// unwrap opens the data keys.
func unwrap(keys []key, master *pki.Master) ([][]byte, error) {
	var out [][]byte
	for _, k := range keys {
		sealed, ok := k.Wraps[master.ID()]
		if !ok {
			return nil, fmt.Errorf("%w: %s, this one is %s", ErrOtherMaster, strings.Join(masters(keys), " or "), master.ID())
		}
		b, err := master.Sealer().Open(label, sealed)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// masters are the ids of the master keys that open all keys.
func masters(keys []key) []string {
	var out []string
	for id := range keys[0].Wraps {
		if !slices.ContainsFunc(keys, func(k key) bool { return k.Wraps[id] == nil }) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// Open returns what seals and opens the secrets in a database. A database without data keys gets one; what an older version sealed under the
// master key itself is sealed anew by reseal in the same transaction. ErrOtherMaster when master is not the database's.
func Open(ctx context.Context, st store.Store, master *pki.Master, now time.Time, reseal Reseal) (*pki.Sealer, error) {
	var s *pki.Sealer
	err := st.Update(ctx, func(tx store.Tx) error {
		keys, err := read(ctx, tx)
		if errors.Is(err, store.ErrNotFound) {
			k, b := fresh(master, now)
			if s, err = pki.NewSealer(b); err != nil {
				return err
			}
			return errors.Join(write(ctx, tx, []key{k}), reseal(ctx, tx, master.Sealer(), s))
		}
		if err != nil {
			return err
		}
		bs, err := unwrap(keys, master)
		if err != nil {
			return err
		}
		s, err = pki.NewSealer(bs...)
		return err
	})
	return s, err
}

// Wrap wraps the data keys by another master key, too. From then on both open the database.
func Wrap(ctx context.Context, st store.Store, master, also *pki.Master) error {
	return st.Update(ctx, func(tx store.Tx) error {
		keys, err := read(ctx, tx)
		if err != nil {
			return err
		}
		bs, err := unwrap(keys, master)
		if err != nil {
			return err
		}
		for i := range keys {
			keys[i].Wraps[also.ID()] = also.Sealer().Seal(label, bs[i])
		}
		return write(ctx, tx, keys)
	})
}

// Forget leaves master as the only master key that opens the database. It returns how many others did before.
func Forget(ctx context.Context, st store.Store, master *pki.Master) (others int, err error) {
	err = st.Update(ctx, func(tx store.Tx) error {
		keys, err := read(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := unwrap(keys, master); err != nil {
			return err
		}
		others = len(masters(keys)) - 1
		for i, k := range keys {
			keys[i].Wraps = map[string][]byte{master.ID(): k.Wraps[master.ID()]}
		}
		return write(ctx, tx, keys)
	})
	return others, err
}

// Renew makes a new data key and seals everything anew. Platforms that run do not know the new key: none may. Older keys stay, to open what
// reseal does not reach.
func Renew(ctx context.Context, st store.Store, master *pki.Master, now time.Time, reseal Reseal) error {
	return st.Update(ctx, func(tx store.Tx) error {
		keys, err := read(ctx, tx)
		if err != nil {
			return err
		}
		bs, err := unwrap(keys, master)
		if err != nil {
			return err
		}
		from, err := pki.NewSealer(bs...)
		if err != nil {
			return err
		}
		k, b := fresh(master, now)
		to, err := pki.NewSealer(b)
		if err != nil {
			return err
		}
		return errors.Join(write(ctx, tx, append([]key{k}, keys...)), reseal(ctx, tx, from, to))
	})
}
