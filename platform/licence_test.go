package platform

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
	"sallyway/license"
	"sallyway/platform/registry"
)

// issuer is a real licence service under test.
type issuer struct {
	t    *testing.T
	srv  *license.Server
	stop func()
	key  string // licence key of the customer acme
}

func startIssuer(t *testing.T) *issuer {
	t.Helper()
	srv, err := license.Open(t.Context(), license.Config{Home: license.Home{Data: t.TempDir()}, Listen: "127.0.0.1:0"})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	i := &issuer{t: t, srv: srv, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("licence service ended with %v", err)
		}
	})}
	t.Cleanup(i.stop)
	_, err = srv.CreateCustomer(t.Context(), "test", license.Customer{Name: "acme", Contact: "sales@example.com"})
	must(t, err)
	k, err := srv.CreateKey(t.Context(), "test", "acme", "test")
	must(t, err)
	i.key = k.Key
	return i
}

// trust are the keys that a platform pins.
func (i *issuer) trust() (out []string) {
	i.t.Helper()
	keys, err := i.srv.SigningKeys(i.t.Context())
	must(i.t, err)
	for _, k := range keys {
		out = append(out, k.Public)
	}
	return out
}

func (i *issuer) issue(req license.IssueRequest) *license.Issued {
	i.t.Helper()
	if req.Organization == "" {
		req.Organization = "default"
	}
	e, err := i.srv.Issue(i.t.Context(), "test", "acme", req)
	must(i.t, err)
	return e
}

func upTo(n int64) *int64 { return &n }

func (i *issuer) configure(c *Config) {
	c.Licence = LicenceConfig{Trust: i.trust(), URL: i.srv.URL(), Key: i.key, Pin: i.srv.Pin()}
}

// install puts a licence in place by the API.
func (l *lab) install(org, jws string) (int, control.Problem) {
	l.t.Helper()
	return l.do(l.admin.Token, http.MethodPut, "/api/v1/orgs/"+org+"/licence", control.InstallLicence{Licence: jws}, nil)
}

func (l *lab) licence() (out control.Licence) {
	l.t.Helper()
	l.api(http.MethodGet, "/licence", nil, &out)
	return out
}

// tries to add a node; it returns the problem.
func (l *lab) adds(kind identity.Kind, name string) (int, control.Problem) {
	l.t.Helper()
	req := control.CreateNode{Name: name}
	if kind == identity.Relay {
		req.Host = "192.0.2.9"
	}
	return l.do(l.admin.Token, http.MethodPost, "/api/v1/orgs/default/"+string(kind)+"s", req, nil)
}

func (l *lab) refusedByLicence(kind identity.Kind, name string, says ...string) {
	l.t.Helper()
	status, p := l.adds(kind, name)
	if status != http.StatusForbidden || p.Code != control.CodeLicenceLimit {
		l.t.Fatalf("another %s: %d %+v", kind, status, p)
	}
	for _, s := range says {
		if !strings.Contains(p.Detail+" "+p.Remedy, s) {
			l.t.Errorf("another %s: %q, %q: does not say %q", kind, p.Detail, p.Remedy, s)
		}
	}
}

func (l *lab) added(kind identity.Kind, name string) {
	l.t.Helper()
	if status, p := l.adds(kind, name); status != http.StatusCreated {
		l.t.Fatalf("%s %s: %d %+v", kind, name, status, p)
	}
}

// TestLicenceOfAService fetches from a real service, is held to what it got, goes on without the service, and takes renewals and what takes it back.
func TestLicenceOfAService(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	l := start(t, i.configure)
	if s := l.licence(); s.State != control.LicenceNone || s.Use[0].Limit != nil {
		t.Fatalf("without a licence: %+v", s)
	}
	relay := l.create(identity.Relay, "fra").join()
	stream := relay.stream()
	first := i.issue(license.IssueRequest{Platform: l.licence().Installation, Limits: entitlement.Limits{Gateways: upTo(2), Relays: upTo(1), Bandwidth: upTo(1 << 20)}, Features: []string{"sso"}})
	i.issue(license.IssueRequest{Platform: "i-another", Limits: entitlement.Limits{Gateways: upTo(100)}}) // another platform's: not handed out here
	must(t, l.srv.FetchLicences(t.Context()))
	s := l.licence()
	if s.State != control.LicenceValid || s.Entitlement.ID != first.ID || !strings.Contains(s.Source, "service") {
		t.Fatalf("fetched %+v", s)
	}
	if s.Use[1].What != "relays" || s.Use[1].Used != 1 || *s.Use[1].Limit != 1 {
		t.Errorf("use %+v", s.Use)
	}
	stream.wait("the bandwidth", func(c *control.Config) bool {
		return c.Relay != nil && len(c.Relay.Orgs) == 1 && c.Relay.Orgs[0].BytesPerSecond == 1<<20
	})
	l.refusedByLicence(identity.Relay, "ams", "1 relay", "allows 1", "sales@example.com", first.ID)
	l.added(identity.Gateway, "a")
	l.added(identity.Gateway, "b")
	l.refusedByLicence(identity.Gateway, "c")
	l.added(identity.Client, "laptop") // no limit
	// Who is deleted makes room.
	l.api(http.MethodDelete, "/gateways/a", nil, nil)
	l.added(identity.Gateway, "c")

	// A renewal comes with the next look.
	renewed, err := i.srv.Renew(t.Context(), "test", first.ID, time.Now().Add(2*365*24*time.Hour))
	must(t, err)
	must(t, l.srv.FetchLicences(t.Context()))
	if s := l.licence(); s.Entitlement.Serial != renewed.Serial || s.Entitlement.Expires.Before(time.Now().Add(700*24*time.Hour)) {
		t.Errorf("renewed %+v", s.Entitlement)
	}
	// After a rotation of keys what the platform trusts is enough.
	_, err = i.srv.RotateKeys(t.Context(), "test", false)
	must(t, err)
	more, err := i.srv.Issue(t.Context(), "test", "acme", license.IssueRequest{Organization: "default", Platform: s.Installation, Limits: entitlement.Limits{Gateways: upTo(3), Relays: upTo(1)}})
	must(t, err)
	must(t, l.srv.FetchLicences(t.Context()))
	l.added(identity.Gateway, "d")
	l.refusedByLicence(identity.Gateway, "e")

	// Taken back: nothing is added, what runs goes on.
	revoked, err := i.srv.Revoke(t.Context(), "test", more.ID, "unpaid")
	must(t, err)
	must(t, l.srv.FetchLicences(t.Context()))
	if s := l.licence(); s.State != control.LicenceExpired || !strings.Contains(s.Problem, "unpaid") {
		t.Errorf("taken back: %+v", s)
	}
	l.refusedByLicence(identity.Client, "late", "unpaid")
	relay.beat(control.Heartbeat{})
	// What was replaced does not come back.
	if status, p := l.install("default", renewed.Licence); status != http.StatusConflict || !strings.Contains(p.Detail, "older") {
		t.Errorf("replayed: %d %+v", status, p)
	}

	// Without the service everything stays as it is.
	i.stop()
	if err := l.srv.FetchLicences(t.Context()); err == nil {
		t.Error("a service that is gone answers")
	}
	l.stop()
	l.run()
	if s := l.licence(); s.State != control.LicenceExpired {
		t.Errorf("after a restart without the service: %+v", s)
	}
	relay.beat(control.Heartbeat{})
	l.api(http.MethodDelete, "/licence", nil, nil)
	l.added(identity.Client, "late")
	if status, p := l.install("default", renewed.Licence); status != http.StatusConflict {
		t.Errorf("replayed after removal: %d %+v", status, p)
	}
	// The newest comes back by hand, and not by itself.
	last := revoked.Licence
	must(t, l.srv.licences.install(t.Context(), last, "test"))
	if s := l.licence(); s.State != control.LicenceNone {
		t.Errorf("a licence that was removed came back by itself: %+v", s)
	}
	if status, p := l.install("default", last); status != http.StatusOK {
		t.Errorf("the newest one after a removal: %d %+v", status, p)
	}
	if v := l.auditDirect("default"); !strings.Contains(fmt.Sprint(v), "licence.install") || !strings.Contains(fmt.Sprint(v), "licence.remove") {
		t.Error("the audit does not tell of licences")
	}
}

// TestLicenceIsRefused brings licences that are not to be believed.
func TestLicenceIsRefused(t *testing.T) {
	t.Parallel()
	key, err := entitlement.NewKey()
	must(t, err)
	stranger, err := entitlement.NewKey()
	must(t, err)
	l := start(t, func(c *Config) { c.Licence.Trust = []string{key.Public().String()} })
	now := time.Now()
	sign := func(k *entitlement.Key, change func(e *entitlement.Entitlement)) string {
		e := &entitlement.Entitlement{
			ID: "e-1", Serial: 5, Issuer: "i", Customer: "acme", Organization: "default", Issued: now, NotBefore: now.Add(-time.Minute), Expires: now.Add(time.Hour),
			Limits: entitlement.Limits{Clients: upTo(1)},
		}
		change(e)
		jws, err := k.Sign(e)
		must(t, err)
		return jws
	}
	same := func(*entitlement.Entitlement) {}
	good := sign(key, same)
	for what, jws := range map[string]string{
		"forged":                 sign(stranger, same),
		"changed":                good[:len(good)-6] + "AAAAAA",
		"another organization's": sign(key, func(e *entitlement.Entitlement) { e.Organization = "rival" }),
		"another platform's":     sign(key, func(e *entitlement.Entitlement) { e.Platform = "i-other" }),
		"over":                   sign(key, func(e *entitlement.Entitlement) { e.Expires = now.Add(-time.Second) }),
		"early":                  sign(key, func(e *entitlement.Entitlement) { e.NotBefore = now.Add(time.Hour) }),
		"text":                   "hello",
	} {
		if status, p := l.install("default", jws); status != http.StatusUnprocessableEntity || p.Remedy == "" {
			t.Errorf("%s: %d %+v", what, status, p)
		}
	}
	if s := l.licence(); s.State != control.LicenceNone {
		t.Fatalf("state %s", s.State)
	}
	if status, p := l.install("default", good); status != http.StatusOK {
		t.Fatalf("a good one: %d %+v", status, p)
	}
	if status, p := l.install("default", good); status != http.StatusOK {
		t.Errorf("the same again: %d %+v", status, p)
	}
	for _, serial := range []int64{4, 5} {
		older := sign(key, func(e *entitlement.Entitlement) { e.ID, e.Serial, e.Limits = "e-0", serial, entitlement.Limits{} })
		if status, p := l.install("default", older); status != http.StatusConflict {
			t.Errorf("serial %d after 5: %d %+v", serial, status, p)
		}
	}
	// An organization's own administrators install what was signed for it, and remove nothing.
	own := l.apiToken("default", "admin", 0)
	if status, _ := l.do(own, http.MethodDelete, "/api/v1/orgs/default/licence", nil, nil); status != http.StatusForbidden {
		t.Errorf("an organization frees itself of its licence: %d", status)
	}
	l.added(identity.Client, "one")
	l.refusedByLicence(identity.Client, "two")
	if v := fmt.Sprint(l.auditDirect("default")); !strings.Contains(v, "licence.limit client refused") {
		t.Error("the audit does not tell of the limit")
	}

	// The key is trusted no more: nothing is added, until it is again.
	l.stop()
	l.cfg.Licence.Trust = []string{stranger.Public().String()}
	l.run()
	if s := l.licence(); s.State != control.LicenceUntrusted {
		t.Errorf("state %s", s.State)
	}
	l.refusedByLicence(identity.Gateway, "gw", "--licence-trust")
	l.stop()
	l.cfg.Licence.Trust = append(l.cfg.Licence.Trust, key.Public().String())
	l.run()
	l.added(identity.Gateway, "gw")
}

// TestLicenceConfiguration refuses to start with what can not work, and starts without a licence that is over.
func TestLicenceConfiguration(t *testing.T) {
	t.Parallel()
	key, err := entitlement.NewKey()
	must(t, err)
	trust := []string{key.Public().String()}
	for want, c := range map[string]LicenceConfig{
		"is no key":             {Trust: []string{"ed25519:AAAA"}},
		"no such file":          {Trust: []string{"/nonexistent/trust"}},
		"--licence-trust":       {URL: "https://licences.example"},
		"--licence-key-file":    {Trust: trust, URL: "https://licences.example"},
		"unprotected":           {Trust: trust, URL: "http://licences.example", Key: "slk_secret"},
		"of the form https://":  {Trust: trust, URL: "licences.example", Key: "slk_secret"},
		"licence file: stat /n": {Trust: trust, File: "/nonexistent/licence"},
	} {
		if _, _, err := c.open(time.Now); err == nil {
			t.Errorf("accepted where %q is wanted", want)
		} else if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "slk_secret") {
			t.Errorf("%v, want %q", err, want)
		}
	}
	file := filepath.Join(t.TempDir(), "licences")
	must(t, os.WriteFile(file, []byte("hello\n"), 0o600))
	l := start(t, func(c *Config) { c.Licence = LicenceConfig{Trust: trust, File: file} })
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(l.logs.String(), "this is no licence"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is told of a file without a licence in it")
		}
	}
	l.added(identity.Client, "laptop")
}

// TestLicenceIsOver lets the end come and go by the clock: what is enrolled stays, what is not can not come, and warnings are told once.
func TestLicenceIsOver(t *testing.T) {
	t.Parallel()
	key, err := entitlement.NewKey()
	must(t, err)
	now := time.Now()
	file := filepath.Join(t.TempDir(), "licences")
	jws, err := key.Sign(&entitlement.Entitlement{
		ID: "e-1", Serial: 1, Issuer: "i", Customer: "acme", Organization: "default", Issued: now, NotBefore: now, Expires: now.Add(2 * time.Minute), Contact: "boss",
	})
	must(t, err)
	must(t, os.WriteFile(file, []byte("# ours\n"+jws+"\n"), 0o600))
	var ahead atomic.Int64
	reg := prometheus.NewRegistry()
	l := start(t, func(c *Config) {
		c.Licence = LicenceConfig{Trust: []string{key.Public().String()}, File: file}
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		c.Metrics = reg
	})
	deadline := time.Now().Add(30 * time.Second)
	for l.licence().State == control.LicenceNone && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // until the file is read
	}
	if s := l.licence(); s.State != control.LicenceExpiring || !strings.HasPrefix(s.Source, "file ") {
		t.Fatalf("licence of the file: %+v", s)
	}
	client, late := l.create(identity.Client, "laptop").join(), l.create(identity.Client, "late")
	stream := client.stream()
	stream.wait("its configuration", always)
	warned := func() (n int) {
		must(t, l.srv.reg.WarnLicences(t.Context()))
		must(t, l.srv.reg.WarnLicences(t.Context()))
		return strings.Count(fmt.Sprint(l.auditDirect("default")), "licence.expir")
	}
	if n := warned(); n != 1 {
		t.Errorf("%d entries ahead of the end", n)
	}

	ahead.Store(int64(3 * time.Minute))
	if n := warned(); n != 2 {
		t.Errorf("%d entries after the end", n)
	}
	if s := l.licence(); s.State != control.LicenceExpired {
		t.Errorf("state %s", s.State)
	}
	l.refusedByLicence(identity.Gateway, "gw", "boss", "has expired")
	if status, p := l.do("", http.MethodPost, "/api/v1/enroll", late.request(), nil); status != http.StatusForbidden || p.Code != control.CodeLicenceLimit {
		t.Errorf("a first enrolment after the end: %d %+v", status, p)
	}
	// What runs goes on: it is heard, told of changes, and renews.
	client.beat(control.Heartbeat{})
	l.api(http.MethodPost, "/clients/laptop/disable", nil, nil)
	stream.ended()
	l.api(http.MethodPost, "/clients/laptop/enable", nil, nil)
	var renewed control.RenewResponse
	csr, err := identity.Request(client.key, client.id)
	must(t, err)
	client.login()
	if status, p := l.do(client.bearer, http.MethodPost, "/api/v1/node/renew", control.RenewRequest{CSR: string(csr)}, &renewed); status != http.StatusOK {
		t.Errorf("renewal of a certificate after the end: %d %+v", status, p)
	}
	var again control.CreatedNode
	l.api(http.MethodPost, "/clients/laptop/token", nil, &again)
	l.fromToken(again.Token).join()
	valid := false
	families, err := reg.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "sallyway_platform_licence_valid" {
			valid = true
			if v := f.GetMetric()[0].GetGauge().GetValue(); v != 0 {
				t.Errorf("metric says %v", v)
			}
		}
	}
	if !valid {
		t.Error("there is no metric of the licence")
	}

	// The clock was wrong: all is well again, and so was the token, which nobody spent.
	ahead.Store(0)
	l.added(identity.Gateway, "gw")
	late.join()
	// The clock is behind: not yet.
	ahead.Store(-int64(10 * time.Minute))
	if s := l.licence(); s.State != control.LicenceEarly {
		t.Errorf("state %s", s.State)
	}
	l.refusedByLicence(identity.Gateway, "gw2", "not valid yet")
}

// TestLicenceIsNotOverrun has 100 add at once where 10 fit.
func TestLicenceIsNotOverrun(t *testing.T) {
	t.Parallel()
	t.Run("SQLite", func(t *testing.T) { t.Parallel(); overrun(t, "") })
	t.Run("PostgreSQL", func(t *testing.T) { t.Parallel(); overrun(t, backing.StartPostgres(t, false).Database(t)) })
}

func overrun(t *testing.T, database string) {
	key, err := entitlement.NewKey()
	must(t, err)
	l := start(t, func(c *Config) { c.Database, c.Licence.Trust = database, []string{key.Public().String()} })
	now := time.Now()
	jws, err := key.Sign(&entitlement.Entitlement{
		ID: "e-1", Serial: 1, Issuer: "i", Customer: "acme", Organization: "default", Issued: now, NotBefore: now, Expires: now.Add(time.Hour), Limits: entitlement.Limits{Clients: upTo(10)},
	})
	must(t, err)
	if status, p := l.install("default", jws); status != http.StatusOK {
		t.Fatalf("%d %+v", status, p)
	}
	const callers = 100
	var made, refused atomic.Int32
	var wg sync.WaitGroup
	for i := range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := l.srv.Registry().CreateNode(t.Context(), "default", identity.Client, control.CreateNode{Name: fmt.Sprint("c", i)})
			switch {
			case err == nil:
				made.Add(1)
			case registry.Code(err) == control.CodeLicenceLimit:
				refused.Add(1)
			default:
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if made.Load() != 10 || refused.Load() != callers-10 {
		t.Errorf("%d made, %d refused", made.Load(), refused.Load())
	}
	if s := l.licence(); s.Use[2].Used != 10 {
		t.Errorf("use %+v", s.Use)
	}
}
