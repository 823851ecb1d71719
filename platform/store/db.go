package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"sallyway/internal/database"
	"sallyway/internal/telemetry"
)

// migrations are written once, in SQLite's words; see design.md.
//
//go:embed migrations/*.sql
var migrations embed.FS

// fleeting are what running platforms tell each other.
var fleeting = []string{"replicas", "replica_beats", "leases"}

// schema is the platform's.
func schema() database.Schema {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		panic(err) // it is embedded above
	}
	return database.Schema{Migrations: files, Program: "platformd", Fleeting: fleeting}
}

// DB is a Store in SQLite or PostgreSQL.
type DB struct{ *database.DB }

var _ Store = (*DB)(nil)

// Config says which database.
type Config = database.Config

// PostgresConfig is where a PostgreSQL is.
type PostgresConfig = database.PostgresConfig

// PostgresConnections is how many connections one platformd opens at most when it is not told otherwise.
const PostgresConnections = database.PostgresConnections

// ErrNotEmpty says that a database already holds a platform.
var ErrNotEmpty = database.ErrNotEmpty

// Open opens or makes the database, and brings its schema up to date.
func Open(ctx context.Context, c Config) (*DB, error) {
	return wrap(database.Open(ctx, c, schema()))
}

// OpenSQLite opens or makes the database at path (0600) and brings its schema up to date.
func OpenSQLite(ctx context.Context, path string) (*DB, error) {
	return wrap(database.OpenSQLite(ctx, path, schema()))
}

// OpenPostgres opens the database, which must exist, and brings its schema up to date. Several programs may do so at once. An error that
// ErrUnavailable wraps says what to do; none holds the password.
func OpenPostgres(ctx context.Context, c PostgresConfig) (*DB, error) {
	return wrap(database.OpenPostgres(ctx, c, schema()))
}

func wrap(db *database.DB, err error) (*DB, error) {
	if err != nil {
		return nil, err
	}
	return &DB{db}, nil
}

// RestoreSQLite puts a backup in the place of the database at path, which no process may have open. The old database is kept
// beside it, under the name that is returned; "" when there was none.
func RestoreSQLite(ctx context.Context, backup, path string) (old string, err error) {
	return database.RestoreSQLite(ctx, backup, path)
}

// RestorePostgres fills an empty PostgreSQL with a backup, or with the database of a platform that ran on SQLite and is stopped: ErrNotEmpty
// when it holds a platform already. It is all there afterwards, or nothing.
func RestorePostgres(ctx context.Context, backup string, to PostgresConfig) error {
	return database.RestorePostgres(ctx, backup, to, schema())
}

// joinedKey is the key of a transaction in a context; see Join.
type joinedKey struct{}

// Join returns a context with which View sees what tx does: methods that read for themselves then read inside of the transaction. It is good while
// tx is.
func Join(ctx context.Context, tx Tx) context.Context { return context.WithValue(ctx, joinedKey{}, tx) }

// Update implements Store.
func (s *DB) Update(ctx context.Context, fn func(Tx) error) error {
	if ctx.Value(joinedKey{}) != nil {
		return errors.New("a transaction inside of a transaction") // it would wait for itself
	}
	ctx, span := telemetry.Child(ctx, "database update")
	defer span.End()
	return failed(span, s.DB.Update(ctx, func(tx *database.Tx) error { return fn(&sqlTx{tx}) }))
}

// View implements Store.
func (s *DB) View(ctx context.Context, fn func(Tx) error) error {
	if tx, ok := ctx.Value(joinedKey{}).(Tx); ok {
		return fn(tx)
	}
	ctx, span := telemetry.Child(ctx, "database view")
	defer span.End()
	return failed(span, s.DB.View(ctx, func(tx *database.Tx) error { return fn(&sqlTx{tx}) }))
}

// failed says in the span of a transaction that the database could not be used; that something was refused or not found is none of its failures.
func failed(span telemetry.Span, err error) error {
	if errors.Is(err, ErrUnavailable) {
		span.Fail(err.Error())
	}
	return err
}

// Writable implements Store.
func (s *DB) Writable(ctx context.Context) error {
	return s.Update(ctx, func(tx Tx) error {
		// A page's worth, so that a disk without any room is noticed.
		return tx.PutMeta(ctx, "probe", fmt.Appendf(make([]byte, 0, 4096), "%04096d", time.Now().UnixNano()))
	})
}
