package platform

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
)

// audit reads the whole audit of an organization by pages.
func (l *lab) audit(org string) []control.AuditEntry {
	l.t.Helper()
	var out []control.AuditEntry
	for cursor := ""; ; {
		var page control.List[control.AuditEntry]
		l.inOrg(org, "GET", "/audit?limit=7&cursor="+cursor, nil, &page)
		out = append(out, page.Items...)
		if cursor = page.NextCursor; cursor == "" {
			return out
		}
	}
}

// audited looks for an entry with an action, object and reason ("" is success).
func (l *lab) audited(org, action, object, reason string) bool {
	l.t.Helper()
	return slices.ContainsFunc(l.audit(org), func(e control.AuditEntry) bool {
		if e.Action != action || e.Object != object {
			return false
		}
		if reason == "" {
			return e.Result == "ok"
		}
		return e.Result == "refused" && e.Detail["reason"] == reason
	})
}

// clock is a clock that tests turn.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

func TestTokenIsSpentOnce(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop")
	const tries = 100
	var good, used, limited atomic.Int32
	var wg sync.WaitGroup
	for range tries {
		m := &node{l: l, id: n.id, name: n.name, token: n.token}
		key, err := identity.NewKey()
		must(t, err)
		m.key = key
		req := m.request()
		wg.Add(1)
		go func() {
			defer wg.Done()
			switch status, p := l.do("", "POST", "/api/v1/enroll", req, nil); {
			case status == 200:
				good.Add(1)
			case p.Code == control.CodeTokenUsed:
				used.Add(1)
			case p.Code == control.CodeRateLimited:
				limited.Add(1)
			default:
				t.Errorf("%d %+v", status, p)
			}
		}()
	}
	wg.Wait()
	if good.Load() != 1 || good.Load()+used.Load()+limited.Load() != tries {
		t.Errorf("%d enrolled, %d refused as used, %d limited", good.Load(), used.Load(), limited.Load())
	}
}

func TestEnrolmentRefusals(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	for _, tc := range []struct {
		code    string
		prepare func(n *node) control.EnrolRequest
	}{
		{control.CodeTokenUsed, func(n *node) control.EnrolRequest { n.join(); return n.request() }},
		{control.CodeTokenUnknown, func(n *node) control.EnrolRequest { n.token.Secret[0] ^= 1; return n.request() }},
		{control.CodeTokenUnknown, func(n *node) control.EnrolRequest { // a newer one replaced it
			l.api("POST", "/clients/"+n.name+"/token", nil, nil)
			return n.request()
		}},
		{control.CodeNodeDisabled, func(n *node) control.EnrolRequest {
			l.api("POST", "/clients/"+n.name+"/disable", nil, nil)
			return n.request()
		}},
		{control.CodeNodeRevoked, func(n *node) control.EnrolRequest {
			l.api("POST", "/clients/"+n.name+"/revoke", nil, nil)
			return n.request()
		}},
		{registry.CodeWrongKind, func(n *node) control.EnrolRequest { n.id.Kind = identity.Gateway; return n.request() }},
		{registry.CodeWrongNode, func(n *node) control.EnrolRequest { n.id.ID = "c-aaaaaaaaaaaa"; return n.request() }},
		{registry.CodeBadRequest, func(n *node) control.EnrolRequest { // a request for another identity than the token's
			req := n.request()
			n.id.ID = "c-aaaaaaaaaaaa"
			req.CSR = n.request().CSR
			return req
		}},
		{registry.CodeKeyInUse, func(n *node) control.EnrolRequest {
			other := l.create(identity.Client, n.name+"-other").join()
			n.key = other.key
			return n.request()
		}},
		{control.CodeTokenExpired, func(n *node) control.EnrolRequest { c.advance(control.TokenLife + time.Second); return n.request() }},
	} {
		name := strings.ReplaceAll(tc.code, "_", "-") + fmt.Sprint(c.ahead.Load()%7)
		n := l.create(identity.Client, strings.ToLower(name)+identity.NewID("x")[2:6])
		req := tc.prepare(n)
		status, p := l.do("", "POST", "/api/v1/enroll", req, nil)
		if p.Code != tc.code || status/100 != 4 || p.Detail == "" || p.Remedy == "" {
			t.Errorf("%s: %d %+v", tc.code, status, p)
		}
		if !l.audited("default", "node.enrol", req.Node.String(), tc.code) {
			t.Errorf("%s: the refusal is not in the audit", tc.code)
		}
		if strings.Contains(p.Detail, string(n.token.Secret)) {
			t.Errorf("%s: the answer repeats the secret", tc.code)
		}
	}
}

func TestEnrolmentGivesCertificates(t *testing.T) {
	t.Parallel()
	l := start(t)
	g := l.create(identity.Gateway, "gw").join()
	if g.enrol.Node != g.id || g.enrol.Name != "gw" {
		t.Errorf("answer %+v", g.enrol)
	}
	for _, tc := range []struct {
		kind  identity.Kind
		chain string
		usage string
	}{{identity.Gateway, g.enrol.Certificates.Leaf, "server"}, {identity.Site, g.enrol.Certificates.Site, "client"}} {
		chain, err := identity.DecodeCertificates([]byte(tc.chain))
		must(t, err)
		usage := map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}
		for role, u := range usage {
			who, err := g.trust(tc.kind).Verify(chain, u)
			if (err == nil) != (role == tc.usage) {
				t.Errorf("%s as %s: %v", tc.kind, role, err)
			}
			if err == nil && who != (identity.Node{Org: "default", Kind: tc.kind, ID: g.id.ID}) {
				t.Errorf("%s proves %v", tc.kind, who)
			}
		}
		if life := time.Until(chain[0].NotAfter); life > control.LeafLife || life < control.LeafLife-time.Minute {
			t.Errorf("%s lives %v", tc.kind, life)
		}
	}
	if !l.audited("default", "node.enrol", g.id.String(), "") || !l.audited("default", "certificate.issue", g.id.String(), "") {
		t.Error("enrolment or certificate is not in the audit")
	}
	var v control.AuditVerification
	l.api("GET", "/audit:verify", nil, &v)
	if !v.OK || v.Entries < 5 {
		t.Errorf("audit %+v", v)
	}
}

func TestAssertions(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	at := func(d time.Duration) func(*jwt.Claims) {
		return func(c *jwt.Claims) {
			c.IssuedAt = jwt.NewNumericDate(time.Now().Add(d))
			c.Expiry = jwt.NewNumericDate(time.Now().Add(d + time.Minute))
		}
	}
	once := n.assertion(nil)
	if token, p := n.exchange(once); token == "" {
		t.Fatalf("%+v", p)
	}
	stranger := l.create(identity.Client, "other").join()
	stolen := *stranger
	stolen.id = n.id
	for _, tc := range []struct {
		name, assertion, want string
	}{
		{"used before", once, "used before"},
		{"other platform", n.assertion(func(c *jwt.Claims) { c.Audience = jwt.Audience{"https://elsewhere.example"} }), "this platform is"},
		{"no jti", n.assertion(func(c *jwt.Claims) { c.ID = "" }), "jti"},
		{"lives for ever", n.assertion(func(c *jwt.Claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(time.Hour)) }), "at most 2m"},
		{"slow clock", n.assertion(at(-time.Hour)), "the node's clock says "},
		{"fast clock", n.assertion(at(time.Hour)), "the platform's says "},
		{"another node's key", stolen.assertion(nil), "not signed by the key"},
		{"issuer is not subject", n.assertion(func(c *jwt.Claims) { c.Issuer = stranger.id.String() }), "iss and sub"},
		{"no JWT", "nonsense", "not a JWT"},
		{"unsigned", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJkZWZhdWx0L2NsaWVudC9jLTEifQ.", "not a JWT"},
		{"huge", strings.Repeat("a", 5000), "limit"},
	} {
		token, p := n.exchange(tc.assertion)
		if token != "" || p.Status != 401 || p.Code != control.CodeBadAssertion || !strings.Contains(p.Detail, tc.want) {
			t.Errorf("%s: %q %+v", tc.name, token, p)
		}
	}
	for name, d := range map[string]time.Duration{"4 minutes slow": -4 * time.Minute, "4 minutes fast": 4 * time.Minute} {
		if token, p := n.exchange(n.assertion(at(d))); token == "" {
			t.Errorf("%s: %+v", name, p)
		}
	}
	if !l.audited("default", "node.login", n.id.String(), control.CodeBadAssertion) {
		t.Error("the refusals are not in the audit")
	}
	// Addressed by any of its URLs.
	if token, p := n.exchange(n.assertion(func(c *jwt.Claims) { c.Audience = jwt.Audience{strings.ToUpper(l.srv.URL()) + "/"} })); token == "" {
		t.Errorf("audience in another form: %+v", p)
	}
}

func TestAccessTokens(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	n := l.create(identity.Client, "laptop").join()
	n.beat(control.Heartbeat{})
	for name, token := range map[string]string{
		"none": "", "changed": n.bearer[:len(n.bearer)-2] + "xx", "no signature": strings.Split(n.bearer, ".")[0], "an API token": l.admin.Token,
	} {
		if status, p := l.do(token, "POST", "/api/v1/node/heartbeat", control.Heartbeat{}, nil); status != 401 {
			t.Errorf("%s: %d %+v", name, status, p)
		}
	}
	if status, _ := l.do(n.bearer, "GET", "/api/v1/orgs", nil, nil); status != 401 {
		t.Errorf("the access token of a node opens the admin API: %d", status)
	}
	c.advance(control.AccessTokenLife)
	if status, p := l.do(n.bearer, "POST", "/api/v1/node/heartbeat", control.Heartbeat{}, nil); status != 401 {
		t.Errorf("expired: %d %+v", status, p)
	}
}

func TestRenewal(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	g := l.create(identity.Gateway, "gw").join()
	renew := func() (int, control.Problem, control.RenewResponse) {
		var out control.RenewResponse
		req := g.request()
		status, p := l.do(g.bearer, "POST", "/api/v1/node/renew", control.RenewRequest{CSR: req.CSR, SiteCSR: req.SiteCSR}, &out)
		return status, p, out
	}
	status, p, out := renew()
	if status != 200 || out.Certificates.Site == "" {
		t.Fatalf("same key: %d %+v", status, p)
	}
	old := g.key
	key, err := identity.NewKey()
	must(t, err)
	g.key = key
	if status, p, _ = renew(); status != 200 {
		t.Fatalf("new key: %d %+v", status, p)
	}
	g.login() // by the new key
	g.key = old
	g.login() // the answer may have been lost: the old one works until its leaf ends
	other := l.create(identity.Client, "other").join()
	g.key = other.key
	if status, p, _ = renew(); status != 403 || p.Code != registry.CodeKeyInUse {
		t.Errorf("the key of another node: %d %+v", status, p)
	}
	c.advance(control.LeafLife + identity.ClockSkew + time.Minute)
	g.key = old
	shifted := func(k *jwt.Claims) {
		k.IssuedAt = jwt.NewNumericDate(c.now())
		k.Expiry = jwt.NewNumericDate(c.now().Add(time.Minute))
	}
	if token, p := g.exchange(g.assertion(shifted)); token != "" || p.Code != registry.CodeKeyDenied {
		t.Errorf("the replaced key after its leaf: %+v", p)
	}
	g.key = key
	if token, p := g.exchange(g.assertion(shifted)); token == "" {
		t.Errorf("the newest key after a long sleep: %+v", p)
	}
}

func TestNewEnrolmentReplacesTheOld(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	oldKey, oldBearer := n.key, n.bearer
	f := n.stream()
	f.wait("its configuration", always)
	var made control.CreatedNode
	l.api("POST", "/clients/laptop/token", nil, &made)
	again := l.fromToken(made.Token).join()
	f.ended()
	if status, p := l.do(oldBearer, "POST", "/api/v1/node/heartbeat", control.Heartbeat{}, nil); status != 401 {
		t.Errorf("the old access token: %d %+v", status, p)
	}
	n.key = oldKey
	if token, p := n.exchange(n.assertion(nil)); token != "" || p.Code != registry.CodeKeyDenied {
		t.Errorf("the old key: %+v", p)
	}
	c := again.stream().wait("the old key denied", always)
	if !slices.Contains(c.Trust.Denied, identity.HashKey(oldKey.Public())) {
		t.Error("the old key is not denied")
	}
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop")
	bad := n.request()
	bad.Secret = []byte("wrong")
	limited := false
	for range 40 {
		if status, _ := l.do("", "POST", "/api/v1/enroll", bad, nil); status == http.StatusTooManyRequests {
			limited = true
			break
		}
	}
	if !limited {
		t.Error("40 wrong tokens and no limit")
	}
	if status, p := l.do("swt1.wrong", "GET", "/api/v1/orgs", nil, nil); status != http.StatusTooManyRequests || p.Code != control.CodeRateLimited {
		t.Errorf("guessing API tokens goes on: %d %+v", status, p)
	}
	// Whoever has a good token passes all the same.
	if status, p := l.do(l.admin.Token, "GET", "/api/v1/orgs", nil, nil); status != http.StatusOK {
		t.Errorf("a good token beside the guessing: %d %+v", status, p)
	}
	b, err := json.Marshal(l.srv.Conditions())
	must(t, err)
	if string(b) != "{}" {
		t.Errorf("conditions %s", b)
	}
	refused := 0
	for _, e := range l.auditDirect("default") {
		if e.Result == "refused" {
			refused++
		}
	}
	if refused != 1 {
		t.Errorf("%d audit entries for one sort of refusal within a minute, want 1", refused)
	}
}

// auditDirect reads the audit past the API.
func (l *lab) auditDirect(org string) []control.AuditEntry {
	l.t.Helper()
	es, err := l.srv.Registry().Audit(l.t.Context(), org, 0, 10_000)
	must(l.t, err)
	return es
}
