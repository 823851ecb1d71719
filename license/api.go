package license

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/database"
)

// Limits of requests.
const (
	maxBody    = 64 << 10 // bytes
	auditLimit = 500
)

// openapi describes the API. A test holds it against the routes.
//
//go:embed openapi.json
var openapi []byte

// caller is who asks.
type caller struct {
	actor    string
	customer string // of a licence key; empty for an administrator
}

// handle answers one request with a status and a document; a nil document is no body.
type handle func(ctx context.Context, who caller, r *http.Request) (int, any, error)

type list[T any] struct {
	Items []T `json:"items"`
}

func listed[T any](items []T, err error) (int, any, error) {
	if items == nil {
		items = []T{}
	}
	return http.StatusOK, list[T]{items}, err
}

// route is one of the API.
type route struct {
	pattern string
	role    string // admin, platform, or anybody
	handle  handle
}

// Who may call a route.
const (
	forAdmin    = "admin"
	forPlatform = "platform"
	forAnybody  = "anybody"
)

func (s *Service) apiRoutes() []route {
	const c = "/api/v1/customers/{customer}"
	return []route{
		{"GET /api/v1/customers", forAdmin, func(ctx context.Context, _ caller, _ *http.Request) (int, any, error) {
			return listed(s.Customers(ctx))
		}},
		{"POST /api/v1/customers", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			var req Customer
			if err := decode(r, &req); err != nil {
				return 0, nil, err
			}
			v, err := s.CreateCustomer(ctx, who.actor, req)
			return http.StatusCreated, v, err
		}},
		{"GET " + c + "/keys", forAdmin, func(ctx context.Context, _ caller, r *http.Request) (int, any, error) {
			return listed(s.Keys(ctx, r.PathValue("customer")))
		}},
		{"POST " + c + "/keys", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			var req struct {
				Name string `json:"name"`
			}
			if err := decode(r, &req); err != nil {
				return 0, nil, err
			}
			v, err := s.CreateKey(ctx, who.actor, r.PathValue("customer"), req.Name)
			return http.StatusCreated, v, err
		}},
		{"DELETE " + c + "/keys/{id}", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			return http.StatusNoContent, nil, s.RevokeKey(ctx, who.actor, r.PathValue("customer"), r.PathValue("id"))
		}},
		{"GET " + c + "/entitlements", forAdmin, func(ctx context.Context, _ caller, r *http.Request) (int, any, error) {
			return listed(s.Entitlements(ctx, r.PathValue("customer"), r.URL.Query().Get("history") == "true"))
		}},
		{"POST " + c + "/entitlements", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			var req IssueRequest
			if err := decode(r, &req); err != nil {
				return 0, nil, err
			}
			v, err := s.Issue(ctx, who.actor, r.PathValue("customer"), req)
			return http.StatusCreated, v, err
		}},
		{"GET /api/v1/entitlements/{id}", forAdmin, func(ctx context.Context, _ caller, r *http.Request) (int, any, error) {
			v, err := s.Entitlement(ctx, r.PathValue("id"))
			return http.StatusOK, v, err
		}},
		{"POST /api/v1/entitlements/{id}/renew", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			var req struct {
				Expires time.Time `json:"expires"`
			}
			if err := decode(r, &req); err != nil {
				return 0, nil, err
			}
			v, err := s.Renew(ctx, who.actor, r.PathValue("id"), req.Expires)
			return http.StatusCreated, v, err
		}},
		{"POST /api/v1/entitlements/{id}/revoke", forAdmin, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			var req struct {
				Reason string `json:"reason"`
			}
			if err := decode(r, &req); err != nil {
				return 0, nil, err
			}
			v, err := s.Revoke(ctx, who.actor, r.PathValue("id"), req.Reason)
			return http.StatusCreated, v, err
		}},
		{"GET /api/v1/audit", forAdmin, func(ctx context.Context, _ caller, r *http.Request) (int, any, error) {
			after, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64) // none is 0
			return listed(s.Audit(ctx, after, auditLimit))
		}},
		{"POST /api/v1/signing-keys/rotate", forAdmin, func(ctx context.Context, who caller, _ *http.Request) (int, any, error) {
			return listed(s.RotateKeys(ctx, who.actor, false))
		}},
		{"GET /api/v1/signing-keys", forAnybody, func(ctx context.Context, _ caller, _ *http.Request) (int, any, error) {
			return listed(s.SigningKeys(ctx))
		}},
		{"GET /api/v1/licence", forPlatform, func(ctx context.Context, who caller, r *http.Request) (int, any, error) {
			l, err := s.Fetch(ctx, who.customer, r.URL.Query().Get("platform"))
			return http.StatusOK, map[string][]string{"licences": l}, err
		}},
	}
}

// decode reads a request strictly.
func decode(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if errors.Is(err, io.EOF) {
		return nil // an empty request asks for what is usual
	}
	if err != nil {
		return refuse(http.StatusBadRequest, control.CodeInvalid, "correct the request; /api/v1/openapi.json describes it", "the request can not be read: %v", err)
	}
	return nil
}

// api is the handler of everything under /api/.
func (s *Server) api() http.Handler {
	mux := http.NewServeMux()
	for _, rt := range s.apiRoutes() {
		mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, r *http.Request) { s.serveRoute(w, r, rt) })
	}
	mux.HandleFunc("GET /api/v1/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openapi) // the peer has gone: nobody is left to tell
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, refuse(http.StatusNotFound, control.CodeNotFound, "see /api/v1/openapi.json", "there is no %.80q", r.Method+" "+r.URL.Path))
	})
	return http.MaxBytesHandler(mux, maxBody)
}

func (s *Server) serveRoute(w http.ResponseWriter, r *http.Request, rt route) {
	ctx := r.Context()
	who, err := s.authenticate(ctx, r, rt.role)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	status, doc, err := rt.handle(ctx, who, r)
	if rt.role == forPlatform {
		result := "ok"
		if err != nil {
			result = "error"
		}
		s.fetches.WithLabelValues(result).Inc()
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if doc == nil {
		w.WriteHeader(status)
		return
	}
	answer(w, status, "application/json", doc)
}

func answer(w http.ResponseWriter, status int, kind string, doc any) {
	b, err := json.Marshal(doc)
	if err != nil {
		http.Error(w, "the answer can not be encoded", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // the peer has gone: nobody is left to tell
}

// authenticate finds out who asks. Credentials have 256 bits: nobody guesses one, so that failures are counted and logged, and not slowed down.
func (s *Server) authenticate(ctx context.Context, r *http.Request, role string) (caller, error) {
	if role == forAnybody {
		return caller{}, nil
	}
	remedy := "on the service's host: sallyway-license admin token"
	if role == forPlatform {
		remedy = "make one: sallyway-license key create --customer NAME"
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return caller{}, refuse(http.StatusUnauthorized, control.CodeTokenUnknown, remedy, "no credential in the request")
	}
	var who caller
	var err error
	if role == forAdmin {
		who.actor, err = s.admin(ctx, token)
		who.actor = "admin:" + who.actor
	} else {
		var k *LicenceKey
		if k, err = s.fetcher(ctx, token); err == nil {
			who = caller{actor: "key:" + k.ID, customer: k.Customer}
		}
	}
	if errors.Is(err, database.ErrNotFound) {
		source, _, _ := net.SplitHostPort(r.RemoteAddr)
		s.log.Warn("refused a credential that is not known, has expired or was revoked", "source", source, "for", role)
		return caller{}, refuse(http.StatusUnauthorized, control.CodeTokenUnknown, remedy, "the credential is not known, has expired or was revoked, or is for something else")
	}
	return who, err
}

// fail tells a caller of an error.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	var e *refusal
	switch {
	case errors.As(err, &e):
	case errors.Is(err, database.ErrUnavailable):
		s.cfg.Health("database", err)
		s.log.Error("database unavailable", "error", err)
		e = refuse(http.StatusServiceUnavailable, "storage_unavailable", "see the log of sallyway-license", "the service's database does not work")
	case r.Context().Err() != nil:
		e = refuse(http.StatusServiceUnavailable, "", "try again", "the request was interrupted")
	default:
		s.log.Error("request failed", "path", r.URL.Path, "error", err)
		e = refuse(http.StatusInternalServerError, "", "its log says more", "the licence service failed at this request")
	}
	s.refused.WithLabelValues(strconv.Itoa(e.Status)).Inc()
	answer(w, e.Status, "application/problem+json", e.Problem)
}
