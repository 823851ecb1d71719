package store

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
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

//go:embed migrations/sqlite/*.sql
var migrations embed.FS

// Limits of the connections.
const (
	busyTimeout = 10 * time.Second // another process (admin token, backup) may hold the write lock this long
	readers     = 4
)

// SQLite is a Store in one file, in WAL mode: one writer, some readers.
type SQLite struct {
	path string
	w, r *sql.DB
}

var _ Store = (*SQLite)(nil)

// OpenSQLite opens or makes the database at path (0600) and brings its schema up to date.
func OpenSQLite(ctx context.Context, path string) (*SQLite, error) {
	// The mode is set before SQLite makes the file, which also decides the mode of the WAL.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	s := &SQLite{path: path}
	if s.w, err = open(path, "immediate"); err != nil {
		return nil, err
	}
	s.w.SetMaxOpenConns(1)
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", path, translate(err)), s.w.Close())
	}
	if s.r, err = open(path, "deferred"); err != nil {
		return nil, errors.Join(err, s.w.Close())
	}
	s.r.SetMaxOpenConns(readers)
	s.r.SetMaxIdleConns(readers)
	return s, nil
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

func (s *SQLite) migrate(ctx context.Context) error {
	files, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.w, files)
	if err != nil {
		return err
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return err
	}
	if have > want {
		return fmt.Errorf("schema %d is newer than this program knows (%d): run the newer platformd, or restore a backup", have, want)
	}
	_, err = p.Up(ctx)
	return err
}

// SchemaVersion is the number of the newest migration that the database has.
func (s *SQLite) SchemaVersion(ctx context.Context) (int64, error) {
	var v int64
	err := s.r.QueryRowContext(ctx, `SELECT MAX(version_id) FROM goose_db_version WHERE is_applied`).Scan(&v)
	return v, translate(err)
}

// Update implements Store.
func (s *SQLite) Update(ctx context.Context, fn func(Tx) error) error { return run(ctx, s.w, fn) }

// View implements Store.
func (s *SQLite) View(ctx context.Context, fn func(Tx) error) error { return run(ctx, s.r, fn) }

func run(ctx context.Context, db *sql.DB, fn func(Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return translate(err)
	}
	if err := fn(&sqliteTx{tx}); err != nil {
		if rb := tx.Rollback(); rb != nil && !errors.Is(rb, sql.ErrTxDone) {
			err = errors.Join(err, translate(rb))
		}
		return err
	}
	return translate(tx.Commit())
}

// Writable implements Store.
func (s *SQLite) Writable(ctx context.Context) error {
	return s.Update(ctx, func(tx Tx) error {
		// A page's worth, so that a disk without any room is noticed.
		return tx.PutMeta(ctx, "probe", fmt.Appendf(make([]byte, 0, 4096), "%04096d", time.Now().UnixNano()))
	})
}

// Backup implements Store (VACUUM INTO).
func (s *SQLite) Backup(ctx context.Context, path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("backup file %s: %w", path, fs.ErrExist)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if _, err := s.r.ExecContext(ctx, `VACUUM INTO ?`, path); err != nil {
		return errors.Join(translate(err), os.Remove(path))
	}
	return nil
}

// Close implements Store.
func (s *SQLite) Close() error { return errors.Join(s.r.Close(), s.w.Close()) }

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

// translate turns errors of the driver into the package's.
func translate(err error) error {
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
	src, err := open(backup, "deferred")
	if err != nil {
		return "", err
	}
	defer src.Close()
	if _, err := os.Stat(backup); err != nil {
		return "", err
	}
	var ok string
	if err := src.QueryRowContext(ctx, `PRAGMA quick_check`).Scan(&ok); err != nil || ok != "ok" {
		return "", fmt.Errorf("%s is not a whole database: %s %w", backup, ok, translate(err))
	}
	if err := func() error {
		f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return f.Close()
	}(); err != nil {
		return "", err
	}
	if _, err := src.ExecContext(ctx, `VACUUM INTO ?`, tmp); err != nil {
		return "", errors.Join(translate(err), os.Remove(tmp))
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

// micros encodes a time; the zero time is NULL.
func micros(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UnixMicro()
}

// stamp decodes a time.
type stamp struct{ t *time.Time }

// Scan implements sql.Scanner.
func (s stamp) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*s.t = time.Time{}
	case int64:
		*s.t = time.UnixMicro(v).UTC()
	default:
		return fmt.Errorf("time of type %T", v)
	}
	return nil
}

// list decodes and encodes a column with JSON.
type list[T any] struct{ v *T }

// Scan implements sql.Scanner.
func (l list[T]) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("JSON column of type %T", v)
	}
	return json.Unmarshal([]byte(s), l.v)
}

func encode[T any](v T) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode column: %v", err)) // slices of addresses, ports and strings always encode
	}
	return string(b)
}
