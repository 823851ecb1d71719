//go:build measure

package store

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/backing"
)

// TestMeasureAudit prints how many entries a second go into one organization's chain, each a transaction of its own for its caller, by many callers
// at once. Both databases wait for the disk at every commit.
//
//	go test -tags measure -run TestMeasureAudit -v ./platform/store
func TestMeasureAudit(t *testing.T) {
	pg := backing.StartPostgres(t, true)
	url := pg.Database(t)
	sqlite, err := OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "x.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer sqlite.Close()
	measureAudit(t, "SQLite", 64, sqlite)
	measureAudit(t, "PostgreSQL", 64, openPostgres(t, url))
	measureAudit(t, "PostgreSQL, three replicas", 64, openPostgres(t, url), openPostgres(t, url), openPostgres(t, url))
}

func measureAudit(t *testing.T, what string, callers int, stores ...Store) {
	t.Helper()
	const length = 5 * time.Second
	var done, failed atomic.Int64
	end := time.Now().Add(length)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := 0; time.Now().Before(end); n++ {
				err := stores[i%len(stores)].Update(t.Context(), func(tx Tx) error {
					seq, hash, err := tx.AuditHead(t.Context(), "a")
					if err != nil {
						return err
					}
					return tx.AppendAudit(t.Context(), "a", &AuditEntry{
						Seq: seq + 1, At: at, Actor: "node:a/client/c-1", Action: "certificate.issue", Object: fmt.Sprint(i, n), Result: "ok",
						Detail: []byte(`{"key":"0123456789abcdef0123456789abcdef","not_after":"2026-01-01T00:00:00Z"}`), Hash: fmt.Sprint(len(hash)),
					})
				})
				if err != nil {
					failed.Add(1)
					t.Error(err)
					return
				}
				done.Add(1)
			}
		}()
	}
	wg.Wait()
	t.Logf("%s: %.0f audit entries a second by %d callers", what, float64(done.Load())/length.Seconds(), callers)
}
