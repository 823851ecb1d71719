package people

import (
	"context"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func accountRecord(a *store.ServiceAccount) *control.ServiceAccountRecord {
	return &control.ServiceAccountRecord{ID: a.ID, Name: a.Name, Scopes: a.Scopes, Disabled: a.Disabled, Created: a.Created, Creator: a.Creator}
}

const accountObject = "service-accounts"

// mayHand refuses to hand out scopes that the caller does not have.
func mayHand(by *Principal, org string, scopes Scopes) error {
	if len(scopes) == 0 {
		return registry.Invalid("body.scopes", "such as relays:read, gateways:write, audit:read, *:read, *", "a service account without scopes can do nothing")
	}
	if !by.contains(org, scopes) {
		return forbidden("ask an owner", "%s can not hand out %v: that is more than its own rights", by.Describe(), scopes.Words())
	}
	return nil
}

// ServiceAccounts lists those of org, or of the platform.
func (s *Service) ServiceAccounts(ctx context.Context, org string, page store.Page) (*control.List[control.ServiceAccountRecord], error) {
	out := &control.List[control.ServiceAccountRecord]{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = &control.List[control.ServiceAccountRecord]{Items: []control.ServiceAccountRecord{}}
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		p := page
		if p.Limit > 0 {
			p.Limit++
		}
		as, err := tx.ServiceAccounts(ctx, org, p)
		if err != nil {
			return err
		}
		if page.Limit > 0 && len(as) > page.Limit {
			as = as[:page.Limit]
			out.NextCursor = as[page.Limit-1].Name
		}
		for _, a := range as {
			out.Items = append(out.Items, *accountRecord(a))
		}
		return nil
	})
	return out, err
}

// account finds a service account for a transaction of a caller who may change it.
func (s *Service) account(ctx context.Context, by *Principal, org, name string, fn func(c *registry.Change, a *store.ServiceAccount) error) error {
	if err := by.Require(org, accountObject, Write); err != nil {
		return err
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, accountObject, Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		a, err := c.FindServiceAccount(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "service-account", name, org)
		}
		return fn(c, a)
	})
}

// ServiceAccount returns one by name or id.
func (s *Service) ServiceAccount(ctx context.Context, org, name string) (out *control.ServiceAccountRecord, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		a, err := tx.FindServiceAccount(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "service-account", name, org)
		}
		out = accountRecord(a)
		return nil
	})
	return out, err
}

// CreateServiceAccount makes one, with scopes that the caller has.
func (s *Service) CreateServiceAccount(ctx context.Context, by *Principal, org string, req control.CreateServiceAccount) (out *control.ServiceAccountRecord, err error) {
	if err := by.Require(org, accountObject, Write); err != nil {
		return nil, err
	}
	if err := registry.CheckName("service account", req.Name); err != nil {
		return nil, err
	}
	scopes, err := ParseScopes(req.Scopes)
	if err != nil {
		return nil, err
	}
	if err := mayHand(by, org, scopes); err != nil {
		return nil, err
	}
	err = s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, accountObject, Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		a := &store.ServiceAccount{ID: identity.NewID("agent"), Org: org, Name: req.Name, Scopes: scopes.Words(), Created: c.Now(), Creator: by.Actor}
		if err := c.InsertServiceAccount(ctx, a); err != nil {
			return registry.Taken(err, "service account", req.Name, org)
		}
		out = accountRecord(a)
		return c.Record(ctx, org, "service-account.create", "service-account/"+a.ID, map[string]any{"name": a.Name, "scopes": a.Scopes})
	})
	return out, err
}

// UpdateServiceAccount changes scopes, or whether it may be used.
func (s *Service) UpdateServiceAccount(ctx context.Context, by *Principal, org, name string, req control.UpdateServiceAccount) (out *control.ServiceAccountRecord, err error) {
	var scopes Scopes
	if req.Scopes != nil {
		if scopes, err = ParseScopes(*req.Scopes); err != nil {
			return nil, err
		}
		if err := mayHand(by, org, scopes); err != nil {
			return nil, err
		}
	}
	err = s.account(ctx, by, org, name, func(c *registry.Change, a *store.ServiceAccount) error {
		if err := mayHand(by, org, scopesOf(a.Scopes)); err != nil { // one with more rights is not the caller's to change
			return err
		}
		detail := map[string]any{"name": a.Name}
		if req.Scopes != nil {
			a.Scopes = scopes.Words()
			detail["scopes"] = a.Scopes
		}
		if req.Disabled != nil {
			a.Disabled = *req.Disabled
			detail["disabled"] = a.Disabled
		}
		if err := c.UpdateServiceAccount(ctx, a); err != nil {
			return err
		}
		out = accountRecord(a)
		return c.Record(ctx, org, "service-account.update", "service-account/"+a.ID, detail)
	})
	return out, err
}

// DeleteServiceAccount deletes one with its tokens.
func (s *Service) DeleteServiceAccount(ctx context.Context, by *Principal, org, name string) error {
	return s.account(ctx, by, org, name, func(c *registry.Change, a *store.ServiceAccount) error {
		if err := c.DeleteServiceAccount(ctx, a.ID); err != nil {
			return err
		}
		return c.Record(ctx, org, "service-account.delete", "service-account/"+a.ID, map[string]any{"name": a.Name})
	})
}

// AccountTokens lists the tokens of a service account.
func (s *Service) AccountTokens(ctx context.Context, org, name string) (out []control.APIToken, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		a, err := tx.FindServiceAccount(ctx, org, name)
		if err != nil {
			return registry.NotFound(err, "service-account", name, org)
		}
		ts, err := tx.AccountTokens(ctx, a.ID)
		out = tokenRecords(ts)
		return err
	})
	return out, err
}

// CreateAccountToken makes a token of a service account; its scopes narrow the account's.
func (s *Service) CreateAccountToken(ctx context.Context, by *Principal, org, name string, req control.CreateAPIToken) (*control.CreatedAPIToken, error) {
	scopes, life, err := checkTokenRequest(req)
	if err != nil {
		return nil, err
	}
	out := &control.CreatedAPIToken{}
	err = s.account(ctx, by, org, name, func(c *registry.Change, a *store.ServiceAccount) error {
		// Who holds a token has the rights of the account: nobody gets more that way than they may hand out.
		if err := mayHand(by, org, scopesOf(a.Scopes)); err != nil {
			return err
		}
		have, err := c.AccountTokens(ctx, a.ID)
		if err != nil {
			return err
		}
		if err := maxLive(have, c.Now()); err != nil {
			return err
		}
		t := &store.AccessToken{Account: a.ID, Name: clip(req.Name, 64), Scopes: scopes.Words()}
		if out.Token, err = newToken(ctx, c, accountPrefix, t, life); err != nil {
			return err
		}
		out.APIToken = tokenRecord(t)
		return c.Record(ctx, org, "api-token.issue", t.ID, map[string]any{"name": t.Name, "service_account": a.Name, "scopes": t.Scopes})
	})
	return out, err
}

// RevokeAccountToken revokes a token of a service account.
func (s *Service) RevokeAccountToken(ctx context.Context, by *Principal, org, name, id string) error {
	return s.account(ctx, by, org, name, func(c *registry.Change, a *store.ServiceAccount) error {
		ts, err := c.AccountTokens(ctx, a.ID)
		if err != nil {
			return err
		}
		return revokeOne(ctx, c, ts, id, org)
	})
}
