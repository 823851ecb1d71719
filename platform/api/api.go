// Package api is the platform's HTTP API: the admin API, described by OpenAPI 3.1 that is made from the code, and the endpoints of nodes.
// It decides who may call what; what is done is package registry's.
//
// Who calls is known from the bearer token (or a browser's session) alone, and the organization in a path and what is done there are held
// against the caller's scopes before a handler runs: a caller of one organization gets 404 for every other, as if it did not exist.
package api

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/version"
	"sallyway/platform/flowlog"
	"sallyway/platform/incoming"
	"sallyway/platform/people"
	"sallyway/platform/push"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/webhook"
)

// Limits of requests.
const (
	maxBody      = 1 << 20 // bytes
	defaultLimit = 100
	maxLimit     = 1000
)

// CodeUnavailable says that the database can not be used.
const CodeUnavailable = "storage_unavailable"

// CodeReadOnly says that a read-only token was used to change something.
const CodeReadOnly = people.CodeReadOnly

// Config is what the API needs.
type Config struct {
	Registry *registry.Registry
	Hub      *push.Hub
	People   *people.Service
	Log      *slog.Logger
	Webhooks *webhook.Service
	Flows    *flowlog.Service
	// Unavailable is told of a database that can not be used. It must not block.
	Unavailable func(error)
	Metrics     prometheus.Registerer
	// Dialler opens sessions to resources.
	Dialler Tester
	// Limiter counts refused requests; nil is one of its own.
	Limiter *Limiter
	// Rate is how many requests a second one caller has; zero is DefaultRate, less is no limit.
	Rate int
}

// Codes of preconditions and of idempotency keys.
const (
	CodePrecondition = "precondition_failed"         // If-Match: the object was changed meanwhile
	CodeKeyReused    = "idempotency_key_reused"      // the key came with another request before
	CodeInProgress   = "idempotency_key_in_progress" // the first request with the key is being carried out: try again
	CodeAnswerLost   = "idempotency_answer_lost"     // the first request with the key was carried out, and its answer was lost
)

type server struct {
	reg     *registry.Registry
	people  *people.Service
	hub     *push.Hub
	log     *slog.Logger
	cfg     Config
	api     huma.API
	mux     *mux
	limiter *Limiter
	budget  budget
	shows   map[string]show // by the path of a GET that answers one object
	refused *prometheus.CounterVec
}

// mux is a ServeMux that knows its patterns.
type mux struct {
	*http.ServeMux
	patterns []string
}

// HandleFunc implements humago.Mux.
func (m *mux) HandleFunc(pattern string, handler func(http.ResponseWriter, *http.Request)) {
	m.patterns = append(m.patterns, pattern)
	m.ServeMux.HandleFunc(pattern, handler)
}

// New returns the handler of everything under /api/v1.
func New(cfg Config) http.Handler {
	return http.MaxBytesHandler(incoming.Routed(routes(cfg).mux), maxBody)
}

// routes makes the handlers of everything under /api/v1, and describes them.
func routes(cfg Config) *server {
	useProblems()
	s := &server{reg: cfg.Registry, people: cfg.People, hub: cfg.Hub, log: cfg.Log, cfg: cfg, mux: &mux{ServeMux: http.NewServeMux()}, limiter: cfg.Limiter, shows: make(map[string]show)}
	s.budget.rate = float64(max(0, cmp.Or(cfg.Rate, DefaultRate)))
	if s.limiter == nil {
		s.limiter = new(Limiter)
	}
	s.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyway_platform_refusals_total", Help: "Requests that were refused, by code.",
	}, []string{"code"})
	cfg.Metrics.MustRegister(s.refused)

	c := huma.DefaultConfig("Sallyway platform", version.Get().Version)
	c.CreateHooks = nil // no $schema members in answers
	c.DocsPath, c.SchemasPath = "", ""
	c.Transformers = append(c.Transformers, named)
	c.OpenAPIPath = "" // see documents
	c.Info.Description = "Admin API and node endpoints of a Sallyway platform. Errors are problem+json (RFC 9457) with a stable code and a remedy."
	c.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"token": {Type: "http", Scheme: "bearer", Description: "API token: of a person (`sallyway login`), of a service account, or of its own (`platformd admin token`)"},
		"node":  {Type: "http", Scheme: "bearer", Description: "access token of a node, from /api/v1/node/token"},
	}
	s.api = humago.New(s.mux, c)
	s.api.UseMiddleware(s.authorize)
	s.orgRoutes()
	s.nodeRoutes()
	s.placesRoutes()
	s.accessRoutes()
	s.testRoutes()
	s.nodeEndpoints()
	s.peopleRoutes()
	s.serviceAccountRoutes()
	s.trailRoutes()
	s.licenceRoutes()
	s.authorityRoutes()
	s.mux.HandleFunc("/api/", func(w http.ResponseWriter, r *http.Request) {
		write(w, &control.Problem{Status: http.StatusNotFound, Code: control.CodeNotFound, Detail: "there is no " + clip(r.Method+" "+r.URL.Path), Remedy: "see /api/v1/openapi.json"})
	})
	s.documents()
	return s
}

func clip(s string) string {
	const most = 100
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// problem is control.Problem as huma answers it.
type problem struct{ control.Problem }

var _ huma.StatusError = (*problem)(nil)

// Error implements error.
func (p *problem) Error() string { return p.Detail }

// GetStatus implements huma.StatusError.
func (p *problem) GetStatus() int { return p.Status }

// ContentType implements huma.ContentTypeFilter.
func (p *problem) ContentType(string) string { return "application/problem+json" }

// useProblems has huma's own errors (validation) be problems of ours. huma keeps the constructor in a variable of its package.
var useProblems = sync.OnceFunc(func() {
	huma.NewError = func(status int, msg string, errs ...error) huma.StatusError {
		p := &problem{control.Problem{Status: status, Title: http.StatusText(status), Detail: msg}}
		switch {
		case status == http.StatusNotFound:
			p.Code = control.CodeNotFound
		case status >= 400 && status < 500:
			p.Code = control.CodeInvalid
			p.Remedy = "correct the request; /api/v1/openapi.json describes it"
		}
		for _, err := range errs {
			part := control.ProblemPart{Message: err.Error()}
			var d *huma.ErrorDetail
			if errors.As(err, &d) {
				part = control.ProblemPart{Message: d.Message, Location: d.Location} // never the value: it may be a secret
			}
			p.Errors = append(p.Errors, part)
		}
		if len(p.Errors) > 0 {
			p.Detail += ": " + strings.TrimSpace(p.Errors[0].Location+" "+p.Errors[0].Message)
		}
		return p
	}
})

// fail turns an error of the registry into what the caller is told.
func (s *server) fail(ctx context.Context, err error) *problem {
	var e *registry.Error
	switch {
	case errors.As(err, &e):
		s.refused.WithLabelValues(e.Problem.Code).Inc()
		return &problem{e.Problem}
	case errors.Is(err, store.ErrUnavailable):
		if s.cfg.Unavailable != nil {
			s.cfg.Unavailable(err)
		}
		s.log.Error("database unavailable", "error", err)
		return &problem{control.Problem{
			Status: http.StatusServiceUnavailable, Title: http.StatusText(http.StatusServiceUnavailable), Code: CodeUnavailable, Detail: err.Error(),
			Remedy: "on the platform's host, make room on the disk of its data folder and see that it can be written (df -h; platformd doctor); what runs goes on meanwhile",
		}}
	case ctx.Err() != nil:
		return &problem{control.Problem{Status: http.StatusServiceUnavailable, Title: "interrupted", Detail: "the request was interrupted", Remedy: "try again"}}
	}
	s.log.Error("request failed", "error", err, "request_id", incoming.ID(ctx))
	return &problem{control.Problem{
		Status: http.StatusInternalServerError, Title: http.StatusText(http.StatusInternalServerError), Detail: "the platform failed at this request",
		Remedy: "its log says more: journalctl -u sallyway-platform",
	}}
}

func tooMany() *problem {
	return &problem{control.Problem{
		Status: http.StatusTooManyRequests, Title: http.StatusText(http.StatusTooManyRequests), Code: control.CodeRateLimited,
		Detail: "too many refused requests from this address", Remedy: "wait a minute and try again",
	}}
}
