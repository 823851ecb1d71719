package database

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// dialect is what differs between the databases. Statements are written once, with ? for their arguments.
type dialect struct {
	// numbered says that arguments are $1, $2, … instead of ?.
	numbered bool
	// translate turns the driver's errors into the package's.
	translate func(error) error
	// again says that the transaction failed only because of others at the same time, and would work when it is run again.
	again func(error) bool
	// lost says that the connection is gone, so that the transaction did not happen unless it was being committed.
	lost func(error) bool
}

// numbered holds statements with their arguments numbered, by the statement as it is written.
var numbered sync.Map

// statement is q as the database wants it.
func (d *dialect) statement(q string) string {
	if !d.numbered {
		return q
	}
	if s, ok := numbered.Load(q); ok {
		return s.(string)
	}
	var b strings.Builder
	n := 0
	for _, c := range q {
		if c != '?' {
			b.WriteRune(c)
			continue
		}
		n++
		b.WriteString("$" + strconv.Itoa(n))
	}
	numbered.Store(q, b.String())
	return b.String()
}

// querier runs statements: a *sql.Tx, or a *sql.Conn inside of a transaction.
type querier interface {
	ExecContext(ctx context.Context, q string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, q string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, q string, args ...any) *sql.Row
}

// Tx is a transaction, of either database. Only the goroutine that runs its function uses it.
type Tx struct {
	q querier
	d *dialect
	// ctx bounds the whole transaction. Statements run under it and not under their caller's, because a driver may give up the connection when a
	// statement is cancelled, and others can share the transaction.
	ctx context.Context //nolint:containedctx // see above: it is the transaction's life
	// broken is the first error after which the transaction can not go on, whatever fn made of it. Only the goroutine of fn touches it.
	broken error
}

// Note translates an error of the driver and remembers one that ends the transaction.
func (t *Tx) Note(err error) error {
	if err == nil {
		return nil
	}
	if t.broken == nil && (t.d.again(err) || t.d.lost(err)) {
		t.broken = err
	}
	return t.d.translate(err)
}

// Exec runs a statement; ErrNotFound when must is set and it changed nothing.
func (t *Tx) Exec(ctx context.Context, must bool, q string, args ...any) error {
	n, err := t.Affect(ctx, q, args...)
	if err == nil && must && n == 0 {
		return ErrNotFound
	}
	return err
}

// Insert runs an INSERT without a conflict clause: ErrExists when a unique key is taken. The transaction can go on after that.
func (t *Tx) Insert(ctx context.Context, q string, args ...any) error {
	n, err := t.Affect(ctx, q+" ON CONFLICT DO NOTHING", args...)
	if err == nil && n == 0 {
		return ErrExists
	}
	return err
}

// Affect runs a statement and says how many rows it changed.
func (t *Tx) Affect(ctx context.Context, q string, args ...any) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	res, err := t.q.ExecContext(t.ctx, t.d.statement(q), args...)
	if err != nil {
		return 0, t.Note(err)
	}
	return res.RowsAffected()
}

// Query runs a statement that answers with rows. Errors of reading them go through Note.
func (t *Tx) Query(ctx context.Context, q string, args ...any) (*sql.Rows, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rows, err := t.q.QueryContext(t.ctx, t.d.statement(q), args...)
	return rows, t.Note(err)
}

// Row is what scan functions read from: a row or rows.
type Row interface{ Scan(dest ...any) error }

// single is a row whose errors are the package's: ErrNotFound when there is none.
type single struct {
	t   *Tx
	row *sql.Row
	err error
}

// Scan implements Row.
func (s single) Scan(dest ...any) error {
	if s.err != nil {
		return s.err
	}
	return s.t.Note(s.row.Scan(dest...))
}

// Row runs a statement that answers with a row at most. Its Scan says ErrNotFound when there is none.
func (t *Tx) Row(ctx context.Context, q string, args ...any) Row {
	if err := ctx.Err(); err != nil {
		return single{err: err}
	}
	return single{t: t, row: t.q.QueryRowContext(t.ctx, t.d.statement(q), args...)}
}

// One reads one row: ErrNotFound when there is none.
func One[T any](ctx context.Context, t *Tx, scan func(Row) (*T, error), q string, args ...any) (*T, error) {
	v, err := scan(t.Row(ctx, q, args...))
	if err != nil {
		return nil, err
	}
	return v, nil
}

// Many reads rows.
func Many[T any](ctx context.Context, t *Tx, scan func(Row) (*T, error), q string, args ...any) ([]*T, error) {
	rows, err := t.Query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []*T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, t.Note(err)
		}
		out = append(out, v)
	}
	return out, t.Note(rows.Err())
}

// Micros encodes a time; the zero time is NULL.
func Micros(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UnixMicro()
}

// Stamp decodes a time; NULL is the zero time.
func Stamp(t *time.Time) sql.Scanner { return stamp{t} }

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

// JSON decodes a column with JSON.
func JSON[T any](v *T) sql.Scanner { return list[T]{v} }

type list[T any] struct{ v *T }

// Scan implements sql.Scanner.
func (l list[T]) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("JSON column of type %T", v)
	}
	return json.Unmarshal([]byte(s), l.v)
}

// Encode makes the text of a column with JSON.
func Encode[T any](v T) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode column: %v", err)) // slices of addresses, ports and strings always encode
	}
	return string(b)
}
