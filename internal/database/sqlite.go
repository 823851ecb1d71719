package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
)

// Limits of the connections.
const (
	busyTimeout = 10 * time.Second // another process (admin token, backup) may hold the write lock this long
	readers     = 4
)

// sqliteDialect is SQLite's: one writer at a time, so no transaction fails because of another.
var sqliteDialect = &dialect{
	translate: translateSQLite,
	again:     func(error) bool { return false },
	lost:      func(error) bool { return false },
}

// OpenSQLite opens or makes the database at path (0600) and brings its schema up to date.
func OpenSQLite(ctx context.Context, path string, schema Schema) (*DB, error) {
	// The mode is set before SQLite makes the file, which also decides the mode of the WAL.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	w, err := open(path, "immediate")
	if err != nil {
		return nil, err
	}
	w.SetMaxOpenConns(1)
	if err := migrate(ctx, w, schema, goose.DialectSQLite3, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", path, translateSQLite(err)), w.Close())
	}
	r, err := open(path, "deferred")
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	r.SetMaxOpenConns(readers)
	r.SetMaxIdleConns(readers)
	return &DB{
		w: w, r: r, d: sqliteDialect, backup: func(ctx context.Context, to string) error { return vacuumInto(ctx, r, to) },
		updates: queue{d: sqliteDialect, lead: make(chan struct{}, 1), begin: func(ctx context.Context, _ int) (*transaction, error) {
			tx, err := w.BeginTx(ctx, nil)
			if err != nil {
				return nil, err
			}
			return &transaction{q: tx, commit: tx.Commit, rollback: tx.Rollback}, nil
		}},
	}, nil
}

func open(path, lock string) (*sql.DB, error) {
	q := url.Values{"_txlock": {lock}, "_pragma": {
		fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()), "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)",
		"journal_size_limit(16777216)", "trusted_schema(0)",
	}}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+q.Encode())
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	return db, nil
}

// vacuumInto writes a consistent copy to a new file.
func vacuumInto(ctx context.Context, db *sql.DB, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, path); err != nil {
		return errors.Join(translateSQLite(err), os.Remove(path))
	}
	return nil
}

// Primary result codes of SQLite (sqlite.org/rescode.html).
const (
	codeBusy     = 5
	codeLocked   = 6
	codeReadOnly = 8
	codeIOErr    = 10
	codeCorrupt  = 11
	codeFull     = 13
	codeCantOpen = 14
	codeNotADB   = 26

	codeUnique     = 2067
	codePrimaryKey = 1555
)

// translateSQLite turns errors of the driver into the package's.
func translateSQLite(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code() {
	case codeUnique, codePrimaryKey:
		return ErrExists
	}
	why := ""
	switch e.Code() & 0xff {
	case codeFull:
		why = "the disk is full"
	case codeReadOnly:
		why = "the file or its folder is read-only"
	case codeCantOpen:
		why = "the file can not be opened"
	case codeIOErr:
		why = "the disk fails"
	case codeCorrupt, codeNotADB:
		why = "the file is damaged: restore a backup"
	case codeBusy, codeLocked:
		why = "another process holds it"
	default:
		return err
	}
	return fmt.Errorf("%w: %s (%w)", ErrUnavailable, why, err)
}

// RestoreSQLite puts a backup in the place of the database at path, which no process may have open. The old database is kept
// beside it, under the name that is returned; "" when there was none.
func RestoreSQLite(ctx context.Context, backup, path string) (old string, err error) {
	tmp := path + ".restore"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := copySQLite(ctx, backup, tmp); err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err == nil {
		old = fmt.Sprintf("%s.before-restore-%s", path, time.Now().UTC().Format("20060102T150405"))
		for _, suffix := range []string{"", "-wal", "-shm"} {
			if err := os.Rename(path+suffix, old+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return "", err
			}
		}
	}
	if err := os.Rename(tmp, path); err != nil {
		return old, err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return old, err
	}
	return old, errors.Join(d.Sync(), d.Close())
}

// copySQLite writes a copy of the database in a file, which is looked through first, to a new file.
func copySQLite(ctx context.Context, from, to string) error {
	if _, err := os.Stat(from); err != nil {
		return err
	}
	src, err := open(from, "deferred")
	if err != nil {
		return err
	}
	defer src.Close()
	var ok string
	if err := src.QueryRowContext(ctx, `PRAGMA quick_check`).Scan(&ok); err != nil || ok != "ok" {
		return fmt.Errorf("%s is not a whole database: %s %w", from, ok, translateSQLite(err))
	}
	return vacuumInto(ctx, src, to)
}
