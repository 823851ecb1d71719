package policy

import (
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
	"io"
	"math/big"
	"strings"
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
	heads map[string]string // protected headers by typ, encoded: all documents of a type have the same; guarded by mu
}

// SignSnapshot returns the signed form of s.
func (g *Signer) SignSnapshot(s *Snapshot) (string, error) {
	jws, _, err := g.sign(typeSnapshot, s)
	return jws, err
}

// SignGrant returns the signed form of gr.
func (g *Signer) SignGrant(gr *Grant) (string, error) {
	jws, _, err := g.sign(typeGrant, gr)
	return jws, err
}

// Kept is what is kept of a signed grant, in few bytes: from it and the grant the signed form is made again without signing. The zero Kept is none.
type Kept struct {
	head             unique.Handle[string]
	payload          [sha256.Size]byte
	signature        [signatureSize]byte
	issued, notAfter int64 // Unix seconds
}

// SignGrantAgain returns the signed form of gr and what to keep of it. Where this signer signed it before, as kept tells, and nothing but its times
// is another, it is that signed form, with the times that it had.
func (g *Signer) SignGrantAgain(gr *Grant, kept Kept) (string, Kept, error) {
	head, err := g.head(typeGrant)
	if err != nil {
		return "", Kept{}, err
	}
	if kept.head == unique.Make(head) {
		old := *gr
		old.Issued, old.NotAfter = time.Unix(kept.issued, 0).UTC(), time.Unix(kept.notAfter, 0).UTC()
		payload, err := json.Marshal(&old)
		if err != nil {
			return "", Kept{}, fmt.Errorf("encode %s: %w", typeGrant, err)
		}
		if sha256.Sum256(payload) == kept.payload {
			return serialize(head, payload, kept.signature[:]), kept, nil
		}
	}
	jws, k, err := g.sign(typeGrant, gr)
	k.issued, k.notAfter = gr.Issued.Unix(), gr.NotAfter.Unix()
	return jws, k, err
}

// signatureSize is that of ES256 (RFC 7518 §3.4): two numbers of 32 bytes.
const signatureSize = 64

// head is the protected header of documents of a type.
func (g *Signer) head(typ string) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if h := g.heads[typ]; h != "" {
		return h, nil
	}
	chain := make([]string, len(g.Chain))
	for i, c := range g.Chain {
		chain[i] = base64.StdEncoding.EncodeToString(c.Raw)
	}
	b, err := json.Marshal(map[string]any{"alg": jose.ES256, "typ": typ, "x5c": chain})
	if err != nil {
		return "", fmt.Errorf("encode the header of %s: %w", typ, err)
	}
	if g.heads == nil {
		g.heads = make(map[string]string)
	}
	g.heads[typ] = base64.RawURLEncoding.EncodeToString(b)
	return g.heads[typ], nil
}

// serialize is a JWS in compact form (RFC 7515 §7.1), or the part of it that is signed when there is no signature yet. There are thousands of them when
// policies change, of 2 KiB each, so none is copied.
func serialize(head string, payload, signature []byte) string {
	enc := base64.RawURLEncoding
	var b strings.Builder
	b.Grow(len(head) + enc.EncodedLen(len(payload)) + enc.EncodedLen(len(signature)) + len(".."))
	b.WriteString(head)
	var text [512]byte
	part := func(raw []byte) {
		b.WriteByte('.')
		for len(raw) > 0 {
			n := min(len(raw), len(text)/4*3)
			enc.Encode(text[:], raw[:n])
			b.Write(text[:enc.EncodedLen(n)])
			raw = raw[n:]
		}
	}
	part(payload)
	if signature != nil {
		part(signature)
	}
	return b.String()
}

// sign makes a JWS in compact form. Documents are signed by the thousand, and a library's signer encodes the chain for each.
func (g *Signer) sign(typ string, doc any) (string, Kept, error) {
	payload, err := json.Marshal(doc)
	if err != nil {
		return "", Kept{}, fmt.Errorf("encode %s: %w", typ, err)
	}
	head, err := g.head(typ)
	if err != nil {
		return "", Kept{}, err
	}
	if key, ok := g.Key.Public().(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return "", Kept{}, fmt.Errorf("sign %s: the key is not on P-256", typ)
	}
	h := sha256.New()
	_, _ = io.WriteString(h, serialize(head, payload, nil)) // a hash never fails
	der, err := g.Key.Sign(rand.Reader, h.Sum(nil), crypto.SHA256)
	if err != nil {
		return "", Kept{}, fmt.Errorf("sign %s: %w", typ, err)
	}
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
		return "", Kept{}, fmt.Errorf("sign %s: the key answers no signature of ECDSA", typ)
	}
	kept := Kept{head: unique.Make(head), payload: sha256.Sum256(payload)}
	sig.R.FillBytes(kept.signature[:signatureSize/2])
	sig.S.FillBytes(kept.signature[signatureSize/2:])
	return serialize(head, payload, kept.signature[:]), kept, nil
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
