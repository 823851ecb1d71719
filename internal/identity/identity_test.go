package identity

import (
	"net/url"
	"strings"
	"testing"
)

func TestParseNode(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, s := range []string{
		"acme/client/c-1", "acme/gateway/g-7k3m9x2pq4ra", "a/relay/r", "acme/site/g-1", "acme/platform/p-1", "acme/policy/p-1",
		"platform.shared/relay/r-1", long + "/client/" + long, "0/client/0",
	} {
		n, err := ParseNode(s)
		if err != nil || n.String() != s || n.IsZero() {
			t.Errorf("ParseNode(%q) = %v, %v", s, n, err)
		}
		if back, err := ParseURI(n.URI()); err != nil || back != n {
			t.Errorf("ParseURI(%q) = %v, %v", n.URI(), back, err)
		}
	}
	for _, s := range []string{
		"", "acme", "acme/client", "acme/client/c-1/x", "/client/c-1", "acme//c-1", "acme/client/", "acme/admin/c-1", "acme/Client/c-1",
		"Acme/client/c-1", "acme/client/C-1", "-acme/client/c-1", "acme-/client/c-1", "acme/client/-", "acme/client/c_1", "acme/client/c 1",
		"a.b/client/c-1", "platform.other/relay/r-1", "acme/client/c.1", long + "a/client/c-1", "acme/client/c-1\n", "acme/client/c\x00",
		"acme/client/\u212a", "../client/c-1",
	} {
		if n, err := ParseNode(s); err == nil {
			t.Errorf("ParseNode(%q) = %v, want an error", s, n)
		}
	}
	if !(Node{}).IsZero() {
		t.Error("the zero Node is somebody")
	}
	if got := (Node{"acme", Gateway, "g-1"}).ServerName(); got != "g-1.acme.sallyway" {
		t.Errorf("server name %q", got)
	}
}

func TestParseNodeErrorsAreBounded(t *testing.T) {
	huge := strings.Repeat("x", 1<<20)
	for _, s := range []string{huge, huge + "/client/c", "acme/" + huge + "/c", "acme/client/" + huge} {
		_, err := ParseNode(s)
		if err == nil || len(err.Error()) > 300 {
			t.Errorf("error of %d bytes repeats its input", len(err.Error()))
		}
	}
	if _, err := ParseURI(&url.URL{Scheme: "spiffe", Host: huge, Path: "/"}); err == nil || len(err.Error()) > 300 {
		t.Error("ParseURI's error repeats its input")
	}
}

func TestParseURIRefuses(t *testing.T) {
	for _, s := range []string{
		"https://acme.sallyway/client/c-1", "spiffe://acme/client/c-1", "spiffe://acme.example/client/c-1", "spiffe://sallyway/client/c-1",
		"spiffe://.sallyway/client/c-1", "spiffe://acme.sallyway.evil/client/c-1", "spiffe://ACME.sallyway/client/c-1",
		"spiffe://acme.sallyway:1/client/c-1", "spiffe://u@acme.sallyway/client/c-1", "spiffe://u:p@acme.sallyway/client/c-1",
		"spiffe://acme.sallyway/client/c-1?x", "spiffe://acme.sallyway/client/c-1?", "spiffe://acme.sallyway/client/c-1#x",
		"spiffe://acme.sallyway/client/c-1/", "spiffe://acme.sallyway//client/c-1", "spiffe://acme.sallyway/client", "spiffe://acme.sallyway",
		"spiffe://acme.sallyway/client%2Fc-1", "spiffe://acme.sallyway/client/c%2D1", "spiffe:acme.sallyway/client/c-1", "/client/c-1", "",
		"spiffe://b.acme.sallyway/client/c-1", "spiffe://acme.sallyway/x/../client/c-1", "spiffe://platform.sallyway.sallyway/client/c-1",
	} {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := ParseURI(u); err == nil {
			t.Errorf("ParseURI(%q) = %v, want an error", s, n)
		}
	}
}

func FuzzParseNode(f *testing.F) {
	for _, s := range []string{"acme/client/c-1", "platform.shared/relay/r-1", "a/b/c", "//", "acme/client/c-1/x", "ACME/client/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseNode(s)
		if err != nil {
			if len(err.Error()) > 500 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		if n.String() != s || n.Validate() != nil {
			t.Fatalf("ParseNode(%q) = %v", s, n)
		}
		if back, err := ParseURI(n.URI()); err != nil || back != n {
			t.Fatalf("%v does not survive its URI: %v, %v", n, back, err)
		}
	})
}

// What ParseURI takes has one spelling: two URIs that differ never name the same node.
func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"spiffe://acme.sallyway/client/c-1", "spiffe://acme.sallyway/client/c-1?", "spiffe://acme.sallyway/client/c%2d1", "spiffe://platform.shared.sallyway/relay/r",
		"spiffe://acme.sallyway/client/c-1#", "spiffe://@acme.sallyway/client/c-1", "spiffe:///a/b", "x",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		n, err := ParseURI(u)
		if err != nil {
			return
		}
		if n.Validate() != nil || n.URI().String() != u.String() {
			t.Fatalf("ParseURI(%q) = %v, whose URI is %q", s, n, n.URI())
		}
	})
}

func TestNewID(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range Kinds {
		for range 200 {
			id := NewID(k)
			if len(id) != 14 || id[0] != k[0] || id[1] != '-' || !ValidLabel(id) {
				t.Fatalf("NewID(%s) = %q", k, id)
			}
			if seen[id] {
				t.Fatalf("%q twice", id)
			}
			seen[id] = true
		}
	}
	// All 32 letters of the alphabet appear: the ids are random in every place, not a counter.
	letters := map[rune]bool{}
	for id := range seen {
		for _, r := range id[2:] {
			letters[r] = true
		}
	}
	if len(letters) != 32 {
		t.Errorf("ids use %d letters, want 32", len(letters))
	}
}
