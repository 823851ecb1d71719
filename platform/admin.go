package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// credentialMeta is the key under which the database has the newest URL and pin, for commands that run beside the server.
const credentialMeta = "advertised"

// remembered writes down the URL and pin that tokens carry.
func (s *Server) remembered(ctx context.Context) error {
	b, err := json.Marshal(control.AdminCredential{URL: s.url, Pin: s.pin})
	if err != nil {
		return err
	}
	return s.store.Update(ctx, func(tx store.Tx) error { return tx.PutMeta(ctx, credentialMeta, b) })
}

// existing opens a data folder that a platform has run on.
func existing(ctx context.Context, dir string) (*store.DB, *registry.Registry, error) {
	if _, err := os.Stat(filepath.Join(dir, databaseFile)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("there is no platform in %s: start one with `platformd serve`, or name its folder with --data", dir)
		}
		return nil, nil, err
	}
	st, reg, err := openRegistry(ctx, dir, slog.New(slog.DiscardHandler), time.Now)
	return st, reg, err
}

// TokenRequest is what an administrator's token may do.
type TokenRequest struct {
	Name     string
	Org      string // empty is every organization
	ReadOnly bool
	Life     time.Duration // zero is for ever
	// RevokeOthers revokes the tokens of the same reach that exist.
	RevokeOthers bool
}

// AdminToken makes a fresh credential for the platform in a data folder, whether its server runs or not.
func AdminToken(ctx context.Context, dir string, req TokenRequest) (c control.AdminCredential, err error) {
	st, reg, err := existing(ctx, dir)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	ctx = registry.WithActor(ctx, "platformd admin")
	if err := st.View(ctx, func(tx store.Tx) error {
		b, err := tx.Meta(ctx, credentialMeta)
		if err != nil {
			return err
		}
		return json.Unmarshal(b, &c)
	}); err != nil {
		return c, fmt.Errorf("the platform in %s has never served, so its URL is not known: start it with `platformd serve` (%w)", dir, err)
	}
	if req.RevokeOthers {
		if _, err := reg.RevokeAPITokens(ctx, req.Org); err != nil {
			return c, err
		}
	}
	scope := store.ScopeAdmin
	if req.ReadOnly {
		scope = store.ScopeReadOnly
	}
	c.Token, err = reg.CreateAPIToken(ctx, req.Name, req.Org, scope, req.Life)
	return c, err
}

// Backup writes a consistent copy of the database in a data folder to a new file, whether its server runs or not. The master key is not
// in it.
func Backup(ctx context.Context, dir, file string) (err error) {
	st, _, err := existing(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return st.Backup(ctx, file)
}

// Restore puts a backup in the place of a data folder's database, which no server may use, and raises all versions past what nodes may
// have seen. It returns where the old database is kept, "" when there was none.
func Restore(ctx context.Context, dir, file string) (old string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, masterFile)); err != nil {
		return "", fmt.Errorf("the master key that the backup's keys are sealed under is missing: put it back at %s first: %w", filepath.Join(dir, masterFile), err)
	}
	if old, err = store.RestoreSQLite(ctx, file, filepath.Join(dir, databaseFile)); err != nil {
		return old, err
	}
	st, reg, err := existing(ctx, dir)
	if err != nil {
		return old, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return old, reg.Restored(registry.WithActor(ctx, "platformd admin"), filepath.Base(file))
}

// Migrate brings the database of a data folder up to date and returns its schema's number. Serving does so by itself.
func Migrate(ctx context.Context, dir string) (v int64, err error) {
	st, _, err := existing(ctx, dir)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return st.SchemaVersion(ctx)
}

// writeFile writes a secret to path (0600) by way of a synced temporary file.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
