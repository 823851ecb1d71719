package auditfile

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/pki"
)

var began = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)

// log is an organization's chain as a platform would export it.
type log struct {
	t     *testing.T
	org   string
	root  *pki.Authority
	lines []string
	head  string
	seq   int64
	key   ed25519.PrivateKey
	keyID string
}

func (l *log) add(v any) {
	b, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	l.lines = append(l.lines, string(b))
}

func (l *log) entries(n int) {
	for range n {
		l.seq++
		e := &Entry{
			Type: TypeEntry, Seq: l.seq, At: began.Add(time.Duration(l.seq) * time.Microsecond), Actor: "token:admin", Action: "node.create", Object: "acme/client/c-1", Result: "ok",
			Detail: json.RawMessage(`{"big":9007199254740993,"name":"<laptop>"}`),
		}
		var err error
		if e.Hash, err = Hash(l.head, l.org, e); err != nil {
			l.t.Fatal(err)
		}
		l.head = e.Hash
		l.add(e)
	}
}

func (l *log) sign() {
	c := &Checkpoint{Type: TypeCheckpoint, Seq: l.seq, Hash: l.head, At: began.Add(time.Hour), Key: l.keyID}
	Sign(l.key, l.org, c)
	l.add(c)
}

// newLog is a chain of five entries, a signature, and two entries more.
func newLog(t *testing.T, org string) *log {
	t.Helper()
	l := &log{t: t, org: org}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	l.root, err = pki.NewRoot(org, began)
	must(err)
	ca, err := l.root.NewIntermediate(org, identity.Policy, began)
	must(err)
	public, key, err := ed25519.GenerateKey(rand.Reader)
	must(err)
	leaf, err := ca.Leaf(identity.Node{Org: org, Kind: identity.Policy, ID: identity.NewID(identity.Policy)}, public, began, pki.PolicyLife)
	must(err)
	l.key, l.keyID = key, identity.HashKey(public).String()
	l.add(Chain{Type: TypeChain, Format: Format, Org: org, Exported: began, Roots: string(identity.EncodeCertificates(l.root.Certificate))})
	l.entries(5)
	l.add(Key{Type: TypeKey, ID: l.keyID, Certificates: string(identity.EncodeCertificates(leaf, ca.Certificate, l.root.Certificate))})
	l.sign()
	l.entries(2)
	return l
}

func (l *log) file() string { return strings.Join(l.lines, "\n") + "\n" }

func (l *log) pin() identity.KeyHash { return identity.CertificateKeyHash(l.root.Certificate) }

func verify(t *testing.T, file string, o Options) *Report {
	t.Helper()
	r, err := Verify(strings.NewReader(file), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestVerifyGood(t *testing.T) {
	l := newLog(t, "acme")
	r := verify(t, l.file(), Options{Pins: []identity.KeyHash{l.pin()}})
	if !r.OK || !r.Pinned || r.Entries != 7 || r.Signed != 5 || r.Beyond() != 2 || r.Checkpoints != 1 || r.Org != "acme" {
		t.Errorf("%+v", r)
	}
	if r := verify(t, l.file(), Options{}); !r.OK || r.Pinned || !slices.Equal(r.Roots, []identity.KeyHash{l.pin()}) {
		t.Errorf("without a pin: %+v", r)
	}
}

// TestVerifyFindsChanges: whatever is done to the file is found, with the line where it shows.
func TestVerifyFindsChanges(t *testing.T) {
	l, other := newLog(t, "acme"), newLog(t, "other")
	pins := []identity.KeyHash{l.pin()}
	for name, c := range map[string]struct {
		change  func(lines []string) []string
		line    int
		problem string
	}{
		"an entry edited": {func(s []string) []string { s[2] = strings.Replace(s[2], "c-1", "c-2", 1); return s }, 3, "was changed"},
		"a number edited": {func(s []string) []string { s[2] = strings.Replace(s[2], "993", "992", 1); return s }, 3, "was changed"},
		"an entry edited, rehashed": {func(s []string) []string {
			var e Entry
			_ = json.Unmarshal([]byte(s[5]), &e)
			prev := e.Hash
			_ = prev
			var before Entry
			_ = json.Unmarshal([]byte(s[4]), &before)
			e.Actor = "nobody"
			e.Hash, _ = Hash(before.Hash, "acme", &e)
			b, _ := json.Marshal(e)
			s[5] = string(b)
			return s
		}, 8, "entries were changed"},
		"an entry removed":          {func(s []string) []string { return slices.Delete(s, 2, 3) }, 3, "removed"},
		"two entries swapped":       {func(s []string) []string { s[2], s[3] = s[3], s[2]; return s }, 3, "moved"},
		"an entry twice":            {func(s []string) []string { return slices.Insert(s, 3, s[2]) }, 4, "put in"},
		"a member added":            {func(s []string) []string { s[2] = `{"note":"x",` + s[2][1:]; return s }, 3, "edited"},
		"another chain's entry":     {func(s []string) []string { s[1] = other.lines[1]; return s }, 2, "does not belong"},
		"another chain's signature": {func(s []string) []string { s[7] = other.lines[7]; return s }, 8, "a key that the file does not have"},
		"another chain's key":       {func(s []string) []string { s[6] = other.lines[6]; return s }, 7, "not for signing the log of organization acme"},
		"another chain":             {func([]string) []string { return other.lines }, 1, "has the pin"},
		"the beginning removed":     {func(s []string) []string { return s[1:] }, 1, "begin"},
		"a signature forged":        {func(s []string) []string { s[7] = strings.Replace(s[7], `:00:00Z`, `:00:01Z`, 1); return s }, 8, "not good"},
		"cut off below a signature": {func(s []string) []string { return append(s[:5], s[6], s[7]) }, 7, "removed"},
		"a new type of line":        {func(s []string) []string { return append(s, `{"type":"x"}`) }, 11, "newer"},
		"not JSON":                  {func(s []string) []string { s[3] = s[3][:20]; return s }, 4, "not JSON"},
		"nothing":                   {func([]string) []string { return nil }, 1, "begin"},
	} {
		t.Run(name, func(t *testing.T) {
			lines := c.change(slices.Clone(l.lines))
			r := verify(t, strings.Join(lines, "\n")+"\n", Options{Pins: pins})
			if name == "nothing" {
				r = verify(t, "", Options{Pins: pins})
				c.problem = "empty"
			}
			if r.OK || r.Line != c.line || !strings.Contains(r.Problem, c.problem) {
				t.Errorf("line %d: %q, want line %d: %q", r.Line, r.Problem, c.line, c.problem)
			}
		})
	}
	// What is cut off behind the last signature leaves no trace in the file: the report says how many entries are beyond it.
	r := verify(t, strings.Join(l.lines[:9], "\n"), Options{Pins: pins})
	if !r.OK || r.Beyond() != 1 {
		t.Errorf("cut off: %+v", r)
	}
}

// TestVerifyMadeUp: a chain under a root of one's own is good in itself, and not under the pin of the real one.
func TestVerifyMadeUp(t *testing.T) {
	real, made := newLog(t, "acme"), newLog(t, "acme")
	if r := verify(t, made.file(), Options{Pins: []identity.KeyHash{real.pin()}}); r.OK {
		t.Error("a chain that somebody made up is taken for the organization's")
	}
	// The real root's certificate in the made-up file does not help: the key does not lead to it.
	made.lines[0] = real.lines[0]
	if r := verify(t, made.file(), Options{Pins: []identity.KeyHash{real.pin()}}); r.OK || !strings.Contains(r.Problem, "does not lead") {
		t.Errorf("%+v", r)
	}
}

func TestVerifyEarlier(t *testing.T) {
	l, other := newLog(t, "acme"), newLog(t, "acme")
	early := l.file()
	l.entries(3)
	l.sign()
	late := l.file()
	for _, c := range []struct{ name, file, earlier, problem string }{
		{"goes on", late, early, ""},
		{"the same", late, late, ""},
		{"cut off", early, late, "goes on with entry 8"},
		{"rewritten", late, other.file(), ""}, // the same entries: only the root differs
		{"another organization", late, newLog(t, "other").file(), "of another organization"},
		{"nothing", late, "", "empty"},
		{"damaged", late, early[:len(early)-30], "damaged"},
	} {
		r := verify(t, c.file, Options{Earlier: strings.NewReader(c.earlier)})
		if r.OK != (c.problem == "") || !strings.Contains(r.Problem, c.problem) || r.Earlier != r.OK {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
	rewritten := newLog(t, "acme")
	rewritten.lines, rewritten.head, rewritten.seq = rewritten.lines[:1], "", 0
	rewritten.entries(2)
	rewritten.org = "acme"
	e := Entry{Type: TypeEntry, Seq: 3, At: began, Actor: "x", Action: "y", Object: "z", Result: "ok", Detail: json.RawMessage(`{}`)}
	e.Hash, _ = Hash(rewritten.head, "acme", &e)
	rewritten.add(e)
	if r := verify(t, rewritten.file(), Options{Earlier: strings.NewReader(early)}); r.OK || !strings.Contains(r.Problem, "rewritten") || r.Line != 4 {
		t.Errorf("a chain that was rewritten: %+v", r)
	}
}

// TestVerifyOtherCA: a CA that the root signed for certificates of nodes signs no log, neither as an intermediate nor named among the roots.
func TestVerifyOtherCA(t *testing.T) {
	l := newLog(t, "acme")
	ca, err := l.root.NewIntermediate("acme", identity.Client, began)
	if err != nil {
		t.Fatal(err)
	}
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Leaf(identity.Node{Org: "acme", Kind: identity.Policy, ID: identity.NewID(identity.Policy)}, public, began, pki.PolicyLife)
	if err != nil {
		t.Fatal(err)
	}
	l.key, l.keyID = key, identity.HashKey(public).String()
	l.add(Key{Type: TypeKey, ID: l.keyID, Certificates: string(identity.EncodeCertificates(leaf, ca.Certificate, l.root.Certificate))})
	l.sign()
	if r := verify(t, l.file(), Options{Pins: []identity.KeyHash{l.pin()}}); r.OK || !strings.Contains(r.Problem, "other certificates") {
		t.Errorf("%+v", r)
	}
	if known := successors([]*x509.Certificate{l.root.Certificate}, []*x509.Certificate{ca.Certificate}); len(known) != 1 {
		t.Error("an intermediate is known as a root")
	}
}

// TestVerifyAfterRotation: the pin of a root also vouches for the one that it signed.
func TestVerifyAfterRotation(t *testing.T) {
	l := newLog(t, "acme")
	next, err := pki.NewRoot("acme", began)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, next.Certificate, l.root.Certificate, next.Certificate.PublicKey, l.root.Key)
	if err != nil {
		t.Fatal(err)
	}
	crossed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	known := successors([]*x509.Certificate{l.root.Certificate}, []*x509.Certificate{crossed, l.root.Certificate})
	if len(known) != 2 {
		t.Errorf("%d roots are known, want 2", len(known))
	}
	stranger := newLog(t, "acme").root.Certificate
	if known = successors(known, []*x509.Certificate{stranger}); len(known) != 2 {
		t.Error("a stranger's root is known")
	}
}

func FuzzVerify(f *testing.F) {
	f.Add([]byte(`{"type":"chain","format":1,"org":"acme","roots":""}` + "\n" + `{"type":"entry","seq":1,"detail":{}}`))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Verify(bytes.NewReader(b), Options{Earlier: bytes.NewReader(b)})
		if err != nil {
			t.Fatal(err)
		}
		if r.OK && r.Entries > int64(bytes.Count(b, []byte("\n"))+1) {
			t.Error(fmt.Sprint("more entries than lines: ", r.Entries))
		}
	})
}
