package api

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people"
	"sallyway/platform/registry"
)

// Keys of a context: the caller, where the request comes from, the organization in its path, the request itself (huma.Context).
type (
	callerKey struct{}
	sourceKey struct{}
	orgKey    struct{}

	requestKey struct{}
)

func caller(ctx context.Context) *people.Principal {
	p, _ := ctx.Value(callerKey{}).(*people.Principal)
	return p
}

func callerSource(ctx context.Context) string {
	s, _ := ctx.Value(sourceKey{}).(string)
	return s
}

// Source is where a request comes from, as limits and the audit have it: an IPv4 address or a /64 of IPv6.
func Source(r *http.Request) string { return source(r) }

// Marks of operations; see marked.
const (
	reads    = "reads"
	own      = "own"
	mine     = "mine"
	platform = "platform"
	chain    = "chain"
	public   = "public"
)

// authorize runs before every operation of the admin API.
func (s *server) authorize(ctx huma.Context, next func(huma.Context)) {
	op := ctx.Operation()
	r, _ := humago.Unwrap(ctx)
	c := context.WithValue(context.WithValue(ctx.Context(), sourceKey{}, source(r)), requestKey{}, ctx)
	if op.Metadata[public] != nil {
		if refusal := s.spend(ctx.SetHeader, "address:"+source(r)); refusal != nil {
			answer(ctx, refusal)
			return
		}
		next(huma.WithContext(ctx, registry.WithActor(c, source(r))))
		return
	}
	p, refusal := s.authenticate(ctx, r)
	if refusal == nil {
		refusal = s.spend(ctx.SetHeader, callerID(p))
	}
	if refusal == nil {
		refusal = s.permit(ctx.Context(), p, ctx.Param("org"), op)
	}
	if refusal != nil {
		answer(ctx, refusal)
		return
	}
	c = context.WithValue(context.WithValue(c, callerKey{}, p), orgKey{}, ctx.Param("org"))
	next(huma.WithContext(ctx, registry.WithActor(c, p.Actor)))
}

// crossOrigin refuses requests that another site has a browser make.
var crossOrigin = http.NewCrossOriginProtection()

func (s *server) authenticate(ctx huma.Context, r *http.Request) (*people.Principal, *problem) {
	from := source(r)
	header := ctx.Header("Authorization")
	if header == "" && people.HasCookie(r) {
		return s.browser(ctx.Context(), r)
	}
	token, ok := strings.CutPrefix(header, "Bearer ")
	if !ok {
		return nil, &problem{control.Problem{
			Status: http.StatusUnauthorized, Title: http.StatusText(http.StatusUnauthorized), Code: control.CodeTokenUnknown, Detail: "no API token in the request",
			Remedy: "sallyway login --url URL; or with a token: sallyway login --url URL --token-file FILE; platformd admin token prints one on the platform's host",
		}}
	}
	p, err := s.people.Authenticate(ctx.Context(), token, from)
	if err != nil {
		if code := registry.Code(err); code != "" {
			// A good token always passes: whoever guesses from behind the same address locks nobody out.
			if !s.limiter.allow(from, s.reg.Now()) {
				s.guessing(ctx.Context(), "API token", from)
				ctx.SetHeader("Retry-After", "60")
				return nil, tooMany()
			}
			s.limiter.failed(from, s.reg.Now())
			err = errors.Join(err, s.reg.APITokenRefused(ctx.Context(), code, from))
		}
		return nil, s.fail(ctx.Context(), err)
	}
	return p, nil
}

// browser authenticates a request of a page of the platform by its session. What changes something carries the session's CSRF token, too.
func (s *server) browser(ctx context.Context, r *http.Request) (*people.Principal, *problem) {
	p, err := s.people.FromRequest(r)
	if err != nil {
		return nil, s.fail(ctx, err)
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return p, nil
	}
	err = crossOrigin.Check(r)
	if err == nil {
		err = p.Session.CheckCSRF(r.Header.Get(people.CSRFHeader))
	}
	if err != nil {
		return nil, &problem{control.Problem{
			Status: http.StatusForbidden, Title: http.StatusText(http.StatusForbidden), Code: control.CodeForbidden, Detail: "the request does not come from a page of this platform",
			Remedy: "load the page again; programs use an API token",
		}}
	}
	return p, nil
}

// object is the word of an operation's path that scopes name: what follows the organization, or the API's root.
func object(op *huma.Operation) string {
	words := strings.Split(strings.TrimPrefix(op.Path, "/api/v1/"), "/")
	if words[0] == "orgs" {
		words = words[min(2, len(words)):]
	} else if words[0] == "shared" {
		words = words[1:]
	}
	if len(words) == 0 {
		return "organizations"
	}
	word, _, _ := strings.Cut(words[0], ":")
	return word
}

// permit holds the caller's scopes against the operation. An organization that the caller does not see is not found.
func (s *server) permit(ctx context.Context, p *people.Principal, org string, op *huma.Operation) *problem {
	inOrg := strings.Contains(op.Path, "{org}")
	if inOrg && org == identity.SharedOrg && op.Metadata[chain] == nil {
		return &problem{control.Problem{
			Status: http.StatusNotFound, Title: http.StatusText(http.StatusNotFound), Code: control.CodeNotFound, Detail: org + " is the platform itself, not an organization",
			Remedy: "its relays are under /api/v1/shared/relays, its people under /api/v1/people, its audit under /api/v1/orgs/" + org + "/audit",
		}}
	}
	verb := people.Write
	if op.Method == http.MethodGet || op.Metadata[reads] != nil {
		verb = people.Read
	}
	what := object(op)
	switch {
	case op.Metadata[own] != nil:
		return nil
	case op.Metadata[mine] != nil:
		what = people.Self
	}
	var err error
	switch {
	case !inOrg:
		err = p.Require(people.Platform, what, verb)
	case op.Metadata[platform] != nil:
		if err = p.Require(org, what, people.Read); err == nil || registry.Code(err) != control.CodeNotFound {
			err = p.Require(people.Platform, what, verb)
		}
	default:
		err = p.Require(org, what, verb)
	}
	if err != nil {
		return s.fail(ctx, err)
	}
	return nil
}
