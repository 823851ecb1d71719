package platform

import (
	"bytes"
	"encoding/json"
	"net/http"
	"testing"

	"sallyway/internal/control"
	"sallyway/platform/people"
)

// TestBrowserSessionsOnTheAPI: a session's cookie is taken where no token is, and what changes something comes from a page of the platform.
func TestBrowserSessionsOnTheAPI(t *testing.T) {
	t.Parallel()
	l := start(t)
	l.want(l.admin.Token, "POST", "/api/v1/orgs/default/people", control.CreatePerson{Login: "ada", Role: "owner", Password: goodPassword}, http.StatusCreated, nil)
	r, err := l.srv.People().LogIn(t.Context(), people.Login{Name: "ada", Password: goodPassword, Source: "192.0.2.1"})
	must(t, err)
	jar := newCookieJar()
	people.SetCookie(jar, r.Session)
	cookie := jar.session()
	token := r.Session.CSRF()
	in, err := json.Marshal(control.CreateNode{Name: "laptop"})
	must(t, err)
	for _, tc := range []struct {
		name, method, cookie string
		headers              map[string]string
		status               int
	}{
		{"reads", "GET", cookie, nil, 200},
		{"no session", "GET", "", nil, 401},
		{"another session", "GET", cookie + "x", nil, 401},
		{"no token of the session", "POST", cookie, nil, 403},
		{"another token", "POST", cookie, map[string]string{people.CSRFHeader: token + "x"}, 403},
		{"from another site", "POST", cookie, map[string]string{people.CSRFHeader: token, "Sec-Fetch-Site": "cross-site"}, 403},
		{"from a host of the same site", "POST", cookie, map[string]string{people.CSRFHeader: token, "Sec-Fetch-Site": "same-site"}, 403},
		{"of another origin", "POST", cookie, map[string]string{people.CSRFHeader: token, "Origin": "https://evil.example"}, 403},
		{"a bad API token beside it", "GET", cookie, map[string]string{"Authorization": "Bearer swt1.x"}, 401},
		{"from a page", "POST", cookie, map[string]string{people.CSRFHeader: token, "Sec-Fetch-Site": "same-origin", "Origin": l.srv.URL()}, 201},
	} {
		req, err := http.NewRequest(tc.method, l.srv.URL()+"/api/v1/orgs/default/clients", bytes.NewReader(in))
		must(t, err)
		if tc.cookie != "" {
			req.AddCookie(&http.Cookie{Name: "__Host-sallyway", Value: tc.cookie})
		}
		req.Header.Set("Content-Type", "application/json")
		for k, v := range tc.headers {
			req.Header.Set(k, v)
		}
		resp, err := l.http.Do(req)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != tc.status {
			t.Errorf("%s: %d, want %d", tc.name, resp.StatusCode, tc.status)
		}
	}
	var clients control.List[control.NodeRecord]
	l.want(l.admin.Token, "GET", "/api/v1/orgs/default/clients", nil, http.StatusOK, &clients)
	if len(clients.Items) != 1 {
		t.Errorf("%d clients", len(clients.Items))
	}
}
