package auditfile

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"sallyway/internal/identity"
)

// maxLine bounds a line in bytes: an entry's detail is far below that.
const maxLine = 4 << 20

// maxKeys bounds the keys of a file: there is one a month.
const maxKeys = 10_000

// Report is what was found in a file.
type Report struct {
	Org      string    `json:"org"`
	Exported time.Time `json:"exported"`
	OK       bool      `json:"ok"`
	// Problem is the first thing that is wrong, Line the line where it shows (from 1 on).
	Problem string `json:"problem,omitempty"`
	Line    int    `json:"line,omitempty"`
	Entries int64  `json:"entries"`
	Head    string `json:"head"` // hash of the last entry
	// Checkpoints are good signatures. Signed is the last entry that one covers, SignedAt its time; entries beyond it could have been cut off
	// or made up without a trace.
	Checkpoints int       `json:"checkpoints"`
	Signed      int64     `json:"signed"`
	SignedAt    time.Time `json:"signed_at,omitzero"`
	// Roots are the pins of the roots that the file names itself. Pinned says that one of them is the one that the reader knows.
	Roots  []identity.KeyHash `json:"roots"`
	Pinned bool               `json:"pinned"`
	// Earlier says that an earlier export is a beginning of this one.
	Earlier bool `json:"earlier,omitempty"`
}

// Beyond is how many entries no signature covers.
func (r *Report) Beyond() int64 { return r.Entries - r.Signed }

// Options say what a file is held against.
type Options struct {
	// Pins are the key hashes of roots that the reader knows from elsewhere; none: the file's own word is taken, and Report.Pinned is false.
	Pins []identity.KeyHash
	// Earlier is an earlier export of the same chain; nil is none.
	Earlier io.Reader
}

// flaw is something wrong with the file, as opposed to an error of reading it.
type flaw struct{ text string }

// Error implements error.
func (f *flaw) Error() string { return f.text }

func wrong(format string, args ...any) error { return &flaw{fmt.Sprintf(format, args...)} }

// Verify checks a file. An error means that it could not be read; what is wrong with it is an answer.
func Verify(r io.Reader, o Options) (*Report, error) {
	v := &verifier{o: o, keys: map[string]*signer{}}
	if o.Earlier != nil {
		v.earlier = newScanner(o.Earlier)
	}
	s := newScanner(r)
	for s.Scan() {
		v.line++
		if err := v.take(s.Bytes()); err != nil {
			var f *flaw
			if errors.As(err, &f) {
				v.rep.Problem, v.rep.Line = f.text, v.line
				return &v.rep, nil
			}
			return &v.rep, err
		}
	}
	switch err := s.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		v.rep.Problem, v.rep.Line = "the line is too long", v.line+1
		return &v.rep, nil
	case err != nil:
		return &v.rep, err
	}
	if v.line == 0 {
		v.rep.Problem, v.rep.Line = "the file is empty", 1
		return &v.rep, nil
	}
	if err := v.end(); err != nil {
		var f *flaw
		if !errors.As(err, &f) {
			return &v.rep, err
		}
		v.rep.Problem, v.rep.Line = f.text, v.line
		return &v.rep, nil
	}
	v.rep.OK = true
	return &v.rep, nil
}

func newScanner(r io.Reader) *bufio.Scanner {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), maxLine)
	return s
}

// signer is a key whose certificate was checked.
type signer struct {
	public    ed25519.PublicKey
	from, end time.Time
}

type verifier struct {
	o       Options
	rep     Report
	line    int
	roots   []*x509.Certificate
	keys    map[string]*signer
	earlier *bufio.Scanner // nil: none, or it is at its end
	begun   bool           // the earlier one's first line was read
	older   int            // lines of it
}

func (v *verifier) take(b []byte) error {
	var kind struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(b, &kind); err != nil {
		return wrong("the line is not JSON: it was damaged or edited")
	}
	if (v.line == 1) != (kind.Type == TypeChain) {
		return wrong("the file does not begin with the line that names its chain, or has another: export it with `sallyway audit export`")
	}
	switch kind.Type {
	case TypeChain:
		return v.chain(b)
	case TypeKey:
		return v.key(b)
	case TypeEntry:
		return v.entry(b)
	case TypeCheckpoint:
		return v.checkpoint(b)
	}
	return wrong("the line is of type %.40q, which this program does not know: a newer one made the file", kind.Type)
}

// decode reads a line strictly: what no check covers must not be in it.
func decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return wrong("the line was damaged or edited: %v", err)
	}
	return nil
}

func (v *verifier) chain(b []byte) error {
	var c Chain
	if err := decode(b, &c); err != nil {
		return err
	}
	if c.Format != Format {
		return wrong("the file has format %d, this program reads %d", c.Format, Format)
	}
	v.rep.Org, v.rep.Exported = c.Org, c.Exported
	var err error
	if v.roots, err = decodeRoots(c.Roots); err != nil {
		return wrong("the roots in the file are damaged: %v", err)
	}
	var known []*x509.Certificate
	for _, r := range v.roots {
		pin := identity.CertificateKeyHash(r)
		v.rep.Roots = append(v.rep.Roots, pin)
		for _, p := range v.o.Pins {
			if p == pin {
				known = append(known, r)
			}
		}
	}
	if len(v.o.Pins) > 0 {
		if len(known) == 0 {
			return wrong("no root in the file has the pin that was given: this is the log of another organization, or it was made up")
		}
		v.roots, v.rep.Pinned = successors(known, v.roots), true
	}
	return nil
}

// decodeRoots reads all roots that an organization has had (PEM): there is no bound on how often one was followed by another.
func decodeRoots(s string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := []byte(s); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := identity.DecodeCertificates(pem.EncodeToMemory(block))
		if err != nil {
			return nil, err
		}
		out = append(out, c...)
	}
	if len(out) == 0 {
		return nil, errors.New("there is none")
	}
	return out, nil
}

// successors are the known roots, and those of all that one of them signed when the organization's root was rotated, or one that it signed did.
func successors(known, all []*x509.Certificate) []*x509.Certificate {
	for grew := true; grew; {
		grew = false
		for _, r := range all {
			if slices.ContainsFunc(known, r.Equal) || !identity.IsRoot(r) { // an intermediate is no root, whoever signed it
				continue
			}
			if slices.ContainsFunc(known, func(k *x509.Certificate) bool { return r.CheckSignatureFrom(k) == nil }) {
				known, grew = append(known, r), true
			}
		}
	}
	return known
}

func (v *verifier) key(b []byte) error {
	var k Key
	if err := decode(b, &k); err != nil {
		return err
	}
	if len(v.keys) >= maxKeys {
		return wrong("there are more than %d keys", maxKeys)
	}
	certs, err := identity.DecodeCertificates([]byte(k.Certificates))
	if err != nil || len(certs) == 0 {
		return wrong("the certificates of key %.70s are damaged", k.ID)
	}
	leaf := certs[0]
	if identity.CertificateKeyHash(leaf).String() != k.ID {
		return wrong("the certificate of key %.70s is for another key", k.ID)
	}
	public, ok := leaf.PublicKey.(ed25519.PublicKey)
	if !ok {
		return wrong("key %.70s is not an Ed25519 key", k.ID)
	}
	n, err := identity.CertificateNode(leaf)
	if err != nil || n.Org != v.rep.Org || n.Kind != identity.Policy {
		return wrong("the certificate of key %.70s is not for signing the log of organization %.70s", k.ID, v.rep.Org)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range v.roots {
		roots.AddCert(r)
	}
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: leaf.NotBefore.Add(time.Minute),
	})
	if err != nil {
		return wrong("the certificate of key %.70s does not lead to the organization's root: %v", k.ID, err)
	}
	if !slices.ContainsFunc(chains, forDocuments) {
		return wrong("the certificate of key %.70s is by a CA for other certificates than those of policies", k.ID)
	}
	v.keys[k.ID] = &signer{public, leaf.NotBefore, leaf.NotAfter}
	return nil
}

// forDocuments says whether a leaf and its CA are for signing documents alone: those of nodes are for TLS.
func forDocuments(chain []*x509.Certificate) bool {
	return len(chain) > 1 && !slices.ContainsFunc(chain[:2], func(c *x509.Certificate) bool {
		return len(c.ExtKeyUsage) != 0 || len(c.UnknownExtKeyUsage) != 1 || !c.UnknownExtKeyUsage[0].Equal(chain[0].UnknownExtKeyUsage[0])
	})
}

func (v *verifier) entry(b []byte) error {
	var e Entry
	if err := decode(b, &e); err != nil {
		return err
	}
	if want := v.rep.Entries + 1; e.Seq != want {
		return wrong("entry %d stands where entry %d belongs: entries were removed, put in or moved", e.Seq, want)
	}
	h, err := Hash(v.rep.Head, v.rep.Org, &e)
	if err != nil || h != e.Hash {
		return wrong("entry %d (%.60s at %s) was changed, or does not belong to this chain", e.Seq, e.Action, e.At.Format(time.RFC3339))
	}
	if v.earlier != nil {
		if err := v.compare(&e); err != nil {
			return err
		}
	}
	v.rep.Entries, v.rep.Head = e.Seq, e.Hash
	return nil
}

// compare holds an entry against the earlier export's.
func (v *verifier) compare(e *Entry) error {
	old, err := v.nextEarlier()
	if err != nil || old == nil {
		return err
	}
	if old.Seq != e.Seq || old.Hash != e.Hash {
		return wrong("entry %d is not the one of the earlier export (its line %d): the chain was rewritten between the two", e.Seq, v.older)
	}
	return nil
}

// nextEarlier reads the next entry of the earlier export; nil when there is none.
func (v *verifier) nextEarlier() (*Entry, error) {
	for v.earlier != nil && v.earlier.Scan() {
		v.older++
		var l struct {
			Entry
			Org string `json:"org"`
		}
		if err := json.Unmarshal(v.earlier.Bytes(), &l); err != nil {
			return nil, wrong("line %d of the earlier export is damaged", v.older)
		}
		if !v.begun {
			v.begun = true
			if l.Type != TypeChain || l.Org != v.rep.Org {
				return nil, wrong("the earlier export is none, or of another organization")
			}
			continue
		}
		if l.Type == TypeEntry {
			return &l.Entry, nil
		}
	}
	if v.earlier != nil {
		if err := v.earlier.Err(); err != nil {
			return nil, fmt.Errorf("earlier export: %w", err)
		}
		if !v.begun {
			return nil, wrong("the earlier export is empty")
		}
		v.earlier = nil
	}
	return nil, nil //nolint:nilnil // the end of the earlier export, as the comment says
}

func (v *verifier) checkpoint(b []byte) error {
	var c Checkpoint
	if err := decode(b, &c); err != nil {
		return err
	}
	k := v.keys[c.Key]
	switch {
	case k == nil:
		return wrong("the signature at entry %d is by a key that the file does not have", c.Seq)
	case c.Seq != v.rep.Entries || c.Hash != v.rep.Head:
		return wrong("the signature is for entry %d with another hash than the chain has here (entry %d): entries were changed or removed", c.Seq, v.rep.Entries)
	case c.At.Before(k.from) || c.At.After(k.end):
		return wrong("the signature at entry %d is from %s, when its key's certificate was not valid", c.Seq, c.At.Format(time.RFC3339))
	case c.At.Before(v.rep.SignedAt):
		return wrong("the signature at entry %d is older than the one before it", c.Seq)
	case !ed25519.Verify(k.public, Message(v.rep.Org, &c), c.Signature):
		return wrong("the signature at entry %d is not good", c.Seq)
	}
	v.rep.Checkpoints++
	v.rep.Signed, v.rep.SignedAt = c.Seq, c.At
	return nil
}

// end looks at what is only known at the end: whether the earlier export has more.
func (v *verifier) end() error {
	if v.o.Earlier == nil {
		return nil
	}
	old, err := v.nextEarlier()
	if err != nil {
		return err
	}
	if old != nil {
		return wrong("the earlier export goes on with entry %d, this file ends at entry %d: entries were cut off", old.Seq, v.rep.Entries)
	}
	v.rep.Earlier = true
	return nil
}
