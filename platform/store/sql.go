package store

import (
	"context"
	"database/sql"
	"math"
	"time"

	"sallyway/internal/database"
)

// sqlTx is a transaction, of either database: database.Tx in the words of this package.
type sqlTx struct{ *database.Tx }

var _ Tx = (*sqlTx)(nil)

// row is what scan functions read from: a row or rows.
type row = database.Row

func (t *sqlTx) note(err error) error { return t.Note(err) }

// exec runs a statement; ErrNotFound when must is set and it changed nothing.
func (t *sqlTx) exec(ctx context.Context, must bool, q string, args ...any) error {
	return t.Exec(ctx, must, q, args...)
}

// insert runs an INSERT without a conflict clause: ErrExists when a unique key is taken. The transaction can go on after that.
func (t *sqlTx) insert(ctx context.Context, q string, args ...any) error {
	return t.Insert(ctx, q, args...)
}

func (t *sqlTx) affect(ctx context.Context, q string, args ...any) (int64, error) {
	return t.Affect(ctx, q, args...)
}

func (t *sqlTx) query(ctx context.Context, q string, args ...any) (*sql.Rows, error) {
	return t.Query(ctx, q, args...)
}

func (t *sqlTx) row(ctx context.Context, q string, args ...any) row { return t.Row(ctx, q, args...) }

func one[T any](ctx context.Context, t *sqlTx, scan func(row) (*T, error), q string, args ...any) (*T, error) {
	return database.One(ctx, t.Tx, scan, q, args...)
}

func many[T any](ctx context.Context, t *sqlTx, scan func(row) (*T, error), q string, args ...any) ([]*T, error) {
	return database.Many(ctx, t.Tx, scan, q, args...)
}

// limit is the SQL for a page's size.
func (p Page) limit() int64 {
	if p.Limit <= 0 {
		return math.MaxInt64
	}
	return int64(p.Limit)
}

// micros encodes a time; the zero time is NULL.
func micros(t time.Time) any { return database.Micros(t) }

// stamp decodes a time.
type stamp struct{ t *time.Time }

// Scan implements sql.Scanner.
func (s stamp) Scan(v any) error { return database.Stamp(s.t).Scan(v) }

// list decodes a column with JSON; encode makes it.
type list[T any] struct{ v *T }

// Scan implements sql.Scanner.
func (l list[T]) Scan(v any) error { return database.JSON(l.v).Scan(v) }

func encode[T any](v T) string { return database.Encode(v) }
