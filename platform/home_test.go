package platform

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/identity"
	"sallyway/platform/keyring"
	"sallyway/platform/pki"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// opens says whether a home's secrets can be read.
func opens(t *testing.T, h Home) error {
	t.Helper()
	st, reg, err := h.open(t.Context(), slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		return err
	}
	defer func() { must(t, st.Close()) }()
	return st.View(t.Context(), func(tx store.Tx) error {
		_, err := reg.Authority(t.Context(), tx, registry.DefaultOrg, string(identity.Gateway))
		return err
	})
}

// homes are a fresh home on each database.
func homes(t *testing.T) map[string]Home {
	t.Helper()
	pg := backing.StartPostgres(t, false)
	return map[string]Home{"SQLite": {Data: t.TempDir()}, "PostgreSQL": {Data: t.TempDir(), Database: pg.Database(t)}}
}

// TestMasterKeyRotation changes the master key: the old one opens nothing any more, at every step some file opens the database.
func TestMasterKeyRotation(t *testing.T) {
	t.Parallel()
	for name, h := range homes(t) {
		t.Run(name, func(t *testing.T) {
			must(t, opens(t, h))
			other := h // a second replica
			other.MasterKey = filepath.Join(t.TempDir(), "copy")
			b, err := os.ReadFile(h.masterPath())
			must(t, err)
			must(t, os.WriteFile(other.MasterKey, b, 0o600))
			must(t, opens(t, other))
			r, err := h.RotateMaster(t.Context(), "")
			must(t, err)
			must(t, opens(t, h))
			if old, err := os.ReadFile(r.Old); err != nil || string(old) != string(b) {
				t.Errorf("the old key is not kept: %v", err)
			}
			if st, err := os.Stat(r.File); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%v %v", st, err)
			}
			if h.store().Replicated() {
				if !r.Finish {
					t.Error("a rotation on PostgreSQL is finished when all replicas have the key")
				}
				must(t, opens(t, other)) // until then it starts
				n, err := h.FinishRotation(t.Context())
				if err != nil || n != 1 {
					t.Errorf("%d others, %v", n, err)
				}
			}
			if err := opens(t, other); !errors.Is(err, keyring.ErrOtherMaster) || !strings.Contains(err.Error(), "copy the master key") {
				t.Errorf("the old master key: %v", err)
			}
			must(t, h.RenewDataKey(t.Context()))
			must(t, opens(t, h))
			// A key that was made elsewhere.
			given := pki.NewMaster()
			file := filepath.Join(t.TempDir(), "given")
			must(t, given.WriteNew(file))
			_, err = h.RotateMaster(t.Context(), file)
			must(t, err)
			asked := h
			asked.MasterKeyCommand = "cat '" + file + "'"
			must(t, opens(t, asked))
			_, err = asked.FinishRotation(t.Context())
			must(t, err)
			if err := opens(t, h); !errors.Is(err, keyring.ErrOtherMaster) {
				t.Errorf("after the move to a command: %v", err)
			}
			asked.MasterKeyCommand = "echo no key here; exit 3"
			if err := opens(t, asked); err == nil || !strings.Contains(err.Error(), "run it by hand") || strings.Contains(err.Error(), "no key here") {
				t.Errorf("a command that fails: %v", err)
			}
		})
	}
}

// TestSecondReplicaNeedsTheMasterKey: it does not make one of its own.
func TestSecondReplicaNeedsTheMasterKey(t *testing.T) {
	t.Parallel()
	pg := backing.StartPostgres(t, false)
	first := Home{Data: t.TempDir(), Database: pg.Database(t)}
	must(t, opens(t, first))
	second := Home{Data: t.TempDir(), Database: first.Database}
	if err := opens(t, second); err == nil || !strings.Contains(err.Error(), "another replica") {
		t.Errorf("without a master key: %v", err)
	}
	if _, err := os.Stat(second.masterPath()); err == nil {
		t.Error("it made a master key that opens nothing")
	}
}

// TestOlderDatabaseGetsDataKeys opens a database whose secrets are sealed under the master key itself, as they were before there were data keys.
func TestOlderDatabaseGetsDataKeys(t *testing.T) {
	t.Parallel()
	h := Home{Data: t.TempDir()}
	st, reg, err := h.open(t.Context(), slog.New(slog.DiscardHandler), time.Now)
	must(t, err)
	master, err := h.master(t.Context(), false)
	must(t, err)
	must(t, st.Update(t.Context(), func(tx store.Tx) error { return registry.Reseal(t.Context(), tx, reg.Seal, master.Sealer()) }))
	must(t, st.Close())
	db, err := sql.Open("sqlite", filepath.Join(h.Data, databaseFile))
	must(t, err)
	_, err = db.ExecContext(t.Context(), `DELETE FROM meta WHERE key = 'data-keys'`)
	must(t, errors.Join(err, db.Close()))
	for range 2 {
		must(t, opens(t, h))
	}
}

// TestMoveToPostgres restores a backup of a platform on SQLite to PostgreSQL, and serves from there.
func TestMoveToPostgres(t *testing.T) {
	t.Parallel()
	pg := backing.StartPostgres(t, false)
	w := populate(t, start(t))
	file := filepath.Join(t.TempDir(), "backup")
	must(t, w.cfg.Home().Backup(t.Context(), file))
	w.stop()
	h := w.cfg.Home()
	h.Database = pg.Database(t)
	_, err := h.Restore(t.Context(), file)
	must(t, err)
	if _, err := h.Restore(t.Context(), file); !errors.Is(err, store.ErrNotEmpty) {
		t.Errorf("restored over a platform: %v", err)
	}
	empty := h
	empty.Data = t.TempDir()
	if _, err := empty.Restore(t.Context(), file); err == nil || !strings.Contains(err.Error(), "master key") {
		t.Errorf("restored without the master key: %v", err)
	}
	w.cfg.Database = h.Database
	w.run()
	// The node's key, token and configuration are all still good.
	f := w.client.stream()
	defer f.close()
	f.wait("its configuration", always)
	again := filepath.Join(t.TempDir(), "again")
	must(t, h.Backup(context.Background(), again))
}
