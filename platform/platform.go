// Package platform is the control plane: it joins the store, the PKI, the registry, the control streams and the HTTP API into one server.
//
//	srv, err := platform.Open(ctx, platform.Config{Data: dir, Listen: ":443", Log: log})
//	if err != nil {
//		return err
//	}
//	return srv.Run(ctx) // until ctx ends
//
// Everything it keeps lies in one folder:
//
//	platform.db   organizations, nodes, policies, certificates of CAs, their keys sealed, hashes of tokens, the audit chains
//	master.key    what seals the keys that seal them, 0600: back it up apart from the database
//	admin.token   credential for `sallyway login`, made at the first start, 0600
package platform

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/telemetry"
	"sallyway/platform/api"
	"sallyway/platform/awsauth"
	"sallyway/platform/dialler"
	"sallyway/platform/incoming"
	"sallyway/platform/people"
	"sallyway/platform/probe"
	"sallyway/platform/push"
	"sallyway/platform/registry"
	"sallyway/platform/replica"
	"sallyway/platform/store"
	"sallyway/platform/syslog"
	"sallyway/platform/web"
)

// Names in the data folder.
const (
	databaseFile = "platform.db"
	masterFile   = "master.key"
	adminFile    = "admin.token"
)

// Limits of the HTTP servers.
const (
	headerTimeout = 10 * time.Second
	readTimeout   = 30 * time.Second
	writeTimeout  = 60 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 32 << 10 // bytes
	maxStreams    = 64       // HTTP/2 requests of one connection at once
	stopTimeout   = 5 * time.Second
	probeInterval = 15 * time.Second // the database is tried for writing
	probeAgain    = time.Second      // while it can not be written
	probeTimeout  = 15 * time.Second
)

// Config is what a platform needs. Only Data is required.
type Config struct {
	Data string // folder
	// Database is the URL of the database: empty or sqlite: is a file in Data. On postgres://… several platforms can serve together; each opens at
	// most Connections connections (zero is store.PostgresConnections).
	Database    string
	Connections int
	// Redis is the URL of the Redis by which platforms on one PostgreSQL talk; empty is none: they talk by the database, more slowly.
	Redis string
	// MasterKey is the file with the master key: empty is one in Data. MasterKeyCommand is a command of the shell that prints the key, and takes its
	// place; a KMS or a hardware module is asked so.
	MasterKey, MasterKeyCommand string
	// Listen is the HTTPS address; empty is none. HTTPListen is a plain one for a load balancer that ends TLS; empty is none.
	Listen, HTTPListen string
	// AdvertiseURL is the URL under which nodes and administrators reach the platform; empty is made from the listen address.
	AdvertiseURL string
	// TLSCert and TLSKey are files of a certificate chain and its key; empty means a certificate by the platform's own CA.
	TLSCert, TLSKey string
	// ACME obtains certificates for names of the platform; the zero value does not.
	ACME ACME
	// DocumentLife is how long snapshots and grants are valid, KeyRotation the age at which TURN keys change: zero is 24 h.
	DocumentLife, KeyRotation time.Duration
	// CredentialLife is how long nodes' credentials for relays are valid while the platform is there to renew them: zero is as long as the
	// node's certificate.
	CredentialLife time.Duration
	// LeafLife is how long nodes' certificates are valid; they are renewed at half of it. Zero is control.LeafLife.
	LeafLife time.Duration
	// TokenLife is how long enrolment tokens work: zero is an hour.
	TokenLife time.Duration
	// Region is the name of the deployment's region, which the database keeps: empty is what it keeps, and another one than that is refused.
	Region string
	// ProbeRelays says which relays are tried from outside.
	ProbeRelays probe.Mode

	// APIRate is how many requests a second one caller of the API has: zero is api.DefaultRate, less is no limit.
	APIRate int

	// Licence says whose licences count and where they come from.
	Licence LicenceConfig

	// AuditSyslog are the syslog receivers that get every audit chain; see syslog.Parse.
	AuditSyslog []syslog.Target
	// AuditSign is how often the heads of the audit chains are signed: zero is an hour.
	AuditSign time.Duration
	// FlowLog is how long flows are kept, FlowLogRows how many of one organization: zero are the defaults of package flowlog.
	FlowLog     time.Duration
	FlowLogRows int

	// AWS says which STS tells the AWS identity of nodes that enrol by it. The zero value is the public one of awsauth.DefaultRegion.
	AWS awsauth.Config

	Log     *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil is a registry of its own
	Now     func() time.Time      // nil is time.Now
	// Tracer makes a span of every request; nil is none.
	Tracer *telemetry.Tracer
	// DrainDelay is how long a platform that stops says that it is not ready before it closes its listeners, for the balancer before it. Zero is two
	// seconds with PostgreSQL and none with SQLite, less is none.
	DrainDelay time.Duration
	// Health is told of conditions: nil is good. Nil is nobody.
	Health func(condition string, err error)

	headerTimeout time.Duration // zero is the constant; for tests
}

// Server is a platform. Open makes it, Run serves, and Close gives back what Open took when Run was never called.
type Server struct {
	cfg      Config
	store    *store.DB
	reg      *registry.Registry
	prober   *probe.Prober
	hub      *push.Hub
	dialler  *dialler.Dialler
	limiter  api.Limiter
	licences *licences
	group    *replica.Group // nil on SQLite: nobody shares it
	people   *people.Service
	trail    *trail
	web      *web.Server
	url      string
	pin      string
	https    net.Listener // nil when off
	plain    net.Listener // nil when off
	certs    *certificates
	handler  http.Handler

	mu  sync.Mutex
	bad map[string]error // conditions that are not good; guarded by mu

	closing sync.Once
}

// Open prepares a platform: data folder, database, PKI, listeners. It starts nothing.
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
	switch {
	case cfg.Listen == "" && cfg.HTTPListen == "":
		return nil, errors.New("neither an HTTPS nor an HTTP address to listen on")
	case (cfg.TLSCert == "") != (cfg.TLSKey == ""):
		return nil, errors.New("a TLS certificate and its key go together: give both or none")
	case cfg.Redis != "" && !cfg.Home().store().Replicated():
		return nil, errors.New("a Redis is for platforms that share a PostgreSQL, and this one is alone on SQLite: leave it out, or name the database with --database")
	case cfg.Redis != "" && cfg.AdvertiseURL == "":
		return nil, errors.New("platforms that share a database are reached under one URL, of a load balancer or a name with several addresses: name it with --advertise-url")
	}
	if err := checkACME(&cfg); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, bad: make(map[string]error)}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Server) open(ctx context.Context) (err error) {
	if s.store, s.reg, err = s.cfg.Home().open(ctx, s.cfg.Log, s.cfg.Now); err != nil {
		return err
	}
	s.reg.TokenLife, s.reg.LeafLife, s.reg.DocumentLife = s.cfg.TokenLife, s.cfg.LeafLife, s.cfg.DocumentLife
	if err := s.reg.BindRegion(ctx, s.cfg.Region, false); err != nil {
		return err
	}
	s.cfg.AWS.Now = s.cfg.Now
	if s.reg.AWS, err = awsauth.New(s.cfg.AWS); err != nil {
		return err
	}
	if s.cfg.Listen != "" {
		if s.https, err = net.Listen("tcp", s.cfg.Listen); err != nil {
			return listenError(s.cfg.Listen, "--listen", err)
		}
	}
	if s.cfg.HTTPListen != "" {
		if s.plain, err = net.Listen("tcp", s.cfg.HTTPListen); err != nil {
			return listenError(s.cfg.HTTPListen, "--http-listen", err)
		}
	}
	if err := s.address(ctx); err != nil {
		return err
	}
	c := push.Config{Registry: s.reg, Log: s.cfg.Log, DocumentLife: s.cfg.DocumentLife, CredentialLife: s.cfg.CredentialLife, KeyRotation: s.cfg.KeyRotation}
	if s.cfg.Home().store().Replicated() {
		if s.group, err = replica.New(replica.Config{
			Store: s.store, Seal: s.reg.Seal, Redis: s.cfg.Redis, Address: s.listens(), Log: s.cfg.Log, Now: s.cfg.Now, Metrics: s.cfg.Metrics,
		}); err != nil {
			return err
		}
		c.Peers, s.limiter.Tell = s.group, s.group.Refused
	}
	s.hub = push.New(c, s.cfg.Metrics)
	s.dialler = dialler.New(dialler.Config{View: s.hub.View, Registry: s.reg, Log: s.cfg.Log, Metrics: s.cfg.Metrics, Now: s.cfg.Now, Relay: s.cfg.ProbeRelays.Permit})
	look := probe.Config{Registry: s.reg, Log: s.cfg.Log, Mode: s.cfg.ProbeRelays, Metrics: s.cfg.Metrics}
	if s.group != nil {
		look.Leads = s.group.Leads
	}
	s.prober = probe.New(look)
	if s.group != nil {
		s.group.Join(local{s.hub, &s.limiter, s.cfg.Now})
	}
	s.people = people.New(people.Config{Registry: s.reg, Log: s.cfg.Log, Shared: s.group != nil})
	if s.trail, err = newTrail(s); err != nil {
		return err
	}
	if s.web, err = web.New(web.Config{
		Registry: s.reg, People: s.people, Webhooks: s.trail.webhooks, Flows: s.trail.flows, Log: s.cfg.Log, Source: api.Source, Conditions: s.Conditions, Dialler: s.dialler,
		Unavailable: func(err error) { s.condition("database", err) },
	}); err != nil {
		return err
	}
	s.handler = s.routes()
	if s.licences, err = newLicences(ctx, s); err != nil {
		return err
	}
	s.cfg.Metrics.MustRegister(&census{s: s})
	if err := s.remembered(ctx); err != nil {
		return err
	}
	if err := s.adminToken(ctx); err != nil {
		return err
	}
	return s.firstOwner(ctx)
}

// adminToken writes the first administrator's credential, and shows how to log in. At later starts it keeps the file's URL and pin up to
// date; a file that was removed stays away.
func (s *Server) adminToken(ctx context.Context) error {
	path := filepath.Join(s.cfg.Data, adminFile)
	c := control.AdminCredential{URL: s.url, Pin: s.pin}
	// Not "is the database new": a first start that failed after making it must not lock everybody out.
	issued, err := s.reg.APITokenIssued(ctx)
	if err != nil {
		return err
	}
	if !issued {
		if c.Token, err = s.reg.CreateAPIToken(ctx, "admin", "", store.ScopeAdmin, 0); err != nil {
			return err
		}
	} else {
		var old control.AdminCredential
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if json.Unmarshal(b, &old) != nil || (old.URL == c.URL && old.Pin == c.Pin) {
			return nil
		}
		c.Token = old.Token
	}
	if err := writeCredential(path, c); err != nil {
		return err
	}
	pin := ""
	if s.pin != "" {
		pin = " --ca-pin " + s.pin
	}
	s.cfg.Log.Info("log in where you are admin, with that file", "login", fmt.Sprintf("sallyway login --url %s --token-file %s%s", s.url, path, pin))
	return nil
}

func writeCredential(path string, c control.AdminCredential) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return daemon.WriteFile(path, append(b, '\n'), 0o600)
}

// URL is the URL under which nodes and administrators reach the platform.
func (s *Server) URL() string { return s.url }

// Pin is the key hash of the CA of the platform's certificate, "" when the system's roots vouch for it.
func (s *Server) Pin() string { return s.pin }

// Registry is what the API does; for the process's own commands and for tests.
func (s *Server) Registry() *registry.Registry { return s.reg }

// AdminFile is the path of the first administrator's credential (control.AdminCredential).
func (s *Server) AdminFile() string { return filepath.Join(s.cfg.Data, adminFile) }

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/api/", api.New(api.Config{
		Registry: s.reg, Hub: s.hub, Dialler: s.dialler, People: s.people, Webhooks: s.trail.webhooks, Flows: s.trail.flows, Log: s.cfg.Log, Metrics: s.cfg.Metrics,
		Unavailable: func(err error) { s.condition("database", err) }, Limiter: &s.limiter, Rate: s.cfg.APIRate,
	}))
	mux.Handle("/", s.web)
	s.healthRoutes(mux)
	return incoming.Handler(incoming.Config{Tracer: s.cfg.Tracer, Log: s.cfg.Log, Metrics: s.cfg.Metrics}, mux)
}

// condition records whether something works.
func (s *Server) condition(name string, err error) {
	s.mu.Lock()
	_, was := s.bad[name]
	if err == nil {
		delete(s.bad, name)
	} else {
		s.bad[name] = err
	}
	s.mu.Unlock()
	switch {
	case err != nil && !was:
		s.cfg.Log.Error("not ready", "condition", name, "error", err)
	case err == nil && was:
		s.cfg.Log.Info("ready again", "condition", name)
	}
	if s.cfg.Health != nil {
		s.cfg.Health(name, err)
	}
}

// Conditions are what does not work now, with why.
func (s *Server) Conditions() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]string, len(s.bad))
	for name, err := range s.bad {
		out[name] = err.Error()
	}
	return out
}

// Run serves until ctx ends; then control streams end, requests in flight get a few seconds, and the database is closed.
func (s *Server) Run(ctx context.Context) error {
	ctx, drained := s.untilDrained(ctx)
	defer drained()
	g, ctx := errgroup.WithContext(ctx)
	if s.https != nil {
		g.Go(func() error { return s.serve(ctx, s.https, true) })
	}
	if s.plain != nil {
		g.Go(func() error { return s.serve(ctx, s.plain, false) })
	}
	g.Go(func() error { return s.hub.Run(ctx) })
	g.Go(func() error { return s.dialler.Run(ctx) })
	if s.group != nil {
		g.Go(func() error { return s.group.Run(ctx) })
	}
	g.Go(func() error { return s.prober.Run(ctx) })
	g.Go(func() error { return s.people.Run(ctx) })
	g.Go(func() error { return s.web.Run(ctx) })
	g.Go(func() error { return s.trail.run(ctx) })
	g.Go(func() error { s.probe(ctx); return nil })
	g.Go(func() error { s.licences.run(ctx); return nil })
	if s.cfg.ACME.On() {
		g.Go(func() error { s.obtain(ctx); return nil })
	}
	s.cfg.Log.Info("platform serves", "url", s.url, "listen", s.cfg.Listen, "http_listen", s.cfg.HTTPListen)
	return errors.Join(g.Wait(), s.Close())
}

// probe tries the database, so that readiness tells of a full disk before a user does.
func (s *Server) probe(ctx context.Context) {
	t := time.NewTicker(probeAgain)
	defer t.Stop()
	var last time.Time
	for {
		if time.Since(last) < probeInterval && len(s.Conditions()) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				continue
			}
		}
		last = time.Now()
		try, cancel := context.WithTimeout(ctx, probeTimeout)
		err := s.store.Writable(try)
		cancel()
		if ctx.Err() != nil {
			return
		}
		s.condition("database", err)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (s *Server) serve(ctx context.Context, l net.Listener, withTLS bool) error {
	srv := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: cmp.Or(s.cfg.headerTimeout, headerTimeout),
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, WriteByteTimeout: 30 * time.Second},
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		// Requests end with ctx, so that control streams do not hold up the stop.
		BaseContext: func(net.Listener) context.Context {
			if withTLS {
				return ctx
			}
			return api.Forwarded(ctx)
		},
	}
	if withTLS {
		srv.TLSConfig = s.certs.config()
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
		if s.store != nil {
			err = errors.Join(err, s.store.Close())
		}
	})
	return err
}

// urlsMeta is the key under which the database has every URL that the platform ever had: nodes that enrolled under an old one still
// name it in their assertions.
const urlsMeta = "urls"

// remember adds the platform's URLs to those that it had before, and returns all.
func remember(ctx context.Context, st store.Store, urls []string) ([]string, error) {
	var all []string
	err := st.Update(ctx, func(tx store.Tx) error {
		all = nil
		b, err := tx.Meta(ctx, urlsMeta)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err == nil {
			if err := json.Unmarshal(b, &all); err != nil {
				return fmt.Errorf("remembered URLs: %w", err)
			}
		}
		for _, u := range urls {
			if !slices.Contains(all, u) {
				all = append(all, u)
			}
		}
		if b, err = json.Marshal(all); err != nil {
			return err
		}
		return tx.PutMeta(ctx, urlsMeta, b)
	})
	return all, err
}
