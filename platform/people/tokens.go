package people

import (
	"context"
	"net/http"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Prefixes of tokens tell what they are, also to programs that look for leaked secrets.
const (
	personPrefix  = "swu1."
	accountPrefix = "sws1."
	maxToken      = 256
	maxTokens     = 50 // that live, of a person or a service account
)

// Authenticate returns who an API token is of: a person, a service account, or the token itself. source is where it comes from.
func (s *Service) Authenticate(ctx context.Context, token, source string) (*Principal, error) {
	if !strings.HasPrefix(token, personPrefix) && !strings.HasPrefix(token, accountPrefix) {
		a, err := s.reg.Administrator(ctx, token)
		if err != nil {
			return nil, err
		}
		return tokenPrincipal(a), nil
	}
	const again = "log in anew: sallyway login --url URL"
	unknown := registry.Refuse(http.StatusUnauthorized, control.CodeTokenUnknown, again, "the API token is not known")
	if len(token) > maxToken {
		return nil, unknown
	}
	now := s.reg.Now()
	var p *Principal
	var t *store.AccessToken
	err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		p = nil
		if t, err = tx.AccessToken(ctx, hashOf(token)); err != nil {
			return err
		}
		switch {
		case !t.Revoked.IsZero():
			return registry.Refuse(http.StatusUnauthorized, control.CodeTokenUnknown, again, "the API token was revoked at %s", t.Revoked.Format(time.RFC3339))
		case !t.Expires.IsZero() && !now.Before(t.Expires):
			return registry.Refuse(http.StatusUnauthorized, control.CodeTokenExpired, again, "the API token expired at %s", t.Expires.Format(time.RFC3339))
		}
		if t.Person != "" {
			person, err := tx.Person(ctx, t.Person)
			if err != nil {
				return err
			}
			if person.Disabled {
				return registry.Refuse(http.StatusUnauthorized, control.CodeTokenUnknown, "ask an owner of the organization", "the account of this token is disabled")
			}
			p, err = principalOf(ctx, tx, person)
			return err
		}
		a, err := tx.ServiceAccount(ctx, t.Account)
		if err != nil {
			return err
		}
		if a.Disabled {
			return registry.Refuse(http.StatusUnauthorized, control.CodeTokenUnknown, "ask an owner of the organization", "the service account of this token is disabled")
		}
		p = &Principal{Kind: KindAccount, ID: a.ID, Name: a.Name, Actor: accountActor(a), Grants: []Grant{{Org: a.Org, Scopes: scopesOf(a.Scopes)}}}
		return nil
	})
	if notFound(err) {
		return nil, unknown
	}
	if err != nil {
		return nil, err
	}
	p.Token = t.ID
	if len(t.Scopes) > 0 {
		p.narrow = scopesOf(t.Scopes)
	}
	if now.Sub(t.LastUsed) > touchEvery {
		err := s.reg.Store.Update(ctx, func(tx store.Tx) error { return tx.TouchAccessToken(ctx, t.ID, now, clip(source, 64)) })
		if err != nil && !notFound(err) {
			s.log.Warn("the last use of a token is not written down", "token", t.ID, "error", err)
		}
	}
	return p, nil
}

// tokenPrincipal is an API token of its own. Its scopes are words: admin, read-only, or several with spaces between them.
func tokenPrincipal(a *registry.Administrator) *Principal {
	var scopes Scopes
	switch a.Scope {
	case store.ScopeAdmin:
		scopes = Scopes{"*"}
	case store.ScopeReadOnly:
		scopes = Scopes{"*:read"}
	default:
		scopes = scopesOf(strings.Fields(string(a.Scope)))
	}
	org := a.Org
	if org == "" {
		org = Platform
	}
	return &Principal{Kind: KindToken, ID: a.ID, Name: a.Name, Actor: "token:" + a.Name, Grants: []Grant{{Org: org, Scopes: scopes}}}
}

// newToken makes an access token in a transaction.
func newToken(ctx context.Context, c *registry.Change, prefix string, t *store.AccessToken, life time.Duration) (string, error) {
	token := prefix + secret()
	t.ID, t.Hash, t.Created = identity.NewID("token"), hashOf(token), c.Now()
	if life > 0 {
		t.Expires = c.Now().Add(life)
	}
	if t.Scopes == nil {
		t.Scopes = []string{}
	}
	return token, c.InsertAccessToken(ctx, t)
}

func tokenRecord(t *store.AccessToken) control.APIToken {
	opt := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	return control.APIToken{
		ID: t.ID, Name: t.Name, Scopes: t.Scopes, Created: t.Created, Expires: opt(t.Expires), Revoked: opt(t.Revoked), LastUsed: opt(t.LastUsed), Source: t.Source,
	}
}

func tokenRecords(ts []*store.AccessToken) []control.APIToken {
	out := []control.APIToken{}
	for _, t := range ts {
		out = append(out, tokenRecord(t))
	}
	return out
}

func checkTokenRequest(req control.CreateAPIToken) (Scopes, time.Duration, error) {
	if strings.TrimSpace(req.Name) == "" {
		return nil, 0, registry.Invalid("body.name", "say what the token is for", "the token has no name")
	}
	const most = 10 * 366 * 24 * time.Hour
	if req.Life < 0 || req.Life > int(most/time.Second) {
		return nil, 0, registry.Invalid("body.life", "seconds, ten years at most; 0 is for ever", "a token can not live %d seconds", req.Life)
	}
	scopes, err := ParseScopes(req.Scopes)
	return scopes, time.Duration(req.Life) * time.Second, err
}

// maxLive refuses one more token than somebody needs.
func maxLive(ts []*store.AccessToken, now time.Time) error {
	live := 0
	for _, t := range ts {
		if t.Revoked.IsZero() && (t.Expires.IsZero() || now.Before(t.Expires)) {
			live++
		}
	}
	if live >= maxTokens {
		return registry.Conflict("revoke those that are not needed any more", "there are %d tokens already", live)
	}
	return nil
}

// MyTokens lists the person's own tokens.
func (s *Service) MyTokens(ctx context.Context, by *Principal) (out []control.APIToken, err error) {
	if err := by.person(); err != nil {
		return nil, err
	}
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		ts, err := tx.PersonTokens(ctx, by.ID)
		out = tokenRecords(ts)
		return err
	})
	return out, err
}

// CreateMyToken makes a token of the person who calls: it may do what the person may, as far as its scopes go.
func (s *Service) CreateMyToken(ctx context.Context, by *Principal, req control.CreateAPIToken) (*control.CreatedAPIToken, error) {
	scopes, life, err := checkTokenRequest(req)
	if err != nil {
		return nil, err
	}
	if by.narrow != nil && (len(scopes) == 0 || !by.narrow.Contains(scopes)) {
		return nil, forbidden("name scopes that this token has", "a token with scopes can not make one with more")
	}
	out := &control.CreatedAPIToken{}
	err = s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		have, err := c.PersonTokens(ctx, p.ID)
		if err != nil {
			return err
		}
		if err := maxLive(have, c.Now()); err != nil {
			return err
		}
		t := &store.AccessToken{Person: p.ID, Name: clip(req.Name, 64), Scopes: scopes.Words()}
		if out.Token, err = newToken(ctx, c, personPrefix, t, life); err != nil {
			return err
		}
		out.APIToken = tokenRecord(t)
		return c.Record(ctx, p.Org, "api-token.issue", t.ID, map[string]any{"name": t.Name, "login": p.Login, "scopes": t.Scopes})
	})
	return out, err
}

// RevokeMyToken revokes one of the person's own tokens.
func (s *Service) RevokeMyToken(ctx context.Context, by *Principal, id string) error {
	return s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		ts, err := c.PersonTokens(ctx, p.ID)
		if err != nil {
			return err
		}
		return revokeOne(ctx, c, ts, id, p.Org)
	})
}

func revokeOne(ctx context.Context, c *registry.Change, ts []*store.AccessToken, id, org string) error {
	for _, t := range ts {
		if t.ID != id {
			continue
		}
		if !t.Revoked.IsZero() {
			return registry.Conflict("", "the token was revoked at %s", t.Revoked.Format(time.RFC3339))
		}
		if err := c.RevokeAccessToken(ctx, t.ID, c.Now()); err != nil {
			return err
		}
		return c.Record(ctx, org, "api-token.revoke", t.ID, map[string]any{"name": t.Name})
	}
	return registry.NotFound(store.ErrNotFound, "token", id, org)
}

// ForgetToken revokes the token that a principal came with: what a program does when it logs out.
func (s *Service) ForgetToken(ctx context.Context, by *Principal) error {
	if by.Kind != KindPerson || by.Token == "" {
		return forbidden("revoke it where it was made", "this token is not of a login")
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		ts, err := c.PersonTokens(ctx, by.ID)
		if err != nil {
			return err
		}
		return revokeOne(ctx, c, ts, by.Token, homeOf(ctx, c, by.ID))
	})
}

// Tokens lists the API tokens of their own: those of org, or of the platform.
func (s *Service) Tokens(ctx context.Context, org string) (out []control.APIToken, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		ts, err := tx.APITokens(ctx, homeWord(org))
		if err != nil {
			return err
		}
		out = []control.APIToken{}
		for _, t := range ts {
			p := tokenPrincipal(&registry.Administrator{Name: t.Name, Org: t.Org, Scope: t.Scope})
			out = append(out, tokenRecord(&store.AccessToken{
				ID: t.ID, Name: t.Name, Scopes: p.Grants[0].Scopes.Words(), Created: t.Created, Expires: t.Expires, Revoked: t.Revoked,
			}))
		}
		return nil
	})
	return out, err
}

// CreateToken makes an API token of its own, with scopes that the caller has.
func (s *Service) CreateToken(ctx context.Context, by *Principal, org string, req control.CreateAPIToken) (*control.CreatedAPIToken, error) {
	if err := by.Require(org, "tokens", Write); err != nil {
		return nil, err
	}
	scopes, life, err := checkTokenRequest(req)
	if err != nil {
		return nil, err
	}
	if err := mayHand(by, org, scopes); err != nil {
		return nil, err
	}
	out := &control.CreatedAPIToken{}
	err = s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, "tokens", Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		scope := store.Scope(strings.Join(scopes.Words(), " "))
		switch scope { // as platformd admin token writes them
		case "*":
			scope = store.ScopeAdmin
		case "*:read":
			scope = store.ScopeReadOnly
		}
		t := &store.APIToken{ID: identity.NewID("token"), Name: clip(req.Name, 64), Org: homeWord(org), Scope: scope, Created: c.Now()}
		out.Token = "swt1." + secret()
		t.Hash = hashOf(out.Token)
		if life > 0 {
			t.Expires = c.Now().Add(life)
		}
		if err := c.InsertAPIToken(ctx, t); err != nil {
			return err
		}
		out.APIToken = tokenRecord(&store.AccessToken{ID: t.ID, Name: t.Name, Scopes: scopes.Words(), Created: t.Created, Expires: t.Expires})
		return c.Record(ctx, org, "api-token.issue", t.ID, map[string]any{"name": t.Name, "scopes": scopes.Words()})
	})
	return out, err
}

// RevokeToken revokes an API token of its own.
func (s *Service) RevokeToken(ctx context.Context, by *Principal, org, id string) error {
	if err := by.Require(org, "tokens", Write); err != nil {
		return err
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, "tokens", Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		ts, err := c.APITokens(ctx, homeWord(org))
		if err != nil {
			return err
		}
		for _, t := range ts {
			if t.ID != id {
				continue
			}
			if !t.Revoked.IsZero() {
				return registry.Conflict("", "the token was revoked at %s", t.Revoked.Format(time.RFC3339))
			}
			if err := c.RevokeAPIToken(ctx, t.ID, c.Now()); err != nil {
				return err
			}
			return c.Record(ctx, org, "api-token.revoke", t.ID, map[string]any{"name": t.Name})
		}
		return registry.NotFound(store.ErrNotFound, "token", id, org)
	})
}
