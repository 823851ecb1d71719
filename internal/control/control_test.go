package control

import (
	"strings"
	"testing"

	"sallyway/internal/identity"
)

func testToken() Token {
	return Token{
		URL: "https://platform.example", Pin: strings.Repeat("ab", 32), Node: identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"},
		Name: "office", Secret: []byte("0123456789abcdef0123456789abcdef"),
	}
}

func TestToken(t *testing.T) {
	want := testToken()
	got, err := ParseToken("\n " + want.String() + "\n")
	if err != nil || got.String() != want.String() || got.Node != want.Node {
		t.Fatalf("%+v, %v", got, err)
	}
	for name, change := range map[string]func(*Token){
		"short secret":    func(t *Token) { t.Secret = t.Secret[:31] },
		"no secret":       func(t *Token) { t.Secret = nil },
		"no node":         func(t *Token) { t.Node = identity.Node{} },
		"odd kind":        func(t *Token) { t.Node.Kind = "admin" },
		"org with slash":  func(t *Token) { t.Node.Org = "a/b" },
		"no URL":          func(t *Token) { t.URL = "" },
		"URL without TLS": func(t *Token) { t.URL = "ftp://x" },
	} {
		tok := testToken()
		change(&tok)
		if _, err := ParseToken(tok.String()); err == nil {
			t.Errorf("%s: parsed", name)
		}
	}
	s := want.String()
	for _, bad := range []string{"", "swe1.", s[5:], s[:len(s)-9], s + "!", "swe2." + s[5:], strings.ToLower(s)} {
		_, err := ParseToken(bad)
		if err == nil {
			t.Errorf("%.12q… parsed", bad)
			continue
		}
		if len(bad) > 20 && strings.Contains(err.Error(), bad[10:20]) {
			t.Errorf("the error repeats the token: %v", err)
		}
	}
}

// FuzzParseToken holds that what parses is whole, and comes out as it went in.
func FuzzParseToken(f *testing.F) {
	f.Add(testToken().String())
	f.Add("swe1.e30")
	f.Add("swe1.")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			return
		}
		if len(tok.Secret) != 32 || tok.Node.Validate() != nil {
			t.Fatalf("parsed %+v", tok.Node)
		}
		again, err := ParseToken(tok.String())
		if err != nil || again.Node != tok.Node || again.URL != tok.URL || string(again.Secret) != string(tok.Secret) {
			t.Fatalf("came out as %v, %v", again.Node, err)
		}
	})
}
