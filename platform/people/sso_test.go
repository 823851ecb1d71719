package people

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// glewlwyd is Debian's OpenID Connect provider, run by the test: https://packages.debian.org/bookworm/glewlwyd
type glewlwyd struct {
	t     *testing.T
	url   string
	admin *http.Client
}

const (
	glewlwydBinary = "glewlwyd"
	glewlwydSchema = "/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3"
)

func newGlewlwyd(t *testing.T) *glewlwyd {
	t.Helper()
	schema, err := os.ReadFile(glewlwydSchema)
	if _, missing := exec.LookPath(glewlwydBinary); missing != nil || err != nil {
		t.Skip("glewlwyd is not installed: build/prerequisites.sh")
	}
	dir := t.TempDir()
	db, err := sql.Open("sqlite", filepath.Join(dir, "g.db"))
	must(t, err)
	// Users have groups, several of them.
	text := strings.Replace(string(schema), `"data-format":{`, `"data-format":{"groups":{"multiple":true,"read":true,"write":true},"verified":{"multiple":false,"read":true,"write":true},`, 1)
	_, err = db.ExecContext(t.Context(), text)
	must(t, err)
	must(t, db.Close())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	must(t, l.Close())
	g := &glewlwyd{t: t, url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	conf := filepath.Join(dir, "g.conf")
	must(t, os.WriteFile(conf, fmt.Appendf(nil, `
port=%d
bind_address="127.0.0.1"
external_url="%s"
login_url="login.html"
api_prefix="api"
log_mode="console"
log_level="INFO"
cookie_secure=0
session_key="SESSION"
admin_scope="g_admin"
profile_scope="g_profile"
user_module_path="/usr/lib/glewlwyd/user"
client_module_path="/usr/lib/glewlwyd/client"
user_auth_scheme_module_path="/usr/lib/glewlwyd/scheme"
plugin_module_path="/usr/lib/glewlwyd/plugin"
hash_algorithm="SHA512"
database = { type = "sqlite3"; path = "%s"; };
`, port, g.url, filepath.Join(dir, "g.db")), 0o600))
	var log bytes.Buffer
	cmd := exec.Command(glewlwydBinary, "--config-file="+conf)
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Logf("log of glewlwyd:\n%s", log.String())
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; {
		resp, err := http.Get(g.url + "/config")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("glewlwyd does not answer: %v", err)
		}
		time.Sleep(20 * time.Millisecond) // between looks
	}
	g.admin = browserOf(t)
	g.send(g.admin, "POST", "/api/auth/", map[string]any{"username": "admin", "password": "password"})
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	must(t, err)
	g.send(g.admin, "POST", "/api/mod/plugin/", map[string]any{"module": "oidc", "name": "oidc", "display_name": "OIDC", "parameters": map[string]any{
		"iss": g.issuer(), "jwt-type": "rsa", "jwt-key-size": "256",
		"key":                   string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		"cert":                  string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})),
		"access-token-duration": 3600, "refresh-token-duration": 3600, "code-duration": 600, "refresh-token-rolling": true, "allow-non-oidc": false,
		"auth-type-code-enabled": true, "auth-type-token-enabled": false, "auth-type-id-token-enabled": false, "auth-type-none-enabled": false,
		"auth-type-password-enabled": false, "auth-type-client-enabled": false, "auth-type-device-enabled": false, "auth-type-refresh-enabled": false,
		"subject-type": "public", "pkce-allowed": true, "pkce-method-plain-allowed": false, "pkce-required": true, "jwks-show": true,
		"name-claim": "mandatory", "email-claim": "mandatory",
		"claims": []any{
			map[string]any{"name": "email_verified", "user-property": "verified", "type": "boolean", "boolean-value-true": "yes", "boolean-value-false": "no", "mandatory": true},
			map[string]any{"name": "groups", "user-property": "groups", "type": "string", "mandatory": true},
		},
	}})
	return g
}

func (g *glewlwyd) issuer() string { return g.url + "/api/oidc" }

// browserOf keeps cookies and follows nothing.
func browserOf(t *testing.T) *http.Client {
	t.Helper()
	jar, err := cookiejar.New(nil)
	must(t, err)
	return &http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (g *glewlwyd) send(c *http.Client, method, path string, in any) {
	g.t.Helper()
	b, err := json.Marshal(in)
	must(g.t, err)
	req, err := http.NewRequest(method, g.url+path, bytes.NewReader(b))
	must(g.t, err)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	must(g.t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(resp.Body)
		g.t.Fatalf("glewlwyd: %s %s: %d %s", method, path, resp.StatusCode, text)
	}
}

// register makes the platform a client.
func (g *glewlwyd) register(id string, redirect ...string) {
	g.t.Helper()
	g.send(g.admin, "POST", "/api/client/", map[string]any{
		"client_id": id, "name": id, "password": id + "-secret", "confidential": true, "enabled": true, "redirect_uri": redirect, "authorization_type": []string{"code"},
		"scope": []string{}, "token_endpoint_auth_method": []string{"client_secret_basic"},
	})
}

// user makes a user of the provider.
func (g *glewlwyd) user(name, email string, verified bool, groups ...string) {
	g.t.Helper()
	word := "no"
	if verified {
		word = "yes"
	}
	u := map[string]any{"username": name, "name": strings.ToUpper(name), "email": email, "password": name + " password", "enabled": true, "scope": []string{"g_profile", "openid"}, "verified": word}
	if len(groups) > 0 {
		u["groups"] = groups
	}
	g.send(g.admin, "POST", "/api/user/", u)
}

func (g *glewlwyd) regroup(name string, groups ...string) {
	g.t.Helper()
	g.send(g.admin, "PUT", "/api/user/"+name, map[string]any{"name": strings.ToUpper(name), "email": name + "@example.com", "enabled": true, "scope": []string{"g_profile", "openid"}, "verified": "yes", "groups": groups})
}

// consent logs a user in at the provider, lets client have the scope, and follows to: what the provider sends the browser back with.
func (g *glewlwyd) consent(name, client, to string) url.Values {
	g.t.Helper()
	b := browserOf(g.t)
	g.send(b, "POST", "/api/auth/", map[string]any{"username": name, "password": name + " password"})
	g.send(b, "PUT", "/api/auth/grant/"+client+"/", map[string]any{"scope": "openid"})
	resp, err := b.Get(to + "&g_continue")
	must(g.t, err)
	resp.Body.Close()
	u, err := url.Parse(resp.Header.Get("Location"))
	must(g.t, err)
	if resp.StatusCode != http.StatusFound || !strings.HasPrefix(u.String(), "https://platform.example"+CallbackPath) {
		g.t.Fatalf("the provider answers %d to %s", resp.StatusCode, u)
	}
	return u.Query()
}

// TestSingleSignOn runs against a real provider.
func TestSingleSignOn(t *testing.T) {
	g := newGlewlwyd(t)
	l := newLab(t)
	l.mu.Lock()
	l.now = time.Now() // the provider has the real clock
	l.mu.Unlock()
	ctx := t.Context()
	rules := control.ProviderRules{
		Scopes: []string{}, Mapping: []control.GroupToRole{{Group: "netops", Role: "admin"}, {Group: "staff", Role: "member"}}, Create: true, LinkByEmail: true,
	}
	req := control.CreateProvider{Name: "corp", Issuer: g.issuer(), ClientID: "sallyway", Secret: "sallyway-secret", ProviderRules: rules}

	// Who may set it up, and where it may be.
	owner := l.person("acme", "owner", Owner)
	admin := l.person("acme", "admin", Admin)
	_, err := l.svc.CreateProvider(ctx, admin, "acme", req)
	code(t, err, CodeReadOnly)
	_, err = l.svc.CreateProvider(ctx, owner, "acme", req) // a private address, by somebody who is not the platform's
	code(t, err, CodeProvider)
	bad := req
	bad.Issuer = g.url + "/api"
	_, err = l.svc.CreateProvider(ctx, root, "acme", bad)
	code(t, err, CodeProvider)
	p, err := l.svc.CreateProvider(ctx, root, "acme", req)
	must(t, err)
	other := req
	other.Name, other.ClientID, other.Secret = "other", "sallyway2", "sallyway2-secret"
	p2, err := l.svc.CreateProvider(ctx, root, "acme", other)
	must(t, err)
	g.register("sallyway", p.Redirect)
	g.register("sallyway2", p2.Redirect)
	must(t, l.reg.Store.View(ctx, func(tx store.Tx) error {
		v, err := tx.Provider(ctx, p.ID)
		if err != nil || bytes.Contains(v.Secret, []byte("sallyway-secret")) {
			t.Errorf("the secret is not sealed: %v", err)
		}
		return nil
	}))

	login := func(user string) (*Principal, error) {
		t.Helper()
		to, browser, err := l.svc.Begin(ctx, p.ID, "/orgs/acme")
		must(t, err)
		s, back, err := l.svc.Finish(ctx, p.ID, g.consent(user, "sallyway", to), browser, "192.0.2.1", "test")
		if err != nil {
			return nil, err
		}
		if back != "/orgs/acme" || s.Provider != "corp" {
			t.Errorf("back to %q, %+v", back, s)
		}
		who, err := l.svc.FromCookie(ctx, s.secret)
		must(t, err)
		return who, nil
	}

	// A new user gets the role of the first rule that fits, and only if one does.
	g.user("ada", "ada@example.com", true, "staff", "netops")
	ada, err := login("ada")
	must(t, err)
	if ada.Name != "ada@example.com" || ada.Display != "ADA" || ada.RoleIn("acme") != Admin || ada.Sees("rival") {
		t.Errorf("%+v", ada)
	}
	g.user("guest", "guest@example.com", true, "visitors")
	_, err = login("guest")
	code(t, err, CodeNoAccount)

	// The same person at the next login, with what the groups say now.
	g.regroup("ada", "staff")
	again, err := login("ada")
	must(t, err)
	if again.ID != ada.ID || again.RoleIn("acme") != Member {
		t.Errorf("%+v", again)
	}
	laptop := l.client(again, "acme", "laptop")
	g.regroup("ada", "visitors")
	again, err = login("ada")
	must(t, err)
	if again.RoleIn("acme") != "" || again.Sees("acme") {
		t.Errorf("%+v", again)
	}
	if n := l.row(laptop.ID); n.Status != store.Revoked {
		t.Errorf("the node of somebody without a role is %s", n.Status)
	}

	// An account is linked by its login, and only when the provider vouches for the address; a profile's address links nothing.
	l.person("acme", "bob@example.com", Auditor)
	g.user("bob", "bob@example.com", false, "staff")
	_, err = login("bob")
	code(t, err, CodeUnverified)
	g.user("bob2", "bob@example.com", true, "netops")
	bob, err := login("bob2")
	must(t, err)
	if bob.Name != "bob@example.com" || bob.RoleIn("acme") != Admin {
		t.Errorf("%+v", bob)
	}
	eve := l.person("acme", "eve", Member)
	address := "victim@example.com"
	_, err = l.svc.UpdateMe(ctx, eve, control.UpdateMe{Email: &address})
	must(t, err)
	g.user("victim", address, true, "staff")
	victim, err := login("victim")
	must(t, err)
	if victim.ID == eve.ID {
		t.Error("an address that somebody gave themselves took an identity over")
	}
	// An account at home elsewhere is not this provider's.
	l.person("rival", "carl@example.com", Owner)
	g.user("carl", "carl@example.com", true, "staff")
	_, err = login("carl")
	code(t, err, control.CodeConflict)
	// Without a verified address the account is the provider's word alone.
	g.user("dora", "dora@example.com", false, "staff")
	dora, err := login("dora")
	must(t, err)
	if !strings.HasPrefix(dora.Name, "corp-") {
		t.Errorf("%+v", dora)
	}
	// Disabled is disabled.
	yes := true
	_, err = l.svc.UpdatePerson(ctx, root, "acme", dora.Name, control.UpdatePerson{Disabled: &yes})
	must(t, err)
	_, err = login("dora")
	code(t, err, CodeNoAccount)

	t.Run("answers that are not of this login", func(t *testing.T) {
		begin := func() (to, browser string) {
			to, browser, err := l.svc.Begin(ctx, p.ID, "/")
			must(t, err)
			return to, browser
		}
		finish := func(id string, q url.Values, browser string) error {
			_, _, err := l.svc.Finish(ctx, id, q, browser, "192.0.2.1", "test")
			return err
		}
		to, browser := begin()
		q := g.consent("victim", "sallyway", to)
		for name, wrong := range map[string]url.Values{
			"no state":      {"code": q["code"]},
			"another state": {"code": q["code"], "state": {secret()}},
		} {
			if err := finish(p.ID, wrong, browser); registry.Code(err) != CodeBadAnswer {
				t.Errorf("%s: %v", name, err)
			}
		}
		code(t, finish(p.ID, q, secret()), CodeBadAnswer) // another browser; the state is spent
		code(t, finish(p.ID, q, browser), CodeBadAnswer)

		// An answer at another provider's redirect URI.
		to, browser = begin()
		q = g.consent("victim", "sallyway", to)
		code(t, finish(p2.ID, q, browser), CodeBadAnswer)
		// The code of one login with the state of another: the provider holds it against the verifier.
		to, _ = begin()
		stolen := g.consent("victim", "sallyway", to)
		to, browser = begin()
		q = g.consent("ada", "sallyway", to)
		q["code"] = stolen["code"]
		code(t, finish(p.ID, q, browser), CodeProvider)
		// Another issuer's name in the answer.
		to, browser = begin()
		q = g.consent("victim", "sallyway", to)
		q.Set("iss", "https://evil.example")
		code(t, finish(p.ID, q, browser), CodeBadAnswer)
		// The provider says no.
		_, browser = begin()
		code(t, finish(p.ID, url.Values{"error": {"access_denied"}, "state": {"x"}}, browser), CodeBadAnswer)
		// A code works once: of several answers at once one logs in.
		to, browser = begin()
		q = g.consent("victim", "sallyway", to)
		errs := atOnce(4, func(int) error { return finish(p.ID, q, browser) })
		if n := succeeded(errs); n != 1 {
			t.Errorf("%d logins: %v", n, errs)
		}
		// Too late.
		to, browser = begin()
		q = g.consent("victim", "sallyway", to)
		l.advance(ssoLife + time.Second)
		code(t, finish(p.ID, q, browser), CodeBadAnswer)
		l.advance(-ssoLife - time.Second)
		if !l.audited("acme", "person.login", "refused") {
			t.Error("not in the audit")
		}
	})

	t.Run("through the browser's paths", func(t *testing.T) {
		mux := http.NewServeMux()
		l.svc.SSORoutes(mux, func(*http.Request) string { return "192.0.2.1" }, func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, registry.Code(err), http.StatusForbidden)
		})
		get := func(path string, cookies ...*http.Cookie) *http.Response {
			r := httptest.NewRequest("GET", "https://platform.example"+path, nil)
			for _, c := range cookies {
				r.AddCookie(c)
			}
			w := httptest.NewRecorder()
			mux.ServeHTTP(w, r)
			return w.Result()
		}
		old := l.session("eve")
		resp := get(StartPath + p.ID + "?return=" + url.QueryEscape("//evil.example/"))
		if resp.StatusCode != http.StatusSeeOther || len(resp.Cookies()) != 1 || !strings.HasPrefix(resp.Cookies()[0].Name, "__Host-") {
			t.Fatalf("%+v", resp)
		}
		q := g.consent("victim", "sallyway", resp.Header.Get("Location"))
		done := get(CallbackPath+p.ID+"?"+q.Encode(), resp.Cookies()[0], &http.Cookie{Name: sessionCookie, Value: old.Session.secret})
		if done.StatusCode != http.StatusSeeOther || done.Header.Get("Location") != "/" {
			t.Errorf("%d to %q", done.StatusCode, done.Header.Get("Location"))
		}
		// The session is a new one, and the one from before is over: a fixed session is worth nothing.
		fresh := ""
		for _, c := range done.Cookies() {
			if c.Name == sessionCookie {
				fresh = c.Value
			}
		}
		if who, err := l.svc.FromCookie(ctx, fresh); err != nil || who.ID != victim.ID || fresh == old.Session.secret {
			t.Errorf("%+v %v", who, err)
		}
		_, err := l.svc.FromCookie(ctx, old.Session.secret)
		code(t, err, CodeNoSession)
		if again := get(CallbackPath+p.ID+"?"+q.Encode(), resp.Cookies()[0]); again.StatusCode != http.StatusForbidden {
			t.Errorf("the same answer twice: %d", again.StatusCode)
		}
	})

	// Off is off.
	_, err = l.svc.UpdateProvider(ctx, root, "acme", "corp", control.UpdateProvider{Disabled: &yes})
	must(t, err)
	_, _, err = l.svc.Begin(ctx, p.ID, "/")
	code(t, err, control.CodeNotFound)
}

// TestProviderRules: rules hand out no more than who writes them has, and the last owner outlives them.
func TestProviderRules(t *testing.T) {
	l := newLab(t)
	owner := l.person("acme", "owner", Owner)
	for _, tc := range []struct {
		by   *Principal
		org  string
		r    control.ProviderRules
		want string // code, "" is taken
	}{
		{owner, "acme", control.ProviderRules{Mapping: []control.GroupToRole{{Group: "a", Role: "owner"}}}, ""},
		{owner, "acme", control.ProviderRules{Mapping: []control.GroupToRole{{Group: "a", Role: "owner", Org: "rival"}}}, control.CodeInvalid},
		{owner, "acme", control.ProviderRules{Mapping: []control.GroupToRole{{Group: "a", Role: "king"}}}, control.CodeInvalid},
		{owner, "acme", control.ProviderRules{Mapping: []control.GroupToRole{{Role: "member"}}}, control.CodeInvalid},
		{owner, "acme", control.ProviderRules{Create: true}, control.CodeInvalid},
		{owner, Platform, control.ProviderRules{Mapping: []control.GroupToRole{{Group: "a", Role: "member"}}}, control.CodeForbidden},
		{root, Platform, control.ProviderRules{Mapping: []control.GroupToRole{{Group: "a", Role: "member", Org: "acme"}, {Group: "*", Role: "auditor"}}}, ""},
	} {
		if err := checkRules(tc.by, tc.org, &tc.r); registry.Code(err) != tc.want || (err == nil) != (tc.want == "") {
			t.Errorf("%s in %s: %+v: %v, want %q", tc.by.Name, tc.org, tc.r, err, tc.want)
		}
	}
	for issuer, ok := range map[string]bool{
		"https://id.example.com": true, "https://id.example.com/realms/x": true, "http://127.0.0.1:5556/dex": true, "http://id.example.com": false, "ftp://id.example.com": false,
		"https://user@id.example.com": false, "https://id.example.com/?x": false, "": false, "id.example.com": false, "https://": false,
	} {
		if err := checkIssuer(issuer); (err == nil) != ok {
			t.Errorf("%q: %v", issuer, err)
		}
	}
	for path, want := range map[string]string{"/orgs/acme?x=1": "/orgs/acme?x=1", "//evil.example": "/", "https://evil.example": "/", `/\evil.example`: "/", "": "/", "x": "/"} {
		if got := returnPath(path); got != want {
			t.Errorf("%q leads to %q", path, got)
		}
	}
}

// TestProvidersOfOrganizationsArePublic: the platform is no way into its own network.
func TestProvidersOfOrganizationsArePublic(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	// By name, too: the address counts that was resolved.
	for _, u := range []string{s.URL, strings.Replace(s.URL, "127.0.0.1", "localhost", 1)} {
		resp, err := providerClient(false).Get(u)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s was dialled", u)
		}
	}
	resp, err := providerClient(true).Get(s.URL)
	must(t, err)
	resp.Body.Close()
	redirecting := httptest.NewServer(http.RedirectHandler(s.URL, http.StatusFound))
	defer redirecting.Close()
	resp, err = providerClient(true).Get(redirecting.URL)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusFound {
		t.Errorf("a redirect was followed: %d", resp.StatusCode)
	}
}
