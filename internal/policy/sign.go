package policy

import (
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

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

// Signer signs an organization's documents: a key and its certificate chain, leaf first, of kind policy.
type Signer struct {
	Key   crypto.Signer
	Chain []*x509.Certificate
}

// SignSnapshot returns the signed form of s.
func (g *Signer) SignSnapshot(s *Snapshot) (string, error) { return g.sign(typeSnapshot, s) }

// SignGrant returns the signed form of gr.
func (g *Signer) SignGrant(gr *Grant) (string, error) { return g.sign(typeGrant, gr) }

func (g *Signer) sign(typ string, doc any) (string, error) {
	payload, err := json.Marshal(doc)
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", typ, err)
	}
	chain := make([]string, len(g.Chain))
	for i, c := range g.Chain {
		chain[i] = base64.StdEncoding.EncodeToString(c.Raw)
	}
	opts := (&jose.SignerOptions{}).WithType(jose.ContentType(typ)).WithHeader("x5c", chain)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: g.Key}, opts)
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	return jws.CompactSerialize()
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
