package people

import (
	"context"
	"errors"
	"net/http"
	"net/mail"
	"regexp"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

const maxLogin = 254

// loginForm is what a login looks like: a name or an e-mail address, in lower case.
var loginForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._+-]{0,62}(@[a-z0-9][a-z0-9.-]{0,189})?$`)

var idForm = regexp.MustCompile(`^[a-z]-[a-z2-7]{12}$`)

func checkLogin(login string) (string, error) {
	login = strings.ToLower(strings.TrimSpace(login))
	if !loginForm.MatchString(login) || idForm.MatchString(login) {
		return "", registry.Invalid("body.login", "a name such as ada, or an e-mail address: letters, digits and . _ + - @", "%.80q is no login", login)
	}
	return login, nil
}

func checkEmail(s string) error {
	if s == "" {
		return nil
	}
	if a, err := mail.ParseAddress(s); err != nil || a.Address != s || len(s) > maxLogin {
		return registry.Invalid("body.email", "such as ada@example.com", "%.80q is no e-mail address", s)
	}
	return nil
}

func checkRole(role string) error {
	if !Role(role).Valid() {
		return registry.Invalid("body.role", "owner, admin, auditor or member", "%.40q is no role", role)
	}
	return nil
}

// homeWord is an organization as callers see it.
func homeWord(org string) string {
	if org == Platform {
		return ""
	}
	return org
}

// record is a person as administrators of org see it. all says that the caller may see the roles in other organizations.
func (s *Service) record(ctx context.Context, tx store.Tx, p *store.Person, org string, all bool) (*control.PersonRecord, error) {
	rec := &control.PersonRecord{
		ID: p.ID, Login: p.Login, Name: p.Name, Email: p.Email, Home: homeWord(p.Org), Disabled: p.Disabled, Password: p.Password != "", TOTP: p.TOTP != nil, Created: p.Created,
	}
	if !p.LastLogin.IsZero() {
		rec.LastLogin = &p.LastLogin
	}
	if !all && p.Org != org {
		rec.Home = ""
	}
	roles, err := tx.PersonRoles(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	for _, r := range roles {
		if r.Org == org {
			rec.Role = r.Role
		}
		if all || r.Org == org {
			rec.Roles = append(rec.Roles, control.PersonRole{Org: r.Org, Role: r.Role})
		}
	}
	ids, err := tx.PersonIdentities(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	for _, i := range ids {
		v, err := tx.Provider(ctx, i.Provider)
		if err != nil {
			return nil, err
		}
		if all || v.Org == org {
			rec.Providers = append(rec.Providers, v.Name)
		}
	}
	nodes, err := tx.PersonNodes(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if n.Org == org {
			rec.Clients = append(rec.Clients, n.Name)
		}
	}
	return rec, nil
}

// People lists who has a role in org or is at home there; with org Platform it lists everybody. The caller has been asked for people:read.
func (s *Service) People(ctx context.Context, org string, page store.Page) (*control.List[control.PersonRecord], error) {
	out := &control.List[control.PersonRecord]{}
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = &control.List[control.PersonRecord]{Items: []control.PersonRecord{}}
		which := org
		if org == Platform {
			which = ""
		} else if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		p := page
		if p.Limit > 0 {
			p.Limit++
		}
		ps, err := tx.People(ctx, which, p)
		if err != nil {
			return err
		}
		if page.Limit > 0 && len(ps) > page.Limit {
			ps = ps[:page.Limit]
			out.NextCursor = ps[page.Limit-1].Login
		}
		for _, p := range ps {
			rec, err := s.record(ctx, tx, p, org, org == Platform)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

func orgError(err error, org string) error {
	if notFound(err) {
		return registry.Refuse(http.StatusNotFound, control.CodeNotFound, "see `sallyway organization list`", "there is no organization %.80q", org)
	}
	return err
}

// toChange finds a person of an organization whom by may change: nobody touches somebody whose rights are more than their own.
func (s *Service) toChange(ctx context.Context, c *registry.Change, by *Principal, org, name string) (*store.Person, *store.PersonRole, error) {
	if err := s.still(ctx, c, by, org, "people", Write); err != nil {
		return nil, nil, err
	}
	if _, err := c.FindOrg(ctx, org); err != nil {
		return nil, nil, err
	}
	p, role, err := find(ctx, c, org, name)
	if err == nil && role != nil {
		err = mayAssign(by, org, role.Role)
	}
	return p, role, err
}

// find finds a person whom org may see.
func find(ctx context.Context, tx store.Tx, org, name string) (*store.Person, *store.PersonRole, error) {
	p, err := tx.FindPerson(ctx, strings.ToLower(name))
	if err != nil {
		return nil, nil, registry.NotFound(err, "user", name, org)
	}
	roles, err := tx.PersonRoles(ctx, p.ID)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range roles {
		if r.Org == org {
			return p, r, nil
		}
	}
	if p.Org != org && org != Platform {
		return nil, nil, registry.NotFound(store.ErrNotFound, "user", name, org)
	}
	return p, nil, nil
}

// Person returns a person whom org may see, by login or id.
func (s *Service) Person(ctx context.Context, org, name string) (out *control.PersonRecord, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if _, err := tx.Org(ctx, org); err != nil {
			return orgError(err, org)
		}
		p, _, err := find(ctx, tx, org, name)
		if err != nil {
			return err
		}
		out, err = s.record(ctx, tx, p, org, org == Platform)
		return err
	})
	return out, err
}

// mayAssign refuses a role that is more than the caller's own.
func mayAssign(by *Principal, org, role string) error {
	if !by.contains(org, Role(role).Scopes()) {
		return forbidden("ask an owner", "%s can not make somebody %s: that is more than its own rights", by.Describe(), role)
	}
	return nil
}

// CreatePerson makes a person at home in org, or gives a known one a role there. Only the platform may draw in people from elsewhere.
func (s *Service) CreatePerson(ctx context.Context, by *Principal, org string, req control.CreatePerson) (*control.InvitedPerson, error) {
	if err := by.Require(org, "people", Write); err != nil {
		return nil, err
	}
	login, err := checkLogin(req.Login)
	if err != nil {
		return nil, err
	}
	if err := checkRole(req.Role); err != nil {
		return nil, err
	}
	if err := errors.Join(checkEmail(req.Email), mayAssign(by, org, req.Role)); err != nil {
		return nil, err
	}
	hash := ""
	if req.Password != "" {
		if err := CheckPassword(req.Password, login, req.Name); err != nil {
			return nil, err
		}
		if hash, err = s.hash.make(ctx, req.Password); err != nil {
			return nil, err
		}
	}
	out := &control.InvitedPerson{}
	err = s.transact(ctx, by, func(c *registry.Change) error {
		*out = control.InvitedPerson{}
		if err := s.still(ctx, c, by, org, "people", Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		p, err := c.FindPerson(ctx, login)
		fresh := notFound(err)
		switch {
		case fresh:
			p = &store.Person{
				ID: identity.NewID("person"), Org: org, Login: login, Name: clip(req.Name, maxNameRunes), Email: req.Email, Password: hash, Created: c.Now(),
			}
			if hash != "" {
				p.PasswordChanged = c.Now()
			}
			if err := c.InsertPerson(ctx, p); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			if role, err := roleOf(ctx, c, p.ID, org); err != nil {
				return err
			} else if role != "" || p.Org == org && role != "" {
				return registry.Conflict("sallyway user update "+login+" --role "+req.Role, "%s is %s of %s already", login, role, org)
			}
			if p.Org != org && !by.Sees(Platform) || hash != "" {
				return registry.Conflict("choose another login; an account that exists elsewhere is let in by an administrator of the platform, without a password", "the login %s is taken", login)
			}
		}
		if err := c.PutPersonRole(ctx, &store.PersonRole{Person: p.ID, Org: org, Role: req.Role, Created: c.Now()}); err != nil {
			return err
		}
		if err := c.Record(ctx, org, "person.create", "person/"+p.ID, map[string]any{"login": login, "role": req.Role, "new": fresh}); err != nil {
			return err
		}
		if fresh && hash == "" {
			if out.Invitation, err = s.invite(ctx, c, p); err != nil {
				return err
			}
		}
		rec, err := s.record(ctx, c.Tx, p, org, org == Platform)
		if err != nil {
			return err
		}
		out.PersonRecord = *rec
		return nil
	})
	return out, err
}

func roleOf(ctx context.Context, tx store.Tx, person, org string) (string, error) {
	roles, err := tx.PersonRoles(ctx, person)
	if err != nil {
		return "", err
	}
	for _, r := range roles {
		if r.Org == org {
			return r.Role, nil
		}
	}
	return "", nil
}

// still asks within a transaction whether a person may still do what they were let in for: of two owners who demote each other at once,
// the second is one no more.
func (s *Service) still(ctx context.Context, tx store.Tx, by *Principal, org, object, verb string) error {
	if by.Kind != KindPerson {
		return nil
	}
	p, err := tx.Person(ctx, by.ID)
	if notFound(err) || err == nil && p.Disabled {
		return noSession()
	}
	if err != nil {
		return err
	}
	now, err := principalOf(ctx, tx, p)
	if err != nil {
		return err
	}
	now.narrow = by.narrow
	return now.Require(org, object, verb)
}

// keepOwner refuses a change after which org has no owner who can log in.
func keepOwner(ctx context.Context, tx store.Tx, org string) error {
	roles, err := tx.OrgRoles(ctx, org)
	if err != nil {
		return err
	}
	for _, r := range roles {
		if Role(r.Role) != Owner {
			continue
		}
		p, err := tx.Person(ctx, r.Person)
		if err != nil {
			return err
		}
		if !p.Disabled {
			return nil
		}
	}
	where := "organization " + org
	if org == Platform {
		where = "the platform"
	}
	return registry.Conflict("make somebody else owner first", "this is the last owner of %s", where)
}

func owns(ctx context.Context, tx store.Tx, person string) (orgs []string, err error) {
	roles, err := tx.PersonRoles(ctx, person)
	for _, r := range roles {
		if Role(r.Role) == Owner {
			orgs = append(orgs, r.Org)
		}
	}
	return orgs, err
}

// managed refuses what concerns the whole account to all but the person's home and the platform.
func managed(p *store.Person, org string) error {
	if p.Org == org || org == Platform {
		return nil
	}
	return registry.Refuse(http.StatusForbidden, CodeOtherAccount, "take the role away here: sallyway user delete "+p.Login+"; the account itself is managed by the platform",
		"the account %s is not at home in %s", p.Login, org)
}

// UpdatePerson changes a person, their role in org, or whether they may log in at all.
func (s *Service) UpdatePerson(ctx context.Context, by *Principal, org, name string, req control.UpdatePerson) (out *control.PersonRecord, err error) {
	if err := by.Require(org, "people", Write); err != nil {
		return nil, err
	}
	if req.Role != nil {
		if err := errors.Join(checkRole(*req.Role), mayAssign(by, org, *req.Role)); err != nil {
			return nil, err
		}
	}
	if req.Email != nil {
		if err := checkEmail(*req.Email); err != nil {
			return nil, err
		}
	}
	err = s.transact(ctx, by, func(c *registry.Change) error {
		p, role, err := s.toChange(ctx, c, by, org, name)
		if err != nil {
			return err
		}
		detail := map[string]any{"login": p.Login}
		if req.Name != nil || req.Email != nil || req.Disabled != nil {
			if err := managed(p, org); err != nil {
				return err
			}
			if err := s.outranks(ctx, c, by, p); err != nil {
				return err
			}
		}
		if req.Name != nil {
			p.Name = clip(*req.Name, maxNameRunes)
			detail["name"] = p.Name
		}
		if req.Email != nil {
			p.Email = *req.Email
			detail["email"] = p.Email
		}
		if req.Role != nil && (role == nil || role.Role != *req.Role) {
			detail["role"] = *req.Role
			was := ""
			if role != nil {
				was = role.Role
				detail["old_role"] = was
			}
			if err := c.PutPersonRole(ctx, &store.PersonRole{Person: p.ID, Org: org, Role: *req.Role, Created: c.Now()}); err != nil {
				return err
			}
			if Role(was) == Owner {
				if err := keepOwner(ctx, c, org); err != nil {
					return err
				}
			}
		}
		if req.Disabled != nil && *req.Disabled != p.Disabled {
			p.Disabled = *req.Disabled
			detail["disabled"] = p.Disabled
		}
		if err := c.UpdatePerson(ctx, p); err != nil {
			return err
		}
		if p.Disabled {
			if err := s.lockOut(ctx, c, p, "its person was disabled"); err != nil {
				return err
			}
		}
		if err := c.Record(ctx, org, "person.update", "person/"+p.ID, detail); err != nil {
			return err
		}
		out, err = s.record(ctx, c.Tx, p, org, org == Platform)
		return err
	})
	return out, err
}

// outranks refuses to touch an account that has more rights anywhere than the caller may hand out there.
func (s *Service) outranks(ctx context.Context, tx store.Tx, by *Principal, p *store.Person) error {
	roles, err := tx.PersonRoles(ctx, p.ID)
	if err != nil {
		return err
	}
	for _, r := range roles {
		if r.Org != p.Org && !by.Sees(Platform) && r.Org != Platform {
			continue // what the account may do elsewhere, its home may take away
		}
		if mayAssign(by, r.Org, r.Role) != nil {
			return forbidden("ask an owner, or an administrator of the platform", "%s has no say over %s, whose rights are more than its own", by.Describe(), p.Login)
		}
	}
	return nil
}

// lockOut ends all that a disabled person holds: sessions, tokens, nodes. An organization keeps an owner.
func (s *Service) lockOut(ctx context.Context, c *registry.Change, p *store.Person, why string) error {
	orgs, err := owns(ctx, c, p.ID)
	if err != nil {
		return err
	}
	for _, o := range orgs {
		if err := keepOwner(ctx, c, o); err != nil {
			return err
		}
	}
	if err := s.endAll(ctx, c, p.ID, ""); err != nil {
		return err
	}
	return revokeNodes(ctx, c, p.ID, "", why)
}

// endAll ends a person's sessions (but the one with id keep), tokens and invitations.
func (s *Service) endAll(ctx context.Context, c *registry.Change, person, keep string) error {
	if err := c.DeleteWebSessions(ctx, person, keep); err != nil {
		return err
	}
	for _, kind := range []string{ticketInvite, ticketSecond, ticketCode} {
		if err := c.DeleteTickets(ctx, kind, person); err != nil {
			return err
		}
	}
	ts, err := c.PersonTokens(ctx, person)
	if err != nil {
		return err
	}
	for _, t := range ts {
		if t.Revoked.IsZero() {
			if err := c.RevokeAccessToken(ctx, t.ID, c.Now()); err != nil {
				return err
			}
		}
	}
	return nil
}

// revokeNodes revokes a person's nodes, in org or (empty) everywhere.
func revokeNodes(ctx context.Context, c *registry.Change, person, org, why string) error {
	nodes, err := c.PersonNodes(ctx, person)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if (org == "" || n.Org == org) && n.Status != store.Revoked {
			if err := c.Revoke(ctx, n, why); err != nil {
				return err
			}
		}
	}
	return nil
}

// DeletePerson takes a person their role in org and revokes their nodes there. Somebody at home there is deleted for good; with org Platform,
// anybody.
func (s *Service) DeletePerson(ctx context.Context, by *Principal, org, name string) error {
	if err := by.Require(org, "people", Write); err != nil {
		return err
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		p, role, err := s.toChange(ctx, c, by, org, name)
		if err != nil {
			return err
		}
		if p.Org != org && org != Platform {
			if err := c.DeletePersonRole(ctx, p.ID, org); err != nil {
				return err
			}
			if Role(role.Role) == Owner {
				if err := keepOwner(ctx, c, org); err != nil {
					return err
				}
			}
			if err := errors.Join(c.ForgetPerson(ctx, p.ID, org), revokeNodes(ctx, c, p.ID, org, "its person left the organization")); err != nil {
				return err
			}
			return c.Record(ctx, org, "person.remove", "person/"+p.ID, map[string]any{"login": p.Login})
		}
		if err := s.outranks(ctx, c, by, p); err != nil {
			return err
		}
		orgs, err := owns(ctx, c, p.ID)
		if err != nil {
			return err
		}
		if err := errors.Join(c.ForgetPerson(ctx, p.ID, ""), revokeNodes(ctx, c, p.ID, "", "its person was deleted")); err != nil {
			return err
		}
		if err := c.DeletePerson(ctx, p.ID); err != nil {
			return err
		}
		for _, o := range orgs {
			if err := keepOwner(ctx, c, o); err != nil {
				return err
			}
		}
		return c.Record(ctx, org, "person.delete", "person/"+p.ID, map[string]any{"login": p.Login})
	})
}

// invite makes a link with which a person chooses a password; older links stop working.
func (s *Service) invite(ctx context.Context, c *registry.Change, p *store.Person) (*control.Invitation, error) {
	if err := c.DeleteTickets(ctx, ticketInvite, p.ID); err != nil {
		return nil, err
	}
	code := secret()
	until := c.Now().Add(InviteLife)
	if err := c.InsertTicket(ctx, &store.Ticket{Hash: hashOf(code), Kind: ticketInvite, Subject: p.ID, Created: c.Now(), Expires: until}); err != nil {
		return nil, err
	}
	// In the fragment, which browsers send to nobody: it stands in no log of a proxy.
	return &control.Invitation{URL: s.reg.URL + "/invite#" + code, Expires: until}, nil
}

// Invite makes a link for a new password of a person at home in org. The old password works until the link is used.
func (s *Service) Invite(ctx context.Context, by *Principal, org, name string) (out *control.Invitation, err error) {
	err = s.manage(ctx, by, org, name, func(c *registry.Change, p *store.Person) error {
		if p.Disabled {
			return registry.Conflict("sallyway user enable "+p.Login, "%s is disabled", p.Login)
		}
		if out, err = s.invite(ctx, c, p); err != nil {
			return err
		}
		return c.Record(ctx, org, "person.invite", "person/"+p.ID, map[string]any{"login": p.Login})
	})
	return out, err
}

// ForgetFactor takes a person at home in org the second factor, when phone and recovery codes are lost.
func (s *Service) ForgetFactor(ctx context.Context, by *Principal, org, name string) (out *control.PersonRecord, err error) {
	err = s.manage(ctx, by, org, name, func(c *registry.Change, p *store.Person) error {
		p.TOTP = nil
		if err := errors.Join(c.UpdatePerson(ctx, p), c.PutRecoveryCodes(ctx, p.ID, nil)); err != nil {
			return err
		}
		if err := c.Record(ctx, org, "person.forget-factor", "person/"+p.ID, map[string]any{"login": p.Login}); err != nil {
			return err
		}
		out, err = s.record(ctx, c.Tx, p, org, org == Platform)
		return err
	})
	return out, err
}

// manage runs fn for a person whose whole account the caller may manage.
func (s *Service) manage(ctx context.Context, by *Principal, org, name string, fn func(c *registry.Change, p *store.Person) error) error {
	if err := by.Require(org, "people", Write); err != nil {
		return err
	}
	return s.transact(ctx, by, func(c *registry.Change) error {
		if err := s.still(ctx, c, by, org, "people", Write); err != nil {
			return err
		}
		if _, err := c.FindOrg(ctx, org); err != nil {
			return err
		}
		p, _, err := find(ctx, c, org, name)
		if err != nil {
			return err
		}
		if err := managed(p, org); err != nil {
			return err
		}
		if err := s.outranks(ctx, c, by, p); err != nil {
			return err
		}
		return fn(c, p)
	})
}

// AcceptInvite sets the password with an invitation's code (what follows the # of its link), ends all sessions and logs in. A second factor
// that the account has stays, and is asked for: then the result has a ticket for SecondFactor.
func (s *Service) AcceptInvite(ctx context.Context, code, password, source, agent string) (*LogInResult, error) {
	gone := registry.Refuse(http.StatusForbidden, CodeTicketGone, "have a new link made: sallyway user invite LOGIN", "the link is used, replaced or too old")
	if err := s.guess(ctx, "invitation", nil, source, ofSource("invite "+source)); err != nil {
		return nil, err
	}
	p, err := s.ofTicket(ctx, code, ticketInvite, gone)
	if err != nil {
		return nil, err
	}
	if err := CheckPassword(password, p.Login, p.Name); err != nil {
		return nil, err
	}
	hash, err := s.hash.make(ctx, password)
	if err != nil {
		return nil, err
	}
	out := &LogInResult{}
	err = s.reg.Transact(registry.WithActor(ctx, personActor(p.Login)), func(c *registry.Change) error {
		*out = LogInResult{}
		if _, err := c.SpendTicket(ctx, hashOf(code), ticketInvite, c.Now()); err != nil {
			if notFound(err) {
				return gone
			}
			return err
		}
		p, err := c.Person(ctx, p.ID)
		if err != nil || p.Disabled {
			return gone
		}
		p.Password, p.PasswordChanged = hash, c.Now()
		if err := s.endAll(ctx, c, p.ID, ""); err != nil {
			return err
		}
		if err := c.Record(ctx, p.Org, "person.password", "person/"+p.ID, map[string]any{"login": p.Login, "source": source, "by": "invitation"}); err != nil {
			return err
		}
		if p.TOTP != nil {
			out.Second = secret()
			if err := c.UpdatePerson(ctx, p); err != nil {
				return err
			}
			return c.InsertTicket(ctx, &store.Ticket{Hash: hashOf(out.Second), Kind: ticketSecond, Subject: p.ID, Created: c.Now(), Expires: c.Now().Add(secondLife)})
		}
		out.Session, err = s.newSession(ctx, c, p, source, agent, "")
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
