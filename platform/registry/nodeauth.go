package registry

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// Limits of what nodes send to show who they are.
const (
	maxAssertion = 4 << 10 // bytes
	maxAccess    = 1 << 10
	maxJTI       = 128
)

// accessKey signs access tokens.
type accessKey struct{ secret []byte }

const (
	accessMeta   = "access-key"
	accessPrefix = "swn1."
)

// loadAccessKey reads the key of access tokens, or makes it.
func (r *Registry) loadAccessKey(ctx context.Context) error {
	return r.Store.Update(ctx, func(tx store.Tx) error {
		sealed, err := tx.Meta(ctx, accessMeta)
		if err == nil {
			r.access.secret, err = r.Seal.Open(accessMeta, sealed)
			return err
		}
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		secret := make([]byte, 32)
		if _, err := rand.Read(secret); err != nil {
			return err
		}
		r.access.secret = secret
		return tx.PutMeta(ctx, accessMeta, r.Seal.Seal(accessMeta, secret))
	})
}

// Session is who an access token speaks for.
type Session struct {
	Node    identity.Node    `json:"n"`
	Key     identity.KeyHash `json:"k"`
	Expires int64            `json:"e"` // Unix seconds
}

func (a *accessKey) mac(body string) []byte {
	m := hmac.New(sha256.New, a.secret)
	m.Write([]byte(accessPrefix + body))
	return m.Sum(nil)
}

func (a *accessKey) issue(s Session) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("encode access token: %v", err)) // strings and numbers always encode
	}
	body := base64.RawURLEncoding.EncodeToString(b)
	return accessPrefix + body + "." + base64.RawURLEncoding.EncodeToString(a.mac(body))
}

var errAccess = errors.New("not an access token of this platform")

// parse checks an access token's signature, not its time.
func (a *accessKey) parse(token string) (*Session, error) {
	rest, ours := strings.CutPrefix(token, accessPrefix)
	body, sig, two := strings.Cut(rest, ".")
	if len(token) > maxAccess || !ours || !two {
		return nil, errAccess
	}
	got, err := base64.RawURLEncoding.DecodeString(sig)
	if err != nil || !hmac.Equal(got, a.mac(body)) {
		return nil, errAccess
	}
	b, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		return nil, errAccess
	}
	s := new(Session)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, errAccess
	}
	return s, nil
}

// CanonicalURL is the form of a URL that audiences are compared in: scheme and host in lower case, no default port, no path.
func CanonicalURL(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return "", fmt.Errorf("%.80q is not a URL", s)
	}
	host := strings.ToLower(u.Host)
	if u.Scheme == "https" {
		host = strings.TrimSuffix(host, ":443")
	} else {
		host = strings.TrimSuffix(host, ":80")
	}
	return u.Scheme + "://" + host, nil
}

func badAssertion(format string, args ...any) *Error {
	return refuse(http.StatusUnauthorized, control.CodeBadAssertion, "", format, args...)
}

// AccessToken exchanges a node's assertion (RFC 7523 §3) for an access token and its life.
func (r *Registry) AccessToken(ctx context.Context, source, assertion string) (string, time.Duration, error) {
	n, claims, tok, err := parseAssertion(assertion)
	if err != nil {
		return "", 0, err
	}
	token, err := r.exchange(ctx, n, claims, tok)
	var e *Error
	if errors.As(err, &e) {
		r.Log.Warn("node refused", "node", n.String(), "code", e.Problem.Code, "reason", e.Detail, "source", source)
		return "", 0, errors.Join(err, r.refused(ctx, n.Org, "node.login", n.String(), e.Problem.Code, source))
	}
	return token, control.AccessTokenLife, err
}

// parseAssertion reads an assertion without trusting it.
func parseAssertion(assertion string) (n identity.Node, claims jwt.Claims, tok *jwt.JSONWebToken, err error) {
	if len(assertion) > maxAssertion {
		return n, claims, nil, badAssertion("assertion of %d bytes, limit %d", len(assertion), maxAssertion)
	}
	tok, err = jwt.ParseSigned(assertion, []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA})
	if err != nil {
		return n, claims, nil, badAssertion("the assertion is not a JWT signed with ES256")
	}
	if err := tok.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return n, claims, nil, badAssertion("the assertion's claims can not be read")
	}
	if n, err = identity.ParseNode(claims.Subject); err != nil || claims.Issuer != claims.Subject {
		return n, claims, nil, badAssertion("iss and sub of an assertion are both the node, org/kind/id")
	}
	return n, claims, tok, nil
}

func (r *Registry) exchange(ctx context.Context, n identity.Node, claims jwt.Claims, tok *jwt.JSONWebToken) (string, error) {
	now := r.Now()
	var key identity.KeyHash
	err := r.Store.View(ctx, func(tx store.Tx) error {
		node, err := tx.Node(ctx, n.ID)
		if errors.Is(err, store.ErrNotFound) || (err == nil && node.Identity() != n) {
			return refuse(http.StatusForbidden, control.CodeNodeUnknown, "enrol it with a new token", "%v does not exist here, or was deleted", n)
		}
		if err != nil {
			return err
		}
		keys, err := tx.Keys(ctx, node.ID)
		if err != nil {
			return err
		}
		if len(keys) == 0 {
			return refuse(http.StatusUnauthorized, control.CodeNotEnrolled, "enrol it with a token", "%v has never enrolled", n)
		}
		newest := true
		for _, k := range keys {
			public, err := x509.ParsePKIXPublicKey(k.Public)
			if err != nil {
				return fmt.Errorf("key %v: %w", k.Hash, err)
			}
			current := !k.Denied && k.Enrolment == node.Enrolment
			// A key that a newer one of the same enrolment replaced works until its leaf ends: the answer to the renewal may be lost.
			usable := current && (newest || k.NotAfter.Add(identity.ClockSkew).After(now))
			if current {
				newest = false
			}
			if !verify(tok, public) {
				continue
			}
			// Only who holds a key of the node is told what became of it.
			if _, err := liveNode(ctx, tx, n); err != nil {
				return err
			}
			if usable {
				key = k.Hash
				return nil
			}
			return refuse(http.StatusUnauthorized, CodeKeyDenied, "enrol it with a new token", "%s %q enrolled anew with another key, or this one was revoked", node.Kind, node.Name)
		}
		return badAssertion("the assertion of %v is not signed by the key of its newest enrolment", n)
	})
	if err != nil {
		return "", err
	}
	// The signature is good: what is wrong from here on is told in full.
	if err := r.checkClaims(now, n, claims); err != nil {
		return "", err
	}
	jti := sha256.Sum256([]byte(n.String() + "\x00" + claims.ID))
	err = r.Store.Update(ctx, func(tx store.Tx) error {
		return tx.InsertAssertion(ctx, jti, now.Add(control.AssertionLife+2*identity.ClockSkew))
	})
	if errors.Is(err, store.ErrExists) {
		return "", badAssertion("the assertion was used before")
	}
	if err != nil {
		return "", err
	}
	return r.access.issue(Session{Node: n, Key: key, Expires: now.Add(control.AccessTokenLife).Unix()}), nil
}

func verify(tok *jwt.JSONWebToken, public crypto.PublicKey) bool {
	var verified jwt.Claims
	return tok.Claims(public, &verified) == nil
}

func (r *Registry) checkClaims(now time.Time, n identity.Node, c jwt.Claims) error {
	ours := slices.ContainsFunc(c.Audience, func(a string) bool {
		u, err := CanonicalURL(a)
		return err == nil && slices.Contains(r.Audiences, u)
	})
	if !ours {
		return badAssertion("the assertion of %v is for %.100q, this platform is %s", n, strings.Join(c.Audience, " "), r.URL)
	}
	if c.ID == "" || len(c.ID) > maxJTI {
		return badAssertion("an assertion has a jti of 1 to %d characters", maxJTI)
	}
	if c.Expiry == nil {
		return badAssertion("the assertion has no exp")
	}
	exp := c.Expiry.Time()
	issued := exp.Add(-control.AssertionLife)
	if c.IssuedAt != nil {
		issued = c.IssuedAt.Time()
	}
	off := issued.Sub(now)
	if c.IssuedAt == nil && exp.After(now) && off < 0 {
		off = 0 // without iat only the end is known, and it lies ahead
	}
	skewed := off.Abs() > identity.ClockSkew || (c.NotBefore != nil && c.NotBefore.Time().Sub(now) > identity.ClockSkew)
	if skewed || exp.Before(now.Add(-identity.ClockSkew)) {
		e := badAssertion("the node's clock says %s, the platform's says %s: they differ by %v, at most %v is fine",
			issued.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), off.Abs().Round(time.Second), identity.ClockSkew)
		e.Remedy = "set the clock of the one that is wrong (timedatectl set-ntp true)"
		return e
	}
	if exp.After(now.Add(control.AssertionLife + identity.ClockSkew)) {
		return badAssertion("the assertion lives until %s, at most %v ahead is fine", exp.UTC().Format(time.RFC3339), control.AssertionLife)
	}
	return nil
}

// liveNode finds a node that may talk to the platform.
func liveNode(ctx context.Context, tx store.Tx, id identity.Node) (*store.Node, error) {
	n, err := tx.Node(ctx, id.ID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	switch {
	case err != nil || n.Identity() != id || !n.Deleted.IsZero():
		return nil, refuse(http.StatusForbidden, control.CodeNodeUnknown, "enrol it with a new token", "%v does not exist, or was deleted", id)
	case n.Status == store.Disabled:
		return nil, refuse(http.StatusForbidden, control.CodeNodeDisabled, fmt.Sprintf("sallyway --org %s %s enable %s", n.Org, n.Kind, n.Name), "%s %q is disabled", n.Kind, n.Name)
	case n.Status == store.Revoked:
		return nil, refuse(http.StatusForbidden, control.CodeNodeRevoked, fmt.Sprintf("sallyway --org %s %s token %s", n.Org, n.Kind, n.Name), "%s %q is revoked", n.Kind, n.Name)
	}
	return n, nil
}

// Session checks an access token, and not whether its node still has its rights: see Who.
func (r *Registry) Session(token string) (*Session, error) {
	s, err := r.access.parse(token)
	if err != nil || r.Now().Unix() >= s.Expires {
		return nil, refuse(http.StatusUnauthorized, "", "get a new one with an assertion", "the access token is unknown or has expired")
	}
	return s, nil
}

// Who checks an access token and that its node still has its rights.
func (r *Registry) Who(ctx context.Context, token string) (*Session, error) {
	s, err := r.Session(token)
	if err != nil {
		return nil, err
	}
	err = r.Store.View(ctx, func(tx store.Tx) error {
		_, err := (&change{Tx: tx, r: r}).who(ctx, s)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// who finds the node that a session speaks for, and checks that its key is still the node's.
func (c *change) who(ctx context.Context, s *Session) (*store.Node, error) {
	n, err := liveNode(ctx, c.Tx, s.Node)
	if err != nil {
		return nil, err
	}
	k, err := c.Key(ctx, s.Key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	if err != nil || k.Node != n.ID || k.Denied || k.Enrolment != n.Enrolment {
		return nil, refuse(http.StatusUnauthorized, CodeKeyDenied, "enrol it with a new token", "%s %q enrolled anew with another key", n.Kind, n.Name)
	}
	return n, nil
}

// ServerCA opens the CA of the platform's own HTTPS certificate.
func (r *Registry) ServerCA(ctx context.Context) (*pki.Authority, error) {
	var ca *pki.Authority
	err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		ca, err = r.Authority(ctx, tx, identity.SharedOrg, pki.KindTLS)
		return err
	})
	return ca, err
}
