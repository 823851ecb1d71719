package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

// TokenRequest is what an administrator's token may do.
type TokenRequest struct {
	Name     string
	Org      string // empty is every organization
	ReadOnly bool
	Life     time.Duration // zero is for ever
	// RevokeOthers revokes the tokens of the same reach that exist.
	RevokeOthers bool
}

// AdminToken makes a fresh credential for the platform of a home, whether its server runs or not.
func (h Home) AdminToken(ctx context.Context, req TokenRequest) (c control.AdminCredential, err error) {
	st, reg, err := h.existing(ctx)
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
		return c, fmt.Errorf("the platform in %s has never served, so its URL is not known: start it with `platformd serve` (%w)", h, err)
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

// Backup writes a consistent copy of the database to a new file, whether its server runs or not. The master key is not
// in it.
func (h Home) Backup(ctx context.Context, file string) (err error) {
	st, _, err := h.existing(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return st.Backup(ctx, file)
}

// Restore puts a backup in the place of the database, which no server may use, and raises all versions past what nodes may have seen. It returns
// where the old database is kept, "" when there was none. A PostgreSQL must be empty (store.ErrNotEmpty): the old one stays as it is.
func (h Home) Restore(ctx context.Context, file string) (old string, err error) {
	return h.RestoreIn(ctx, file, RestoreRegion{})
}

// RestoreIn is Restore for a deployment of a region: registry.ErrOtherRegion for a backup of another one.
func (h Home) RestoreIn(ctx context.Context, file string, in RestoreRegion) (old string, err error) {
	if err := os.MkdirAll(h.Data, 0o700); err != nil {
		return "", err
	}
	if _, err := h.master(ctx, false); err != nil {
		return "", fmt.Errorf("the master key that the backup's keys are sealed under is needed first: %w", err)
	}
	region, err := h.checkRegion(ctx, file, in)
	if err != nil {
		return "", err
	}
	if c := h.store(); c.Replicated() {
		err = store.RestorePostgres(ctx, file, store.PostgresConfig{URL: c.URL, Connections: c.Connections})
	} else {
		old, err = store.RestoreSQLite(ctx, file, c.Path)
	}
	if err != nil {
		return old, err
	}
	st, reg, err := h.existing(ctx)
	if err != nil {
		return old, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	ctx = registry.WithActor(ctx, "platformd admin")
	if err := reg.BindRegion(ctx, region, in.Other); err != nil {
		return old, err
	}
	return old, reg.Restored(ctx, filepath.Base(file))
}

// Migrate brings the database up to date and returns its schema's number. Serving does so by itself.
func (h Home) Migrate(ctx context.Context) (v int64, err error) {
	st, _, err := h.existing(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return st.SchemaVersion(ctx)
}
