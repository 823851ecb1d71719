// Package web is the platform's user interface: pages that the server makes, one style sheet and one small script for what is live. It
// calls the registry as the API's handlers do, under the caller's role and organization, and allows nothing that the API refuses.
//
// No page needs the script: forms are plain POSTs followed by a redirect, questions are asked in <details>, pictures are SVG made here. The
// content security policy allows no inline script or style and nothing from elsewhere.
package web

import (
	"context"
	"embed"
	"io/fs"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyway/platform/flowlog"
	"sallyway/platform/people"
	"sallyway/platform/registry"
	"sallyway/platform/web/history"
	"sallyway/platform/webhook"
)

//go:embed templates static
var files embed.FS

// Limits of requests.
const (
	maxBody  = 256 << 10 // bytes of a form
	pageSize = 50        // rows of a list
)

// Config is what the pages need.
type Config struct {
	Registry *registry.Registry
	People   *people.Service
	Log      *slog.Logger
	// Unavailable is told of a database that can not be used. It must not block.
	Unavailable func(error)
	// Source is where a request comes from, for limits and the audit.
	Source   func(*http.Request) string
	Webhooks *webhook.Service
	Flows    *flowlog.Service
	// Dialler opens sessions to resources.
	Dialler Tester
	// Conditions are what does not work at the platform itself, with why; nil is nothing.
	Conditions func() map[string]string
}

// Server serves the pages. New makes it, and Run does what happens by itself.
type Server struct {
	cfg      Config
	reg      *registry.Registry
	log      *slog.Logger
	history  *history.Recorder
	watchers *watchers
	pages    pages
	assets   map[string]asset
	handler  http.Handler
}

var _ http.Handler = (*Server)(nil)

// New prepares the pages. It starts nothing.
func New(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg, reg: cfg.Registry, log: cfg.Log, history: history.New(cfg.Registry.Store, cfg.Registry.Board, cfg.Registry.Now)}
	s.watchers = newWatchers(cfg.Registry)
	static, err := fs.Sub(files, "static")
	if err != nil {
		return nil, err
	}
	if s.assets, err = loadAssets(static); err != nil {
		return nil, err
	}
	templates, err := fs.Sub(files, "templates")
	if err != nil {
		return nil, err
	}
	if s.pages, err = parsePages(templates, s.assetURL); err != nil {
		return nil, err
	}
	s.handler = s.routes()
	return s, nil
}

// Run records history and wakes live pages until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		s.history.Run(ctx, func(err error) { s.log.Error("history was not recorded, it is tried again", "error", err) })
		return nil
	})
	g.Go(func() error { s.watchers.run(ctx); return nil })
	return g.Wait()
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// contentPolicy is the content security policy of every page.
const contentPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"font-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// secure sets what every answer carries.
func secure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", contentPolicy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
		if r.TLS != nil || strings.HasPrefix(r.Header.Get("X-Forwarded-Proto"), "https") {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		next.ServeHTTP(w, r)
	})
}

// now is the registry's clock.
func (s *Server) now() time.Time { return s.reg.Now() }
