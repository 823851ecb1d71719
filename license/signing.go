package license

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"sallyway/internal/daemon"
	"sallyway/internal/database"
	"sallyway/internal/entitlement"
)

// signingFile has the keys, 0600: the one that signs and the one that will next. Services on one database have copies of the same file.
const signingFile = "signing.key"

// seeds is what the file holds.
type seeds struct {
	Comment string `json:"comment"`
	Seeds   []seed `json:"keys"`
}

type seed struct {
	ID   string `json:"id"`
	Seed []byte `json:"seed"`
}

const seedsComment = "Signing keys of the licence service. Secret. Keep a copy apart from the database: without it every platform has to trust a new key."

// readSeeds reads the keys by their ids; fs.ErrNotExist when there is no file.
func readSeeds(dir string) (map[string]*entitlement.Key, error) {
	path := filepath.Join(dir, signingFile)
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by other users: run chmod 600 %s", path, path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var f seeds
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("%s is damaged: put a copy of it in its place", path) // the cause may quote it
	}
	out := make(map[string]*entitlement.Key)
	for _, s := range f.Seeds {
		k, err := entitlement.KeyOf(s.Seed)
		if err != nil || k.Public().ID() != s.ID {
			return nil, fmt.Errorf("%s is damaged: put a copy of it in its place", path)
		}
		out[s.ID] = k
	}
	return out, nil
}

// writeSeeds replaces the file in one step.
func writeSeeds(dir string, keys ...*entitlement.Key) error {
	f := seeds{Comment: seedsComment}
	for _, k := range keys {
		f.Seeds = append(f.Seeds, seed{k.Public().ID(), k.Seed()})
	}
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return daemon.WriteFile(filepath.Join(dir, signingFile), append(b, '\n'), 0o600)
}

// prepareKeys makes the first keys, and sees at every start that the file has the key that signs.
func (s *Service) prepareKeys(ctx context.Context) error {
	var known []*SigningKey
	if err := s.db.View(ctx, func(tx *database.Tx) (err error) {
		known, err = signingKeys(ctx, tx)
		return err
	}); err != nil {
		return err
	}
	if len(known) > 0 {
		_, err := s.signer(known)
		return err
	}
	have, err := readSeeds(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// A file that is there already is that of a first start that failed, or of another service on this database that is just as new.
	keys := make([]*entitlement.Key, 0, 2)
	for _, k := range have {
		keys = append(keys, k)
	}
	for len(keys) < 2 {
		k, err := entitlement.NewKey()
		if err != nil {
			return err
		}
		keys = append(keys, k)
	}
	if err := writeSeeds(s.dir, keys...); err != nil {
		return fmt.Errorf("signing key: %w", err)
	}
	return s.db.Update(ctx, func(tx *database.Tx) error {
		now := s.now()
		there, err := signingKeys(ctx, tx)
		if err != nil {
			return err
		}
		if len(there) > 0 {
			return errors.New("another licence service made its signing keys on this database just now: copy its signing.key here and start again")
		}
		for i, state := range []string{KeyCurrent, KeyNext} {
			if err := putSigningKey(ctx, tx, keys[i], state, now); err != nil {
				return err
			}
		}
		return record(ctx, tx, now, "service", "key.create", keys[0].Public().ID(), map[string]any{"next": keys[1].Public().ID()})
	})
}

func putSigningKey(ctx context.Context, tx *database.Tx, k *entitlement.Key, state string, now time.Time) error {
	return tx.Insert(ctx, `INSERT INTO signing_keys (id, public, state, created) VALUES (?, ?, ?, ?)`, k.Public().ID(), k.Public().String(), state, database.Micros(now))
}

// signer is the key that signs, of those that the database knows: the file has it, or this is not the service's file.
func (s *Service) signer(known []*SigningKey) (*entitlement.Key, error) {
	have, err := readSeeds(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, k := range known {
		if k.State == KeyCurrent && have[k.ID] != nil {
			return have[k.ID], nil
		}
	}
	return nil, fmt.Errorf("%s has not the key that signs: copy the file of that name from another service on this database, or from your backup of it; when it is lost: sallyway-license admin rotate-keys --lost",
		filepath.Join(s.dir, signingFile))
}

// RotateKeys has the next key sign from now on, and makes a new next one. With lost, the file is gone: both are made anew, and every platform has to be
// told. It returns the keys that platforms should trust.
func (s *Service) RotateKeys(ctx context.Context, actor string, lost bool) ([]*SigningKey, error) {
	var known []*SigningKey
	if err := s.db.View(ctx, func(tx *database.Tx) (err error) {
		known, err = signingKeys(ctx, tx)
		return err
	}); err != nil {
		return nil, err
	}
	have, err := readSeeds(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var current, next *entitlement.Key
	var keep []*entitlement.Key
	for _, k := range known {
		if h := have[k.ID]; h != nil && k.State != KeyOld {
			keep = append(keep, h)
			if k.State == KeyNext {
				current = h
			}
		}
	}
	switch {
	case lost && len(keep) > 0:
		return nil, fmt.Errorf("%s still has keys of this service: rotate without --lost", filepath.Join(s.dir, signingFile))
	case lost:
		if current, err = entitlement.NewKey(); err != nil {
			return nil, err
		}
		keep = append(keep, current)
	case current == nil:
		return nil, fmt.Errorf("%s has not the next key: copy the newest file from the service that rotated last", filepath.Join(s.dir, signingFile))
	}
	if next, err = entitlement.NewKey(); err != nil {
		return nil, err
	}
	// A crash at any point leaves a file that has the key that signs.
	if err := writeSeeds(s.dir, append(keep, next)...); err != nil {
		return nil, err
	}
	var out []*SigningKey
	if err := s.db.Update(ctx, func(tx *database.Tx) error {
		now := s.now()
		if err := tx.Exec(ctx, false, `UPDATE signing_keys SET state = 'old' WHERE state = 'current' OR state = 'next'`); err != nil {
			return err
		}
		if lost {
			if err := putSigningKey(ctx, tx, current, KeyCurrent, now); err != nil {
				return err
			}
		} else if err := tx.Exec(ctx, true, `UPDATE signing_keys SET state = 'current' WHERE id = ?`, current.Public().ID()); err != nil {
			return err
		}
		if err := putSigningKey(ctx, tx, next, KeyNext, now); err != nil {
			return err
		}
		if err := record(ctx, tx, now, actor, "key.rotate", current.Public().ID(), map[string]any{"next": next.Public().ID(), "lost": lost}); err != nil {
			return err
		}
		out, err = signingKeys(ctx, tx)
		return err
	}); err != nil {
		return nil, err
	}
	return out, writeSeeds(s.dir, current, next)
}

// SigningKeys are the public keys of the service, the current one first, then the next one: platforms should trust both.
func (s *Service) SigningKeys(ctx context.Context) (out []*SigningKey, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) (err error) {
		out, err = signingKeys(ctx, tx)
		return err
	})
	return out, err
}
