package admin

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/platform"
	"sallyway/platform/people"
)

const password = "lamp orchid gravel tuesday"

// inBrowser logs a person in as the pages do.
func inBrowser(t *testing.T, srv *platform.Server, login string) *people.Principal {
	t.Helper()
	svc := srv.People()
	r, err := svc.LogIn(t.Context(), people.Login{Name: login, Password: password, Source: "192.0.2.1"})
	if err != nil {
		t.Fatal(err)
	}
	w := cookieWriter{http.Header{}}
	people.SetCookie(w, r.Session)
	p, err := svc.FromCookie(t.Context(), (&http.Response{Header: w.h}).Cookies()[0].Value)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

type cookieWriter struct{ h http.Header }

func (c cookieWriter) Header() http.Header         { return c.h }
func (c cookieWriter) Write(b []byte) (int, error) { return len(b), nil }
func (c cookieWriter) WriteHeader(int)             {}

// watched runs a command line in the background. said waits until it has written what matches to standard error.
func watched(t *testing.T, a *app, line ...string) (said func(want *regexp.Regexp) []string, done chan int) {
	t.Helper()
	r, w := io.Pipe()
	done = make(chan int, 1)
	go func() {
		root := a.command()
		root.SetArgs(line)
		root.SetOut(io.Discard)
		root.SetErr(w)
		err := root.ExecuteContext(context.Background())
		w.CloseWithError(err)
		done <- daemon.ExitCode(err)
	}()
	parts := make(chan string, 1000)
	go func() { // ends with the command
		defer close(parts)
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if err != nil {
				return
			}
			parts <- string(buf[:n])
		}
	}()
	all := ""
	return func(want *regexp.Regexp) []string {
		t.Helper()
		for part := range parts {
			all += part
			if m := want.FindStringSubmatch(all); m != nil {
				return m
			}
		}
		t.Fatalf("it ended after saying %q", all)
		return nil
	}, done
}

func ended(t *testing.T, done chan int, want int) {
	t.Helper()
	select {
	case got := <-done:
		if got != want {
			t.Fatalf("exit code %d, want %d", got, want)
		}
	case <-time.After(60 * time.Second):
		t.Fatal("it does not end")
	}
}

// TestLoginOfPersons logs in with a code and by browser against the real platform, and works as that person.
func TestLoginOfPersons(t *testing.T) {
	srv, do := realPlatform(t)
	do(0, "login --token-file "+srv.AdminFile())
	if _, err := srv.People().CreatePerson(t.Context(), everything, "default", control.CreatePerson{Login: "ada", Role: "member", Password: password}); err != nil {
		t.Fatal(err)
	}
	ada := inBrowser(t, srv, "ada")
	credentials := os.Getenv("SALLYWAY_CREDENTIALS")

	// With a code, typed into a browser elsewhere.
	said, done := watched(t, &app{poll: 10 * time.Millisecond}, "login", "--url", srv.URL(), "--ca-pin", srv.Pin(), "--device")
	userCode := said(regexp.MustCompile(`type this code:\n\n +([0-9A-Z]{4}-[0-9A-Z]{4})\n`))[1]
	w, err := srv.People().Device(t.Context(), ada, userCode)
	if err != nil || !strings.HasPrefix(w.Client, "sallyway of ") {
		t.Fatalf("%+v %v", w, err)
	}
	if err := srv.People().DecideDevice(t.Context(), ada, userCode, true); err != nil {
		t.Fatal(err)
	}
	ended(t, done, 0)
	if st, err := os.Stat(credentials); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st, err)
	}
	do(0, "whoami", "person ada", "default", "member")
	do(1, "gateway list", "no right")
	do(1, "user list", "no right")
	do(0, "client enrol laptop", "sallyway connect", "laptop")
	do(0, "client enrol laptop", "fresh token")
	do(0, "client mine", "laptop")
	do(0, "token create script --scope self:read", "swu1.")
	do(0, "token list", "script", "login: sallyway of")

	// Denied: the reason, and the old login stays.
	said, done = watched(t, &app{poll: 10 * time.Millisecond}, "login", "--url", srv.URL(), "--ca-pin", srv.Pin(), "--device")
	userCode = said(regexp.MustCompile(`([0-9A-Z]{4}-[0-9A-Z]{4})\n`))[1]
	if err := srv.People().DecideDevice(t.Context(), ada, userCode, false); err != nil {
		t.Fatal(err)
	}
	ended(t, done, daemon.ExitDegraded)
	do(0, "whoami", "person ada")

	// Logging out ends the token at the platform, too.
	b, err := os.ReadFile(credentials)
	if err != nil {
		t.Fatal(err)
	}
	var kept control.AdminCredential
	if err := json.Unmarshal(b, &kept); err != nil || !strings.HasPrefix(kept.Token, personToken) {
		t.Fatalf("%v", err)
	}
	do(0, "logout", "Logged out")
	if _, err := srv.People().Authenticate(t.Context(), kept.Token, "192.0.2.1"); err == nil {
		t.Error("the token outlives the logout")
	}

	// By the browser of this host. What other programs of the host send there changes nothing.
	opened := make(chan string, 1)
	_, done = watched(t, &app{poll: auditPoll, browse: func(to string) { opened <- to }}, "login", "--url", srv.URL(), "--ca-pin", srv.Pin(), "--browser")
	u, err := url.Parse(<-opened)
	if err != nil {
		t.Fatal(err)
	}
	l, err := people.ParseProgramLogin(u.Query())
	if err != nil || u.Path != "/login/program" {
		t.Fatalf("%s: %v", u, err)
	}
	for _, forged := range []string{"?code=x", "?code=x&state=" + url.QueryEscape(strings.Repeat("x", 43))} {
		if status := fetch(t, l.Redirect+forged); status != http.StatusForbidden {
			t.Errorf("%s: %d", forged, status)
		}
	}
	back, err := srv.People().ApproveProgram(t.Context(), ada, l)
	if err != nil {
		t.Fatal(err)
	}
	if status := fetch(t, back); status != http.StatusOK {
		t.Errorf("%d", status)
	}
	ended(t, done, 0)
	do(0, "whoami", "person ada")
	do(0, "logout")

	// Denied in the browser; and an answer that claims to be of another platform.
	for _, spoil := range []func(*people.ProgramLogin) string{
		srv.People().DenyProgram,
		func(l *people.ProgramLogin) string {
			return l.Redirect + "?" + url.Values{"code": {"x"}, "state": {l.State}, "iss": {"https://evil.example"}}.Encode()
		},
	} {
		_, done = watched(t, &app{poll: auditPoll, browse: func(to string) { opened <- to }}, "login", "--url", srv.URL(), "--ca-pin", srv.Pin(), "--browser")
		u, err := url.Parse(<-opened)
		if err != nil {
			t.Fatal(err)
		}
		l, err := people.ParseProgramLogin(u.Query())
		if err != nil {
			t.Fatal(err)
		}
		fetch(t, spoil(l))
		ended(t, done, daemon.ExitDegraded)
	}
}

func fetch(t *testing.T, to string) int {
	t.Helper()
	resp, err := http.Get(to)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// everything may do all, as the platform's own token.
var everything = &people.Principal{Kind: people.KindToken, Name: "test", Actor: "token:test", Grants: []people.Grant{{Org: people.Platform, Scopes: people.Scopes{"*"}}}}

// TestPeopleVerbs walks the verbs about people, accounts and tokens against the real platform.
func TestPeopleVerbs(t *testing.T) {
	srv, do := realPlatform(t)
	do(2, "login", "--url")
	do(2, "login --url "+srv.URL()+" --device --browser", "not both")
	do(0, "login --token-file "+srv.AdminFile())
	do(0, "whoami", "token admin", "(all)")
	do(0, "user list", "invite somebody")
	do(0, "user create ada@example.com --role admin --name Ada", "admin of organization default", srv.URL()+"/invite#")
	do(1, "user create ada@example.com", "already")
	do(2, "user create Bad!Login", "no login")
	do(2, "user create x --role king", "role")
	do(0, "user update ada@example.com --role owner", "owner of organization default")
	do(1, "user update ada@example.com --role member", "last owner")
	do(0, "user create bob --role member")
	do(0, "user list", "ada@example.com", "bob", "owner")
	do(0, "user show bob", "member of default")
	do(0, "user invite bob", "/invite#")
	do(0, "user disable bob", "disabled")
	do(0, "user enable bob", "enabled")
	do(0, "user forget-factor bob", "bob")
	do(0, "group create staff --member person:bob", "1 member")
	do(0, "group show staff", "person:bob")
	do(0, "group update staff --add person:ada@example.com", "2 members")
	do(0, "user delete bob", "no more")
	do(1, "user show bob", "no user")
	do(0, "user create root@example.com --role owner --platform", "of the platform")
	do(0, "user list --platform", "root@example.com", "ada@example.com")
	do(2, "service-account create ci", "--scope")
	do(2, "service-account create ci --scope everything", "no scope")
	do(0, "service-account create ci --scope gateways:read", "service account ci")
	do(0, "service-account token ci --name x --expires 24h", "sws1.")
	do(0, "service-account tokens ci", "active")
	do(0, "service-account update ci --state off", "disabled")
	do(0, "service-account list", "gateways:read", "disabled")
	do(0, "service-account delete ci", "deleted")
	do(0, "token create monitoring --of organization --scope *:read", "swt1.")
	do(0, "token list --of organization", "monitoring", "*:read")
	do(2, "token list --of nobody", "--of")
	do(1, "token create mine", "persons")
	do(1, "provider create corp --issuer https://127.0.0.1:1 --client-id x", "single sign-on")
	do(0, "provider list", "no single sign-on")
}
