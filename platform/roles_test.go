package platform

import (
	"net/http"
	"strings"
	"testing"

	"sallyway/internal/control"
	"sallyway/platform/people"
)

const goodPassword = "lamp orchid gravel tuesday"

// populatePeople makes people and service accounts: ada and robot in organization default, and of the platform.
func (l *lab) populatePeople() {
	l.t.Helper()
	l.want(l.admin.Token, "POST", "/api/v1/orgs/default/people", control.CreatePerson{Login: "ada", Role: "member", Password: goodPassword}, http.StatusCreated, nil)
	l.want(l.admin.Token, "POST", "/api/v1/people", control.CreatePerson{Login: "root1", Role: "owner", Password: goodPassword}, http.StatusCreated, nil)
	for _, prefix := range []string{"/api/v1", "/api/v1/orgs/default"} {
		l.want(l.admin.Token, "POST", prefix+"/service-accounts", control.CreateServiceAccount{Name: "robot", Scopes: []string{"relays:read"}}, http.StatusCreated, nil)
	}
}

// want makes a request that must answer status.
func (l *lab) want(token, method, path string, in any, status int, out any) {
	l.t.Helper()
	if got, p := l.do(token, method, path, in, out); got != status {
		l.t.Fatalf("%s %s: %d %+v, want %d", method, path, got, p, status)
	}
}

// person makes a person with a role and returns a token of theirs.
func (l *lab) person(org, login, role string) string {
	l.t.Helper()
	path := "/api/v1/orgs/" + org + "/people"
	if org == people.Platform {
		path = "/api/v1/people"
	}
	l.want(l.admin.Token, "POST", path, control.CreatePerson{Login: login, Role: role, Password: goodPassword}, http.StatusCreated, nil)
	return l.personToken(login)
}

func (l *lab) personToken(login string) string {
	l.t.Helper()
	svc := l.srv.People()
	r, err := svc.LogIn(l.t.Context(), people.Login{Name: login, Password: goodPassword, Source: "192.0.2.1"})
	must(l.t, err)
	w := newCookieJar()
	people.SetCookie(w, r.Session)
	p, err := svc.FromCookie(l.t.Context(), w.session())
	must(l.t, err)
	token, err := svc.CreateMyToken(l.t.Context(), p, control.CreateAPIToken{Name: "test"})
	must(l.t, err)
	return token.Token
}

// cookieJar is a http.ResponseWriter for cookies alone.
type cookieJar struct{ h http.Header }

func newCookieJar() cookieJar                   { return cookieJar{http.Header{}} }
func (c cookieJar) Header() http.Header         { return c.h }
func (c cookieJar) Write(b []byte) (int, error) { return len(b), nil }
func (c cookieJar) WriteHeader(int)             {}
func (c cookieJar) session() string {
	for _, k := range (&http.Response{Header: c.h}).Cookies() {
		if k.Name == "__Host-sallyway" {
			return k.Value
		}
	}
	return ""
}

// TestEveryRouteByRole walks all routes of the OpenAPI document as a person of each role: of the organization, of another one, and of the
// platform. A request that passes the check of rights may fail after it, for its object or body; the check itself answers 403 or 404.
func TestEveryRouteByRole(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	w.want(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, http.StatusCreated, nil)
	w.populatePeople()
	tokens := map[string]string{}
	for _, role := range people.Roles {
		tokens[string(role)] = w.person("default", "the-"+string(role), string(role))
	}
	tokens["rival owner"] = w.person("rival", "rival-owner", "owner")
	tokens["platform auditor"] = w.person(people.Platform, "platform-auditor", "auditor")
	tokens["nobody"] = w.person("default", "soon-nobody", "member")
	w.want(w.admin.Token, "POST", "/api/v1/orgs/rival/people", control.CreatePerson{Login: "soon-nobody", Role: "member"}, http.StatusCreated, nil)

	names := strings.NewReplacer("{org}", "default", "{name}", "no-such-object", "{id}", "x-aaaaaaaaaaaa")
	checked := 0
	for path, ops := range w.document().Paths {
		for method, op := range ops {
			method = strings.ToUpper(method)
			if len(op.Security) == 0 || op.Security[0]["node"] != nil {
				continue
			}
			var (
				reading = method == "GET" || strings.HasSuffix(path, ":explain")
				inOrg   = strings.Contains(path, "{org}")
				own     = strings.HasPrefix(path, "/api/v1/me") || path == "/api/v1/orgs" && reading
				self    = strings.HasPrefix(path, "/api/v1/orgs/{org}/my/")
				people  = strings.Contains(path, "/people") || strings.Contains(path, "/providers")
				root    = (path == "/api/v1/orgs/{org}" || path == "/api/v1/orgs/{org}/licence") && method == "DELETE"
			)
			if path == "/api/v1/me/logout" {
				continue // it would end the token; see TestDeviceLogin
			}
			// may says who the check lets pass.
			may := map[string]bool{
				"owner":            own || inOrg && !root,
				"admin":            own || inOrg && !root && (reading || !people),
				"auditor":          own || inOrg && (reading || self),
				"member":           own || self,
				"nobody":           own || self,
				"rival owner":      own,
				"platform auditor": own || reading || self,
			}
			var in any
			if op.RequestBody != nil {
				in = map[string]any{"no such": "field"} // fails after the check of rights
			}
			for who, token := range tokens {
				status, p := w.do(token, method, names.Replace(path), in, nil)
				checked++
				passed := status != http.StatusForbidden && (status != http.StatusNotFound || !strings.Contains(p.Detail, "no organization"))
				if status == http.StatusUnauthorized || status == http.StatusTooManyRequests || status >= 500 {
					t.Fatalf("%s %s as %s: %d %+v", method, path, who, status, p)
				}
				if passed != may[who] {
					t.Errorf("%s %s as %s: %d %+v, want passed=%v", method, path, who, status, p, may[who])
				}
				if who == "rival owner" && inOrg && status != http.StatusNotFound {
					t.Errorf("%s %s as %s: %d, the organization shows", method, path, who, status)
				}
			}
		}
	}
	if checked < 600 {
		t.Errorf("%d requests", checked)
	}
}
