package platformapi

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
)

// platform answers each request with the next of its answers.
type platform struct {
	t       *testing.T
	mu      sync.Mutex
	answers []http.HandlerFunc // guarded by mu
	seen    []*http.Request    // guarded by mu
	bodies  []string           // guarded by mu
}

func (p *platform) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Error(err)
	}
	p.mu.Lock()
	p.seen, p.bodies = append(p.seen, r), append(p.bodies, string(b))
	if len(p.answers) == 0 {
		p.mu.Unlock()
		p.t.Errorf("one request more than answers: %s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusTeapot)
		return
	}
	next := p.answers[0]
	p.answers = p.answers[1:]
	p.mu.Unlock()
	next(w, r)
}

// requests are those that came, and sent their bodies.
func (p *platform) requests() []*http.Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.seen)
}

func (p *platform) sent() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.bodies)
}

func serve(t *testing.T, answers ...http.HandlerFunc) (*Client, *platform) {
	t.Helper()
	p := &platform{t: t, answers: answers}
	srv := httptest.NewServer(p)
	t.Cleanup(srv.Close)
	c, err := New(Config{URL: srv.URL, Token: "secret", UserAgent: "test", Edit: func(_ context.Context, h http.Header) { h.Set("X-Edit", "yes") }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, p
}

func answer(status int, v any, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		kind := "application/json"
		if status >= 400 {
			kind = "application/problem+json"
		}
		w.Header().Set("Content-Type", kind)
		w.WriteHeader(status)
		if v != nil {
			_ = json.NewEncoder(w).Encode(v) // the test sees what is missing
		}
	}
}

// lose ends the connection without an answer.
func lose(w http.ResponseWriter, _ *http.Request) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = c.Close() // it is what the test is about
	}
}

func TestLostConnection(t *testing.T) {
	t.Parallel()
	made := control.CreatedNode{NodeRecord: control.NodeRecord{ID: "g-1", Name: "office"}, Token: "t"}
	c, p := serve(t, lose, answer(409, control.Problem{Code: codeInProgress}, "Retry-After", "0"), answer(201, made))
	got, err := c.CreateGateway(t.Context(), "default", control.CreateNode{Name: "office"})
	if err != nil || got.Token != "t" {
		t.Fatalf("%+v, %v", got, err)
	}
	first := p.requests()[0].Header.Get("Idempotency-Key")
	for i, r := range p.requests() {
		if key := r.Header.Get("Idempotency-Key"); key != first || len(key) < 20 || p.sent()[i] != p.sent()[0] {
			t.Errorf("try %d: key %q, body %s", i, key, p.sent()[i])
		}
		if r.URL.Path != "/api/v1/orgs/default/gateways" || r.Header.Get("Authorization") != "Bearer secret" || r.Header.Get("X-Edit") != "yes" {
			t.Errorf("%s %v", r.URL, r.Header)
		}
	}
	c, p = serve(t, answer(201, made))
	if _, err := c.CreateGateway(t.Context(), "default", control.CreateNode{}); err != nil || p.requests()[0].Header.Get("Idempotency-Key") == first {
		t.Errorf("another request has the same key (%v)", err)
	}
	// A deletion whose answer was lost finds nothing at the second try: it was done. At the first try nothing is nothing.
	c, _ = serve(t, lose, answer(404, control.Problem{Code: control.CodeNotFound}), answer(404, control.Problem{Code: control.CodeNotFound}))
	if err := c.DeleteGateway(t.Context(), "default", "office"); err != nil {
		t.Error(err)
	}
	var refused *link.Problem
	if err := c.DeleteGateway(t.Context(), "default", "office"); !errors.As(err, &refused) || refused.Code != control.CodeNotFound {
		t.Error(err)
	}
	// A login has nobody whom a key could belong to: its code is shown once.
	c, p = serve(t, lose)
	var lost *link.Error
	if _, err := c.TakeLoginToken(t.Context(), control.TakeToken{}); !errors.As(err, &lost) || lost.Kind != link.Broken || p.requests()[0].Header.Get("Idempotency-Key") != "" {
		t.Errorf("%v, %v", err, p.requests()[0].Header)
	}
	// Somewhere it ends.
	c, p = serve(t, lose, lose, lose, lose)
	if _, err := c.Me(t.Context()); !errors.As(err, &lost) || len(p.requests()) != tries {
		t.Errorf("%v after %d tries", err, len(p.requests()))
	}
}

func TestTooManyRequests(t *testing.T) {
	t.Parallel()
	busy := func(seconds string) http.HandlerFunc {
		return answer(429, control.Problem{Code: control.CodeRateLimited}, "Retry-After", seconds)
	}
	c, _ := serve(t, busy("0"), answer(200, control.Me{Name: "ada"}))
	if me, err := c.Me(t.Context()); err != nil || me.Name != "ada" {
		t.Errorf("%+v, %v", me, err)
	}
	for _, after := range []string{"60", "", "-1"} {
		c, p := serve(t, busy(after))
		var refused *link.Problem
		if _, err := c.Me(t.Context()); !errors.As(err, &refused) || refused.Code != control.CodeRateLimited || len(p.requests()) != 1 {
			t.Errorf("Retry-After %q: %v after %d tries", after, err, len(p.requests()))
		}
	}
	// A caller that gives up is not kept.
	ctx, cancel := context.WithCancel(t.Context())
	c, _ = serve(t, func(w http.ResponseWriter, r *http.Request) { busy("5")(w, r); cancel() })
	if _, err := c.Me(ctx); err == nil {
		t.Error("no error")
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	list := func(next string, names ...string) http.HandlerFunc {
		var l control.List[control.NodeRecord]
		for _, n := range names {
			l.Items = append(l.Items, control.NodeRecord{Name: n})
		}
		l.NextCursor = next
		return answer(200, l)
	}
	c, p := serve(t, list("one", "a", "b"), list("", "c"))
	nodes, err := Collect(c.AllRelays(t.Context(), "a/b"))
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	if err != nil || !slices.Equal(names, []string{"a", "b", "c"}) {
		t.Errorf("%v, %v", names, err)
	}
	if p.requests()[0].URL.EscapedPath() != "/api/v1/orgs/a%2Fb/relays" || p.requests()[0].URL.RawQuery != "limit=200" || p.requests()[1].URL.RawQuery != "cursor=one&limit=200" {
		t.Errorf("%s, %s", p.requests()[0].URL, p.requests()[1].URL)
	}
	c, p = serve(t, list("one", "a"), answer(500, control.Problem{}))
	if _, err := Collect(c.AllRelays(t.Context(), "..")); err == nil || p.requests()[0].URL.EscapedPath() != "/api/v1/orgs/%2E%2E/relays" {
		t.Errorf("%v at %s", err, p.requests()[0].URL)
	}
	c, _ = serve(t, list("one", "a", "b"))
	for n, err := range c.AllRelays(t.Context(), "default") {
		if err != nil || n.Name != "a" {
			t.Errorf("%+v, %v", n, err)
		}
		break // and no further page
	}
}

func TestEntityTags(t *testing.T) {
	t.Parallel()
	c, p := serve(t, answer(200, control.NodeRecord{Name: "a"}, "ETag", `"x.y"`), answer(412, control.Problem{Code: "precondition_failed", Detail: "it was changed"}))
	var etag string
	if n, err := c.ShowRelay(t.Context(), "default", "a", ETag(&etag)); err != nil || n.Name != "a" || etag != `"x.y"` {
		t.Errorf("%+v, ETag %s, %v", n, etag, err)
	}
	var refused *link.Problem
	_, err := c.UpdateRelay(t.Context(), "default", "a", control.UpdateNode{}, IfMatch(etag), IdempotencyKey("mine"))
	if !errors.As(err, &refused) || refused.Code != "precondition_failed" || !strings.Contains(err.Error(), "it was changed") {
		t.Error(err)
	}
	if h := p.requests()[1].Header; h.Get("If-Match") != etag || h.Get("Idempotency-Key") != "mine" {
		t.Errorf("%v", h)
	}
}
