package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// Limits of the connections to PostgreSQL.
const (
	// PostgresConnections is how many one program opens at most when it is not told otherwise: a few replicas fit into a server's default of 100.
	PostgresConnections = 16
	// postgresWriters is how many transactions of one program write at once. Those that touch the same rows wait for each other anyway.
	postgresWriters  = 2
	fewestReaders    = 2
	connectTimeout   = 5 * time.Second
	statementTimeout = 20 * time.Second // less than batchTimeout, so that the server says what was slow
	idleTimeout      = 5 * time.Minute
	lifetime         = time.Hour // of a connection, so that a server that was added or moved is found
	// migrationWait is how long a replica waits for another that migrates.
	migrationWait = 5 * time.Minute
	migrationLock = 0x53414c4c59 // key of the advisory lock
)

// postgresDialect is PostgreSQL's. Transactions that write are serializable: one that meets another's changes fails and is run again.
var postgresDialect = &dialect{
	numbered: true, translate: translatePostgres,
	again: conflictPostgres, lost: lostPostgres,
}

// PostgresConfig is where a PostgreSQL is.
type PostgresConfig struct {
	// URL is postgres://USER@HOST[,HOST…]/DATABASE with libpq's parameters. A password in it is shown nowhere; better is libpq's PGPASSFILE.
	URL string
	// Connections is how many are opened at most; zero is PostgresConnections.
	Connections int
}

// OpenPostgres opens the database, which must exist, and brings its schema up to date. Several programs may do so at once. An error that
// ErrUnavailable wraps says what to do; none holds the password.
func OpenPostgres(ctx context.Context, cfg PostgresConfig, schema Schema) (*DB, error) {
	c, err := parsePostgres(cfg.URL)
	if err != nil {
		return nil, err
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	for name, value := range map[string]string{
		"application_name": schema.Program, "timezone": "UTC",
		"statement_timeout":                   fmt.Sprint(statementTimeout.Milliseconds()),
		"idle_in_transaction_session_timeout": fmt.Sprint(batchTimeout.Milliseconds()),
	} {
		if c.RuntimeParams[name] == "" {
			c.RuntimeParams[name] = value
		}
	}
	if err := migratePostgres(ctx, c.Copy(), schema); err != nil {
		return nil, fmt.Errorf("database %s: %w", where(c), err)
	}
	total := cfg.Connections
	if total == 0 {
		total = PostgresConnections
	}
	if total < postgresWriters+fewestReaders {
		return nil, fmt.Errorf("%d connections to the database are too few: at least %d", total, postgresWriters+fewestReaders)
	}
	w, r := pool(c, postgresWriters), pool(c, total-postgresWriters)
	return &DB{
		w: w, r: r, d: postgresDialect, backup: func(ctx context.Context, to string) error { return postgresBackup(ctx, r, to, schema) },
		view: &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true},
		updates: queue{d: postgresDialect, lead: make(chan struct{}, postgresWriters), begin: func(ctx context.Context, attempt int) (*transaction, error) {
			return beginPostgres(ctx, w, attempt)
		}},
	}, nil
}

func parsePostgres(url string) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("database URL: %w\nit is of the form postgres://USER@HOST:5432/DATABASE?sslmode=verify-full", err) // pgx hides passwords
	}
	return c, nil
}

func pool(c *pgx.ConnConfig, most int) *sql.DB {
	db := stdlib.OpenDB(*c)
	db.SetMaxOpenConns(most)
	db.SetMaxIdleConns(most)
	db.SetConnMaxIdleTime(idleTimeout)
	db.SetConnMaxLifetime(lifetime)
	return db
}

// beginPostgres starts a transaction. The first attempt of one runs beside others and may find that it can not be put in order with them; from
// the second on it waits until no other writes, in any process, and keeps them out. LOCK TABLE takes no snapshot, so what comes after it sees
// everything that was committed while it waited.
func beginPostgres(ctx context.Context, db *sql.DB, attempt int) (*transaction, error) {
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelSerializable})
	if err != nil {
		return nil, err
	}
	mode := `LOCK TABLE update_turns IN ROW SHARE MODE`
	if attempt > 0 {
		mode = `LOCK TABLE update_turns IN EXCLUSIVE MODE`
	}
	if _, err := tx.ExecContext(ctx, mode); err != nil {
		return nil, errors.Join(err, tx.Rollback())
	}
	return &transaction{q: tx, commit: tx.Commit, rollback: tx.Rollback}, nil
}

func migratePostgres(ctx context.Context, c *pgx.ConnConfig, schema Schema) (err error) {
	c.RuntimeParams["statement_timeout"] = "0" // a migration takes the time that it takes
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "0"
	db := stdlib.OpenDB(*c)
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := db.PingContext(ctx); err != nil {
		return translatePostgres(err)
	}
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockID(migrationLock), lock.WithLockTimeout(1, uint64(migrationWait/time.Second)))
	if err != nil {
		return err
	}
	return translatePostgres(migrate(ctx, db, schema, goose.DialectPostgres, toPostgres, goose.WithSessionLocker(locker)))
}

// where names a database without its password.
func where(c *pgx.ConnConfig) string {
	return fmt.Sprintf("%s on %s:%d", c.Database, c.Host, c.Port)
}

func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// conflictPostgres says whether others at the same time are why a transaction failed.
func conflictPostgres(err error) bool {
	code := sqlState(err)
	return code == "40001" || code == "40P01" // serialization_failure, deadlock_detected
}

// lostPostgres says whether an error means that the connection, and the transaction with it, is gone.
func lostPostgres(err error) bool {
	var connect *pgconn.ConnectError
	var network net.Error
	switch code := sqlState(err); {
	case code != "":
		return strings.HasPrefix(code, "08") || strings.HasPrefix(code, "57P") || code == "25P03" || code == "25006"
	case errors.Is(err, driver.ErrBadConn), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, sql.ErrTxDone), errors.Is(err, sql.ErrConnDone), errors.As(err, &connect), errors.As(err, &network):
		return true
	}
	return false
}

// remedies of PostgreSQL's errors (its manual, appendix A), by class or code; the longest that fits counts.
var remedies = map[string]string{
	"08":    "the connection broke: see that the server runs",
	"25006": "the server is read-only, as a standby is: add target_session_attrs=read-write to the URL and name all servers",
	"28":    "the server refuses the user: see its pg_hba.conf, and give the password in the file that PGPASSFILE names",
	"3D000": "make the database first: createdb",
	"3F000": "the schema is missing: see the user's search_path",
	"42501": "the user may not do this: make it the owner of the database",
	"53":    "the server lacks resources",
	"53100": "the server's disk is full: make room",
	"53300": "the server has no connection free: raise its max_connections, or lower --database-connections",
	"55P03": "another transaction holds a lock for too long",
	"57014": "a statement took too long: the server is overloaded, or something holds its locks",
	"57P":   "the server stops or starts",
	"58":    "the server's disk fails: see its log",
	"XX":    "the server's data is damaged: see its log, restore a backup",
}

// translatePostgres turns errors of the driver into the package's.
func translatePostgres(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return ErrNotFound
	case errors.Is(err, ErrUnavailable):
		return err
	}
	code := sqlState(err)
	if code == "23505" {
		return ErrExists
	}
	best, why := "", ""
	for prefix, remedy := range remedies {
		if code != "" && strings.HasPrefix(code, prefix) && len(prefix) > len(best) {
			best, why = prefix, remedy
		}
	}
	switch {
	case why != "":
	case errors.Is(err, context.Canceled):
		return err
	case lostPostgres(err), errors.Is(err, context.DeadlineExceeded):
		why = "it does not answer: see that the server runs and can be reached from here"
	case conflictPostgres(err):
		why = "others write all the time"
	default:
		return err
	}
	return fmt.Errorf("%w: %s (%w)", ErrUnavailable, why, err)
}
