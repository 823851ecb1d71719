package registry

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

const (
	apiPrefix   = "swt1."
	maxAPIToken = 256
)

// CreateAPIToken makes a token of the admin API and returns it; the platform keeps only its hash. An empty org is every organization,
// a life of 0 is for ever.
func (r *Registry) CreateAPIToken(ctx context.Context, name, org string, scope store.Scope, life time.Duration) (string, error) {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return "", err
	}
	token := apiPrefix + base64.RawURLEncoding.EncodeToString(secret)
	err := r.update(ctx, func(c *change) error {
		chain := identity.SharedOrg
		if org != "" {
			if _, err := c.org(ctx, org); err != nil {
				return err
			}
			chain = org
		}
		t := &store.APIToken{ID: identity.NewID("token"), Hash: sha256.Sum256([]byte(token)), Name: clip(name, 64), Org: org, Scope: scope, Created: c.now}
		if life > 0 {
			t.Expires = c.now.Add(life)
		}
		if err := c.InsertAPIToken(ctx, t); err != nil {
			return err
		}
		return c.audit(ctx, chain, "api-token.issue", t.ID, audit.OK, map[string]any{"name": t.Name, "scope": string(scope), "org": org})
	})
	return token, err
}

// APITokenIssued says whether the platform ever issued a token for all organizations: whether anybody could log in.
func (r *Registry) APITokenIssued(ctx context.Context) (issued bool, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		ts, err := tx.APITokens(ctx, "")
		issued = len(ts) > 0
		return err
	})
	return issued, err
}

// RevokeAPITokens revokes all tokens of the platform (org empty) or of an organization.
func (r *Registry) RevokeAPITokens(ctx context.Context, org string) (int, error) {
	count := 0
	err := r.update(ctx, func(c *change) error {
		count = 0
		ts, err := c.APITokens(ctx, org)
		if err != nil {
			return err
		}
		chain := org
		if org == "" {
			chain = identity.SharedOrg
		}
		for _, t := range ts {
			if !t.Revoked.IsZero() {
				continue
			}
			if err := c.RevokeAPIToken(ctx, t.ID, c.now); err != nil {
				return err
			}
			if err := c.audit(ctx, chain, "api-token.revoke", t.ID, audit.OK, map[string]any{"name": t.Name}); err != nil {
				return err
			}
			count++
		}
		return nil
	})
	return count, err
}

// Administrator is who an API token speaks for.
type Administrator struct {
	ID    string
	Name  string
	Org   string // empty is every organization
	Scope store.Scope
}

// Administrator checks an API token.
func (r *Registry) Administrator(ctx context.Context, token string) (*Administrator, error) {
	const again = "make a fresh one on the platform's host: platformd admin token"
	unknown := refuse(http.StatusUnauthorized, control.CodeTokenUnknown, again, "the API token is not known")
	if len(token) > maxAPIToken || !strings.HasPrefix(token, apiPrefix) {
		return nil, unknown
	}
	var t *store.APIToken
	err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		t, err = tx.APIToken(ctx, sha256.Sum256([]byte(token)))
		return err
	})
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, unknown
	case err != nil:
		return nil, err
	case !t.Revoked.IsZero():
		return nil, refuse(http.StatusUnauthorized, control.CodeTokenUnknown, again, "the API token was revoked at %s", t.Revoked.Format(time.RFC3339))
	case !t.Expires.IsZero() && r.Now().After(t.Expires):
		return nil, refuse(http.StatusUnauthorized, control.CodeTokenExpired, again, "the API token expired at %s", t.Expires.Format(time.RFC3339))
	}
	return &Administrator{ID: t.ID, Name: t.Name, Org: t.Org, Scope: t.Scope}, nil
}
