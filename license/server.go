package license

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/database"
	"sallyway/internal/entitlement"
)

// Names in the data folder.
const (
	databaseFile = "license.db"
	adminFile    = "admin.token"
)

// Limits of the HTTP server.
const (
	headerTimeout = 10 * time.Second
	readTimeout   = 20 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 16 << 10 // bytes
	stopTimeout   = 5 * time.Second
	probeInterval = 15 * time.Second // the database is tried for writing
)

// Home is where a service keeps what it knows.
type Home struct {
	Data string // folder
	// Database is the URL of the database: empty or sqlite: is a file in Data. On a postgres://… several services can work together, of several regions too.
	Database    string
	Connections int
	// Issuer is what licences call the service; empty is "sallyway-license". Services on one database have the same.
	Issuer string
}

// Config is what a service needs. Only Data is required.
type Config struct {
	Home
	// Listen is the HTTPS address; empty is none. HTTPListen is a plain one for a load balancer that ends TLS; empty is none.
	Listen, HTTPListen string
	// URL is the one under which platforms and administrators reach the service; empty is made from the listen address.
	URL string
	// TLSCert and TLSKey are files of a certificate chain and its key; empty means one by an authority of the service's own.
	TLSCert, TLSKey string

	Log     *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil is a registry of its own
	Now     func() time.Time      // nil is time.Now
	// Health is told of conditions: nil is good. Nil is nobody.
	Health func(condition string, err error)
}

// Server is a licence service. Open makes it, Run serves, and Close gives back what Open took when Run was never called.
type Server struct {
	*Service
	cfg          Config
	tls          *certificates // nil without HTTPS
	https, plain net.Listener  // nil when off
	fetches      *prometheus.CounterVec
	refused      *prometheus.CounterVec

	mu   sync.Mutex
	sick error // of the database; guarded by mu

	closing sync.Once
}

// OpenHome opens the database of a service, for commands on its own host.
func OpenHome(ctx context.Context, h Home, log *slog.Logger, now func() time.Time) (*Service, error) {
	if err := os.MkdirAll(h.Data, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	db, err := database.Open(ctx, h.database(), Schema())
	if err != nil {
		return nil, err
	}
	s := &Service{db: db, dir: h.Data, issuer: h.Issuer, clock: now, log: log}
	if s.issuer == "" {
		s.issuer = "sallyway-license"
	}
	if len(s.issuer) > entitlement.MaxText {
		return nil, errors.Join(fmt.Errorf("issuer of %d bytes, limit %d", len(s.issuer), entitlement.MaxText), db.Close())
	}
	return s, nil
}

func (h Home) database() database.Config {
	return database.Config{URL: h.Database, Path: filepath.Join(h.Data, databaseFile), Connections: h.Connections}
}

// Existing opens what a service has run on.
func (h Home) Existing(ctx context.Context) (*Service, error) {
	if c := h.database(); !c.Replicated() {
		if _, err := os.Stat(c.Path); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no licence service in %s: start one with `sallyway-license serve`, or name its folder with --data", h.Data)
		}
	}
	return OpenHome(ctx, h, slog.New(slog.DiscardHandler), time.Now)
}

// Restore puts a backup in the place of the database, which no service may have open. It returns where the old one is kept, "" when there was none. A
// PostgreSQL must be empty.
func (h Home) Restore(ctx context.Context, backup string) (string, error) {
	c := h.database()
	if c.Replicated() {
		return "", database.RestorePostgres(ctx, backup, database.PostgresConfig{URL: c.URL, Connections: c.Connections}, Schema())
	}
	return database.RestoreSQLite(ctx, backup, c.Path)
}

// Backup writes a copy of the database to a new file. The signing keys are not in it.
func (s *Service) Backup(ctx context.Context, path string) error { return s.db.Backup(ctx, path) }

// Close closes the database.
func (s *Service) Close() error { return s.db.Close() }

// Open prepares a service: data folder, database, keys, listeners. It starts nothing.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	if cfg.Health == nil {
		cfg.Health = func(string, error) {}
	}
	switch {
	case cfg.Listen == "" && cfg.HTTPListen == "":
		return nil, errors.New("neither an HTTPS nor an HTTP address to listen on")
	case (cfg.TLSCert == "") != (cfg.TLSKey == ""):
		return nil, errors.New("a TLS certificate and its key go together: give both or none")
	}
	if cfg.URL != "" {
		if u, err := url.Parse(cfg.URL); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			return nil, fmt.Errorf("URL %.80q is not of the form https://host[:port]", cfg.URL)
		}
	}
	service, err := OpenHome(ctx, cfg.Home, cfg.Log, cfg.Now)
	if err != nil {
		return nil, err
	}
	s := &Server{Service: service, cfg: cfg}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Server) open(ctx context.Context) (err error) {
	if err := s.prepareKeys(ctx); err != nil {
		return err
	}
	for _, l := range []struct {
		address, flag string
		to            *net.Listener
	}{{s.cfg.Listen, "--listen", &s.https}, {s.cfg.HTTPListen, "--http-listen", &s.plain}} {
		if l.address == "" {
			continue
		}
		if *l.to, err = net.Listen("tcp", l.address); err != nil {
			return fmt.Errorf("listen: %w\nname a free address with %s", err, l.flag)
		}
	}
	if s.cfg.URL == "" {
		s.cfg.URL = address(s.https, s.plain)
	}
	pin := ""
	if s.https != nil {
		if s.tls, err = openCertificates(s.cfg.Data, s.cfg.TLSCert, s.cfg.TLSKey, s.cfg.URL, s.cfg.Now); err != nil {
			return err
		}
		pin = s.tls.pin
	}
	s.fetches = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyway_license_fetches_total", Help: "Platforms that fetched, by result."}, []string{"result"})
	s.refused = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyway_license_refusals_total", Help: "Requests that were refused, by status."}, []string{"status"})
	s.cfg.Metrics.MustRegister(s.fetches, s.refused, &census{s})
	return s.adminToken(ctx, pin)
}

// address is a URL of the service as its listeners have it.
func address(https, plain net.Listener) string {
	scheme, l := "https", https
	if l == nil {
		scheme, l = "http", plain
	}
	a := l.Addr().(*net.TCPAddr)
	host := a.IP.String()
	if a.IP.IsUnspecified() {
		host = "localhost"
		if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	return scheme + "://" + net.JoinHostPort(host, fmt.Sprint(a.Port))
}

// adminToken writes the first administrator's credential; later it keeps the file's URL and pin up to date. A file that was removed stays away.
func (s *Server) adminToken(ctx context.Context, pin string) error {
	path := s.AdminFile()
	c := control.AdminCredential{URL: s.cfg.URL, Pin: pin}
	var any int
	if err := s.db.View(ctx, func(tx *database.Tx) error {
		return tx.Row(ctx, `SELECT COUNT(*) FROM admin_tokens`).Scan(&any)
	}); err != nil {
		return err
	}
	if any == 0 {
		var err error
		if c.Token, err = s.AdminToken(ctx, "admin", 0, false); err != nil {
			return err
		}
	} else {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var old control.AdminCredential
		if json.Unmarshal(b, &old) != nil || old.URL == c.URL && old.Pin == c.Pin {
			return nil
		}
		c.Token = old.Token
	}
	return WriteCredential(path, c)
}

// WriteCredential writes a credential to a file of mode 0600.
func WriteCredential(path string, c control.AdminCredential) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return daemon.WriteFile(path, append(b, '\n'), 0o600)
}

// AdminFile is the path of the first administrator's credential (control.AdminCredential).
func (s *Server) AdminFile() string { return filepath.Join(s.cfg.Data, adminFile) }

// URL is the URL under which platforms and administrators reach the service.
func (s *Server) URL() string { return s.cfg.URL }

// Pin is the key hash of the CA of the service's certificate, "" when the system's roots vouch for it.
func (s *Server) Pin() string {
	if s.tls == nil {
		return ""
	}
	return s.tls.pin
}

// Run serves until ctx ends; then requests in flight get a few seconds, and the database is closed.
func (s *Server) Run(ctx context.Context) error {
	h := s.routes()
	g, ctx := errgroup.WithContext(ctx)
	if s.https != nil {
		g.Go(func() error { return s.serve(ctx, s.https, h, s.tls.config()) })
	}
	if s.plain != nil {
		g.Go(func() error { return s.serve(ctx, s.plain, h, nil) })
	}
	g.Go(func() error { s.probe(ctx); return nil })
	s.log.Info("licence service serves", "url", s.cfg.URL, "listen", s.cfg.Listen, "http_listen", s.cfg.HTTPListen)
	return errors.Join(g.Wait(), s.Close())
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", s.api())
	for _, path := range []string{"GET /livez", "GET /healthz", "GET /readyz"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if err := s.Sick(); err != nil && !strings.HasSuffix(r.URL.Path, "/livez") {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			_, _ = fmt.Fprintln(w, "ok") // the peer has gone: nobody is left to tell
		})
	}
	return mux
}

// Sick says why the service can not do its work; nil when it can.
func (s *Server) Sick() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sick
}

// probe tries the database, so that readiness tells of a full disk before a caller does.
func (s *Server) probe(ctx context.Context) {
	t := time.NewTicker(probeInterval)
	defer t.Stop()
	for {
		err := s.Writable(ctx)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		was := s.sick
		s.sick = err
		s.mu.Unlock()
		s.cfg.Health("database", err)
		if (err == nil) != (was == nil) {
			s.log.Log(ctx, level(err), "database", "works", err == nil, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

func level(err error) slog.Level {
	if err != nil {
		return slog.LevelError
	}
	return slog.LevelInfo
}

// Writable says whether a write would work now: database.ErrUnavailable when not.
func (s *Service) Writable(ctx context.Context) error {
	return s.db.Update(ctx, func(tx *database.Tx) error {
		// A page's worth, so that a disk without any room is noticed.
		return tx.Exec(ctx, true, `INSERT INTO meta (key, value) VALUES ('probe', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`,
			fmt.Appendf(make([]byte, 0, 4096), "%04096d", time.Now().UnixNano()))
	})
}

func (s *Server) serve(ctx context.Context, l net.Listener, h http.Handler, withTLS *tls.Config) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), TLSConfig: withTLS,
	}
	return daemon.Serve(ctx, srv, l, stopTimeout)
}

// Close gives back what Open took. It is idempotent and not called while Run runs.
func (s *Server) Close() error {
	var err error
	s.closing.Do(func() {
		for _, l := range []net.Listener{s.https, s.plain} {
			if l == nil {
				continue
			}
			if e := l.Close(); e != nil && !errors.Is(e, net.ErrClosed) {
				err = errors.Join(err, e)
			}
		}
		err = errors.Join(err, s.Service.Close())
	})
	return err
}
