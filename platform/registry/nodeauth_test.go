package registry

import (
	"errors"
	"testing"
	"time"

	"sallyway/internal/identity"
)

func TestAccessKey(t *testing.T) {
	a := &accessKey{secret: []byte("0123456789abcdef0123456789abcdef")}
	s := Session{Node: identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}, Expires: 1234}
	token := a.issue(s)
	if got, err := a.parse(token); err != nil || *got != s {
		t.Fatalf("%+v %v", got, err)
	}
	for i := range token {
		bad := []byte(token)
		bad[i]++
		if got, err := a.parse(string(bad)); err == nil && *got != s {
			t.Fatalf("byte %d changed: %+v", i, got)
		}
	}
	other := &accessKey{secret: []byte("another")}
	if _, err := other.parse(token); err == nil {
		t.Error("another platform takes the token")
	}
}

func FuzzAccessToken(f *testing.F) {
	a := &accessKey{secret: []byte("0123456789abcdef0123456789abcdef")}
	good := a.issue(Session{Expires: 1})
	f.Add(good)
	f.Add("swn1..")
	f.Add("swn1.e30.AAAA")
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := a.parse(s); err == nil && s != good && *got != (Session{Expires: 1}) {
			t.Errorf("%q is taken as %+v", s, got)
		}
	})
}

func FuzzAssertion(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhL2NsaWVudC9jLTEiLCJpc3MiOiJhL2NsaWVudC9jLTEifQ.AAAA")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	f.Fuzz(func(t *testing.T, s string) {
		n, claims, _, err := parseAssertion(s)
		if err == nil && (n.Validate() != nil || claims.Issuer != n.String()) {
			t.Errorf("%q is read as %v", s, n)
		}
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Errorf("%q: %v is no refusal", s, err)
		}
	})
}

func TestCanonicalURL(t *testing.T) {
	for in, want := range map[string]string{
		"https://H.example": "https://h.example", "https://h.example:443/": "https://h.example", "https://h:8443": "https://h:8443",
		"http://h:80": "http://h", "http://h:443": "http://h:443", "https://[::1]:443": "https://[::1]", "h": "", "ftp://h": "", "": "",
	} {
		if got, err := CanonicalURL(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
}

func TestRefusalsAreCounted(t *testing.T) {
	var a aggregate
	now := time.Now()
	s := sort{org: "acme", action: "node.enrol", code: "token_used", source: "192.0.2.1"}
	for i := range 5 {
		if first := a.note(s, now); first != (i == 0) {
			t.Errorf("refusal %d: first %t", i, first)
		}
	}
	if got := a.take(now, false); got != nil {
		t.Errorf("taken before the window is over: %v", got)
	}
	if got := a.take(now.Add(refusalWindow), false); got[s] != 5 {
		t.Errorf("%v", got)
	}
	many := 0
	for i := range 3 * refusalSorts {
		s.source = time.Duration(i).String()
		if a.note(s, now) {
			many++
		}
	}
	if many > refusalSorts+1 {
		t.Errorf("%d entries for a flood of sources, limit %d", many, refusalSorts+1)
	}
}
