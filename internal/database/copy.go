package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A backup is an SQLite file whatever the database is, so that one of PostgreSQL can be restored to either. Both have the same tables, so rows
// are copied as they are.

// ErrNotEmpty says that a database already holds something.
var ErrNotEmpty = errors.New("the database is not empty")

// brought are tables that every schema brings along.
var brought = []string{"goose_db_version", "update_turns"}

// postgresBackup writes everything that a PostgreSQL holds to a new SQLite file.
func postgresBackup(ctx context.Context, from *sql.DB, path string, schema Schema) (err error) {
	to, err := OpenSQLite(ctx, path, schema)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, to.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	src, err := from.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return translatePostgres(err)
	}
	defer func() { _ = src.Rollback() }() // it only read
	if _, err := src.ExecContext(ctx, `SET LOCAL statement_timeout = 0`); err != nil {
		return translatePostgres(err)
	}
	names, err := tables(ctx, to.r, schema)
	if err != nil {
		return err
	}
	dst, err := to.w.BeginTx(ctx, nil)
	if err != nil {
		return translateSQLite(err)
	}
	for _, name := range names {
		if err := copyTable(ctx, name, src, dst, sqliteDialect); err != nil {
			return errors.Join(err, dst.Rollback())
		}
	}
	return translateSQLite(dst.Commit())
}

// RestorePostgres fills an empty PostgreSQL with a backup, or with the database of a program that ran on SQLite and is stopped: ErrNotEmpty
// when it holds something already. It is all there afterwards, or nothing.
func RestorePostgres(ctx context.Context, backup string, to PostgresConfig, schema Schema) (err error) {
	dir, err := os.MkdirTemp("", "sallyway-restore-") // 0700
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// A copy, because one of an older version is brought up to date first.
	tmp := filepath.Join(dir, "copy")
	if err := copySQLite(ctx, backup, tmp); err != nil {
		return err
	}
	from, err := OpenSQLite(ctx, tmp, schema)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	names, err := tables(ctx, from.r, schema)
	if err != nil {
		return err
	}
	db, err := OpenPostgres(ctx, to, schema)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	src, err := from.r.BeginTx(ctx, nil)
	if err != nil {
		return translateSQLite(err)
	}
	defer func() { _ = src.Rollback() }() // it only read
	dst, err := beginPostgres(ctx, db.w, 1)
	if err != nil {
		return translatePostgres(err)
	}
	if err := fill(ctx, names, src, dst.q); err != nil {
		return errors.Join(translatePostgres(err), dst.rollback())
	}
	return translatePostgres(dst.commit())
}

func fill(ctx context.Context, names []string, src, dst querier) error {
	if _, err := dst.ExecContext(ctx, `SET LOCAL idle_in_transaction_session_timeout = 0`); err != nil {
		return err
	}
	for _, name := range names {
		var full bool
		if err := dst.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM `+name+`)`).Scan(&full); err != nil {
			return err
		}
		if full {
			return fmt.Errorf("%w: table %s has rows; make a new database for the backup (createdb), and name that one", ErrNotEmpty, name)
		}
	}
	for _, name := range names {
		if err := copyTable(ctx, name, src, dst, postgresDialect); err != nil {
			return err
		}
	}
	return nil
}

// tables lists the tables of an SQLite database, those that others refer to first.
func tables(ctx context.Context, db *sql.DB, schema Schema) ([]string, error) {
	texts := func(q string, args ...any) (out []string, err error) {
		rows, err := db.QueryContext(ctx, q, args...)
		if err != nil {
			return nil, translateSQLite(err)
		}
		defer rows.Close()
		for rows.Next() {
			var s string
			if err := rows.Scan(&s); err != nil {
				return nil, translateSQLite(err)
			}
			out = append(out, s)
		}
		return out, translateSQLite(rows.Err())
	}
	names, err := texts(`SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name`)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return slices.Contains(brought, n) || slices.Contains(schema.Fleeting, n) })
	needs := make(map[string][]string)
	for _, n := range names {
		if needs[n], err = texts(`SELECT DISTINCT "table" FROM pragma_foreign_key_list(?)`, n); err != nil {
			return nil, err
		}
	}
	var out []string
	for len(out) < len(names) {
		before := len(out)
		for _, n := range names {
			if !slices.Contains(out, n) && !slices.ContainsFunc(needs[n], func(on string) bool { return !slices.Contains(out, on) }) {
				out = append(out, n)
			}
		}
		if len(out) == before {
			return nil, errors.New("tables refer to each other in a circle")
		}
	}
	return out, nil
}

// copyTable copies all rows of a table.
func copyTable(ctx context.Context, name string, src, dst querier, d *dialect) error {
	types, err := columnTypes(ctx, dst, name)
	if err != nil {
		return fmt.Errorf("table %s: %w", name, err)
	}
	rows, err := src.QueryContext(ctx, `SELECT * FROM `+name)
	if err != nil {
		return fmt.Errorf("table %s: %w", name, err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return err
	}
	insert := d.statement(`INSERT INTO ` + name + ` (` + strings.Join(columns, ", ") + `) VALUES (?` + strings.Repeat(", ?", len(columns)-1) + `)`)
	values, into := make([]any, len(columns)), make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return fmt.Errorf("table %s: %w", name, err)
		}
		for i, v := range values {
			// SQLite has no booleans of its own: an older migration may have named the column otherwise.
			if n, ok := v.(int64); ok && types[columns[i]] == "BOOL" {
				values[i] = n != 0
			}
		}
		if _, err := dst.ExecContext(ctx, insert, values...); err != nil {
			return fmt.Errorf("table %s: %w", name, err)
		}
	}
	return rows.Err()
}

// columnTypes are the database's names of the types of a table's columns.
func columnTypes(ctx context.Context, q querier, table string) (map[string]string, error) {
	rows, err := q.QueryContext(ctx, `SELECT * FROM `+table+` LIMIT 0`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	types, err := rows.ColumnTypes()
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for _, t := range types {
		out[t.Name()] = t.DatabaseTypeName()
	}
	return out, rows.Err()
}
