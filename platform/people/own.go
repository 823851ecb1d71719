package people

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net/http"
	"slices"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// What a person does with their own account.

// Me is who calls, for the API.
func (s *Service) Me(ctx context.Context, p *Principal) (*control.Me, error) {
	_, all := p.Organizations()
	out := &control.Me{Kind: string(p.Kind), ID: p.ID, Name: p.Name, All: all, Organizations: []control.MyOrganization{}}
	for _, g := range p.Grants {
		out.Organizations = append(out.Organizations, control.MyOrganization{Org: g.Org, Role: string(g.Role), Scopes: g.Scopes.Words()})
	}
	if p.Kind != KindPerson {
		return out, nil
	}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		v, err := tx.Person(ctx, p.ID)
		if err != nil {
			return err
		}
		out.Person, err = s.record(ctx, tx, v, v.Org, true)
		return err
	})
	return out, err
}

// own runs fn for the person who calls.
func (s *Service) own(ctx context.Context, by *Principal, fn func(c *registry.Change, p *store.Person) error) error {
	if err := by.person(); err != nil {
		return err
	}
	if by.narrow != nil && !by.narrow.May(Self, Write) {
		return refuseScope(by, Platform, Self, Write)
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		p, err := c.Person(ctx, by.ID)
		if notFound(err) || err == nil && p.Disabled {
			return noSession()
		}
		if err != nil {
			return err
		}
		return fn(c, p)
	})
}

// UpdateMe changes a person's own name and address.
func (s *Service) UpdateMe(ctx context.Context, by *Principal, req control.UpdateMe) (*control.Me, error) {
	if req.Email != nil {
		if err := checkEmail(*req.Email); err != nil {
			return nil, err
		}
	}
	err := s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		detail := map[string]any{"login": p.Login}
		if req.Name != nil {
			p.Name = clip(*req.Name, maxNameRunes)
			detail["name"] = p.Name
		}
		if req.Email != nil {
			p.Email = *req.Email
			detail["email"] = p.Email
		}
		if err := c.UpdatePerson(ctx, p); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "person.update", "person/"+p.ID, detail)
	})
	if err != nil {
		return nil, err
	}
	return s.Me(ctx, by)
}

// confirm checks the person's own password before something that a borrowed browser must not do. Without a password there is nothing to check.
func (s *Service) confirm(ctx context.Context, by *Principal, password, source string) (*store.Person, error) {
	if err := by.person(); err != nil {
		return nil, err
	}
	if by.Session == nil {
		return nil, forbidden("do it in the browser", "this needs a browser's session, not a token")
	}
	var p *store.Person
	err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		p, err = tx.Person(ctx, by.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	if p.Password == "" {
		return p, nil
	}
	account, from := ofAccount("password", p.Login, "session "+by.Session.ID), ofSource(source)
	if err := s.guess(ctx, "password", p, source, account, from); err != nil {
		return nil, err
	}
	ok, _, err := s.hash.check(ctx, p.Password, password)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errors.Join(registry.Refuse(http.StatusForbidden, CodeBadLogin, "type your present password", "the password is wrong"), s.refuseLogin(ctx, p, CodeBadLogin, source))
	}
	s.guard.succeeded(account, from)
	return p, nil
}

// ChangePassword sets a new password. All other sessions end, and the one that asks gets a new cookie: set it with SetCookie.
func (s *Service) ChangePassword(ctx context.Context, by *Principal, old, password, source string) (*Session, error) {
	was, err := s.confirm(ctx, by, old, source)
	if err != nil {
		return nil, err
	}
	if was.Password == "" {
		return nil, registry.Refuse(http.StatusConflict, CodeNoPassword, "you log in by single sign-on; an owner can send you a link for a password: sallyway user invite "+was.Login, "the account has no password")
	}
	if err := CheckPassword(password, was.Login, was.Name); err != nil {
		return nil, err
	}
	hash, err := s.hash.make(ctx, password)
	if err != nil {
		return nil, err
	}
	var out *Session
	err = s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		if p.Password != was.Password {
			return registry.Conflict("load the page again", "the password was changed just now")
		}
		p.Password, p.PasswordChanged = hash, c.Now()
		if err := errors.Join(c.DeleteWebSessions(ctx, p.ID, ""), c.DeleteTickets(ctx, ticketInvite, p.ID), c.DeleteTickets(ctx, ticketSecond, p.ID)); err != nil {
			return err
		}
		if out, err = s.newSession(ctx, c, p, source, by.Session.Agent, by.Session.Provider); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "person.password", "person/"+p.ID, map[string]any{"login": p.Login, "source": source})
	})
	return out, err
}

// Factor is a second factor that is not confirmed yet.
type Factor struct {
	Secret string // base32, to type
	URL    string // otpauth://, for a QR code
	// Ticket goes back to ConfirmFactor: the sealed secret.
	Ticket string
}

const ticketFactor = "factor"

// BeginFactor makes the secret of an authenticator. It counts after ConfirmFactor.
func (s *Service) BeginFactor(ctx context.Context, by *Principal, password, source string) (*Factor, error) {
	if _, err := s.confirm(ctx, by, password, source); err != nil {
		return nil, err
	}
	key := make([]byte, totpSecret)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	out := &Factor{Secret: base32Plain.EncodeToString(key), URL: totpURL("Sallyway", by.Name, key), Ticket: secret()}
	err := s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		if err := c.DeleteTickets(ctx, ticketFactor, p.ID); err != nil {
			return err
		}
		return c.InsertTicket(ctx, &store.Ticket{
			Hash: hashOf(out.Ticket), Kind: ticketFactor, Subject: p.ID, Data: s.reg.Seal.Seal(registry.TOTPLabel(p.ID), key), Created: c.Now(), Expires: c.Now().Add(secondLife * 3),
		})
	})
	return out, err
}

// ConfirmFactor turns a second factor on with a code of it, and returns recovery codes, which are shown once. Other sessions end.
func (s *Service) ConfirmFactor(ctx context.Context, by *Principal, ticket, code string) (recovery []string, err error) {
	if err := s.guard.try(s.reg.Now(), ofAccount("factor", by.ID, "")); err != nil {
		return nil, err
	}
	err = s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		t, err := c.Ticket(ctx, hashOf(ticket), ticketFactor, c.Now())
		if notFound(err) || err == nil && t.Subject != p.ID {
			return registry.Refuse(http.StatusForbidden, CodeTicketGone, "begin again", "this has taken too long")
		}
		if err != nil {
			return err
		}
		key, err := s.reg.Seal.Open(registry.TOTPLabel(p.ID), t.Data)
		if err != nil {
			return err
		}
		step, ok := totpMatch(key, code, c.Now())
		if !ok {
			return registry.Refuse(http.StatusForbidden, CodeBadCode, "wait for the next code, and see that the clock of your phone is right", "the code is wrong")
		}
		p.TOTP = t.Data
		if err := errors.Join(c.UpdatePerson(ctx, p), c.DeleteTickets(ctx, ticketFactor, p.ID)); err != nil {
			return err
		}
		if err := c.StepTOTP(ctx, p.ID, step); err != nil && !notFound(err) {
			return err
		}
		if recovery, err = newRecovery(ctx, c, p.ID); err != nil {
			return err
		}
		keep := ""
		if by.Session != nil {
			keep = by.Session.ID
		}
		if err := c.DeleteWebSessions(ctx, p.ID, keep); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "person.factor", "person/"+p.ID, map[string]any{"login": p.Login, "on": true})
	})
	if err == nil {
		s.guard.succeeded(ofAccount("factor", by.ID, ""), guess{})
	}
	return recovery, err
}

func newRecovery(ctx context.Context, c *registry.Change, person string) ([]string, error) {
	out := make([]string, recoveryCodes)
	hashes := make([][32]byte, recoveryCodes)
	for i := range out {
		out[i] = words(recoveryDigits, 5)
		hashes[i] = recoveryHash(person, out[i])
	}
	return out, c.PutRecoveryCodes(ctx, person, hashes)
}

// RemoveFactor turns the second factor off.
func (s *Service) RemoveFactor(ctx context.Context, by *Principal, password, source string) error {
	if _, err := s.confirm(ctx, by, password, source); err != nil {
		return err
	}
	return s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		p.TOTP = nil
		if err := errors.Join(c.UpdatePerson(ctx, p), c.PutRecoveryCodes(ctx, p.ID, nil)); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "person.factor", "person/"+p.ID, map[string]any{"login": p.Login, "on": false})
	})
}

// RenewRecovery replaces the recovery codes.
func (s *Service) RenewRecovery(ctx context.Context, by *Principal, password, source string) (codes []string, err error) {
	if _, err := s.confirm(ctx, by, password, source); err != nil {
		return nil, err
	}
	err = s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		if p.TOTP == nil {
			return registry.Conflict("turn the second factor on first", "the account has no second factor")
		}
		if codes, err = newRecovery(ctx, c, p.ID); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "person.recovery", "person/"+p.ID, map[string]any{"login": p.Login})
	})
	return codes, err
}

// RecoveryLeft is how many recovery codes a person has left.
func (s *Service) RecoveryLeft(ctx context.Context, by *Principal) (n int, err error) {
	if err := by.person(); err != nil {
		return 0, err
	}
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		n, err = tx.RecoveryCodes(ctx, by.ID)
		return err
	})
	return n, err
}

// MyClients lists the person's client nodes in org, or (empty) everywhere the person has a role.
func (s *Service) MyClients(ctx context.Context, by *Principal, org string) ([]control.NodeRecord, error) {
	if err := s.mine(by, org, Read); err != nil {
		return nil, err
	}
	var nodes []*store.Node
	err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		nodes, err = tx.PersonNodes(ctx, by.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	out := []control.NodeRecord{}
	for _, n := range nodes {
		if n.Org != org {
			continue
		}
		rec, err := s.reg.Node(ctx, n.Org, n.Kind, n.ID)
		if registry.Code(err) == control.CodeNotFound { // deleted meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, *rec)
	}
	return out, nil
}

// mine refuses what persons do for themselves in org to whoever has no role there.
func (s *Service) mine(by *Principal, org, verb string) error {
	if err := by.person(); err != nil {
		return err
	}
	return by.Require(org, Self, verb)
}

// maxClients is how many client nodes a person may have in an organization.
const maxClients = 20

// CreateMyClient makes a client node of the person who calls, and its enrolment token.
func (s *Service) CreateMyClient(ctx context.Context, by *Principal, org string, req control.CreateNode) (*control.CreatedNode, error) {
	if err := s.mine(by, org, Write); err != nil {
		return nil, err
	}
	return s.reg.CreateNodeOf(registry.WithActor(ctx, by.Actor), org, identity.Client, req, func(c *registry.Change, n *store.Node) error {
		if err := s.still(ctx, c, by, org, Self, Write); err != nil {
			return err
		}
		have, err := c.PersonNodes(ctx, by.ID)
		if err != nil {
			return err
		}
		count := 0
		for _, h := range have {
			if h.Org == org {
				count++
			}
		}
		if count >= maxClients {
			return registry.Conflict("delete one that you need no more: sallyway client list --mine", "you have %d clients in %s, limit %d", count, org, maxClients)
		}
		return c.BindNode(ctx, n.ID, by.ID)
	})
}

// myClient finds a client node of the person who calls.
func (s *Service) myClient(ctx context.Context, by *Principal, org, name string) (*store.Node, error) {
	if err := s.mine(by, org, Write); err != nil {
		return nil, err
	}
	var out *store.Node
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		n, err := tx.FindNode(ctx, org, identity.Client, name)
		if err != nil {
			return registry.NotFound(err, "client", name, org)
		}
		if owner, err := tx.NodePerson(ctx, n.ID); err != nil || owner != by.ID {
			if err != nil && !notFound(err) {
				return err
			}
			return registry.NotFound(store.ErrNotFound, "client", name, org)
		}
		out = n
		return nil
	})
	return out, err
}

// ReissueMyClient makes a new enrolment token for the person's own client.
func (s *Service) ReissueMyClient(ctx context.Context, by *Principal, org, name string) (*control.CreatedNode, error) {
	n, err := s.myClient(ctx, by, org, name)
	if err != nil {
		return nil, err
	}
	return s.reg.ReissueToken(registry.WithActor(ctx, by.Actor), org, identity.Client, n.ID)
}

// DeleteMyClient deletes the person's own client.
func (s *Service) DeleteMyClient(ctx context.Context, by *Principal, org, name string) error {
	n, err := s.myClient(ctx, by, org, name)
	if err != nil {
		return err
	}
	return s.reg.DeleteNode(registry.WithActor(ctx, by.Actor), org, identity.Client, n.ID)
}

// MyResources lists what the person's own clients in org reach.
func (s *Service) MyResources(ctx context.Context, by *Principal, org string) ([]control.MyResource, error) {
	clients, err := s.MyClients(ctx, by, org)
	if err != nil {
		return nil, err
	}
	reach, err := s.reg.Reach(ctx, org)
	if err != nil {
		return nil, err
	}
	reached := map[string][]string{}
	for _, c := range clients {
		for _, r := range reach.Subjects["client:"+c.Name] {
			reached[r] = append(reached[r], c.Name)
		}
	}
	out := []control.MyResource{}
	for _, name := range slices.Sorted(maps.Keys(reached)) {
		r, err := s.reg.Resource(ctx, org, name)
		if registry.Code(err) == control.CodeNotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, control.MyResource{Name: r.Name, Address: r.Address, DNS: r.Name + "." + org + ".sallyway.internal", Clients: reached[name]})
	}
	return out, nil
}
