package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
)

// grantType is RFC 7523 §2.1.
const grantType = "urn:ietf:params:oauth:grant-type:jwt-bearer"

// assertionLife is how long an assertion of ours lives. It is half of what the platform takes, so that clocks may differ by the rest.
const assertionLife = control.AssertionLife / 2

// accessToken keeps a short-lived token fresh. The zero value has none yet.
type accessToken struct {
	mu      sync.Mutex // held while a token is fetched, so that one fetch serves all
	value   string     // secret
	refresh time.Time  // fetch a new one after this
}

// get returns a token that is good for a while.
func (t *accessToken) get(ctx context.Context, l *link.Link, key crypto.Signer, n identity.Node, audience string, now func() time.Time) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.value != "" && now().Before(t.refresh) {
		return t.value, nil
	}
	t.value = ""
	var answer struct { // RFC 6749 §5.1
		Token   string  `json:"access_token"`
		Expires float64 `json:"expires_in"` // seconds
	}
	for try := 0; ; try++ {
		// The platform's clock counts for the platform's checks; a difference that people must see is left to fail.
		offset := usableOffset(l)
		assertion, err := assert(key, n, audience, now().Add(offset))
		if err != nil {
			return "", err
		}
		form := url.Values{"grant_type": {grantType}, "assertion": {assertion}}
		if err = l.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/node/token", Form: form}, &answer); err == nil {
			break
		}
		if learnt := usableOffset(l); try > 0 || (learnt-offset).Abs() < assertionLife/2 {
			return "", &authError{err}
		}
		// The refusal told the platform's clock: once more by it.
	}
	if answer.Token == "" {
		return "", errors.New("the platform answered an empty access token")
	}
	life := control.AccessTokenLife
	if answer.Expires > 0 {
		life = time.Duration(answer.Expires * float64(time.Second))
	}
	t.value, t.refresh = answer.Token, now().Add(life*3/4)
	return t.value, nil
}

// usableOffset is the platform's clock minus ours, or zero where they differ too much.
func usableOffset(l *link.Link) time.Duration {
	if off := l.ClockOffset(); off.Abs() <= link.MaxClockOffset {
		return off
	}
	return 0
}

// drop forgets a token that the platform did not take.
func (t *accessToken) drop(value string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.value == value {
		t.value = ""
	}
}

// authError says that the platform did not give an access token.
type authError struct{ error }

func (e *authError) Unwrap() error { return e.error }

// assert makes a node's assertion (RFC 7523 §3).
func assert(key crypto.Signer, n identity.Node, audience string, at time.Time) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("sign assertion: %w", err)
	}
	s, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: n.String(), Subject: n.String(), Audience: jwt.Audience{audience}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(at), Expiry: jwt.NewNumericDate(at.Add(assertionLife)),
	}).Serialize()
	if err != nil {
		return "", fmt.Errorf("sign assertion: %w", err)
	}
	return s, nil
}

// call sends a request as the node.
func (a *Agent) call(ctx context.Context, path string, in, out any) error {
	bearer, err := a.bearer(ctx)
	if err != nil {
		return err
	}
	err = a.link.Do(ctx, link.Request{Method: http.MethodPost, Path: path, Bearer: bearer, JSON: in}, out)
	a.noteAuth(bearer, err)
	return err
}

func (a *Agent) bearer(ctx context.Context) (string, error) {
	return a.access.get(ctx, a.link, a.key, a.state.Node, a.state.URL, a.cfg.Now)
}

func (a *Agent) noteAuth(bearer string, err error) {
	if p, ok := errors.AsType[*link.Problem](err); ok && p.Status == http.StatusUnauthorized {
		a.access.drop(bearer)
	}
}

// blocked returns why the platform does not talk to this node: an answer that trying again soon does not change.
func blocked(err error) (string, bool) {
	p, ok := errors.AsType[*link.Problem](err)
	if !ok || (p.Status != http.StatusUnauthorized && p.Status != http.StatusForbidden) {
		return "", false
	}
	switch p.Code {
	case control.CodeNodeDisabled, control.CodeNodeRevoked, control.CodeNodeUnknown:
		return p.Error(), true
	case control.CodeBadAssertion: // the clock or the way, not the node
		return "", false
	}
	// A token that ran out gives 401 on other requests; where the token itself is refused, the node is.
	_, auth := errors.AsType[*authError](err)
	return p.Error(), auth || p.Status == http.StatusForbidden
}
