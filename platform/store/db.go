package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
)

// viewTimeout ends a view whose database does not answer.
const viewTimeout = 30 * time.Second

// DB is a Store in SQLite or PostgreSQL.
type DB struct {
	w, r    *sql.DB // to write and to read; may be the same
	d       *dialect
	view    *sql.TxOptions // nil is the driver's default
	updates queue
	backup  func(ctx context.Context, to string) error
}

var _ Store = (*DB)(nil)

// Config says which database.
type Config struct {
	// URL is empty or sqlite: for the file at Path, or that of a PostgreSQL; see PostgresConfig.
	URL         string
	Path        string
	Connections int
}

// Replicated says whether the database can serve several platforms at once.
func (c Config) Replicated() bool {
	return strings.HasPrefix(c.URL, "postgres://") || strings.HasPrefix(c.URL, "postgresql://")
}

// Check says what is wrong with the URL, without its password.
func (c Config) Check() error {
	if c.URL == "" || c.URL == "sqlite:" {
		return nil
	}
	if !c.Replicated() {
		scheme, _, _ := strings.Cut(c.URL, ":") // the rest may hold a password
		return fmt.Errorf("a database URL begins with postgres://, or is sqlite: for the file in the data folder; this one begins with %.20q", scheme)
	}
	_, err := parsePostgres(c.URL)
	return err
}

// Open opens or makes the database, and brings its schema up to date.
func Open(ctx context.Context, c Config) (*DB, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	if c.Replicated() {
		return OpenPostgres(ctx, PostgresConfig{URL: c.URL, Connections: c.Connections})
	}
	return OpenSQLite(ctx, c.Path)
}

// Update implements Store.
func (s *DB) Update(ctx context.Context, fn func(Tx) error) error { return s.updates.do(ctx, fn) }

// View implements Store.
func (s *DB) View(ctx context.Context, fn func(Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	life, cancel := context.WithTimeout(context.WithoutCancel(ctx), viewTimeout)
	defer cancel()
	tx, err := s.r.BeginTx(life, s.view)
	if err != nil {
		return s.d.translate(err)
	}
	defer func() { _ = tx.Rollback() }() // it only read: nothing is lost
	return fn(&sqlTx{q: tx, d: s.d, ctx: life})
}

// SchemaVersion implements Store.
func (s *DB) SchemaVersion(ctx context.Context) (int64, error) {
	var v int64
	err := s.r.QueryRowContext(ctx, `SELECT MAX(version_id) FROM goose_db_version WHERE is_applied`).Scan(&v)
	return v, s.d.translate(err)
}

// Writable implements Store.
func (s *DB) Writable(ctx context.Context) error {
	return s.Update(ctx, func(tx Tx) error {
		// A page's worth, so that a disk without any room is noticed.
		return tx.PutMeta(ctx, "probe", fmt.Appendf(make([]byte, 0, 4096), "%04096d", time.Now().UnixNano()))
	})
}

// Backup implements Store.
func (s *DB) Backup(ctx context.Context, path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("backup file %s: %w", path, fs.ErrExist)
	}
	return s.backup(ctx, path)
}

// Close implements Store.
func (s *DB) Close() error {
	if s.r == s.w {
		return s.w.Close()
	}
	return errors.Join(s.r.Close(), s.w.Close())
}
