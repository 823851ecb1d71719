// Package database opens SQLite and PostgreSQL alike: one schema, one text of every statement, transactions one after the other. It knows no
// table of anybody's; who keeps something has its migrations and its statements (platform/store, license). platform/store/design.md says which words
// both databases know, and how transactions are ordered.
//
//	db, err := database.Open(ctx, database.Config{Path: file}, schema)
//	err = db.Update(ctx, func(tx *database.Tx) error {
//		return tx.Insert(ctx, `INSERT INTO things (id, made) VALUES (?, ?)`, id, database.Micros(now))
//	})
package database

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

// Errors that callers branch on.
var (
	// ErrNotFound says that a row does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists says that a name or key is taken.
	ErrExists = errors.New("exists already")
	// ErrUnavailable says that the database can not be written or read: disk full, read-only, damaged. The wrapped text says which.
	ErrUnavailable = errors.New("the database is unavailable")
)

// viewTimeout ends a view whose database does not answer.
const viewTimeout = 30 * time.Second

// Schema is what a program keeps.
type Schema struct {
	// Migrations are files NNNN_what.sql for goose, in SQLite's words. They make a table update_turns with one column, which never has a row.
	Migrations fs.FS
	// Program is whose database it is, in errors and in the server's list of connections.
	Program string
	// Fleeting are tables that are in no backup, beside those that the schema brings along.
	Fleeting []string
}

// DB is a database with its schema. All methods may be called concurrently.
type DB struct {
	w, r    *sql.DB // to write and to read; may be the same
	d       *dialect
	view    *sql.TxOptions // nil is the driver's default
	updates queue
	backup  func(ctx context.Context, to string) error
}

// Config says which database.
type Config struct {
	// URL is empty or sqlite: for the file at Path, or that of a PostgreSQL; see PostgresConfig.
	URL         string
	Path        string
	Connections int
}

// Replicated says whether the database can serve several programs at once.
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
func Open(ctx context.Context, c Config, schema Schema) (*DB, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	if c.Replicated() {
		return OpenPostgres(ctx, PostgresConfig{URL: c.URL, Connections: c.Connections}, schema)
	}
	return OpenSQLite(ctx, c.Path, schema)
}

// Update runs fn in a transaction that may write, and commits when fn returns nil. Updates run one after the other. fn must not keep tx and may be
// run again when the database asks for a retry.
func (s *DB) Update(ctx context.Context, fn func(tx *Tx) error) error { return s.updates.do(ctx, fn) }

// View runs fn in a transaction that sees one state of the database.
func (s *DB) View(ctx context.Context, fn func(tx *Tx) error) error {
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
	return fn(&Tx{q: tx, d: s.d, ctx: life})
}

// SchemaVersion is the number of the newest migration that the database has.
func (s *DB) SchemaVersion(ctx context.Context) (int64, error) {
	var v int64
	err := s.r.QueryRowContext(ctx, `SELECT MAX(version_id) FROM goose_db_version WHERE is_applied`).Scan(&v)
	return v, s.d.translate(err)
}

// Backup writes a consistent copy to a new file, an SQLite database.
func (s *DB) Backup(ctx context.Context, path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("backup file %s: %w", path, fs.ErrExist)
	}
	return s.backup(ctx, path)
}

// Close ends the connections.
func (s *DB) Close() error {
	if s.r == s.w {
		return s.w.Close()
	}
	return errors.Join(s.r.Close(), s.w.Close())
}
