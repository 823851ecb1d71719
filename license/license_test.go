package license

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/database"
	"sallyway/internal/entitlement"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// running is a service under test, over HTTPS.
type running struct {
	*Server
	t     *testing.T
	stop  func()
	admin control.AdminCredential
	http  *http.Client
}

func run(t *testing.T, cfg Config) *running {
	t.Helper()
	if cfg.Listen == "" && cfg.HTTPListen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	srv, err := Open(t.Context(), cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	r := &running{Server: srv, t: t, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the service ended with %v", err)
		}
	})}
	t.Cleanup(r.stop)
	b, err := os.ReadFile(srv.AdminFile())
	must(t, err)
	must(t, json.Unmarshal(b, &r.admin))
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // of this process
	t.Cleanup(tr.CloseIdleConnections)
	r.http = &http.Client{Transport: tr}
	return r
}

// do asks; out may be nil.
func (r *running) do(bearer, method, path string, in, out any) (int, control.Problem) {
	r.t.Helper()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		must(r.t, err)
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.URL()+path, body)
	must(r.t, err)
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := r.http.Do(req)
	must(r.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(r.t, err)
	var p control.Problem
	if resp.StatusCode >= 400 {
		if ct := resp.Header.Get("Content-Type"); ct != "application/problem+json" || json.Unmarshal(b, &p) != nil || p.Detail == "" {
			r.t.Errorf("%s %s: %d with %s: %s", method, path, resp.StatusCode, ct, b)
		}
		return resp.StatusCode, p
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			r.t.Fatalf("%s %s: %v: %s", method, path, err, b)
		}
	}
	return resp.StatusCode, p
}

func (r *running) ok(method, path string, in, out any) {
	r.t.Helper()
	if status, p := r.do(r.admin.Token, method, path, in, out); status/100 != 2 {
		r.t.Fatalf("%s %s: %d %+v", method, path, status, p)
	}
}

func (r *running) trust() (out entitlement.Trust) {
	r.t.Helper()
	keys, err := r.SigningKeys(r.t.Context())
	must(r.t, err)
	for _, k := range keys {
		p, err := entitlement.ParsePublic(k.Public)
		must(r.t, err)
		if k.State != KeyOld {
			out = append(out, p)
		}
	}
	return out
}

func (r *running) fetch(key, platform string) (out []*entitlement.Entitlement) {
	r.t.Helper()
	var got struct{ Licences []string }
	if status, p := r.do(key, http.MethodGet, "/api/v1/licence?platform="+platform, nil, &got); status != http.StatusOK {
		r.t.Fatalf("fetch: %d %+v", status, p)
	}
	for _, jws := range got.Licences {
		e, err := r.trust().Open(jws)
		must(r.t, err)
		out = append(out, e)
	}
	return out
}

func TestSQLite(t *testing.T) { suite(t, Home{Data: t.TempDir()}) }

func TestPostgres(t *testing.T) {
	pg := backing.StartPostgres(t, false)
	suite(t, Home{Data: t.TempDir(), Database: pg.Database(t)})
	t.Run("two services", func(t *testing.T) { twoServices(t, pg.Database(t)) })
}

// suite is what a service does by its API, on either database.
func suite(t *testing.T, h Home) {
	var ahead atomic.Int64
	r := run(t, Config{Home: h, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
	for _, name := range []string{"acme", "globex"} {
		r.ok(http.MethodPost, "/api/v1/customers", Customer{Name: name, Contact: "sales@example.com"}, nil)
	}
	if status, p := r.do(r.admin.Token, http.MethodPost, "/api/v1/customers", Customer{Name: "acme"}, nil); status != http.StatusConflict {
		t.Errorf("twice: %d %+v", status, p)
	}
	if status, p := r.do(r.admin.Token, http.MethodPost, "/api/v1/customers", Customer{Name: "../x"}, nil); status != http.StatusUnprocessableEntity || p.Errors[0].Location != "body.name" {
		t.Errorf("bad name: %d %+v", status, p)
	}
	var key, other LicenceKey
	r.ok(http.MethodPost, "/api/v1/customers/acme/keys", map[string]string{"name": "prod"}, &key)
	r.ok(http.MethodPost, "/api/v1/customers/globex/keys", nil, &other)

	ten := int64(10)
	var first, bound Issued
	r.ok(http.MethodPost, "/api/v1/customers/acme/entitlements", IssueRequest{Organization: "prod", Limits: entitlement.Limits{Gateways: &ten}}, &first)
	r.ok(http.MethodPost, "/api/v1/customers/acme/entitlements", IssueRequest{Organization: "test", Platform: "i-1"}, &bound)
	if first.Serial < 1 || bound.Serial <= first.Serial || first.Contact != "sales@example.com" || *first.Limits.Gateways != 10 || first.Signer != r.trust()[0].ID() {
		t.Errorf("issued %+v, %+v", first, bound)
	}
	if status, _ := r.do(r.admin.Token, http.MethodPost, "/api/v1/customers/acme/entitlements", IssueRequest{Organization: "prod", Platform: "i-1"}, nil); status != http.StatusConflict {
		t.Errorf("one for a platform beside one for any: %d", status)
	}
	past := time.Now().Add(-time.Hour)
	for what, req := range map[string]IssueRequest{"over": {Organization: "x", Expires: &past}, "for nobody": {}, "for text that is none": {Organization: "a\nb"}} {
		if status, _ := r.do(r.admin.Token, http.MethodPost, "/api/v1/customers/acme/entitlements", req, nil); status != http.StatusUnprocessableEntity {
			t.Errorf("issued a licence %s: %d", what, status)
		}
	}
	if got := r.fetch(key.Key, "i-1"); len(got) != 2 {
		t.Errorf("platform i-1 gets %d", len(got))
	}
	if got := r.fetch(key.Key, "i-2"); len(got) != 1 || got[0].ID != first.ID {
		t.Errorf("platform i-2 gets %d", len(got))
	}
	if got := r.fetch(other.Key, "i-1"); len(got) != 0 {
		t.Errorf("another customer gets %d", len(got))
	}

	// Renewing and taking back issue the next document, once.
	var renewed, revoked Issued
	r.ok(http.MethodPost, "/api/v1/entitlements/"+first.ID+"/renew", nil, &renewed)
	if renewed.Serial <= first.Serial || !renewed.Expires.After(first.Expires) || *renewed.Limits.Gateways != 10 {
		t.Errorf("renewed %+v", renewed)
	}
	if status, _ := r.do(r.admin.Token, http.MethodPost, "/api/v1/entitlements/"+first.ID+"/renew", nil, nil); status != http.StatusConflict {
		t.Errorf("renewed what was replaced: %d", status)
	}
	ahead.Store(int64(3 * time.Second))
	r.ok(http.MethodPost, "/api/v1/entitlements/"+renewed.ID+"/revoke", map[string]string{"reason": "unpaid"}, &revoked)
	got := r.fetch(key.Key, "i-2")
	if len(got) != 1 || got[0].Reason != "unpaid" || got[0].Valid(time.Now().Add(10*time.Second)) == nil || got[0].Serial != revoked.Serial {
		t.Errorf("taken back: %+v", got)
	}
	var all, now list[*Issued]
	r.ok(http.MethodGet, "/api/v1/customers/acme/entitlements?history=true", nil, &all)
	r.ok(http.MethodGet, "/api/v1/customers/acme/entitlements", nil, &now)
	if len(all.Items) != 4 || len(now.Items) != 2 {
		t.Errorf("%d in all, %d now", len(all.Items), len(now.Items))
	}

	// Serials of many at once are apart, and the log has each.
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := r.Issue(t.Context(), "crowd", "globex", IssueRequest{Organization: "prod"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	entries, err := r.Audit(t.Context(), 0, 1000)
	must(t, err)
	if n := len(slices.DeleteFunc(entries, func(e *Entry) bool { return e.Actor != "crowd" })); n != 20 {
		t.Errorf("%d entries of 20", n)
	}
	if n, err := r.VerifyAudit(t.Context()); err != nil || n < 28 {
		t.Errorf("%d entries, %v", n, err)
	}
	must(t, r.db.Update(t.Context(), func(tx *database.Tx) error {
		return tx.Exec(t.Context(), true, `UPDATE audit SET detail = '{}' WHERE seq = 5`)
	}))
	if n, err := r.VerifyAudit(t.Context()); err == nil || n != 4 {
		t.Errorf("a change was not noticed: %d %v", n, err)
	}

	// A licence key ends at once.
	r.ok(http.MethodDelete, "/api/v1/customers/acme/keys/"+key.ID, nil, nil)
	if status, _ := r.do(key.Key, http.MethodGet, "/api/v1/licence", nil, nil); status != http.StatusUnauthorized {
		t.Errorf("a revoked licence key fetches: %d", status)
	}
	if c := r.checks(t.Context()); c[0].Result != "PASS" || c[1].Result != "PASS" || c[2].Result != "FAIL" {
		t.Errorf("doctor %+v", c)
	}
}

// TestWhoMay asks every route without a credential and with one for something else, and holds the description of the API against the routes.
func TestWhoMay(t *testing.T) {
	r := run(t, Config{Home: Home{Data: t.TempDir()}})
	r.ok(http.MethodPost, "/api/v1/customers", Customer{Name: "acme"}, nil)
	var key LicenceKey
	r.ok(http.MethodPost, "/api/v1/customers/acme/keys", nil, &key)
	expired, err := r.AdminToken(t.Context(), "short", time.Nanosecond, false)
	must(t, err)
	var doc struct {
		Paths map[string]map[string]struct {
			Security []map[string][]string
		}
	}
	if status, _ := r.do("", http.MethodGet, "/api/v1/openapi.json", nil, &doc); status != http.StatusOK {
		t.Fatal("no description")
	}
	described := 0
	for _, ops := range doc.Paths {
		described += len(ops)
	}
	routes := r.apiRoutes()
	if described != len(routes) {
		t.Errorf("%d routes, %d are described", len(routes), described)
	}
	for _, rt := range routes {
		method, path, _ := strings.Cut(rt.pattern, " ")
		op, ok := doc.Paths[path][strings.ToLower(method)]
		if !ok {
			t.Errorf("%s is not described", rt.pattern)
			continue
		}
		path = strings.NewReplacer("{customer}", "acme", "{id}", "e-1").Replace(path)
		wrong := map[string]string{"nothing": "", "nonsense": "nonsense", "an expired token": expired}
		switch rt.role {
		case forAnybody:
			if len(op.Security) != 0 {
				t.Errorf("%s is for anybody, and described for %v", rt.pattern, op.Security)
			}
			continue
		case forAdmin:
			wrong["a licence key"] = key.Key
		case forPlatform:
			wrong["an administrator's token"] = r.admin.Token
		}
		if len(op.Security) != 1 || op.Security[0][rt.role] == nil {
			t.Errorf("%s is for %s, and described for %v", rt.pattern, rt.role, op.Security)
		}
		for what, bearer := range wrong {
			if status, p := r.do(bearer, method, path, nil, nil); status != http.StatusUnauthorized || p.Remedy == "" {
				t.Errorf("%s with %s: %d %+v", rt.pattern, what, status, p)
			}
		}
	}
	// Credentials and signing keys are not in the database.
	r.stop()
	seeds, err := os.ReadFile(filepath.Join(r.cfg.Data, signingFile))
	must(t, err)
	var f struct {
		Keys []struct{ Seed []byte }
	}
	must(t, json.Unmarshal(seeds, &f))
	db, err := os.ReadFile(filepath.Join(r.cfg.Data, databaseFile))
	must(t, err)
	for _, secret := range [][]byte{[]byte(key.Key), []byte(r.admin.Token), f.Keys[0].Seed, f.Keys[1].Seed} {
		if len(secret) < 32 || bytes.Contains(db, secret) {
			t.Error("a secret is in the database")
		}
	}
	for _, name := range []string{signingFile, tlsFile, adminFile, databaseFile} {
		if st, err := os.Stat(filepath.Join(r.cfg.Data, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
}

// TestRotation rotates while platforms trust two keys, loses the file, and starts with another's.
func TestRotation(t *testing.T) {
	h := Home{Data: t.TempDir()}
	r := run(t, Config{Home: h})
	r.ok(http.MethodPost, "/api/v1/customers", Customer{Name: "acme"}, nil)
	issue := func() *Issued {
		t.Helper()
		e, err := r.Issue(t.Context(), "test", "acme", IssueRequest{Organization: "prod"})
		must(t, err)
		return e
	}
	pinned := r.trust()
	old := issue()
	var keys list[*SigningKey]
	r.ok(http.MethodPost, "/api/v1/signing-keys/rotate", nil, &keys)
	if keys.Items[0].ID != pinned[1].ID() || keys.Items[0].State != KeyCurrent || keys.Items[2].ID != pinned[0].ID() || keys.Items[2].State != KeyOld {
		t.Errorf("keys %+v", keys.Items)
	}
	if _, err := pinned.Open(issue().Licence); err != nil {
		t.Errorf("after one rotation: %v", err)
	}
	r.ok(http.MethodPost, "/api/v1/signing-keys/rotate", nil, nil)
	if _, err := pinned.Open(issue().Licence); !errors.Is(err, entitlement.ErrUntrusted) {
		t.Errorf("after two rotations: %v", err)
	}
	if e, err := r.Entitlement(t.Context(), old.ID); err != nil || e.State != Replaced {
		t.Errorf("an old one: %v", err) // the service still knows what it signed
	}
	// The file is away: nothing is issued, and the way out says so.
	path := filepath.Join(h.Data, signingFile)
	must(t, os.Rename(path, path+".away"))
	if _, err := r.Issue(t.Context(), "test", "acme", IssueRequest{Organization: "prod"}); err == nil || !strings.Contains(err.Error(), "--lost") {
		t.Errorf("without its key: %v", err)
	}
	r.stop()
	if _, err := Open(t.Context(), Config{Home: h, Listen: "127.0.0.1:0"}); err == nil || !strings.Contains(err.Error(), "copy the file") {
		t.Errorf("started without its key: %v", err)
	}
	must(t, os.Rename(path+".away", path))
	must(t, os.Chmod(path, 0o644))
	if _, err := Open(t.Context(), Config{Home: h, Listen: "127.0.0.1:0"}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("started with a key for everybody: %v", err)
	}
	must(t, os.Remove(path))
	s, err := h.Existing(t.Context())
	must(t, err)
	if _, err := s.RotateKeys(t.Context(), "host", false); err == nil {
		t.Error("rotated keys that are lost")
	}
	_, err = s.RotateKeys(t.Context(), "host", true)
	must(t, err)
	if _, err := s.RotateKeys(t.Context(), "host", true); err == nil {
		t.Error("keys that are there are called lost")
	}
	must(t, s.Close())
	r = run(t, Config{Home: h})
	if e, err := r.trust().Open(issue().Licence); err != nil || e.Serial <= old.Serial {
		t.Errorf("with new keys: %v", err)
	}
}

// twoServices share a database: the second needs the first's keys, and goes on after a rotation of the first.
func twoServices(t *testing.T, url string) {
	one := run(t, Config{Home: Home{Data: t.TempDir(), Database: url}})
	one.ok(http.MethodPost, "/api/v1/customers", Customer{Name: "acme"}, nil)
	h := Home{Data: t.TempDir(), Database: url}
	if _, err := Open(t.Context(), Config{Home: h, Listen: "127.0.0.1:0"}); err == nil || !strings.Contains(err.Error(), "another service on this database") {
		t.Fatalf("a second service without the keys: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(one.cfg.Data, signingFile))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(h.Data, signingFile), b, 0o600))
	must(t, WriteCredential(filepath.Join(h.Data, adminFile), one.admin))
	two := run(t, Config{Home: h})
	if two.admin.URL != two.URL() || two.admin.Pin != two.Pin() {
		t.Errorf("the second's credential is for %s", two.admin.URL)
	}
	_, err = one.RotateKeys(t.Context(), "test", false)
	must(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	serials := make(map[int64]bool)
	for _, s := range []*running{one, two} {
		for range 10 {
			wg.Go(func() {
				e, err := s.Issue(t.Context(), "test", "acme", IssueRequest{Organization: "prod"})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				serials[e.Serial] = true
				if e.Signer != one.trust()[0].ID() {
					t.Error("signed by an old key")
				}
			})
		}
	}
	wg.Wait()
	if len(serials) != 20 {
		t.Errorf("%d serials of 20", len(serials))
	}
}

// TestBackup restores what was backed up, beside its keys.
func TestBackup(t *testing.T) {
	h := Home{Data: t.TempDir()}
	r := run(t, Config{Home: h})
	r.ok(http.MethodPost, "/api/v1/customers", Customer{Name: "acme"}, nil)
	file := filepath.Join(t.TempDir(), "backup")
	must(t, r.Backup(t.Context(), file))
	r.ok(http.MethodPost, "/api/v1/customers", Customer{Name: "late"}, nil)
	r.stop()
	old, err := h.Restore(t.Context(), file)
	if err != nil || old == "" {
		t.Fatalf("restore: %q %v", old, err)
	}
	r = run(t, Config{Home: h})
	all, err := r.Customers(t.Context())
	if err != nil || len(all) != 1 || all[0].Name != "acme" {
		t.Errorf("%+v %v", all, err)
	}
}

// TestHealth tells of a database that can not be written.
func TestHealth(t *testing.T) {
	r := run(t, Config{Home: Home{Data: t.TempDir()}, HTTPListen: "127.0.0.1:0"})
	get := func(path string) int {
		resp, err := http.Get("http://" + r.plain.Addr().String() + path)
		must(t, err)
		defer resp.Body.Close()
		return resp.StatusCode
	}
	if get("/livez") != http.StatusOK || get("/readyz") != http.StatusOK {
		t.Error("not well at the start")
	}
	r.mu.Lock()
	r.sick = database.ErrUnavailable
	r.mu.Unlock()
	if get("/livez") != http.StatusOK || get("/readyz") != http.StatusServiceUnavailable || get("/healthz") != http.StatusServiceUnavailable {
		t.Error("a database that does not work is hidden, or ends the process")
	}
}
