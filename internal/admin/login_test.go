package admin

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pion/stun/v4"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

// tlsPlatform answers with the organizations, over TLS with a certificate of its own, to who has the token.
func tlsPlatform(t *testing.T, orgs string) (url, pin string) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+apiToken {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusUnauthorized)
			w.Write([]byte(`{"detail":"unknown token","code":"token_unknown"}`))
			return
		}
		w.Write([]byte(orgs))
	}))
	s.Config.ErrorLog = nil
	t.Cleanup(s.Close)
	return s.URL, identity.CertificateKeyHash(s.Certificate()).String()
}

func TestLogin(t *testing.T) {
	url, pin := tlsPlatform(t, `{"items":[`+orgJSON+`]}`)
	whole, _ := json.Marshal(control.AdminCredential{URL: url, Pin: pin, Token: apiToken})
	wrongPin, _ := json.Marshal(control.AdminCredential{URL: url, Pin: strings.Repeat("ab", 32), Token: apiToken})
	stale, _ := json.Marshal(control.AdminCredential{URL: url, Pin: pin, Token: "other"})
	enrolment := control.Token{URL: url, Node: identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}, Secret: make([]byte, 32)}.String()
	tests := []struct {
		name  string
		stdin string
		args  []string
		code  int
		want  string // part of standard output or error
		org   string // kept, when code is 0
	}{
		{"admin.token on standard input", string(whole) + "\n", nil, 0, "Logged in to " + url + ", organization acme.", "acme"},
		{"bare token", apiToken, []string{"--url", url, "--ca-pin", pin}, 0, "Logged in", "acme"},
		{"with organization", string(whole), []string{"--org", "acme"}, 0, "organization acme", "acme"},
		{"unknown organization", string(whole), []string{"--org", "nope"}, 2, "there are: acme", ""},
		{"bare token without URL", apiToken, nil, 2, "--url", ""},
		{"bare token without pin", apiToken, []string{"--url", url}, 1, "authority that this host does not know", ""},
		{"another pin", string(wrongPin), nil, 1, "intercepts", ""},
		{"pin that is none", string(whole), []string{"--ca-pin", "xyz"}, 2, "CA pin", ""},
		{"stale token", string(stale), nil, 1, "platformd admin token", ""},
		{"enrolment token", enrolment, []string{"--url", url}, 2, "which is for a node", ""},
		{"damaged file", `{"url":`, nil, 2, "damaged", ""},
		{"nothing", "", nil, 2, "no token", ""},
		{"two words", "a b", []string{"--url", url}, 2, "no token", ""},
		{"not a URL", apiToken, []string{"--url", "platform.example"}, 2, "https://host", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "deep", "credentials.json")
			t.Setenv("SALLYWAY_CREDENTIALS", path)
			t.Setenv("SALLYWAY_ORG", "")
			r := sallyway(t, tt.stdin, append([]string{"login", "--token-file", "-"}, tt.args...)...)
			if r.code != tt.code || !strings.Contains(r.out+r.errors, tt.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s%s", r.code, tt.code, tt.want, r.out, r.errors)
			}
			for _, secret := range []string{apiToken, enrolment} {
				if strings.Contains(r.out+r.errors, secret) {
					t.Errorf("a token is shown:\n%s%s", r.out, r.errors)
				}
			}
			fi, err := os.Stat(path)
			if tt.code != 0 {
				if err == nil {
					t.Error("a failed login was kept")
				}
				return
			}
			if err != nil || fi.Mode().Perm() != 0o600 {
				t.Fatalf("kept login: %v, %v", fi, err)
			}
			c, err := loadCredential()
			if err != nil || c.URL != url || c.Pin != pin || c.Token != apiToken || c.Org != tt.org {
				t.Errorf("kept %+v, %v", c, err)
			}
			if r := sallyway(t, "", "organization", "list", "--json"); r.code != 0 || !strings.Contains(r.out, `"acme"`) {
				t.Errorf("first verb after the login: %+v", r)
			}
			if r := sallyway(t, "", "logout"); r.code != 0 {
				t.Errorf("logout: %+v", r)
			}
			if _, err := os.Stat(path); err == nil {
				t.Error("logout left the login")
			}
		})
	}
}

func TestLoginFromFile(t *testing.T) {
	url, pin := tlsPlatform(t, `{"items":[]}`)
	t.Setenv("SALLYWAY_CREDENTIALS", filepath.Join(t.TempDir(), "credentials.json"))
	b, _ := json.Marshal(control.AdminCredential{URL: url, Pin: pin, Token: apiToken})
	path := filepath.Join(t.TempDir(), "admin.token")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := sallyway(t, "", "login", "--token-file", path); r.code != 0 || !strings.Contains(r.out, "organization default") {
		t.Errorf("%+v", r)
	}
	if r := sallyway(t, "", "login", "--token-file", path+".none"); r.code != 2 || !strings.Contains(r.errors, "read the token") {
		t.Errorf("%+v", r)
	}
}

// stunServer answers Binding requests on loopback.
func stunServer(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			m := &stun.Message{Raw: append([]byte{}, b[:n]...)}
			if m.Decode() != nil {
				continue
			}
			addr := from.(*net.UDPAddr)
			answer, err := stun.Build(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess,
				&stun.XORMappedAddress{IP: addr.IP, Port: addr.Port}, stun.Fingerprint)
			if err == nil {
				_, _ = conn.WriteTo(answer.Raw, from)
			}
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return conn.LocalAddr().String()
}

func TestStun(t *testing.T) {
	one, two := stunServer(t), stunServer(t)
	t.Setenv("SALLYWAY_CREDENTIALS", filepath.Join(t.TempDir(), "none.json"))
	r := sallyway(t, "", "stun", one, two, "--json")
	var ans stunAnswer
	if err := json.Unmarshal([]byte(r.out), &ans); r.code != 0 || err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if len(ans.Bindings) != 2 || ans.Bindings[0].Server.String() != one || ans.Bindings[1].Reflexive != ans.Local || ans.NAT != "none" {
		t.Errorf("%+v", ans)
	}

	// A relay by its name on the platform.
	host, port, _ := net.SplitHostPort(two)
	f := newFakeAPI(t, exchange{"GET", "/api/v1/orgs/acme/relays/fra-1", "", 0, `{"name":"fra-1","host":"` + host + `","port":` + port + `}`})
	loggedIn(t, f.server.URL, "acme")
	if r := sallyway(t, "", "stun", "fra-1"); r.code != 0 || !strings.Contains(r.out, two) {
		t.Errorf("%+v", r)
	}
	if r := sallyway(t, "", "stun", "127.0.0.1:0"); r.code != 2 || !strings.Contains(r.errors, "not a port") {
		t.Errorf("%+v", r)
	}
}
