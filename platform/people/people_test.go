package people

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func TestMain(m *testing.M) {
	current = cost{memory: 64, time: 1, threads: 1} // the race detector makes argon2id ten times as slow
	os.Exit(m.Run())
}

const password = "lamp orchid gravel tuesday"

// lab is a service on a fresh database, with a clock that stands until it is moved.
type lab struct {
	t   *testing.T
	svc *Service
	reg *registry.Registry

	mu  sync.Mutex
	now time.Time // guarded by mu
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{t: t, now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	l.reg = &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: l.clock, URL: "https://platform.example"}
	_, err = l.reg.Bootstrap(t.Context())
	must(t, err)
	for _, name := range []string{"acme", "rival"} {
		_, err := l.reg.CreateOrg(t.Context(), control.CreateOrganization{Name: name})
		must(t, err)
	}
	l.svc = New(Config{Registry: l.reg})
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l *lab) clock() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

func (l *lab) advance(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = l.now.Add(d)
}

// root may do everything, as the first token of a platform.
var root = &Principal{Kind: KindToken, Name: "root", Actor: "token:root", Grants: []Grant{{Org: Platform, Scopes: Scopes{"*"}}}}

// person makes a person and logs in.
func (l *lab) person(org, login string, role Role) *Principal {
	l.t.Helper()
	_, err := l.svc.CreatePerson(l.t.Context(), root, org, control.CreatePerson{Login: login, Role: string(role), Password: password})
	must(l.t, err)
	return l.session(login)
}

// session logs in.
func (l *lab) session(login string) *Principal {
	l.t.Helper()
	r, err := l.svc.LogIn(l.t.Context(), Login{Name: login, Password: password, Source: "192.0.2.1", Agent: "test"})
	must(l.t, err)
	p, err := l.svc.FromCookie(l.t.Context(), r.Session.secret)
	must(l.t, err)
	return p
}

// code expects a refusal.
func code(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || registry.Code(err) != want {
		t.Errorf("%q: %v, want code %q", registry.Code(err), err, want)
	}
}

// audited says whether a chain has an entry of an action and result.
func (l *lab) audited(org, action, result string) bool {
	l.t.Helper()
	es, err := l.reg.Audit(l.t.Context(), org, 0, 1000)
	must(l.t, err)
	return slices.ContainsFunc(es, func(e control.AuditEntry) bool { return e.Action == action && e.Result == result })
}

func (l *lab) role(org, login string) string {
	l.t.Helper()
	p, err := l.svc.Person(l.t.Context(), org, login)
	must(l.t, err)
	return p.Role
}

// at once runs n functions together and returns their errors.
func atOnce(n int, fn func(i int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-begin
			errs[i] = fn(i)
		})
	}
	close(begin)
	wg.Wait()
	return errs
}

func succeeded(errs []error) (n int) {
	for _, err := range errs {
		if err == nil {
			n++
		}
	}
	return n
}

// TestSetupCodesOfReplicas has two platforms show a code each: both are good until one was used.
func TestSetupCodesOfReplicas(t *testing.T) {
	l := newLab(t)
	l.svc.shared = true
	ctx := t.Context()
	one, err := l.svc.SetupCode(ctx)
	must(t, err)
	other, err := l.svc.SetupCode(ctx)
	must(t, err)
	_, err = l.svc.CreateFirst(ctx, FirstOwner{Code: one, Login: "ada", Password: password, Source: "192.0.2.7"})
	must(t, err)
	if _, err = l.svc.CreateFirst(ctx, FirstOwner{Code: other, Login: "eve", Password: password, Source: "192.0.2.8"}); err == nil {
		t.Error("a second first owner was made")
	}
}

func TestFirstOwner(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	first, err := l.svc.FirstRun(ctx)
	must(t, err)
	old, err := l.svc.SetupCode(ctx)
	must(t, err)
	setup, err := l.svc.SetupCode(ctx)
	must(t, err)
	if !first || setup == "" || setup == old {
		t.Fatalf("first run %v, codes %q %q", first, old, setup)
	}
	req := FirstOwner{Login: "Ada", Password: password, Source: "192.0.2.7"}
	for _, bad := range []string{"", "nothing", old} {
		req.Code = bad
		_, err := l.svc.CreateFirst(ctx, req)
		code(t, err, CodeBadSetup)
	}
	weak := req
	weak.Code, weak.Password = setup, "password1234"
	_, err = l.svc.CreateFirst(ctx, weak)
	code(t, err, control.CodeInvalid)
	reader, err := l.reg.CreateAPIToken(ctx, "reader", "", store.ScopeReadOnly, 0)
	must(t, err)
	req.Code = reader
	_, err = l.svc.CreateFirst(ctx, req)
	code(t, err, CodeBadSetup)

	// Of many with the right code one becomes owner.
	req.Code = setup
	errs := atOnce(8, func(i int) error {
		r := req
		r.Login = fmt.Sprintf("owner%d", i)
		r.Source = fmt.Sprintf("198.51.100.%d", i)
		_, err := l.svc.CreateFirst(ctx, r)
		return err
	})
	if n := succeeded(errs); n != 1 {
		t.Fatalf("%d first owners: %v", n, errs)
	}
	list, err := l.svc.People(ctx, Platform, store.Page{})
	must(t, err)
	if len(list.Items) != 1 || list.Items[0].Role != string(Owner) {
		t.Errorf("%+v", list.Items)
	}
	if again, err := l.svc.SetupCode(ctx); err != nil || again != "" {
		t.Errorf("a code after the first owner: %q %v", again, err)
	}
	_, err = l.svc.CreateFirst(ctx, req)
	code(t, err, CodeNotFirst)
	if !l.audited(Platform, "person.create", "ok") || !l.audited(Platform, "person.create", "refused") {
		t.Error("not in the audit")
	}
}

func TestFirstOwnerByAdminToken(t *testing.T) {
	l := newLab(t)
	token, err := l.reg.CreateAPIToken(t.Context(), "admin", "", store.ScopeAdmin, 0)
	must(t, err)
	s, err := l.svc.CreateFirst(t.Context(), FirstOwner{Code: token, Login: "ada", Password: password, Source: "192.0.2.7"})
	must(t, err)
	p, err := l.svc.FromCookie(t.Context(), s.secret)
	must(t, err)
	if !p.May("acme", "people", Write) || !p.May(Platform, "organizations", Write) || p.RoleIn("acme") != Owner {
		t.Errorf("%+v", p)
	}
}

func TestPasswords(t *testing.T) {
	for p, bad := range map[string]bool{
		"lamp orchid gravel tuesday": false, "f9!kQz0pL2#x": false, "schön-geölt-türkis": false,
		"short": true, "elevenchars": true, "aaaaaaaaaaaaaaaa": true, "password1234": true, "P@ssw0rd!2026": true, "Passwort2026!!": true, "qwertyuiop12": true,
		"123456789012": true, "correcthorsebatterystaple": true, "adalovelace!": true, "\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7\xf6\xf5\xf4": true, "Changeme1234!": true,
	} {
		if err := CheckPassword(p, "ada.lovelace", "adalovelace"); (err != nil) != bad {
			t.Errorf("%q: %v", p, err)
		}
	}
	h := newHasher()
	a, err := h.make(t.Context(), password)
	must(t, err)
	b, err := h.make(t.Context(), password)
	must(t, err)
	if a == b {
		t.Error("no salt")
	}
	for _, tc := range []struct {
		hash, password string
		ok             bool
	}{{a, password, true}, {a, password + " ", false}, {"", password, false}, {"", "", false}, {h.nobody, "", false}} {
		if ok, _, err := h.check(t.Context(), tc.hash, tc.password); err != nil || ok != tc.ok {
			t.Errorf("%+v: %v %v", tc, ok, err)
		}
	}
	for _, damaged := range []string{"x", "$argon2id$v=19$m=64,t=1,p=1$AAAA", "$argon2id$v=19$m=4000000000,t=1,p=1$AAAA$AAAAAAAAAAAAAAAAAAAAAAAA", "$argon2i$v=19$m=64,t=1,p=1$AAAA$AAAAAAAAAAAAAAAAAAAAAAAA"} {
		if _, _, err := h.check(t.Context(), damaged, password); err == nil {
			t.Errorf("%q is taken", damaged)
		}
	}
	// A hash with older parameters is renewed by a login.
	was := current
	old := cost{memory: 32, time: 1, threads: 1}
	defer func() { current = was }()
	current = old
	weak, err := h.make(t.Context(), password)
	must(t, err)
	current = was
	if ok, renew, err := h.check(t.Context(), weak, password); err != nil || !ok || !renew {
		t.Errorf("%v %v %v", ok, renew, err)
	}
	// So many at once and no more.
	for range cap(h.waiting) {
		h.waiting <- struct{}{}
	}
	_, err = h.make(t.Context(), password)
	code(t, err, control.CodeRateLimited)
}

// TestLoginTellsNothing holds the answers for accounts that exist, do not, are disabled or have no password against each other.
func TestLoginTellsNothing(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	l.person("acme", "ada", Member)
	l.person("acme", "gone", Member)
	yes := true
	_, err := l.svc.UpdatePerson(ctx, root, "acme", "gone", control.UpdatePerson{Disabled: &yes})
	must(t, err)
	_, err = l.svc.CreatePerson(ctx, root, "acme", control.CreatePerson{Login: "invited", Role: "member"})
	must(t, err)
	p, err := l.svc.Person(ctx, "acme", "ada")
	must(t, err)
	var texts []string
	for i, name := range []string{"ada", "nobody", "gone", "invited", p.ID, ""} {
		_, err := l.svc.LogIn(ctx, Login{Name: name, Password: "wrong wrong wrong", Source: fmt.Sprintf("192.0.2.%d", i)})
		code(t, err, CodeBadLogin)
		texts = append(texts, err.Error())
	}
	// The right password of a disabled account, and an id in the place of a login, read the same.
	for i, name := range []string{"gone", p.ID} {
		_, err := l.svc.LogIn(ctx, Login{Name: name, Password: password, Source: fmt.Sprintf("192.0.2.2%d", i)})
		texts = append(texts, err.Error())
	}
	if len(slices.Compact(texts)) != 1 {
		t.Errorf("different answers: %q", texts)
	}
	if !l.audited("acme", "person.login", "refused") || !l.audited(Platform, "person.login", "refused") {
		t.Error("not in the audit")
	}
}

// TestGuessing slows one source down for one account, and nobody else.
func TestGuessing(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ada := l.person("acme", "ada", Member)
	known := l.svc.deviceValue(ada.ID, l.clock())
	try := func(source, device, pw string) error {
		_, err := l.svc.LogIn(ctx, Login{Name: "ada", Password: pw, Source: source, Device: device})
		return err
	}
	for range freeFailures {
		code(t, try("203.0.113.9", "", "wrong"), CodeBadLogin)
	}
	code(t, try("203.0.113.9", "", password), control.CodeRateLimited) // even with the right one
	if err := try("192.0.2.5", "", password); err != nil {
		t.Errorf("from elsewhere: %v", err)
	}
	if err := try("203.0.113.9", known, password); err != nil {
		t.Errorf("from the same address, in a browser that the account knows: %v", err)
	}
	code(t, try("203.0.113.9", l.svc.deviceValue("p-other", l.clock()), password), control.CodeRateLimited)
	l.advance(firstDelay)
	code(t, try("203.0.113.9", "", "wrong"), CodeBadLogin)
	l.advance(firstDelay)
	code(t, try("203.0.113.9", "", password), control.CodeRateLimited) // twice as long now
	l.advance(maxDelay)
	if err := try("203.0.113.9", "", password); err != nil {
		t.Errorf("after the delay: %v", err)
	}
	// Guesses that come at once do not all count as the first.
	errs := atOnce(40, func(int) error { return try("203.0.113.10", "", "wrong") })
	tried := 0
	for _, err := range errs {
		if registry.Code(err) == CodeBadLogin {
			tried++
		}
	}
	if tried > freeFailures {
		t.Errorf("%d guesses at once", tried)
	}
	// One source, many accounts.
	limited := 0
	for i := range freeOfSource + 20 {
		_, err := l.svc.LogIn(ctx, Login{Name: fmt.Sprintf("user%d", i), Password: "wrong", Source: "203.0.113.11"})
		if registry.Code(err) == control.CodeRateLimited {
			limited++
		}
	}
	if limited < 15 {
		t.Errorf("%d of %d refused", limited, freeOfSource+20)
	}
}

func TestGuardIsBounded(t *testing.T) {
	var g guard
	now := time.Now()
	for i := range guardKeys + 100 {
		must(t, g.try(now.Add(time.Duration(i)), ofAccount("password", fmt.Sprint(i), "192.0.2.1")))
	}
	if len(g.keys) > guardKeys {
		t.Errorf("%d keys", len(g.keys))
	}
}

func TestSessions(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	a := l.person("acme", "ada", Member)
	b := l.session("ada")
	if a.Session.secret == b.Session.secret || a.Session.CSRF() == b.Session.CSRF() {
		t.Fatal("two logins share a session")
	}
	own, err := l.svc.Sessions(ctx, a)
	must(t, err)
	if len(own) != 2 || own[0].Current == own[1].Current {
		t.Errorf("%+v", own)
	}
	eve := l.person("acme", "eve", Member)
	code(t, l.svc.EndSession(ctx, eve, b.Session.ID), control.CodeNotFound)
	must(t, l.svc.EndSession(ctx, a, b.Session.ID))
	_, err = l.svc.FromCookie(ctx, b.Session.secret)
	code(t, err, CodeNoSession)

	// The database has hashes only.
	must(t, l.reg.Store.View(ctx, func(tx store.Tx) error {
		s, err := tx.WebSession(ctx, hashOf(a.Session.secret))
		if err != nil || s.Person != a.ID {
			t.Errorf("%+v %v", s, err)
		}
		return nil
	}))

	// Idle sessions end, used ones live on, none longer than its whole life.
	for range int(SessionLife/(SessionIdle-time.Hour)) - 1 {
		l.advance(SessionIdle - time.Hour)
		if _, err := l.svc.FromCookie(ctx, a.Session.secret); err != nil {
			t.Fatalf("after %v: %v", l.clock(), err)
		}
	}
	l.advance(SessionIdle - time.Hour)
	_, err = l.svc.FromCookie(ctx, a.Session.secret)
	code(t, err, CodeNoSession)
	c := l.session("ada")
	l.advance(SessionIdle + time.Minute)
	_, err = l.svc.FromCookie(ctx, c.Session.secret)
	code(t, err, CodeNoSession)
	must(t, l.svc.purge(ctx))
	must(t, l.reg.Store.View(ctx, func(tx store.Tx) error {
		vs, err := tx.WebSessions(ctx, a.ID)
		if len(vs) != 0 {
			t.Errorf("%d expired sessions are kept", len(vs))
		}
		return err
	}))

	for _, bad := range []string{"", "x", a.Session.secret[1:], c.Session.ID} {
		_, err := l.svc.FromCookie(ctx, bad)
		code(t, err, CodeNoSession)
	}
}

func TestPasswordChangeEndsSessions(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	here := l.person("acme", "ada", Member)
	there := l.session("ada")
	const next = "marble tunnel seven owls"
	_, err := l.svc.ChangePassword(ctx, here, "wrong wrong wrong", next, "192.0.2.1")
	code(t, err, CodeBadLogin)
	_, err = l.svc.ChangePassword(ctx, here, password, "short", "192.0.2.1")
	code(t, err, control.CodeInvalid)
	fresh, err := l.svc.ChangePassword(ctx, here, password, next, "192.0.2.1")
	must(t, err)
	for _, old := range []*Principal{here, there} {
		_, err := l.svc.FromCookie(ctx, old.Session.secret)
		code(t, err, CodeNoSession)
	}
	_, err = l.svc.FromCookie(ctx, fresh.secret)
	must(t, err)
	_, err = l.svc.LogIn(ctx, Login{Name: "ada", Password: password, Source: "192.0.2.1"})
	code(t, err, CodeBadLogin)
	_, err = l.svc.LogIn(ctx, Login{Name: "ada", Password: next, Source: "192.0.2.1"})
	must(t, err)
	// A token can not change it.
	token, err := l.svc.CreateMyToken(ctx, l.person("acme", "bob", Member), control.CreateAPIToken{Name: "x"})
	must(t, err)
	bob, err := l.svc.Authenticate(ctx, token.Token, "192.0.2.1")
	must(t, err)
	_, err = l.svc.ChangePassword(ctx, bob, password, next, "192.0.2.1")
	code(t, err, control.CodeForbidden)
}

func TestCookies(t *testing.T) {
	l := newLab(t)
	ada := l.person("acme", "ada", Member)
	w := headers{http.Header{}}
	s := *ada.Session
	s.device = "x"
	SetCookie(w, &s)
	cookies := (&http.Response{Header: w.h}).Cookies()
	if len(cookies) != 2 {
		t.Fatalf("%v", cookies)
	}
	for _, c := range cookies {
		if len(c.Name) < 7 || c.Name[:7] != "__Host-" || !c.Secure || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Domain != "" {
			t.Errorf("%+v", c)
		}
	}
	r, err := http.NewRequest("GET", "https://platform.example/", nil)
	must(t, err)
	r.AddCookie(cookies[0])
	if p, err := l.svc.FromRequest(r); err != nil || p.ID != ada.ID {
		t.Errorf("%+v %v", p, err)
	}
	if err := ada.Session.CheckCSRF(ada.Session.CSRF()); err != nil {
		t.Error(err)
	}
	other := l.session("ada")
	for _, bad := range []string{"", "x", other.Session.CSRF(), ada.Session.secret} {
		if err := ada.Session.CheckCSRF(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

type headers struct{ h http.Header }

func (h headers) Header() http.Header         { return h.h }
func (h headers) Write(b []byte) (int, error) { return len(b), nil }
func (h headers) WriteHeader(int)             {}

// node enrols nothing: it is the row of a client.
func (l *lab) client(by *Principal, org, name string) *store.Node {
	l.t.Helper()
	n, err := l.svc.CreateMyClient(l.t.Context(), by, org, control.CreateNode{Name: name})
	must(l.t, err)
	return l.row(n.ID)
}

func (l *lab) row(id string) (n *store.Node) {
	l.t.Helper()
	must(l.t, l.reg.Store.View(l.t.Context(), func(tx store.Tx) (err error) {
		n, err = tx.Node(l.t.Context(), id)
		return err
	}))
	return n
}

// TestGuessingIsTold: a source that guesses stands in the audit of the person's home, once, and not with what it typed.
func TestGuessingIsTold(t *testing.T) {
	l := newLab(t)
	l.person("acme", "ada", Admin)
	count := func(org string) (n int) {
		t.Helper()
		es, err := l.reg.Audit(t.Context(), org, 0, 1000)
		must(t, err)
		for _, e := range es {
			if strings.Contains(fmt.Sprint(e), "hunter2") {
				t.Errorf("what was typed is in the audit: %+v", e)
			}
			if e.Action == "guessing.slow-down" {
				n++
				if e.Actor != "198.51.100.7" || e.Result != "refused" {
					t.Errorf("%+v", e)
				}
			}
		}
		return n
	}
	guess := func(name string, times int) {
		for range times {
			_, err := l.svc.LogIn(t.Context(), Login{Name: name, Password: "wrong hunter2", Source: "198.51.100.7", Agent: "test"})
			if err == nil {
				t.Fatal("logged in")
			}
		}
	}
	guess("ada", freeFailures)
	if n := count("acme"); n != 0 {
		t.Errorf("%d alerts before it has to wait", n)
	}
	guess("ada", 10)
	if n := count("acme"); n != 1 {
		t.Errorf("%d alerts, want 1", n)
	}
	l.advance(2 * time.Hour)
	guess("hunter2", 20)
	if n := count(Platform); n != 1 {
		t.Errorf("%d alerts of an account that nobody has, want 1 in the platform's own log", n)
	}
}
