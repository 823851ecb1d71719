package oidc

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// liar is a provider that says what a test has it say. The real one is in the tests of package people.
type liar struct {
	*httptest.Server
	key    *rsa.PrivateKey
	claims map[string]any         // of the ID token; iss, aud, sub, exp and iat have defaults
	sign   func() jose.SigningKey // nil is the provider's key
	doc    map[string]any         // added to the discovery document
	form   url.Values             // that the token endpoint got last
	bare   bool                   // send no ID token
}

// signing is the provider's key, one for all tests.
var signing = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func newLiar(t *testing.T) *liar {
	t.Helper()
	key := signing()
	l := &liar{key: key, claims: map[string]any{}, doc: map[string]any{}}
	mux := http.NewServeMux()
	l.Server = httptest.NewServer(mux)
	t.Cleanup(l.Close)
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		doc := map[string]any{
			"issuer": l.URL, "authorization_endpoint": l.URL + "/auth", "token_endpoint": l.URL + "/token", "jwks_uri": l.URL + "/keys",
			"id_token_signing_alg_values_supported": []string{"RS256", "HS256", "none"},
		}
		for k, v := range l.doc {
			doc[k] = v
		}
		answer(w, doc)
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "RS256", Use: "sig"}}})
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		l.form = r.Form
		out := map[string]any{"access_token": "at", "token_type": "Bearer"}
		if !l.bare {
			out["id_token"] = l.token(t)
		}
		answer(w, out)
	})
	return l
}

func (l *liar) token(t *testing.T) string {
	t.Helper()
	k := jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: l.key, KeyID: "k"}}
	if l.sign != nil {
		k = l.sign()
	}
	s, err := jose.NewSigner(k, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	claims := map[string]any{"iss": l.URL, "aud": "sallyway", "sub": "user-1", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "nonce": "right nonce"}
	for k, v := range l.claims {
		if v == nil {
			delete(claims, k)
			continue
		}
		claims[k] = v
	}
	raw, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func discover(t *testing.T, l *liar) *Provider {
	t.Helper()
	p, err := Discover(t.Context(), l.Client(), Config{Issuer: l.URL, ClientID: "sallyway", Secret: "client secret", Redirect: "https://platform.example/cb", Scopes: []string{"email"}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestTokensThatLie: each says one thing that is not so.
func TestTokensThatLie(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	wrongHash := base64.RawURLEncoding.EncodeToString(make([]byte, 16))
	for name, tc := range map[string]struct {
		claims map[string]any
		sign   func() jose.SigningKey
		want   error // nil is taken
	}{
		"nothing":                 {nil, nil, nil},
		"nonce":                   {map[string]any{"nonce": "another"}, nil, ErrNonce},
		"no nonce":                {map[string]any{"nonce": nil}, nil, ErrNonce},
		"issuer":                  {map[string]any{"iss": "https://evil.example"}, nil, ErrToken},
		"no issuer":               {map[string]any{"iss": nil}, nil, ErrToken},
		"audience":                {map[string]any{"aud": "another"}, nil, ErrToken},
		"no audience":             {map[string]any{"aud": nil}, nil, ErrToken},
		"audiences without party": {map[string]any{"aud": []string{"sallyway", "another"}}, nil, ErrToken},
		"another party":           {map[string]any{"aud": []string{"sallyway", "another"}, "azp": "another"}, nil, ErrToken},
		"our party":               {map[string]any{"aud": []string{"sallyway", "another"}, "azp": "sallyway"}, nil, nil},
		"expired":                 {map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}, nil, ErrToken},
		"not yet":                 {map[string]any{"nbf": time.Now().Add(time.Hour).Unix()}, nil, ErrToken},
		"nobody":                  {map[string]any{"sub": ""}, nil, ErrToken},
		"access token":            {map[string]any{"at_hash": wrongHash}, nil, ErrToken},
		"another key": {nil, func() jose.SigningKey {
			return jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: other, KeyID: "k"}}
		}, ErrToken},
		"the client's secret as key": {nil, func() jose.SigningKey {
			return jose.SigningKey{Algorithm: jose.HS256, Key: []byte(strings.Repeat("client secret", 3))}
		}, ErrToken},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLiar(t)
			l.claims, l.sign = tc.claims, tc.sign
			_, err := discover(t, l).Exchange(t.Context(), l.Client(), "code", "right nonce", "verifier")
			if !errors.Is(err, tc.want) || (tc.want == nil) != (err == nil) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "client secret") {
				t.Errorf("the secret shows: %v", err)
			}
		})
	}
	l := newLiar(t)
	l.bare = true
	if _, err := discover(t, l).Exchange(t.Context(), l.Client(), "code", "right nonce", "verifier"); !errors.Is(err, ErrToken) {
		t.Errorf("without ID token: %v", err)
	}
}

func TestRequests(t *testing.T) {
	l := newLiar(t)
	p := discover(t, l)
	verifier := NewVerifier()
	u, err := url.Parse(p.AuthURL("the state", "the nonce", verifier))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(verifier))
	want := url.Values{
		"client_id": {"sallyway"}, "redirect_uri": {"https://platform.example/cb"}, "response_type": {"code"}, "scope": {"openid email"}, "state": {"the state"}, "nonce": {"the nonce"},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"},
	}
	if got := u.Query(); got.Encode() != want.Encode() {
		t.Errorf("%v, want %v", got, want)
	}
	l.claims = map[string]any{"email": "a@b.example", "email_verified": "true", "name": "Ada", "groups": []string{"x", "y"}, "team": "z", "number": 7}
	c, err := p.Exchange(t.Context(), l.Client(), "the code", "right nonce", verifier)
	if err != nil {
		t.Fatal(err)
	}
	if l.form.Get("code") != "the code" || l.form.Get("code_verifier") != verifier || l.form.Get("redirect_uri") != "https://platform.example/cb" {
		t.Errorf("sent %v", l.form)
	}
	if c.Subject != "user-1" || c.Email != "a@b.example" || !c.EmailVerified || c.Name != "Ada" {
		t.Errorf("%+v", c)
	}
	if !slices.Equal(c.Strings("groups"), []string{"x", "y"}) || !slices.Equal(c.Strings("team"), []string{"z"}) || c.Strings("number") != nil || c.Strings("nothing") != nil {
		t.Errorf("%v %v", c.Strings("groups"), c.Strings("team"))
	}
	l.claims["email_verified"] = false
	if c, err = p.Exchange(t.Context(), l.Client(), "c", "right nonce", verifier); err != nil || c.EmailVerified {
		t.Errorf("%+v %v", c, err)
	}
}

// TestMixUp is RFC 9207: an answer that names another issuer, or none where one was promised.
func TestMixUp(t *testing.T) {
	l := newLiar(t)
	p := discover(t, l)
	for iss, ok := range map[string]bool{"": true, l.URL: true, "https://evil.example": false, l.URL + "/": false} {
		if err := p.CheckIssuer(iss); (err == nil) != ok {
			t.Errorf("%q: %v", iss, err)
		}
	}
	l.doc["authorization_response_iss_parameter_supported"] = true
	if err := discover(t, l).CheckIssuer(""); !errors.Is(err, ErrIssuer) {
		t.Errorf("promised and missing: %v", err)
	}
}

func TestDiscoveryThatLies(t *testing.T) {
	for name, doc := range map[string]map[string]any{
		"issuer":  {"issuer": "https://evil.example"},
		"no PKCE": {"code_challenge_methods_supported": []string{"plain"}},
	} {
		l := newLiar(t)
		l.doc = doc
		if _, err := Discover(t.Context(), l.Client(), Config{Issuer: l.URL, ClientID: "sallyway"}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := Discover(t.Context(), http.DefaultClient, Config{Issuer: "http://127.0.0.1:1", ClientID: "sallyway"}); err == nil {
		t.Error("a provider that is not there")
	}
}
