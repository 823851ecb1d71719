package web

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/awsauth"
	"sallyway/platform/flowlog"
	"sallyway/platform/people"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/webhook"
)

const password = "a sally is a dash out of a fortress"

// site is a platform's pages on a server of this process.
type site struct {
	t   testing.TB
	web *Server
	reg *registry.Registry
	svc *people.Service
	srv *httptest.Server
}

func newSite(t testing.TB) *site {
	t.Helper()
	ctx := t.Context()
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	st, err := store.OpenSQLite(ctx, filepath.Join(t.TempDir(), "platform.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	s := &site{t: t}
	s.reg = &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now, URL: "https://platform.example"}
	_, err = s.reg.Bootstrap(ctx)
	must(t, err)
	s.svc = people.New(people.Config{Registry: s.reg})
	metrics := prometheus.NewRegistry()
	s.web, err = New(Config{
		Registry: s.reg, People: s.svc, Webhooks: webhook.New(webhook.Config{Registry: s.reg, Log: s.reg.Log, Metrics: metrics}),
		Flows: flowlog.New(flowlog.Config{Registry: s.reg, Log: s.reg.Log, Metrics: metrics}), Log: slog.New(slog.DiscardHandler), Source: func(*http.Request) string { return "192.0.2.1" },
	})
	must(t, err)
	s.srv = httptest.NewTLSServer(s.web)
	t.Cleanup(s.srv.Close)
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// owner makes the first person.
func (s *site) owner() *people.Principal {
	s.t.Helper()
	ctx := s.t.Context()
	code, err := s.svc.SetupCode(ctx)
	must(s.t, err)
	_, err = s.svc.CreateFirst(ctx, people.FirstOwner{Code: code, Login: "ada", Password: password})
	must(s.t, err)
	return s.principal("ada")
}

func (s *site) principal(login string) *people.Principal {
	s.t.Helper()
	res, err := s.svc.LogIn(s.t.Context(), people.Login{Name: login, Password: password})
	must(s.t, err)
	rec := httptest.NewRecorder()
	people.SetCookie(rec, res.Session)
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for _, c := range rec.Result().Cookies() {
		r.AddCookie(c)
	}
	p, err := s.svc.FromRequest(r)
	must(s.t, err)
	return p
}

// person adds somebody with a role in an organization.
func (s *site) person(by *people.Principal, login, org string, role people.Role) {
	s.t.Helper()
	_, err := s.svc.CreatePerson(s.t.Context(), by, org, control.CreatePerson{Login: login, Role: string(role), Password: password})
	must(s.t, err)
}

// browser is somebody with cookies and without a script.
type browser struct {
	s    *site
	http *http.Client
}

func (s *site) browser() *browser {
	jar, err := cookiejar.New(nil)
	must(s.t, err)
	tr := s.srv.Client().Transport.(*http.Transport).Clone()
	tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // of this process
	return &browser{s, &http.Client{Jar: jar, Transport: tr}}
}

type answer struct {
	status int
	body   string
	path   string
	header http.Header
}

func (b *browser) send(r *http.Request) answer {
	b.s.t.Helper()
	resp, err := b.http.Do(r)
	must(b.s.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(b.s.t, err)
	return answer{resp.StatusCode, string(body), resp.Request.URL.RequestURI(), resp.Header}
}

func (b *browser) get(path string) answer {
	b.s.t.Helper()
	r, err := http.NewRequestWithContext(b.s.t.Context(), http.MethodGet, b.s.srv.URL+path, nil)
	must(b.s.t, err)
	return b.send(r)
}

// post sends a form with the token of the last page that has one. Pairs are name, value.
func (b *browser) post(path, token string, pairs ...string) answer {
	b.s.t.Helper()
	v := url.Values{people.CSRFField: {token}}
	for i := 0; i+1 < len(pairs); i += 2 {
		v.Add(pairs[i], pairs[i+1])
	}
	r, err := http.NewRequestWithContext(b.s.t.Context(), http.MethodPost, b.s.srv.URL+path, strings.NewReader(v.Encode()))
	must(b.s.t, err)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	return b.send(r)
}

var csrf = regexp.MustCompile(`name="csrf" value="([^"]+)"`)

func tokenIn(a answer) string {
	if m := csrf.FindStringSubmatch(a.body); m != nil {
		return m[1]
	}
	return ""
}

func (b *browser) logIn(login string) *browser {
	b.s.t.Helper()
	if a := b.post("/login", "", "login", login, "password", password); a.status != http.StatusOK || strings.HasPrefix(a.path, "/login") {
		b.s.t.Fatalf("login: %d at %s: %.300s", a.status, a.path, a.body)
	}
	return b
}

// TestFirstRun makes the owner once, with the code alone.
func TestFirstRun(t *testing.T) {
	s := newSite(t)
	b := s.browser()
	if a := b.get("/orgs/default/overview"); a.path != "/setup" || a.status != http.StatusOK {
		t.Fatalf("the first visit ends at %s with %d", a.path, a.status)
	}
	if a := b.post("/setup", "", "code", "guess", "login", "mallory", "password", password, "password2", password); a.status != http.StatusForbidden || !strings.Contains(a.body, "setup code is not the right one") {
		t.Errorf("a guess: %d", a.status)
	}
	code, err := s.svc.SetupCode(t.Context())
	must(t, err)
	if a := b.post("/setup", "", "code", code, "login", "ada", "password", password, "password2", password); a.path != "/orgs/default/overview" {
		t.Fatalf("the owner lands at %s (%d): %.400s", a.path, a.status, a.body)
	}
	d, err := s.svc.StartDevice(t.Context(), control.StartDevice{Client: "a test"}, "198.51.100.1")
	must(t, err)
	if _, query, _ := strings.Cut(d.URLWhole, "?"); !strings.Contains(b.get("/device?"+query).body, `value="`+d.UserCode+`"`) {
		t.Errorf("the page at %s does not have the code", d.URLWhole)
	}
	other := s.browser()
	if a := other.get("/setup"); !strings.HasPrefix(a.path, "/login") {
		t.Errorf("a second first run shows %s", a.path)
	}
	if a := other.post("/setup", "", "code", code, "login", "eve", "password", password, "password2", password); a.status != http.StatusConflict {
		t.Errorf("a second owner: %d", a.status)
	}
}

// pagesOf are all pages of an organization that a GET shows, by the routes themselves.
var pagesOf = []string{
	"overview", "sessions", "topology", "history", "resources", "resources/new", "resources/db", "resources/db/edit", "policies", "policies/new", "policies/explain",
	"groups", "groups/new", "groups/team", "networking/relays", "networking/relays/new", "networking/relays/fra-1", "networking/relays/fra-1/deploy",
	"networking/gateways", "networking/gateways/new", "networking/gateways/office", "networking/clients", "networking/clients/laptop", "audit", "audit/export",
	"audit/signed", "webhooks", "flows", "flows/export",
	"certificates", "certificates/gateway/rotation", "organization", "licence", "users", "users/new", "users/ada", "service-accounts", "api-tokens", "sso", "my",
}

// furnish makes one of everything in an organization.
func (s *site) furnish(org string) {
	s.t.Helper()
	ctx := s.t.Context()
	for _, n := range []struct {
		kind identity.Kind
		req  control.CreateNode
	}{{identity.Relay, control.CreateNode{Name: "fra-1", Host: "203.0.113.7"}}, {identity.Gateway, control.CreateNode{Name: "office"}}, {identity.Client, control.CreateNode{Name: "laptop"}}} {
		_, err := s.reg.CreateNode(ctx, org, n.kind, n.req)
		must(s.t, err)
	}
	_, err := s.reg.CreateResource(ctx, org, control.CreateResource{Name: "db", Address: "10.0.3.7", TCP: []policy.PortRange{{First: 5432, Last: 5432}}, Gateways: []string{"office"}})
	must(s.t, err)
	_, err = s.reg.PutGroup(ctx, org, "team", &[]string{"client:laptop"}, true)
	must(s.t, err)
	_, err = s.reg.CreatePolicy(ctx, org, control.CreatePolicy{Subject: "group:team", Resource: "db"})
	must(s.t, err)
	_, err = s.web.cfg.Webhooks.Create(ctx, org, control.CreateWebhook{Name: "siem", URL: "https://siem.example/in"})
	must(s.t, err)
}

// TestNothingCrossesOrganizations asks for every page, and sends every form, of an organization that the reader does not belong to.
func TestNothingCrossesOrganizations(t *testing.T) {
	s := newSite(t)
	ada := s.owner()
	s.furnish(registry.DefaultOrg)
	_, err := s.reg.CreateOrg(t.Context(), control.CreateOrganization{Name: "other"})
	must(t, err)
	s.furnish("other")
	s.person(ada, "owen", "other", people.Owner)
	owen := s.browser().logIn("owen")
	token := tokenIn(owen.get("/orgs/other/overview"))
	if token == "" {
		t.Fatal("no token on a page of one's own")
	}
	for _, p := range pagesOf {
		if a := owen.get("/orgs/default/" + p); a.status != http.StatusNotFound {
			t.Errorf("GET %s of another organization: %d", p, a.status)
		} else if strings.Contains(a.body, "fra-1") && !strings.Contains(p, "fra-1") || strings.Contains(a.body, "203.0.113.7") {
			t.Errorf("GET %s tells something of another organization", p)
		}
		if p == "users/ada" || strings.HasSuffix(p, "/export") {
			continue
		}
		if a := owen.get("/orgs/other/" + p); a.status != http.StatusOK {
			t.Errorf("GET %s of one's own organization: %d", p, a.status)
		}
	}
	forms := []string{
		"networking/relays/new", "networking/relays/fra-1", "networking/relays/fra-1/token", "networking/relays/fra-1/do/delete", "networking/clients/laptop/do/revoke",
		"resources/new", "resources/db/edit", "resources/db/do/delete", "policies/new", "policies/group-team-db/do/delete", "groups/new", "groups/team", "groups/team/delete",
		"sessions/laptop/end", "webhooks", "webhooks/siem/do/test", "webhooks/siem/do/delete", "flows/log", "organization", "licence", "licence/do/remove", "users/new", "users/ada", "users/ada/do/delete", "service-accounts", "api-tokens", "sso", "my/clients",
	}
	for _, p := range forms {
		if a := owen.post("/orgs/default/"+p, token, "name", "x", "login", "x"); a.status != http.StatusNotFound {
			t.Errorf("POST %s of another organization: %d", p, a.status)
		}
	}
	if _, err := s.reg.Node(t.Context(), registry.DefaultOrg, identity.Relay, "fra-1"); err != nil {
		t.Error(err)
	}
}

// TestRoles shows that pages allow what the scopes allow, whatever buttons they show.
func TestRoles(t *testing.T) {
	s := newSite(t)
	ada := s.owner()
	s.furnish(registry.DefaultOrg)
	s.person(ada, "audra", registry.DefaultOrg, people.Auditor)
	s.person(ada, "adam", registry.DefaultOrg, people.Admin)
	s.person(ada, "mia", registry.DefaultOrg, people.Member)

	audra := s.browser().logIn("audra")
	page := audra.get("/orgs/default/networking/relays/fra-1")
	if page.status != http.StatusOK || strings.Contains(page.body, "Delete") {
		t.Errorf("an auditor sees a relay with %d, and buttons: %v", page.status, strings.Contains(page.body, "Delete"))
	}
	for _, p := range []string{"networking/relays/fra-1/do/delete", "networking/relays/new", "resources/db/do/delete", "policies/new", "sessions/laptop/end", "users/new", "organization", "licence", "licence/do/remove"} {
		if a := audra.post("/orgs/default/"+p, tokenIn(page), "name", "x", "host", "192.0.2.1"); a.status != http.StatusForbidden {
			t.Errorf("an auditor's POST %s: %d", p, a.status)
		}
	}
	adam := s.browser().logIn("adam")
	page = adam.get("/orgs/default/networking/relays")
	if a := adam.post("/orgs/default/networking/relays/new", tokenIn(page), "name", "ams-2", "host", "192.0.2.1"); a.status != http.StatusOK || a.path != "/orgs/default/networking/relays/ams-2/deploy" {
		t.Errorf("an admin creates a relay: %d at %s", a.status, a.path)
	}
	if a := adam.post("/orgs/default/users/new", tokenIn(page), "login", "eve", "role", "owner"); a.status != http.StatusForbidden {
		t.Errorf("an admin makes an owner: %d", a.status)
	}
	mia := s.browser().logIn("mia")
	if a := mia.get("/"); a.path != "/orgs/default/my" || a.status != http.StatusOK {
		t.Errorf("a member lands at %s with %d", a.path, a.status)
	}
	for _, p := range pagesOf {
		if p == "my" {
			continue
		}
		if a := mia.get("/orgs/default/" + p); a.status != http.StatusForbidden {
			t.Errorf("a member's GET %s: %d", p, a.status)
		}
	}
	page = mia.get("/orgs/default/my")
	if a := mia.post("/orgs/default/my/clients", tokenIn(page), "name", "mias-laptop"); !strings.Contains(a.body, "swe1.") || a.path != "/orgs/default/my/clients/mias-laptop" {
		t.Errorf("a member's own device: %d at %s", a.status, a.path)
	}
}

// TestForms shows that a form counts from a page of the platform, with its token, alone.
func TestForms(t *testing.T) {
	s := newSite(t)
	s.owner()
	b := s.browser().logIn("ada")
	token := tokenIn(b.get("/orgs/default/overview"))
	create := "/orgs/default/networking/gateways/new"
	if a := b.post(create, "", "name", "one"); a.status != http.StatusForbidden {
		t.Errorf("without a token: %d", a.status)
	}
	if a := b.post(create, strings.Repeat("A", len(token)), "name", "one"); a.status != http.StatusForbidden {
		t.Errorf("with another token: %d", a.status)
	}
	for _, h := range [][2]string{{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "https://evil.example"}} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.srv.URL+create, strings.NewReader("csrf="+token+"&name=one"))
		must(t, err)
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set(h[0], h[1])
		if a := b.send(r); a.status != http.StatusForbidden {
			t.Errorf("%s %s: %d", h[0], h[1], a.status)
		}
	}
	if a := b.post(create, token, "name", "one"); a.status != http.StatusOK {
		t.Errorf("with both: %d", a.status)
	}
	if a := b.post("/theme", token, "theme", "dark", "back", "https://evil.example/"); !strings.Contains(a.body, `data-theme="dark"`) || strings.Contains(a.path, "evil") {
		t.Errorf("the theme's way back: %s", a.path)
	}
	for _, to := range []string{"//evil.example", "https://evil.example", `/\evil.example`, "javascript:alert(1)", ""} {
		if got := local(to, "/"); got != "/" {
			t.Errorf("%q leads to %q", to, got)
		}
	}
	big := strings.Repeat("x", maxBody+1)
	if a := b.post(create, token, "name", big); a.status != http.StatusBadRequest {
		t.Errorf("a form that is too large: %d", a.status)
	}
}

// TestHeaders holds the headers of every sort of answer.
func TestHeaders(t *testing.T) {
	s := newSite(t)
	s.owner()
	b := s.browser().logIn("ada")
	for _, p := range []string{"/login", "/orgs/default/overview", "/orgs/default/networking/relays/none", s.web.assetURL("app.js"), "/nothing"} {
		h := b.get(p).header
		for k, want := range map[string]string{"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"} {
			if h.Get(k) != want {
				t.Errorf("%s: %s is %q", p, k, h.Get(k))
			}
		}
		csp := h.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
			if !strings.Contains(csp, want) {
				t.Errorf("%s: no %s in %q", p, want, csp)
			}
		}
		if strings.Contains(csp, "unsafe") || strings.Contains(csp, "*") {
			t.Errorf("%s: %q", p, csp)
		}
		if h.Get("Strict-Transport-Security") == "" {
			t.Errorf("%s: no HSTS over TLS", p)
		}
	}
	if c := b.get("/orgs/default/overview").header.Get("Cache-Control"); c != "no-store" {
		t.Errorf("a page may be kept: %q", c)
	}
	if c := b.get(s.web.assetURL("app.css")).header.Get("Cache-Control"); !strings.Contains(c, "immutable") {
		t.Errorf("a file may not be kept: %q", c)
	}
}

// TestDeployCommand shows a command to whoever issued it alone, again and again, until it expires.
func TestDeployCommand(t *testing.T) {
	s := newSite(t)
	ada := s.owner()
	s.person(ada, "adam", registry.DefaultOrg, people.Admin)
	b := s.browser().logIn("ada")
	token := tokenIn(b.get("/orgs/default/networking/relays/new"))
	first := b.post("/orgs/default/networking/relays/new", token, "name", "fra-1", "host", "203.0.113.7")
	command := regexp.MustCompile(`sudo relayd install --token-file - &lt;&lt;&lt; &#39;(swe1\.[A-Za-z0-9_-]+)&#39;`)
	m := command.FindStringSubmatch(first.body)
	if m == nil {
		t.Fatalf("no command at %s: %.2000s", first.path, first.body)
	}
	if _, err := control.ParseToken(m[1]); err != nil {
		t.Error(err)
	}
	if again := command.FindStringSubmatch(b.get(first.path).body); again == nil || again[1] != m[1] {
		t.Error("loading the page again shows another command, or none")
	}
	other := s.browser().logIn("adam")
	if strings.Contains(other.get(first.path).body, "swe1.") {
		t.Error("somebody else sees the command")
	}
	for _, c := range b.http.Jar.Cookies(mustURL(t, s.srv.URL+first.path)) {
		if strings.Contains(c.Value, m[1]) {
			t.Errorf("cookie %s has the token in clear", c.Name)
		}
		// The sealed command is worth nothing for another person's browser.
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.srv.URL+first.path, nil)
		must(t, err)
		if c.Name == deployCookie {
			r.AddCookie(c)
			if strings.Contains(other.send(r).body, "swe1.") {
				t.Error("the cookie shows the command to somebody else")
			}
		}
	}
	if a := b.post("/orgs/default/networking/relays/fra-1/token", token); !strings.Contains(a.body, "swe1.") || strings.Contains(a.body, m[1]) {
		t.Error("a new command is not another one")
	}
	now := s.reg.Now
	s.reg.Now = func() time.Time { return now().Add(61 * time.Minute) }
	if a := b.get(first.path); strings.Contains(a.body, "swe1.") || !strings.Contains(a.body, "expired") {
		t.Error("an expired command is still shown, or nothing says that it has expired")
	}
}

func mustURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	must(t, err)
	return u
}

// TestTextIsNoMarkup puts markup wherever users put text.
func TestTextIsNoMarkup(t *testing.T) {
	s := newSite(t)
	ada := s.owner()
	s.furnish(registry.DefaultOrg)
	const evil = `"><script>alert(1)</script><form method="post" action="https://evil.example">`
	name := evil
	_, err := s.svc.UpdateMe(t.Context(), ada, control.UpdateMe{Name: &name})
	must(t, err)
	n, err := s.reg.Node(t.Context(), registry.DefaultOrg, identity.Gateway, "office")
	must(t, err)
	enrol(t, s.reg, registry.DefaultOrg, identity.Gateway, "office")
	s.reg.Board.Put(n.ID, presence.Beat{At: time.Now(), Heartbeat: control.Heartbeat{State: "degraded", Version: evil, Problems: []string{evil}, Sessions: []control.SessionReport{{
		Peer: identity.Node{Org: registry.DefaultOrg, Kind: identity.Client, ID: evil}, Relay: evil + " udp",
	}}}})
	b := s.browser().logIn("ada")
	for _, p := range append(pagesOf, "policies?q="+url.QueryEscape(evil), "audit?q="+url.QueryEscape(evil), "networking/relays?q="+url.QueryEscape(evil)) {
		if a := b.get("/orgs/default/" + p); strings.Contains(a.body, "<script>alert") || strings.Contains(a.body, `action="https://evil`) {
			t.Errorf("%s has the markup", p)
		}
	}
	if a := b.get("/orgs/default/sessions"); !strings.Contains(a.body, "&lt;script&gt;") {
		t.Error("the text is not shown at all: the test looks in the wrong place")
	}
}

// enrol has a node look as if it had.
func enrol(t testing.TB, reg *registry.Registry, org string, kind identity.Kind, names ...string) {
	t.Helper()
	ctx := t.Context()
	must(t, reg.Store.Update(ctx, func(tx store.Tx) error {
		for _, name := range names {
			n, err := tx.FindNode(ctx, org, kind, name)
			if err != nil {
				return err
			}
			n.Enrolled, n.Enrolment = time.Now().Add(-time.Hour), 1
			if err := tx.UpdateNode(ctx, n); err != nil {
				return err
			}
		}
		return nil
	}))
}

// TestLive is told of a change, and of the end of one's session.
func TestLive(t *testing.T) {
	s := newSite(t)
	s.owner()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go s.web.watchers.run(ctx)
	b := s.browser().logIn("ada")
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.srv.URL+"/orgs/default/live", nil)
	must(t, err)
	resp, err := b.http.Do(r)
	must(t, err)
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "text/event-stream" {
		t.Fatalf("%d %s", resp.StatusCode, ct)
	}
	events := make(chan struct{}, 100)
	go func() {
		defer close(events)
		buf := make([]byte, 4096)
		for {
			n, err := resp.Body.Read(buf)
			for range strings.Count(string(buf[:n]), "event: change") {
				events <- struct{}{}
			}
			if err != nil {
				return
			}
		}
	}()
	wait := func(what string) {
		t.Helper()
		select {
		case _, ok := <-events:
			if !ok {
				t.Fatalf("%s: the stream ended", what)
			}
		case <-ctx.Done():
			t.Fatalf("%s: no event", what)
		}
	}
	wait("at once")
	// The first look takes the mark; what comes after it is a change.
	for range 2 {
		select {
		case <-time.After(watchInterval + watchInterval/2):
		case <-ctx.Done():
		}
		_, err := s.reg.CreateNode(ctx, registry.DefaultOrg, identity.Client, control.CreateNode{Name: fmt.Sprintf("c%d", time.Now().UnixNano())})
		must(t, err)
		wait("after a change")
	}
}

// TestAccountPage sets up a second factor, makes a token and logs out.
func TestAccountPage(t *testing.T) {
	s := newSite(t)
	s.owner()
	b := s.browser().logIn("ada")
	page := b.get("/account")
	token := tokenIn(page)
	if a := b.post("/account/factor", token, "password", "wrong wrong wrong"); a.status == http.StatusOK || strings.Contains(a.body, "otpauth") {
		t.Errorf("a second factor without the password: %d", a.status)
	}
	a := b.post("/account/factor", token, "password", password)
	if a.status != http.StatusOK || !strings.Contains(a.body, `class="qr"`) {
		t.Fatalf("no QR code: %d", a.status)
	}
	made := b.post("/account/token", token, "name", "script", "scopes", "*:read", "days", "3")
	secret := regexp.MustCompile(`<pre id="once"[^>]*>([^<]+)<`).FindStringSubmatch(made.body)
	if secret == nil {
		t.Fatalf("no token: %d", made.status)
	}
	if p, err := s.svc.Authenticate(t.Context(), secret[1], "192.0.2.1"); err != nil || p.May(registry.DefaultOrg, "relays", people.Write) || !p.May(registry.DefaultOrg, "relays", people.Read) {
		t.Errorf("the token: %v", err)
	}
	if strings.Contains(b.get("/account").body, secret[1]) {
		t.Error("the token is shown twice")
	}
	if a := b.post("/logout", token); a.path != "/login" {
		t.Errorf("after logging out: %s", a.path)
	}
	if a := b.get("/account"); !strings.HasPrefix(a.path, "/login") {
		t.Errorf("logged out, and still at %s", a.path)
	}
}

// TestCommandLine: a person finds the line that logs them in, with the pin of the platform's own CA where there is one.
func TestCommandLine(t *testing.T) {
	s := newSite(t)
	s.owner()
	b := s.browser().logIn("ada")
	for _, pin := range []string{"", strings.Repeat("5e", 32)} {
		s.reg.Pin = pin
		want := `<pre id="cli" tabindex="0">sallyway login --url https://platform.example</pre>`
		if pin != "" {
			want = strings.Replace(want, "</pre>", " --ca-pin "+pin+"</pre>", 1)
		}
		for _, path := range []string{"/account", "/orgs/default/my"} {
			if a := b.get(path); !strings.Contains(a.body, want) || !strings.Contains(a.body, `data-copy="cli"`) || !strings.Contains(a.body, "--device") {
				t.Errorf("%s with the pin %q has no line to log in: %d", path, pin, a.status)
			}
		}
	}
}

// TestHiddenWithoutSheet: what only a script or a narrow screen shows is hidden by the page itself, so that a reader without the style sheet does
// not come upon it.
func TestHiddenWithoutSheet(t *testing.T) {
	s := newSite(t)
	s.owner()
	body := s.browser().logIn("ada").get("/account").body
	for _, part := range []string{`<dialog id="shortcuts"`, `<div class="close"`, `<a class="ghost menu"`, `<button type="button" class="ghost hide-s" data-shortcuts`} {
		_, rest, found := strings.Cut(body, part)
		tag, _, _ := strings.Cut(rest, ">")
		if !found || !strings.HasSuffix(tag, " hidden") || strings.Contains(tag, " open") {
			t.Errorf("%s is not hidden: %q", part, tag)
		}
	}
}

// TestAuthentication edits how a relay enrols: by token, or by the AWS identity of its host.
func TestAuthentication(t *testing.T) {
	s := newSite(t)
	s.owner()
	s.furnish(registry.DefaultOrg)
	b := s.browser().logIn("ada")
	const relay = "/orgs/default/networking/relays/fra-1"
	token := tokenIn(b.get(relay))
	if a := b.post(relay+"/authentication", token, "authentication", "aws", "accounts", "123456789012"); a.status != http.StatusForbidden || !strings.Contains(a.body, "--aws-region") {
		t.Errorf("at a platform without AWS: %d, and no word on what to do", a.status)
	}
	aws, err := awsauth.New(awsauth.Config{Region: "eu-central-1"})
	must(t, err)
	s.reg.AWS = aws
	if a := b.post(relay+"/authentication", token, "authentication", "aws"); a.status != http.StatusUnprocessableEntity {
		t.Errorf("AWS without anybody who may: %d", a.status)
	}
	a := b.post(relay+"/authentication", token, "authentication", "aws", "principals", "arn:aws:iam::123456789012:role/relay-*", "accounts", "123456789012")
	if a.status != http.StatusOK || !strings.Contains(a.body, "arn:aws:iam::123456789012:role/relay-*") || !strings.Contains(a.body, "enrols by its AWS identity") {
		t.Errorf("AWS: %d", a.status)
	}
	n, err := s.reg.Node(t.Context(), registry.DefaultOrg, identity.Relay, "fra-1")
	must(t, err)
	if n.Authentication != control.AuthAWS || n.AWS == nil || len(n.AWS.Principals) != 1 || len(n.AWS.Accounts) != 1 {
		t.Errorf("kept as %+v %+v", n.Authentication, n.AWS)
	}
	if a := b.post(relay+"/token", token); strings.Contains(a.body, "swe1.") || !strings.Contains(a.body, "relayd install") {
		t.Errorf("its deploy command: %d, with a token: %v", a.status, strings.Contains(a.body, "swe1."))
	}
	b.post(relay+"/authentication", token, "authentication", "token")
	if a := b.post(relay+"/token", token); !strings.Contains(a.body, "swe1.") {
		t.Error("by token again, and no token in its command")
	}
}
