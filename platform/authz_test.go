package platform

import (
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// openAPI is the part of the document that tests look at.
type openAPI struct {
	OpenAPI string `json:"openapi"`
	Paths   map[string]map[string]struct {
		OperationID string                `json:"operationId"`
		Security    []map[string][]string `json:"security"`
		RequestBody *struct{}             `json:"requestBody"`
	} `json:"paths"`
}

func (l *lab) document() openAPI {
	l.t.Helper()
	resp, err := l.http.Get(l.srv.URL() + "/api/v1/openapi.json")
	must(l.t, err)
	defer resp.Body.Close()
	var doc openAPI
	must(l.t, json.NewDecoder(resp.Body).Decode(&doc))
	return doc
}

func (l *lab) apiToken(org string, scope store.Scope, life time.Duration) string {
	l.t.Helper()
	token, err := l.srv.Registry().CreateAPIToken(l.t.Context(), "test", org, scope, life)
	must(l.t, err)
	return token
}

// bodies are requests that would work, by the last words of a path, so that a refusal is one of rights and not of form.
func body(path string) any {
	switch {
	case strings.HasSuffix(path, "/orgs"):
		return control.CreateOrganization{Name: "third"}
	case strings.HasSuffix(path, "/relays"):
		return control.CreateNode{Name: "new", Host: "192.0.2.1"}
	case strings.HasSuffix(path, "/resources"):
		return control.CreateResource{Name: "new", Gateways: []string{"gw"}, Address: "10.0.0.1", ICMP: true}
	case strings.HasSuffix(path, "/policies"):
		return control.CreatePolicy{Subject: "client:laptop", Resource: "web"}
	case strings.HasSuffix(path, ":explain"):
		return control.ExplainRequest{Subject: "client:laptop", Resource: "web"}
	case strings.HasSuffix(path, "/resources/{name}/test"):
		return control.TestResource{}
	case strings.HasSuffix(path, "/credential"):
		return control.CreateTURNCredential{Client: "laptop"}
	case strings.HasSuffix(path, "/people"):
		return control.CreatePerson{Login: "new", Role: "member"}
	case strings.HasSuffix(path, "/service-accounts"):
		return control.CreateServiceAccount{Name: "new", Scopes: []string{"relays:read"}}
	case strings.HasSuffix(path, "/tokens"):
		return control.CreateAPIToken{Name: "new", Scopes: []string{"relays:read"}}
	case strings.HasSuffix(path, "/providers"):
		return control.CreateProvider{Name: "new", Issuer: "https://issuer.example", ClientID: "x"}
	case strings.HasSuffix(path, "{org}"):
		return map[string]any{"range": []string{"10.96.0.0/12"}}
	}
	return control.CreateNode{Name: "new"}
}

// TestEveryRouteKnowsItsOrganization walks all routes of the OpenAPI document with tokens that must not pass.
func TestEveryRouteKnowsItsOrganization(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	rival, reader, own := w.apiToken("rival", store.ScopeAdmin, 0), w.apiToken("", store.ScopeReadOnly, 0), w.apiToken("default", store.ScopeAdmin, 0)
	w.populatePeople()
	doc := w.document()
	if !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Errorf("OpenAPI %s", doc.OpenAPI)
	}
	routes := 0
	names := strings.NewReplacer("{org}", "default", "{name}", "laptop")
	before := w.auditDirect("default")
	for path, ops := range doc.Paths {
		for method, op := range ops {
			method = strings.ToUpper(method)
			if len(op.Security) > 0 && op.Security[0]["node"] != nil {
				if status, _ := w.do(w.admin.Token, method, path, struct{}{}, nil); status != 401 {
					t.Errorf("%s %s with an API token: %d", method, path, status)
				}
				continue
			}
			if len(op.Security) == 0 {
				if !slices.Contains([]string{"/api/v1/enroll", "/api/v1/enroll/aws", "/api/v1/enroll/aws/challenge", "/api/v1/node/token", "/api/v1/openapi.json", "/api/v1/auth/device", "/api/v1/auth/token"}, path) {
					t.Errorf("%s %s has no security", method, path)
				}
				continue
			}
			routes++
			if strings.HasPrefix(path, "/api/v1/me") {
				continue // whoever calls: see TestEveryRouteByRole
			}
			self := strings.HasPrefix(path, "/api/v1/orgs/{org}/my/") // of persons: no token of its own has any
			url := names.Replace(path)
			switch {
			case strings.Contains(path, "/relays/"):
				url = strings.Replace(path, "{name}", "relay-1", 1)
			case strings.Contains(path, "/gateways/"):
				url = strings.Replace(path, "{name}", "gw", 1)
			case strings.Contains(path, "/resources/"):
				url = strings.Replace(path, "{name}", "web", 1)
			case strings.Contains(path, "/policies/"):
				url = strings.Replace(path, "{name}", "client-laptop-web", 1)
			case strings.Contains(path, "/people/"):
				url = strings.Replace(path, "{name}", "ada", 1)
			case strings.Contains(path, "/service-accounts/"):
				url = strings.Replace(path, "{name}", "robot", 1)
			}
			url = names.Replace(url)
			var in any
			if op.RequestBody != nil {
				in = body(path)
				if method == "PATCH" && !strings.HasSuffix(path, "{org}") {
					in = struct{}{}
				}
			}
			status, p := w.do(rival, method, url, in, nil)
			switch {
			case path == "/api/v1/orgs" && method == "GET":
				var orgs control.List[control.Organization]
				w.do(rival, method, url, nil, &orgs)
				if len(orgs.Items) != 1 || orgs.Items[0].Name != "rival" {
					t.Errorf("another organization's list: %+v", orgs)
				}
			case strings.Contains(path, "{org}") && (status != 404 || p.Code != control.CodeNotFound):
				t.Errorf("%s %s with another organization's token: %d %+v", method, path, status, p)
			case !strings.Contains(path, "{org}") && (status != 403 || p.Code != control.CodeForbidden):
				t.Errorf("%s %s with an organization's token: %d %+v", method, path, status, p)
			}
			// The same object asked for under the caller's own organization does not exist there.
			if strings.Contains(path, "{name}") && strings.Contains(path, "{org}") {
				if status, _ := w.do(rival, method, strings.Replace(url, "/orgs/default/", "/orgs/rival/", 1), in, nil); status != 404 && !(status == 422 && strings.HasSuffix(path, "/drain")) && !(status == 403 && self) {
					t.Errorf("%s %s: %d for an object of another organization", method, path, status)
				}
			}
			if self {
				if status, p := w.do(reader, method, url, in, nil); status != 403 {
					t.Errorf("%s %s with a token: %d %+v", method, path, status, p)
				}
			} else if method != "GET" && !strings.HasSuffix(path, ":explain") {
				if status, p := w.do(reader, method, url, in, nil); status != 403 || p.Code != "read_only_token" {
					t.Errorf("%s %s with a read-only token: %d %+v", method, path, status, p)
				}
			} else if status, p := w.do(reader, method, url, in, nil); status != 200 && !strings.Contains(path, "/groups/") && !strings.Contains(path, "/webhooks/") && !strings.Contains(path, "/shared/") && !strings.Contains(path, "/providers/") {
				t.Errorf("%s %s with a read-only token: %d %+v", method, path, status, p)
			}
			for _, bad := range []string{"", "swt1.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"} {
				if status, _ := w.do(bad, method, url, in, nil); status != 401 && status != 429 {
					t.Errorf("%s %s with token %q: %d", method, path, bad, status)
				}
			}
		}
	}
	if routes < 90 {
		t.Errorf("%d routes walked", routes)
	}
	if status, p := w.do(own, "DELETE", "/api/v1/orgs/default", nil, nil); status != 403 {
		t.Errorf("an organization's own token deletes it: %d %+v", status, p)
	}
	for _, e := range w.auditDirect("default")[len(before):] {
		if e.Result == "ok" && e.Actor == "token:test" {
			t.Errorf("something was done: %+v", e)
		}
	}
	w.gateway.stream().settled()
}

func TestAPITokens(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	short := l.apiToken("", store.ScopeAdmin, time.Hour)
	if status, _ := l.do(short, "GET", "/api/v1/orgs", nil, nil); status != 200 {
		t.Errorf("fresh: %d", status)
	}
	c.advance(2 * time.Hour)
	if status, p := l.do(short, "GET", "/api/v1/orgs", nil, nil); status != 401 || p.Code != control.CodeTokenExpired {
		t.Errorf("expired: %d %+v", status, p)
	}
	// From the host, while the server runs.
	cred, err := Home{Data: l.cfg.Data}.AdminToken(t.Context(), TokenRequest{Name: "fresh", RevokeOthers: true})
	must(t, err)
	if cred.URL != l.srv.URL() || cred.Pin != l.srv.Pin() {
		t.Errorf("credential for %s, pin %s", cred.URL, cred.Pin)
	}
	if status, _ := l.do(cred.Token, "GET", "/api/v1/orgs", nil, nil); status != 200 {
		t.Errorf("token of the host: %d", status)
	}
	if status, p := l.do(l.admin.Token, "GET", "/api/v1/orgs", nil, nil); status != 401 || p.Code != control.CodeTokenUnknown {
		t.Errorf("revoked: %d %+v", status, p)
	}
	found := slices.ContainsFunc(l.auditDirect(identity.SharedOrg), func(e control.AuditEntry) bool {
		return e.Action == "api.login" && e.Result == "refused" && e.Detail["reason"] == control.CodeTokenExpired
	})
	if !found {
		t.Error("the refused login is not in the audit")
	}
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	web := control.CreateResource{Name: "x", Gateways: []string{"gw"}, Address: "10.0.0.1", TCP: []policy.PortRange{policy.AllPorts}}
	with := func(change func(*control.CreateResource)) control.CreateResource {
		c := web
		change(&c)
		return c
	}
	for _, tc := range []struct {
		path   string
		in     any
		status int
		says   string
	}{
		{"/clients", control.CreateNode{Name: "Laptop"}, 422, "DNS label"},
		{"/clients", control.CreateNode{Name: ""}, 422, "DNS label"},
		{"/clients", control.CreateNode{Name: "c-aaaaaaaaaaaa"}, 422, "looks like an id"},
		{"/clients", control.CreateNode{Name: "laptop"}, 409, "already has"},
		{"/clients", control.CreateNode{Name: "x", Host: "h"}, 422, "only relays"},
		{"/clients", map[string]any{"name": "x", "nme": 1}, 422, "nme"},
		{"/clients", map[string]any{"name": 7}, 422, "string"},
		{"/relays", control.CreateNode{Name: "x"}, 422, "relay host"},
		{"/relays", control.CreateNode{Name: "x", Host: "1.2.3"}, 422, "relay host"},
		{"/relays", control.CreateNode{Name: "x", Host: "a:5349"}, 422, "without port"},
		{"/relays", control.CreateNode{Name: "x", Host: "r.example", Peers: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:0")}}, 422, "configured peer"},
		{"/resources", with(func(c *control.CreateResource) { c.Address = "10.0.0.1/24" }), 422, "10.0.0.0/24"},
		{"/resources", with(func(c *control.CreateResource) { c.Address = "::ffff:10.0.0.0/104" }), 422, "IPv4 network"},
		{"/resources", with(func(c *control.CreateResource) { c.Address = "a b" }), 422, "host name"},
		{"/resources", with(func(c *control.CreateResource) { c.Address = "*" }), 422, "host name"},
		{"/resources", with(func(c *control.CreateResource) { c.TCP = nil }), 422, "allows nothing"},
		{"/resources", with(func(c *control.CreateResource) { c.Gateways = nil }), 422, "gateways"},
		{"/resources", with(func(c *control.CreateResource) { c.Gateways = []string{"nowhere"} }), 404, "no gateway"},
		{"/resources", with(func(c *control.CreateResource) { c.Domains = []string{"."} }), 422, "catch-all"},
		{"/resources", map[string]any{"name": "x", "gateways": []string{"gw"}, "address": "10.0.0.1", "tcp": []string{"99999"}}, 422, "99999"},
		{"/policies", control.CreatePolicy{Subject: "laptop", Resource: "web"}, 422, "names nobody"},
		{"/policies", control.CreatePolicy{Subject: "client:nobody", Resource: "web"}, 404, "no client"},
		{"/policies", control.CreatePolicy{Subject: "client:laptop", Resource: "web"}, 409, "already allows"},
		{"/policies", control.CreatePolicy{Subject: "person:ada@example.com", Resource: "web"}, 404, "sallyway --org default user create ada@example.com --role member"},
		{"/policies", control.CreatePolicy{Subject: "person:$(reboot)", Resource: "web"}, 404, "user create LOGIN --role member"},
		{"/groups", control.CreateGroup{Name: "g", Members: []string{"group:g"}}, 404, "no group"},
		{"/relays/relay-1/credential", control.CreateTURNCredential{Client: "laptop", TTL: 90_000}, 422, "90000"},
		{"/gateways/gw/drain", nil, 422, "only relays"},
	} {
		status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs/default"+tc.path, tc.in, nil)
		text := p.Detail + p.Remedy
		for _, e := range p.Errors {
			text += e.Message + e.Location
		}
		if status != tc.status || p.Code == "" || !strings.Contains(text, tc.says) {
			t.Errorf("%s %+v: %d %+v, want %d with %q", tc.path, tc.in, status, p, tc.status, tc.says)
		}
	}
	for _, name := range []string{"shared", "platform", "platform.shared", "-", strings.Repeat("a", 64)} {
		if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: name}, nil); status != 422 {
			t.Errorf("organization %q: %d %+v", name, status, p)
		}
	}
	for path, want := range map[string]int{"/status": 404, "/clients": 404, "/audit": 200, "/audit:verify": 200} {
		if status, p := w.do(w.admin.Token, "GET", "/api/v1/orgs/platform.shared"+path, nil, nil); status != want {
			t.Errorf("%s of the platform itself: %d %+v", path, status, p)
		}
	}
	if status, p := w.do(w.admin.Token, "GET", "/api/v1/nothing", nil, nil); status != 404 || p.Code != control.CodeNotFound {
		t.Errorf("%d %+v", status, p)
	}
	req, err := http.NewRequest("POST", w.srv.URL()+"/api/v1/enroll", io.LimitReader(zeros{}, 2<<20))
	must(t, err)
	resp, err := w.http.Do(req)
	must(t, err)
	defer resp.Body.Close()
	if resp.StatusCode/100 != 4 {
		t.Errorf("2 MiB: %d", resp.StatusCode)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func TestPages(t *testing.T) {
	t.Parallel()
	l := start(t)
	for _, n := range []string{"e", "b", "d", "a", "c"} {
		l.api("POST", "/clients", control.CreateNode{Name: n}, nil)
	}
	var got []string
	cursor, pages := "", 0
	for {
		var page control.List[control.NodeRecord]
		l.api("GET", "/clients?limit=2&cursor="+cursor, nil, &page)
		for _, n := range page.Items {
			got = append(got, n.Name)
		}
		pages++
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if strings.Join(got, "") != "abcde" || pages != 3 {
		t.Errorf("%v in %d pages", got, pages)
	}
	if status, p := l.do(l.admin.Token, "GET", "/api/v1/orgs/default/clients?cursor=%21%21", nil, nil); status != 422 {
		t.Errorf("bad cursor: %d %+v", status, p)
	}
	if status, p := l.do(l.admin.Token, "GET", "/api/v1/orgs/default/clients?limit=5000", nil, nil); status != 422 {
		t.Errorf("bad limit: %d %+v", status, p)
	}
}

func TestVirtualAddresses(t *testing.T) {
	t.Parallel()
	l := start(t)
	status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "small", Range: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24")}}, nil)
	if status != 201 {
		t.Fatalf("%+v", p)
	}
	seen := make(map[netip.Addr]string)
	take := func(name string, as []netip.Addr) {
		t.Helper()
		if len(as) != 2 || !as[0].Is4() || !as[1].Is6() || !netip.MustParsePrefix("10.99.0.0/24").Contains(as[0]) {
			t.Fatalf("%s has %v", name, as)
		}
		for _, a := range as {
			if other := seen[a]; other != "" {
				t.Fatalf("%v is of %s and %s", a, other, name)
			}
			seen[a] = name
		}
	}
	reg := l.srv.Registry()
	var first *control.CreatedNode
	for i := 0; ; i++ {
		n, err := reg.CreateNode(t.Context(), "small", identity.Client, control.CreateNode{Name: "c" + strings.Repeat("x", i%40) + string(rune('a'+i%26)) + string(rune('a'+i/26))})
		if err != nil {
			if i < 200 || registry.Code(err) != control.CodeConflict || !strings.Contains(err.Error(), "used up") {
				t.Fatalf("after %d nodes: %v", i, err)
			}
			break
		}
		if i == 0 {
			first = n
		}
		take(n.Name, n.Virtual)
	}
	must(t, reg.DeleteNode(t.Context(), "small", identity.Client, first.Name))
	n, err := reg.CreateNode(t.Context(), "small", identity.Client, control.CreateNode{Name: "again"})
	must(t, err)
	if n.Virtual[0] != first.Virtual[0] {
		t.Errorf("%v, want the free %v", n.Virtual, first.Virtual)
	}
	// Networks have none.
	w := populate(t, l)
	var r control.ResourceRecord
	l.api("POST", "/resources", control.CreateResource{Name: "net", Gateways: []string{"gw"}, Address: "10.0.0.0/8", ICMP: true}, &r)
	if len(r.Virtual) != 0 {
		t.Errorf("a network has %v", r.Virtual)
	}
	l.api("PATCH", "/resources/net", control.UpdateResource{Address: ptr("db.internal")}, &r)
	if len(r.Virtual) != 2 {
		t.Errorf("a host has %v", r.Virtual)
	}
	_ = w
}

func TestExplain(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	ask := func(req control.ExplainRequest) control.Explanation {
		t.Helper()
		var e control.Explanation
		w.api("POST", "/policies:explain", req, &e)
		return e
	}
	w.api("POST", "/clients", control.CreateNode{Name: "guest"}, nil)
	if e := ask(control.ExplainRequest{Subject: "client:laptop", Resource: "web"}); !e.Allowed || e.Rule != "client-laptop-web" || !slices.Equal(e.Gateways, []string{"gw"}) {
		t.Errorf("%+v", e)
	}
	for _, tc := range []struct {
		req     control.ExplainRequest
		allowed bool
		says    string
	}{
		{control.ExplainRequest{Subject: "client:laptop", Resource: "web", Proto: policy.TCP, Port: 80}, true, "allows"},
		{control.ExplainRequest{Subject: "client:laptop", Resource: "web", Proto: policy.ICMP}, true, "allows"},
		{control.ExplainRequest{Subject: "client:laptop", Resource: "web", Proto: policy.TCP, Port: 22}, false, "widen the resource"},
		{control.ExplainRequest{Subject: "client:laptop", Resource: "web", Proto: policy.UDP, Port: 80}, false, "does not include"},
		{control.ExplainRequest{Subject: "client:guest", Resource: "web"}, false, "sallyway policy allow --client guest --resource web"},
	} {
		if e := ask(tc.req); e.Allowed != tc.allowed || !strings.Contains(e.Reason+e.Remedy, tc.says) || (!e.Allowed && e.Rule != policy.DefaultDeny) {
			t.Errorf("%+v: %+v", tc.req, e)
		}
	}
	w.api("POST", "/clients/laptop/disable", nil, nil)
	if e := ask(control.ExplainRequest{Subject: "client:laptop", Resource: "web"}); e.Allowed || !strings.Contains(e.Remedy, "enable laptop") {
		t.Errorf("%+v", e)
	}
	w.api("POST", "/clients/laptop/enable", nil, nil)
	w.api("PATCH", "/resources/web", control.UpdateResource{Disabled: ptr(true)}, nil)
	if e := ask(control.ExplainRequest{Subject: "client:laptop", Resource: "web"}); e.Allowed || !strings.Contains(e.Remedy, "resource enable web") {
		t.Errorf("%+v", e)
	}
}

// TestSecretsAtRestAndInLogs looks for every secret that the platform handed out in what it wrote.
func TestSecretsAtRestAndInLogs(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	relay := w.relays[0].stream().wait("its keys", always)
	cl := w.client.stream().settled().last
	assertion := w.client.assertion(nil)
	w.client.exchange(assertion)
	bad := w.client.request()
	w.do("", "POST", "/api/v1/enroll", bad, nil)
	master, err := os.ReadFile(filepath.Join(w.cfg.Data, "master.key"))
	must(t, err)
	secrets := map[string]string{
		"API token": w.admin.Token, "enrolment token": w.client.token.String(), "enrolment secret": string(w.client.token.Secret),
		"access token": w.client.bearer, "TURN key": string(relay.Relay.Keys[0].Secret), "TURN password": cl.Dialling.Gateways[0].Relays[0].Password,
		"assertion": assertion, "private key in PEM": "PRIVATE KEY", "master key": strings.TrimSpace(string(master)),
	}
	w.stop()
	files, err := filepath.Glob(filepath.Join(w.cfg.Data, "platform.db*"))
	must(t, err)
	if len(files) == 0 {
		t.Fatal("no database")
	}
	for _, f := range files {
		st, err := os.Stat(f)
		must(t, err)
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f, st.Mode())
		}
		b, err := os.ReadFile(f)
		must(t, err)
		for what, s := range secrets {
			if strings.Contains(string(b), s) {
				t.Errorf("%s holds the %s in clear", filepath.Base(f), what)
			}
		}
		// PKCS #8 in DER of a P-256 key begins with its algorithm (RFC 5915 in RFC 5958).
		if strings.Contains(string(b), "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d\x30\x6b\x02\x01\x01\x04\x20") {
			t.Errorf("%s holds a private key in DER", filepath.Base(f))
		}
	}
	for what, s := range secrets {
		if strings.Contains(w.logs.String(), s) {
			t.Errorf("the log holds the %s", what)
		}
	}
	for _, f := range []string{"master.key", "admin.token"} {
		if st, err := os.Stat(filepath.Join(w.cfg.Data, f)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, st.Mode(), err)
		}
	}
	// Another master key opens nothing.
	must(t, os.WriteFile(filepath.Join(w.cfg.Data, "master.key"), []byte(strings.Repeat("ab", 32)+"\n"), 0o600))
	if srv, err := Open(t.Context(), w.cfg); err == nil {
		_ = srv.Close()
		t.Error("started with another master key")
	} else if !strings.Contains(err.Error(), "master key") {
		t.Errorf("another master key: %v", err)
	}
	must(t, os.Remove(filepath.Join(w.cfg.Data, "master.key")))
	if _, err := Open(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "put it back") {
		t.Errorf("without master key: %v", err)
	}
}
