package policy

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"
	"unique"

	"github.com/go-jose/go-jose/v4"

	"sallyway/internal/identity"
)

// MaxDocument bounds a signed document in bytes; a snapshot with 10 000 rules is below 4 MiB.
const MaxDocument = 16 << 20

// Types of documents, as the typ header of the JWS.
const (
	typeSnapshot = "sallyway-snapshot+jws"
	typeGrant    = "sallyway-grant+jws"
)

// Signer signs an organization's documents: a key on P-256 and its certificate chain, leaf first, of kind policy. It may be used concurrently.
type Signer struct {
	Key   crypto.Signer
	Chain []*x509.Certificate

	mu    sync.Mutex
	heads map[string]unique.Handle[string] // protected headers by typ, encoded: all documents of a type have the same; guarded by mu
}

// AppendSnapshot appends the signed form of s to b: some MiB where a gateway has thousands of peers.
func (g *Signer) AppendSnapshot(b []byte, s *Snapshot) ([]byte, error) {
	payload, err := json.Marshal(s)
	if err != nil {
		return b, fmt.Errorf("encode %s: %w", typeSnapshot, err)
	}
	b, _, err = g.sign(b, typeSnapshot, payload)
	return b, err
}

// Kept is what is kept of a signed grant, in few bytes: from it and the grant the signed form is made again without signing. The zero Kept is none.
type Kept struct {
	head             unique.Handle[string]
	payload          [sha256.Size]byte
	signature        [signatureSize]byte
	issued, notAfter int64 // Unix seconds
}

// zeroTimes is how the JSON of a grant ends whose times are zero.
const zeroTimes = `"issued":"0001-01-01T00:00:00Z","not_after":"0001-01-01T00:00:00Z"}`

// Untimed is a grant as JSON up to its times, which come last.
func Untimed(gr *Grant) ([]byte, error) {
	copied := *gr
	copied.Issued, copied.NotAfter = time.Time{}, time.Time{}
	b, err := json.Marshal(&copied)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", typeGrant, err)
	}
	b, ok := bytes.CutSuffix(b, []byte(zeroTimes))
	if !ok {
		return nil, fmt.Errorf("encode %s: its times do not come last", typeGrant)
	}
	return b, nil
}

// appendTimes appends what Untimed left out.
func appendTimes(b []byte, issued, notAfter time.Time) []byte {
	b = issued.UTC().AppendFormat(append(b, `"issued":"`...), time.RFC3339)
	b = notAfter.UTC().AppendFormat(append(b, `","not_after":"`...), time.RFC3339)
	return append(b, `"}`...)
}

// AppendGrant appends the signed form of a grant to b, and returns what to keep of it. The grant is head and rest, one after the other, as Untimed makes it;
// its times are whole seconds. Where this signer signed it before, as kept tells, and nothing but its times is another, it is that signed form, with the times
// that it had. Grants are sent by the thousand when policies change: where b has room, nothing is allocated for one that was signed before.
func (g *Signer) AppendGrant(b, head, rest []byte, issued, notAfter time.Time, kept Kept) ([]byte, Kept, error) {
	protected, err := g.head(typeGrant)
	if err != nil {
		return b, Kept{}, err
	}
	start := len(b)
	b = append(append(b, head...), rest...)
	untimed := len(b)
	if kept.head == protected {
		b = appendTimes(b, time.Unix(kept.issued, 0), time.Unix(kept.notAfter, 0))
		if payload := b[start:]; sha256.Sum256(payload) == kept.payload {
			signed := len(b)
			b = appendPart(appendPart(append(b, protected.Value()...), payload), kept.signature[:])
			return slices.Delete(b, start, signed), kept, nil
		}
	}
	b = appendTimes(b[:untimed], issued, notAfter)
	signed := len(b)
	b, kept, err = g.sign(b, typeGrant, b[start:])
	kept.issued, kept.notAfter = issued.Unix(), notAfter.Unix()
	return slices.Delete(b, start, signed), kept, err
}

// signatureSize is that of ES256 (RFC 7518 §3.4): two numbers of 32 bytes.
const signatureSize = 64

// head is the protected header of documents of a type.
func (g *Signer) head(typ string) (unique.Handle[string], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if h, ok := g.heads[typ]; ok {
		return h, nil
	}
	chain := make([]string, len(g.Chain))
	for i, c := range g.Chain {
		chain[i] = base64.StdEncoding.EncodeToString(c.Raw)
	}
	b, err := json.Marshal(map[string]any{"alg": jose.ES256, "typ": typ, "x5c": chain})
	if err != nil {
		return unique.Handle[string]{}, fmt.Errorf("encode the header of %s: %w", typ, err)
	}
	if g.heads == nil {
		g.heads = make(map[string]unique.Handle[string])
	}
	g.heads[typ] = unique.Make(base64.RawURLEncoding.EncodeToString(b))
	return g.heads[typ], nil
}

// appendPart appends a part of a JWS in compact form (RFC 7515 §7.1) that is not the first.
func appendPart(b, raw []byte) []byte { return base64.RawURLEncoding.AppendEncode(append(b, '.'), raw) }

// sign appends a JWS in compact form to b, and returns what to keep of it but for times. A library's signer encodes the chain for each.
func (g *Signer) sign(b []byte, typ string, payload []byte) ([]byte, Kept, error) {
	head, err := g.head(typ)
	if err != nil {
		return b, Kept{}, err
	}
	if key, ok := g.Key.Public().(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return b, Kept{}, fmt.Errorf("sign %s: the key is not on P-256", typ)
	}
	start := len(b)
	enc := base64.RawURLEncoding
	b = slices.Grow(b, len(head.Value())+len("..")+enc.EncodedLen(len(payload))+enc.EncodedLen(signatureSize))
	b = appendPart(append(b, head.Value()...), payload)
	digest := sha256.Sum256(b[start:])
	der, err := g.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return b, Kept{}, fmt.Errorf("sign %s: %w", typ, err)
	}
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
		return b, Kept{}, fmt.Errorf("sign %s: the key answers no signature of ECDSA", typ)
	}
	kept := Kept{head: head, payload: sha256.Sum256(payload)}
	sig.R.FillBytes(kept.signature[:signatureSize/2])
	sig.S.FillBytes(kept.signature[signatureSize/2:])
	return appendPart(b, kept.signature[:]), kept, nil
}

// OpenSnapshot checks a signed snapshot for the gateway audience against the organization's trust. It does not look at
// NotAfter or at versions seen before: the keeper of the highest version does.
func OpenSnapshot(jws string, trust *identity.Trust, audience identity.Node) (*Snapshot, error) {
	s, err := open[Snapshot](jws, typeSnapshot, trust, audience.Org)
	if err != nil {
		return nil, err
	}
	if s.Org != audience.Org || s.Audience != audience {
		return nil, fmt.Errorf("snapshot is for %v, this is %v", s.Audience, audience)
	}
	return s, nil
}

// OpenGrant checks a signed grant for node against the organization's trust.
func OpenGrant(jws string, trust *identity.Trust, node identity.Node) (*Grant, error) {
	g, err := open[Grant](jws, typeGrant, trust, node.Org)
	if err != nil {
		return nil, err
	}
	if g.Org != node.Org || !samePeer(g.Node, node) {
		return nil, fmt.Errorf("grant is for %v, this is %v", g.Node, node)
	}
	return g, nil
}

func open[T any](jws, typ string, trust *identity.Trust, org string) (*T, error) {
	if len(jws) > MaxDocument {
		return nil, fmt.Errorf("%s of %d bytes, limit %d", typ, len(jws), MaxDocument)
	}
	sig, err := jose.ParseSignedCompact(jws, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", typ, err)
	}
	head := sig.Signatures[0].Protected
	if got, _ := head.ExtraHeaders[jose.HeaderType].(string); got != typ {
		return nil, fmt.Errorf("document of type %.40q, want %s", got, typ)
	}
	chain, err := x5c(sig)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", typ, err)
	}
	who, err := trust.Verify(chain, x509.ExtKeyUsageAny)
	if err != nil {
		return nil, fmt.Errorf("signer of %s: %w", typ, err)
	}
	if who.Kind != identity.Policy || who.Org != org {
		return nil, fmt.Errorf("%s is signed by %v, want the policy key of %s", typ, who, org)
	}
	payload, err := sig.Verify(chain[0].PublicKey)
	if err != nil {
		return nil, fmt.Errorf("signature of %s does not match its content", typ)
	}
	doc := new(T)
	if err := json.Unmarshal(payload, doc); err != nil {
		return nil, fmt.Errorf("decode %s: %w", typ, err)
	}
	return doc, nil
}

// x5c reads the certificate chain of a JWS without trusting it.
func x5c(sig *jose.JSONWebSignature) ([]*x509.Certificate, error) {
	// go-jose parses x5c but only hands it out verified against a pool; the verification here knows pins and identities.
	raw := sig.FullSerialize()
	var outer struct {
		Protected string `json:"protected"`
	}
	if err := json.Unmarshal([]byte(raw), &outer); err != nil {
		return nil, err
	}
	head, err := base64.RawURLEncoding.DecodeString(outer.Protected)
	if err != nil {
		return nil, err
	}
	var h struct {
		X5C []string `json:"x5c"`
	}
	if err := json.Unmarshal(head, &h); err != nil {
		return nil, err
	}
	if len(h.X5C) == 0 || len(h.X5C) > identity.MaxChain {
		return nil, errors.New("no certificate chain of the signer")
	}
	var chain []*x509.Certificate
	for _, s := range h.X5C {
		der, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			return nil, errors.New("malformed certificate of the signer")
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, errors.New("malformed certificate of the signer")
		}
		chain = append(chain, c)
	}
	return chain, nil
}
