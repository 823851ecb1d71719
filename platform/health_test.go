package platform

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/telemetry"
	"sallyway/internal/telemetry/otlptest"
)

// request sends a request with headers, and returns the answer with its body.
func (l *lab) request(method, path string, header map[string]string) (*http.Response, string) {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), method, l.at()+path, nil)
	must(l.t, err)
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := l.http.Do(req)
	must(l.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(l.t, err)
	return resp, string(b)
}

// TestHealth wants /readyz and /healthz to say what is the case, and /livez to depend on nothing.
func TestHealth(t *testing.T) {
	t.Parallel()
	l := start(t)
	want := func(what, path string, status int, part string) {
		t.Helper()
		if resp, body := l.request("GET", path, nil); resp.StatusCode != status || !strings.Contains(body, part) {
			t.Errorf("%s: %s: %d %s", what, path, resp.StatusCode, body)
		}
	}
	for _, path := range []string{"/readyz", "/healthz"} {
		want("running", path, 200, `"ready":true`)
	}
	want("running", "/livez", 200, `"live":true`)
	l.srv.condition("something", errors.New("it does not work"))
	for _, path := range []string{"/readyz", "/healthz"} {
		want("with a condition", path, 503, "it does not work")
	}
	want("with a condition", "/livez", 200, `"live":true`)
	l.srv.condition("something", nil)
	want("without it", "/readyz", 200, `"ready":true`)
}

// TestDrain stops a platform: for a while it says that it is not ready, and still answers.
func TestDrain(t *testing.T) {
	t.Parallel()
	told := make(chan string, 16)
	l := start(t, func(c *Config) {
		c.DrainDelay = 2 * time.Second
		c.Health = func(condition string, err error) {
			if err != nil {
				told <- condition
			}
		}
	})
	began, stopped := time.Now(), make(chan struct{})
	go func() { defer close(stopped); l.stop() }()
	eventually(t, "the platform says that it stops", func() bool { _, is := l.srv.Conditions()[conditionStop]; return is })
	for _, path := range []string{"/readyz", "/healthz"} {
		if resp, body := l.request("GET", path, nil); resp.StatusCode != 503 || !strings.Contains(body, "stops") {
			t.Errorf("%s of a platform that stops: %d %s", path, resp.StatusCode, body)
		}
	}
	if resp, _ := l.request("GET", "/livez", nil); resp.StatusCode != 200 {
		t.Errorf("livez of a platform that stops: %d", resp.StatusCode)
	}
	var orgs control.List[control.Organization]
	if status, p := l.do(l.admin.Token, "GET", "/api/v1/orgs", nil, &orgs); status != 200 {
		t.Errorf("a platform that stops does not answer: %d %+v", status, p)
	}
	select {
	case c := <-told:
		if c != conditionStop {
			t.Errorf("the shell is told of %q", c)
		}
	default:
		t.Error("the shell is not told")
	}
	<-stopped
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("the listeners closed after %v", took)
	}
}

// TestRequestIDs wants an id in every answer, and the same in the problem, the log and the audit.
func TestRequestIDs(t *testing.T) {
	t.Parallel()
	l := start(t)
	bearer := "Bearer " + l.admin.Token
	for path, status := range map[string]int{"/api/v1/orgs": 200, "/api/v1/orgs/none/gateways": 404, "/api/v1/nothing": 404, "/api/v1/orgs?limit=x": 422, "/livez": 200, "/login": 200} {
		seen := make(map[string]bool)
		for _, given := range []string{"", "from-a-caller_1.2", "short", strings.Repeat("x", 65), "a b c d e f g h"} {
			header := map[string]string{"Authorization": bearer}
			if given != "" {
				header["X-Request-Id"] = given
			}
			resp, body := l.request("GET", path, header)
			id := resp.Header.Get("X-Request-Id")
			if len(resp.Header.Values("X-Request-Id")) != 1 || !control.ValidRequestID(id) || (id == given) != (given == "from-a-caller_1.2") || seen[id] {
				t.Errorf("%s with id %q is answered with %q", path, given, resp.Header.Values("X-Request-Id"))
			}
			seen[id] = true
			if path != "/login" && resp.StatusCode != status { // the first run leads elsewhere
				t.Errorf("%s: %d, want %d: %s", path, resp.StatusCode, status, body)
			}
			if strings.HasPrefix(resp.Header.Get("Content-Type"), "application/problem+json") {
				var p control.Problem
				must(t, json.Unmarshal([]byte(body), &p))
				if p.RequestID != id {
					t.Errorf("%s: problem %s, header %s", path, body, id)
				}
			} else if resp.StatusCode >= 400 {
				t.Errorf("%s: %d with %s", path, resp.StatusCode, resp.Header.Get("Content-Type"))
			}
			if !strings.Contains(l.logs.String(), "request_id="+id) {
				t.Errorf("%s: the log does not know %s", path, id)
			}
		}
	}
	// A node's refusal has it too.
	resp, body := l.request("POST", "/api/v1/node/heartbeat", map[string]string{"Authorization": "Bearer nonsense", "X-Request-Id": "of-a-node-1"})
	if resp.StatusCode != 401 || !strings.Contains(body, `"request_id":"of-a-node-1"`) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	// What it changed is in the audit with it.
	made, body := l.request("DELETE", "/api/v1/orgs/default/clients/none", map[string]string{"Authorization": bearer})
	if made.StatusCode != 404 {
		t.Errorf("%d %s", made.StatusCode, body)
	}
	l.api("POST", "/clients", control.CreateNode{Name: "laptop"}, nil)
	made, body = l.request("DELETE", "/api/v1/orgs/default/clients/laptop", map[string]string{"Authorization": bearer, "X-Request-Id": "the-deletion"})
	if made.StatusCode/100 != 2 {
		t.Fatalf("%d %s", made.StatusCode, body)
	}
	_, audit := l.request("GET", "/api/v1/orgs/default/audit?limit=1000", map[string]string{"Authorization": bearer})
	if strings.Count(audit, `"request_id":"the-deletion"`) != 1 {
		t.Errorf("the audit does not say which request it was: %s", audit)
	}
	if strings.Contains(l.logs.String(), l.admin.Token) {
		t.Error("the log has the token")
	}
}

// TestRequestSpans follows a request into the platform and its database.
func TestRequestSpans(t *testing.T) {
	t.Parallel()
	c := otlptest.Start(t)
	tele, err := telemetry.New(telemetry.Config{Settings: telemetry.Settings{Endpoint: c.URL}, Service: "platformd"})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tele.Run(ctx) }()
	defer func() { cancel(); must(t, <-done) }()
	l := start(t, func(c *Config) { c.Tracer = tele.Tracer() })
	const trace = "0af7651916cd43dd8448eb211c80319c"
	header := map[string]string{"Authorization": "Bearer " + l.admin.Token, "Traceparent": "00-" + trace + "-b7ad6b7169203331-01", "X-Request-Id": "traced-1"}
	if resp, body := l.request("GET", "/api/v1/orgs/default/gateways?limit=7", header); resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	got := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Trace == trace && s.Parent == "b7ad6b7169203331" })[0]
	if got.Name != "GET /api/v1/orgs/{org}/gateways" || got.Service != "platformd" || got.Attributes["sallyway.org"] != "default" || got.Attributes["sallyway.request_id"] != "traced-1" {
		t.Errorf("%+v", got)
	}
	for _, s := range c.Wait(t, 1, func(s otlptest.Span) bool { return s.Trace == trace && s.Parent == got.ID }) {
		if !strings.HasPrefix(s.Name, "database ") {
			t.Errorf("%+v", s)
		}
	}
	// A page has a span; what lasts as long as a page is open, and what balancers ask for, have none.
	l.request("GET", "/login", map[string]string{"Traceparent": header["Traceparent"]})
	c.Wait(t, 1, func(s otlptest.Span) bool { return s.Trace == trace && strings.HasPrefix(s.Name, "GET /login") })
	for _, s := range c.Spans() {
		for k, v := range s.Attributes {
			if strings.Contains(v, l.admin.Token) || strings.Contains(v, "limit=7") {
				t.Errorf("span %s has %s=%s", s.Name, k, v)
			}
		}
	}
}
