// Package incoming is what the platform says of every HTTP request, whoever serves it: an id that answer, log and audit share, and a span.
//
//	h := incoming.Handler(incoming.Config{Tracer: tracer, Log: log}, mux)   // outermost
//	mux.Handle("/api/", incoming.Routed(apiMux))                           // so that a span is named after the route that was taken
//	log.Error("request failed", "request_id", incoming.ID(ctx))
package incoming

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/telemetry"
)

// Config is what Handler needs.
type Config struct {
	Tracer *telemetry.Tracer // nil: no spans
	Log    *slog.Logger      // nil discards
	// Metrics is where the counters of requests are registered; nil is nowhere.
	Metrics prometheus.Registerer
}

// about is what is known of a request; it lives in its context.
type about struct {
	id    string
	route string // pattern of the innermost mux, "" when none had one
	org   string
}

type aboutKey struct{}

func of(ctx context.Context) *about {
	a, _ := ctx.Value(aboutKey{}).(*about)
	return a
}

// ID is the id of the request that ctx belongs to, "" where there is none.
func ID(ctx context.Context) string {
	if a := of(ctx); a != nil {
		return a.id
	}
	return ""
}

// Handler gives every request an id: the one in X-Request-Id when that is well-formed (control.ValidRequestID), else one of its own. It is in the
// answer's header, in the context, and in the request's own header, where what has no context finds it.
//
// What fails here (5xx) is a line of the log, everything else one at debug. Neither holds a query string, a header or a body, and no span does.
func Handler(cfg Config, next http.Handler) http.Handler {
	log, counts := cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), newMetrics(cfg.Metrics)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &about{id: r.Header.Get(control.RequestIDHeader)}
		if !control.ValidRequestID(a.id) {
			a.id = rand.Text()
		}
		ctx := context.WithValue(r.Context(), aboutKey{}, a)
		var span telemetry.Span
		if !unspanned(r) {
			ctx, span = cfg.Tracer.Start(telemetry.Extract(ctx, r.Header), r.Method, telemetry.Server)
			defer span.End()
		}
		r = r.WithContext(ctx)
		r.Header.Set(control.RequestIDHeader, a.id)
		w.Header().Set(control.RequestIDHeader, a.id)
		rec := &recorder{ResponseWriter: w}
		began := time.Now()
		next.ServeHTTP(rec, r)
		a.finish(span, r, rec.code())
		counts.count(r, rec.code(), time.Since(began))
		level := slog.LevelDebug
		if rec.code() >= 500 {
			level = slog.LevelWarn
		}
		if log.Enabled(ctx, level) {
			log.Log(ctx, level, "request", "method", r.Method, "route", cmp.Or(a.route, "none"), "status", rec.code(), "took", time.Since(began).Round(time.Microsecond), "request_id", a.id)
		}
	})
}

// finish says in a span what became of a request.
func (a *about) finish(span telemetry.Span, r *http.Request, status int) {
	if !span.Recording() {
		return
	}
	if a.route != "" {
		span.Rename(a.route) // METHOD /path/{with}/{names}
		span.String("http.route", a.route)
	}
	span.String("http.request.method", r.Method)
	span.Int("http.response.status_code", status)
	span.String("sallyway.request_id", a.id)
	if a.org != "" {
		span.String("sallyway.org", a.org)
	}
	if status >= 500 {
		span.Fail(fmt.Sprintf("answered %d", status))
	}
}

// unspanned tells of requests that get no span: those that are answered for as long as their node or page is there, and what balancers ask every second.
func unspanned(r *http.Request) bool {
	switch r.URL.Path {
	case "/api/v1/node/control", "/livez", "/readyz", "/healthz":
		return true
	}
	return r.Header.Get("Accept") == "text/event-stream"
}

// Routed notes which of a mux's routes a request took, and for which organization.
func Routed(mux http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(w, r)
		if a := of(r.Context()); a != nil {
			// A mux writes what it matched into the request.
			a.route, a.org = r.Pattern, r.PathValue("org")
		}
	})
}

// recorder keeps an answer's status.
type recorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 || r.status < 200 { // informational ones come before the answer's
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController: streams flush and move their deadlines by it.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) code() int { return cmp.Or(r.status, http.StatusOK) }
