// Package oidc is the platform's side of OpenID Connect: the code flow with PKCE against one provider, and the checks of what comes back.
//
//	p, err := oidc.Discover(ctx, client, oidc.Config{Issuer: "https://id.example.com", ClientID: "sallyway", Secret: s, Redirect: url})
//	to := p.AuthURL(state, nonce, verifier)           // the browser goes there, and comes back with code and state
//	claims, err := p.Exchange(ctx, client, code, nonce, verifier)
//
// Who calls compares the state and keeps nonce and verifier with it; see OpenID Connect Core 1.0 §3.1, RFC 7636, RFC 9207, RFC 9700.
package oidc

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// Config is how the platform is known to a provider.
type Config struct {
	Issuer   string // exactly as its discovery document has it
	ClientID string
	Secret   string // empty for a public client
	Redirect string
	Scopes   []string // besides openid
	// Now is the clock for the life of tokens; nil is time.Now.
	Now func() time.Time
}

// Provider is one that was asked for its documents. It may be used concurrently.
type Provider struct {
	oauth    oauth2.Config
	verifier *oidc.IDTokenVerifier
	issuer   string
	clientID string
	// issSent says that the provider promises the parameter iss in answers (RFC 9207 §3).
	issSent bool
}

// Errors of what comes back.
var (
	// ErrNonce says that the ID token is not of this login.
	ErrNonce = errors.New("the ID token is of another login (nonce)")
	// ErrIssuer says that the answer is another provider's.
	ErrIssuer = errors.New("the answer is another provider's (iss)")
	// ErrToken says that the ID token is missing or does not hold: signature, issuer, audience or time.
	ErrToken = errors.New("the ID token does not hold")
)

// algorithms of signatures that are taken: public keys alone, so that the client's secret is no key.
var algorithms = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA}

// Discover reads a provider's documents. client makes this and all later requests for keys.
func Discover(ctx context.Context, client *http.Client, cfg Config) (*Provider, error) {
	// Keys are asked for later, too: the client goes with the provider, the life of ctx does not.
	p, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), client), cfg.Issuer)
	if err != nil {
		return nil, fmt.Errorf("discover %s: %w", cfg.Issuer, err)
	}
	var doc struct {
		Iss        bool     `json:"authorization_response_iss_parameter_supported"`
		Challenges []string `json:"code_challenge_methods_supported"`
	}
	if err := p.Claims(&doc); err != nil {
		return nil, fmt.Errorf("discover %s: %w", cfg.Issuer, err)
	}
	if len(doc.Challenges) > 0 && !slices.Contains(doc.Challenges, "S256") {
		return nil, fmt.Errorf("discover %s: the provider knows no PKCE with S256", cfg.Issuer)
	}
	return &Provider{
		oauth:    oauth2.Config{ClientID: cfg.ClientID, ClientSecret: cfg.Secret, RedirectURL: cfg.Redirect, Endpoint: p.Endpoint(), Scopes: append([]string{oidc.ScopeOpenID}, cfg.Scopes...)},
		verifier: p.VerifierContext(oidc.ClientContext(context.Background(), client), &oidc.Config{ClientID: cfg.ClientID, SupportedSigningAlgs: algorithms, Now: cfg.Now}),
		issuer:   cfg.Issuer, clientID: cfg.ClientID, issSent: doc.Iss,
	}, nil
}

// NewVerifier makes a PKCE verifier of 256 random bits.
func NewVerifier() string { return oauth2.GenerateVerifier() }

// AuthURL is where the browser goes.
func (p *Provider) AuthURL(state, nonce, verifier string) string {
	return p.oauth.AuthCodeURL(state, oidc.Nonce(nonce), oauth2.S256ChallengeOption(verifier))
}

// CheckIssuer holds the parameter iss of an answer against the provider (RFC 9207 §2.4): one that promises it must send it.
func (p *Provider) CheckIssuer(iss string) error {
	if iss == "" && !p.issSent || iss == p.issuer {
		return nil
	}
	return ErrIssuer
}

// Claims are what a provider says of a user.
type Claims struct {
	Subject       string
	Email         string
	EmailVerified bool
	Name          string

	all map[string]json.RawMessage
}

// maxClaim bounds a claim's values that are looked at.
const maxValues = 1000

// Strings are the values of a claim that is a text or a list of texts.
func (c *Claims) Strings(claim string) []string {
	raw, ok := c.all[claim]
	if !ok {
		return nil
	}
	var list []string
	if json.Unmarshal(raw, &list) == nil {
		return list[:min(len(list), maxValues)]
	}
	var one string
	if json.Unmarshal(raw, &one) == nil && one != "" {
		return []string{one}
	}
	return nil
}

// Exchange takes the tokens for a code, and checks the ID token: signature, issuer, audience, times, nonce.
func (p *Provider) Exchange(ctx context.Context, client *http.Client, code, nonce, verifier string) (*Claims, error) {
	ctx = oidc.ClientContext(ctx, client)
	t, err := p.oauth.Exchange(ctx, code, oauth2.VerifierOption(verifier))
	if err != nil {
		var e *oauth2.RetrieveError
		if errors.As(err, &e) { // its text has the whole answer in it
			return nil, fmt.Errorf("%s refused the code: %.100q", p.issuer, e.ErrorCode)
		}
		return nil, fmt.Errorf("take tokens of %s: %w", p.issuer, err)
	}
	raw, ok := t.Extra("id_token").(string)
	if !ok {
		return nil, fmt.Errorf("%w: none was sent", ErrToken)
	}
	id, err := p.verifier.Verify(ctx, raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrToken, err)
	}
	if subtle.ConstantTimeCompare([]byte(id.Nonce), []byte(nonce)) != 1 {
		return nil, ErrNonce
	}
	if id.AccessTokenHash != "" {
		if err := id.VerifyAccessToken(t.AccessToken); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrToken, err)
		}
	}
	out := &Claims{Subject: id.Subject}
	var known struct {
		Email    string `json:"email"`
		Verified any    `json:"email_verified"` // some providers send a text
		Name     string `json:"name"`
		Party    string `json:"azp"`
	}
	if err := errors.Join(id.Claims(&known), id.Claims(&out.all)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrToken, err)
	}
	// A token for several audiences, or that says who it was given to, was given to us (OpenID Connect Core §3.1.3.7, 4 and 5).
	if len(id.Audience) > 1 && known.Party == "" || known.Party != "" && known.Party != p.clientID {
		return nil, fmt.Errorf("%w: it was given to another client", ErrToken)
	}
	if out.Subject == "" {
		return nil, fmt.Errorf("%w: it names nobody", ErrToken)
	}
	out.Email, out.Name = known.Email, known.Name
	out.EmailVerified = known.Verified == true || known.Verified == "true"
	return out, nil
}
