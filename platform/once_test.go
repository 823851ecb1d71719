package platform

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people"
	"sallyway/platform/store"
)

// reply is an answer with what stands in its headers.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) problem() (p control.Problem) {
	_ = json.Unmarshal(r.body, &p) // an answer that is none has no code
	return p
}

// ask makes one request with headers, as pairs of name and value. It may be called from other goroutines than the test's.
func (l *lab) ask(bearer, method, path string, in any, headers ...string) (reply, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return reply{}, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(l.t.Context(), method, l.at()+path, body)
	if err != nil {
		return reply{}, err
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, b}, err
}

func (l *lab) must(bearer, method, path string, in any, headers ...string) reply {
	l.t.Helper()
	r, err := l.ask(bearer, method, path, in, headers...)
	must(l.t, err)
	return r
}

// onBoth runs a test on SQLite, and on two platforms that share a PostgreSQL.
func onBoth(t *testing.T, test func(t *testing.T, ls []*lab)) {
	t.Run("SQLite", func(t *testing.T) { test(t, []*lab{start(t)}) })
	t.Run("PostgreSQL", func(t *testing.T) { test(t, replicas(t, 2, backing.StartPostgres(t, false).Database(t), "")) })
}

// together asks the platforms in turn for the same at once.
func together(t *testing.T, ls []*lab, n int, ask func(l *lab, i int) (reply, error)) []reply {
	t.Helper()
	out, begin := make([]reply, n), make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-begin
			var err error
			if out[i], err = ask(ls[i%len(ls)], i); err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	close(begin)
	wg.Wait()
	return out
}

const clientsPath = "/api/v1/orgs/default/clients"

// TestIdempotencyKey holds a hundred requests with one key at once to making one client.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, ls []*lab) {
		admin := ls[0].admin.Token
		const key, n = "0b4f1ff5-5e54-4c6a-a96b-1f4c0b9a8a4a", 100
		var first []byte
		for _, r := range together(t, ls, n, func(l *lab, _ int) (reply, error) {
			return l.ask(admin, "POST", clientsPath, control.CreateNode{Name: "laptop"}, "Idempotency-Key", key)
		}) {
			switch {
			case r.status == 201 && first == nil:
				first = r.body
			case r.status == 201:
				if !bytes.Equal(r.body, first) {
					t.Errorf("two answers: %s and %s", first, r.body)
				}
			case r.status != 409 || r.problem().Code != "idempotency_key_in_progress" || r.header.Get("Retry-After") == "":
				t.Errorf("%d %s", r.status, r.body)
			}
		}
		if first == nil {
			t.Fatal("no request was carried out")
		}
		created := 0
		for _, e := range ls[0].auditDirect("default") {
			if e.Action == "node.create" {
				created++
			}
		}
		if created != 1 {
			t.Errorf("%d clients were made", created)
		}
		// Later, quoted as the draft has it, and at the other replica: the same answer.
		last := ls[len(ls)-1]
		again := last.must(admin, "POST", clientsPath, control.CreateNode{Name: "laptop"}, "Idempotency-Key", `"`+key+`"`)
		if again.status != 201 || !bytes.Equal(again.body, first) || again.header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("%d %s, want the first answer again", again.status, again.body)
		}
		if r := last.must(admin, "POST", clientsPath, control.CreateNode{Name: "phone"}, "Idempotency-Key", key); r.status != 422 || r.problem().Code != "idempotency_key_reused" {
			t.Errorf("the key with another request: %d %s", r.status, r.body)
		}
		if r := last.must(admin, "POST", "/api/v1/orgs/default/gateways", control.CreateNode{Name: "laptop"}, "Idempotency-Key", key); r.status != 422 {
			t.Errorf("the key on another path: %d %s", r.status, r.body)
		}
		// A key is its caller's.
		other := ls[0].apiToken("", store.ScopeAdmin, 0)
		if r := last.must(other, "POST", clientsPath, control.CreateNode{Name: "phone"}, "Idempotency-Key", key); r.status != 201 {
			t.Errorf("another caller's key: %d %s", r.status, r.body)
		}
		// What was refused was not carried out: the corrected request may take the key.
		if r := last.must(admin, "POST", clientsPath, control.CreateNode{Name: "NO"}, "Idempotency-Key", "second"); r.status != 422 || r.problem().Code != control.CodeInvalid {
			t.Errorf("%d %s", r.status, r.body)
		}
		if r := last.must(admin, "POST", clientsPath, control.CreateNode{Name: "yes"}, "Idempotency-Key", "second"); r.status != 201 {
			t.Errorf("%d %s", r.status, r.body)
		}
		for _, bad := range []string{strings.Repeat("k", 129), "a b", `""`, `a"b`} {
			if r := last.must(admin, "POST", clientsPath, control.CreateNode{Name: "bad"}, "Idempotency-Key", bad); r.status != 400 {
				t.Errorf("key %q: %d", bad, r.status)
			}
		}
		// An answer without body.
		person := "/api/v1/orgs/default/policies:explain"
		if r := last.must(admin, "POST", person, control.ExplainRequest{Subject: "client:laptop", Resource: "none"}, "Idempotency-Key", key); r.status == 422 && r.problem().Code == "idempotency_key_reused" {
			t.Error("a request that only reads looked at the key")
		}
	})
}

// TestAnswersAreSealed looks for what answers told in the database, and takes the answer away after the request was carried out.
func TestAnswersAreSealed(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	send := func() reply {
		return l.must(l.admin.Token, "POST", "/api/v1/orgs/default/tokens", control.CreateAPIToken{Name: "robot", Scopes: []string{"relays:read"}}, "Idempotency-Key", "k1")
	}
	var made control.CreatedAPIToken
	r := send()
	must(t, json.Unmarshal(r.body, &made))
	if made.Token == "" {
		t.Fatalf("%d %s", r.status, r.body)
	}
	for _, file := range []string{databaseFile, databaseFile + "-wal"} {
		b, err := os.ReadFile(filepath.Join(l.cfg.Data, file))
		must(t, err)
		if bytes.Contains(b, []byte(made.Token)) || bytes.Contains(b, []byte(made.Token[5:])) {
			t.Errorf("the token lies in %s", file)
		}
	}
	// As if the platform had crashed between the token and its answer.
	database := filepath.Join(l.cfg.Data, databaseFile)
	tamper(t, database, `UPDATE answers SET done = FALSE`)
	if r := send(); r.status != 409 || r.problem().Code != "idempotency_key_in_progress" {
		t.Errorf("%d %s", r.status, r.body)
	}
	c.advance(3 * time.Minute)
	if r := send(); r.status != 409 || r.problem().Code != "idempotency_answer_lost" {
		t.Errorf("%d %s", r.status, r.body)
	}
	// An answer of another place does not open.
	l.must(l.admin.Token, "POST", clientsPath, control.CreateNode{Name: "laptop"}, "Idempotency-Key", "k2")
	tamper(t, database, `UPDATE answers SET done = TRUE, sealed = (SELECT b.sealed FROM answers AS b WHERE b.id <> answers.id)`)
	if r := send(); r.status != 409 || r.problem().Code != "idempotency_answer_lost" || bytes.Contains(r.body, []byte("swt1.")) || bytes.Contains(r.body, []byte("laptop")) {
		t.Errorf("%d %s", r.status, r.body)
	}
	c.advance(25 * time.Hour)
	if r := send(); r.status != 201 {
		t.Errorf("a day later: %d %s", r.status, r.body)
	}
}

// TestPrecondition: of many changes to what they all read, one wins.
func TestPrecondition(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, ls []*lab) {
		l, admin := ls[0], ls[0].admin.Token
		relay := l.create(identity.Relay, "fra-1").join()
		const path = "/api/v1/orgs/default/relays/fra-1"
		read := l.must(admin, "GET", path, nil)
		etag := read.header.Get("ETag")
		if read.status != 200 || len(etag) < 20 || strings.HasPrefix(etag, "W/") {
			t.Fatalf("%d, ETag %s", read.status, etag)
		}
		if r := l.must(admin, "GET", path, nil, "If-None-Match", `"other", `+etag); r.status != 304 || len(r.body) > 0 || r.header.Get("ETag") != etag {
			t.Errorf("%d %s", r.status, r.body)
		}
		won := 0
		for i, r := range together(t, ls, 8, func(l *lab, i int) (reply, error) {
			host := fmt.Sprintf("host-%d.example", i)
			return l.ask(admin, "PATCH", path, control.UpdateNode{Host: &host}, "If-Match", etag)
		}) {
			switch {
			case r.status == 200:
				won++
				etag = r.header.Get("ETag")
			case r.status != 412 || r.problem().Code != "precondition_failed":
				t.Errorf("change %d: %d %s", i, r.status, r.body)
			}
		}
		if won != 1 {
			t.Errorf("%d changes won", won)
		}
		now := l.must(admin, "GET", path, nil)
		if a, b := set(now.header.Get("ETag")), set(etag); a != b {
			t.Errorf("a change answers ETag %s, the object has %s", b, a)
		}
		// What changes by itself shows to who polls, and is in the way of no change.
		relay.beat(control.Heartbeat{Problems: []string{"hot"}, Version: "9.9"})
		etag = now.header.Get("ETag")
		if r := l.must(admin, "GET", path, nil, "If-None-Match", etag); r.status != 200 || r.header.Get("ETag") == etag {
			t.Errorf("after a heartbeat: %d, ETag %s", r.status, r.header.Get("ETag"))
		}
		port := uint16(5350)
		if r := l.must(admin, "PATCH", path, control.UpdateNode{Port: &port}, "If-Match", etag); r.status != 200 {
			t.Errorf("after a heartbeat: %d %s", r.status, r.body)
		}
		if r := l.must(admin, "DELETE", path, nil, "If-Match", etag); r.status != 412 {
			t.Errorf("delete of what was changed: %d", r.status)
		}
		if r := l.must(admin, "DELETE", path, nil, "If-Match", "*"); r.status != 204 {
			t.Errorf("delete of what is there: %d %s", r.status, r.body)
		}
		if r := l.must(admin, "DELETE", path, nil, "If-Match", "*"); r.status != 404 {
			t.Errorf("delete of what is not: %d", r.status)
		}
	})
}

// set is the part of an entity tag that If-Match looks at.
func set(etag string) string {
	first, _, _ := strings.Cut(etag, ".")
	return first
}

// TestEveryChangeTakesPreconditions walks all routes that change an object: with the ETag of another one they do nothing.
func TestEveryChangeTakesPreconditions(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	w.populatePeople()
	w.api("POST", "/groups", control.CreateGroup{Name: "all"}, nil)
	w.api("POST", "/webhooks", control.CreateWebhook{Name: "siem", URL: "https://192.0.2.9/", ThroughGateways: true}, nil)
	must(t, w.srv.Registry().Store.Update(t.Context(), func(tx store.Tx) error { // not by the API, which asks the provider
		return errors.Join(tx.InsertProvider(t.Context(), &store.Provider{ID: identity.NewID("provider"), Org: "default", Name: "sso", Issuer: "https://issuer.example", Created: time.Now(), Settings: []byte("{}")}),
			tx.InsertProvider(t.Context(), &store.Provider{ID: identity.NewID("provider"), Org: people.Platform, Name: "sso", Issuer: "https://issuer.example", Created: time.Now(), Settings: []byte("{}")}))
	}))
	for _, p := range []struct {
		path string
		in   any
	}{
		{"/shared/relays", control.CreateNode{Name: "eu-1", Host: "192.0.2.9"}},
		{"/people", control.CreatePerson{Login: "root@example.com", Role: "auditor"}},
	} {
		if status, problem := w.do(w.admin.Token, "POST", "/api/v1"+p.path, p.in, nil); status != 201 {
			t.Fatalf("%s: %d %+v", p.path, status, problem)
		}
	}
	objects := map[string]string{
		"/orgs/{org}": "", "/orgs/{org}/licence": "", "/orgs/{org}/flow-log": "", "/orgs/{org}/webhooks/{name}": "siem", "/orgs/{org}/relays/{name}": "relay-1", "/orgs/{org}/gateways/{name}": "gw", "/orgs/{org}/clients/{name}": "laptop",
		"/orgs/{org}/resources/{name}": "web", "/orgs/{org}/policies/{name}": "client-laptop-web", "/orgs/{org}/groups/{name}": "all",
		"/orgs/{org}/people/{name}": "ada", "/orgs/{org}/service-accounts/{name}": "robot", "/orgs/{org}/providers/{name}": "sso",
		"/shared/relays/{name}": "eu-1", "/people/{name}": "root@example.com", "/service-accounts/{name}": "robot", "/providers/{name}": "sso",
	}
	seen := 0
	before := len(w.auditDirect("default"))
	for path, ops := range w.document().Paths {
		if strings.HasPrefix(path, "/api/v1/me") {
			continue // for persons
		}
		if _, ok := ops["get"]; !ok {
			continue
		}
		for _, method := range []string{"patch", "put", "delete"} {
			op, ok := ops[method]
			if !ok {
				continue
			}
			name, ok := objects[strings.TrimPrefix(path, "/api/v1")]
			if !ok {
				t.Errorf("%s is new: name an object for it here", path)
				continue
			}
			seen++
			url := strings.NewReplacer("{org}", "default", "{name}", name).Replace(path)
			var in any
			switch {
			case strings.HasSuffix(path, "/licence"):
				if method == "put" {
					continue // one that can be read and is signed comes before what is there
				}
			case strings.HasSuffix(path, "/flow-log"):
				in = control.FlowLog{}
			case op.RequestBody != nil:
				in = struct{}{}
			}
			if r := w.must(w.admin.Token, strings.ToUpper(method), url, in, "If-Match", `"other.other"`); r.status != 412 || r.problem().Code != "precondition_failed" {
				t.Errorf("%s %s: %d %s", method, url, r.status, r.body)
			}
			if r := w.must(w.admin.Token, "GET", url, nil); r.status != 200 || r.header.Get("ETag") == "" {
				t.Errorf("%s after that: %d, ETag %s", url, r.status, r.header.Get("ETag"))
			}
		}
	}
	if seen < 25 {
		t.Errorf("%d routes walked", seen)
	}
	if es := w.auditDirect("default")[before:]; slices.ContainsFunc(es, func(e control.AuditEntry) bool { return e.Result == "ok" }) {
		t.Errorf("something was done: %+v", es)
	}
}

// TestBudget: who asks too often waits, and nobody else does.
func TestBudget(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now, cfg.APIRate = c.now, 2 })
	admin, other := l.admin.Token, l.apiToken("", store.ScopeReadOnly, 0)
	node := l.create(identity.Client, "laptop").join()
	c.advance(time.Minute)
	for i := range 8 {
		r := l.must(admin, "GET", clientsPath, nil)
		if want := fmt.Sprintf(`"requests";r=%d;t=%d`, 7-i, (i+2)/2); r.status != 200 || r.header.Get("RateLimit") != want || r.header.Get("RateLimit-Policy") != `"requests";q=8;w=4` {
			t.Errorf("request %d: %d, %q of %q, want %q", i, r.status, r.header.Get("RateLimit"), r.header.Get("RateLimit-Policy"), want)
		}
	}
	if r := l.must(admin, "GET", clientsPath, nil); r.status != 429 || r.problem().Code != control.CodeRateLimited || r.header.Get("Retry-After") != "1" {
		t.Errorf("past the budget: %d %s, Retry-After %q", r.status, r.body, r.header.Get("Retry-After"))
	}
	if r := l.must(other, "GET", clientsPath, nil); r.status != 200 {
		t.Errorf("another caller: %d %s", r.status, r.body)
	}
	node.beat(control.Heartbeat{})
	c.advance(time.Second)
	for i, want := range []int{200, 200, 429} {
		if r := l.must(admin, "GET", clientsPath, nil); r.status != want {
			t.Errorf("request %d a second later: %d, want %d", i, r.status, want)
		}
	}
}
