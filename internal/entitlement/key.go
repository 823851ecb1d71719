package entitlement

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// typ is the document's type in the header of the JWS.
const typ = "sallyway-entitlement+jws"

// keyPrefix begins a public key in text.
const keyPrefix = "ed25519:"

// maxTrustFile bounds a file of public keys, in bytes.
const maxTrustFile = 64 << 10

// Public is a key that verifies.
type Public ed25519.PublicKey

// ParsePublic reads a public key in text, ed25519:BASE64URL.
func ParsePublic(s string) (Public, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), keyPrefix)
	b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if !ok || err != nil || len(b) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%.60q is no key of a licence service: it is of the form %sBASE64URL, as `sallyway-license admin keys` prints it", s, keyPrefix)
	}
	return Public(b), nil
}

// String is the key in text.
func (p Public) String() string { return keyPrefix + base64.RawURLEncoding.EncodeToString(p) }

// ID is a short name of the key: the first 8 bytes of its SHA-256, in hex.
func (p Public) ID() string {
	h := sha256.Sum256(p)
	return hex.EncodeToString(h[:8])
}

// Key signs documents.
type Key struct{ private ed25519.PrivateKey }

// NewKey makes a key.
func NewKey() (*Key, error) {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Key{k}, nil
}

// KeyOf is the key of a seed of 32 bytes.
func KeyOf(seed []byte) (*Key, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("seed of %d bytes, want %d", len(seed), ed25519.SeedSize)
	}
	return &Key{ed25519.NewKeyFromSeed(seed)}, nil
}

// Seed is what KeyOf makes the key of. It is secret.
func (k *Key) Seed() []byte { return k.private.Seed() }

// Public is the key that verifies what k signs.
func (k *Key) Public() Public { return Public(k.private.Public().(ed25519.PublicKey)) }

// Sign returns the signed form of e, with its times cut to whole seconds.
func (k *Key) Sign(e *Entitlement) (string, error) {
	payload, err := e.encode()
	if err != nil {
		return "", err
	}
	opts := (&jose.SignerOptions{}).WithType(typ).WithHeader("kid", k.Public().ID())
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: k.private}, opts)
	if err != nil {
		return "", fmt.Errorf("sign the licence: %w", err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign the licence: %w", err)
	}
	return jws.CompactSerialize()
}

// Trust are the keys whose documents are believed. The zero value believes none.
type Trust []Public

// ParseTrust reads keys: each is one in text, or the name of a file that has one on each line (# begins a comment).
func ParseTrust(values []string) (Trust, error) {
	var out Trust
	add := func(s string) error {
		p, err := ParsePublic(s)
		if err == nil && !slices.ContainsFunc(out, func(q Public) bool { return q.ID() == p.ID() }) {
			out = append(out, p)
		}
		return err
	}
	for _, v := range values {
		if strings.HasPrefix(v, keyPrefix) {
			if err := add(v); err != nil {
				return nil, err
			}
			continue
		}
		st, err := os.Stat(v)
		if err != nil {
			return nil, fmt.Errorf("keys of licence services: %w", err)
		}
		if st.Size() > maxTrustFile {
			return nil, fmt.Errorf("%s has %d bytes: that is no list of keys", v, st.Size())
		}
		b, err := os.ReadFile(v)
		if err != nil {
			return nil, fmt.Errorf("keys of licence services: %w", err)
		}
		for line := range strings.Lines(string(b)) {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line == "" {
				continue
			}
			if err := add(line); err != nil {
				return nil, fmt.Errorf("%s: %w", v, err)
			}
		}
	}
	return out, nil
}

// Open verifies a signed document and reads it: ErrUntrusted when none of the keys has signed it. Whom it is for (For) and its time (Valid) are
// not looked at.
func (t Trust) Open(jws string) (*Entitlement, error) {
	jws = strings.TrimSpace(jws)
	if len(jws) > MaxDocument {
		return nil, fmt.Errorf("licence of %d bytes, limit %d", len(jws), MaxDocument)
	}
	sig, err := jose.ParseSignedCompact(jws, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil || len(sig.Signatures) != 1 {
		return nil, errors.New("this is no licence: one is a single line of three parts with dots between them, as `sallyway-license` gives it out")
	}
	head := sig.Signatures[0].Protected
	if got, _ := head.ExtraHeaders[jose.HeaderType].(string); got != typ {
		return nil, fmt.Errorf("document of type %.40q, want %s", got, typ)
	}
	i := slices.IndexFunc(t, func(p Public) bool { return p.ID() == head.KeyID })
	if i < 0 {
		return nil, fmt.Errorf("%w: it is signed by the key %.40q; name that key with --licence-trust if you trust it", ErrUntrusted, head.KeyID)
	}
	payload, err := sig.Verify(ed25519.PublicKey(t[i]))
	if err != nil {
		return nil, fmt.Errorf("%w: its signature does not match its content", ErrUntrusted)
	}
	return decode(payload)
}
