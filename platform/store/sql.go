package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
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

// sqlTx is a transaction, of either database.
type sqlTx struct {
	q querier
	d *dialect
	// ctx bounds the whole transaction. Statements run under it and not under their caller's, because a driver may give up the connection when a
	// statement is cancelled, and others can share the transaction.
	ctx context.Context //nolint:containedctx // see above: it is the transaction's life
	// broken is the first error after which the transaction can not go on, whatever fn made of it. Only the goroutine of fn touches it.
	broken error
}

var _ Tx = (*sqlTx)(nil)

// note translates an error of the driver and remembers one that ends the transaction.
func (t *sqlTx) note(err error) error {
	if err == nil {
		return nil
	}
	if t.broken == nil && (t.d.again(err) || t.d.lost(err)) {
		t.broken = err
	}
	return t.d.translate(err)
}

// exec runs a statement; ErrNotFound when must is set and it changed nothing.
func (t *sqlTx) exec(ctx context.Context, must bool, q string, args ...any) error {
	n, err := t.affect(ctx, q, args...)
	if err == nil && must && n == 0 {
		return ErrNotFound
	}
	return err
}

// insert runs an INSERT without a conflict clause: ErrExists when a unique key is taken. The transaction can go on after that.
func (t *sqlTx) insert(ctx context.Context, q string, args ...any) error {
	n, err := t.affect(ctx, q+" ON CONFLICT DO NOTHING", args...)
	if err == nil && n == 0 {
		return ErrExists
	}
	return err
}

func (t *sqlTx) affect(ctx context.Context, q string, args ...any) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	res, err := t.q.ExecContext(t.ctx, t.d.statement(q), args...)
	if err != nil {
		return 0, t.note(err)
	}
	return res.RowsAffected()
}

func (t *sqlTx) query(ctx context.Context, q string, args ...any) (*sql.Rows, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rows, err := t.q.QueryContext(t.ctx, t.d.statement(q), args...)
	return rows, t.note(err)
}

// row is what scan functions read from: a row or rows.
type row interface{ Scan(dest ...any) error }

// single is a row whose errors are the package's: ErrNotFound when there is none.
type single struct {
	t   *sqlTx
	row *sql.Row
	err error
}

// Scan implements row.
func (s single) Scan(dest ...any) error {
	if s.err != nil {
		return s.err
	}
	return s.t.note(s.row.Scan(dest...))
}

func (t *sqlTx) row(ctx context.Context, q string, args ...any) row {
	if err := ctx.Err(); err != nil {
		return single{err: err}
	}
	return single{t: t, row: t.q.QueryRowContext(t.ctx, t.d.statement(q), args...)}
}

func one[T any](ctx context.Context, t *sqlTx, scan func(row) (*T, error), q string, args ...any) (*T, error) {
	v, err := scan(t.row(ctx, q, args...))
	if err != nil {
		return nil, err
	}
	return v, nil
}

func many[T any](ctx context.Context, t *sqlTx, scan func(row) (*T, error), q string, args ...any) ([]*T, error) {
	rows, err := t.query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []*T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, t.note(err)
		}
		out = append(out, v)
	}
	return out, t.note(rows.Err())
}

// limit is the SQL for a page's size.
func (p Page) limit() int64 {
	if p.Limit <= 0 {
		return math.MaxInt64
	}
	return int64(p.Limit)
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
