package people

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Codes of refused logins.
const (
	CodeBadLogin     = "bad_login"     // login or password
	CodeBadCode      = "bad_code"      // second factor
	CodeBadSetup     = "bad_setup"     // setup code
	CodeTicketGone   = "ticket_gone"   // an invitation or a login between two steps that is used or too old
	CodeNotFirst     = "not_first"     // the first owner exists
	CodeNoPassword   = "no_password"   // the account has none
	CodeOtherAccount = "other_account" // the account is managed elsewhere
)

// Kinds of tickets.
const (
	ticketSetup  = "setup"
	ticketInvite = "invite"
	ticketSecond = "second"
)

func splitThree(s string, a, b, c *string) bool {
	parts := strings.Split(s, " ")
	if len(parts) != 3 {
		return false
	}
	*a, *b, *c = parts[0], parts[1], parts[2]
	return true
}

// FirstRun says whether no person exists yet, so that the first owner is to be made.
func (s *Service) FirstRun(ctx context.Context) (first bool, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		n, err := tx.CountPeople(ctx)
		first = n == 0
		return err
	})
	return first, err
}

// SetupCode makes a fresh code for CreateFirst; older ones stop working, but for those of other platforms (Config.Shared). It is "" when the
// first owner exists.
func (s *Service) SetupCode(ctx context.Context) (code string, err error) {
	code = words(16, 4)
	err = s.reg.Transact(ctx, func(c *registry.Change) error {
		n, err := c.CountPeople(ctx)
		if err != nil || n > 0 {
			code = ""
			return err
		}
		if !s.shared {
			if err := c.DeleteTickets(ctx, ticketSetup, ""); err != nil {
				return err
			}
		}
		return c.InsertTicket(ctx, &store.Ticket{Hash: hashOf(plain(code)), Kind: ticketSetup, Created: c.Now(), Expires: c.Now().Add(SetupLife)})
	})
	return code, err
}

// FirstOwner is the first person of a platform. Code is the setup code of the platform's log, or the token of its admin.token.
type FirstOwner struct {
	Code, Login, Name, Email, Password string
	Source, Agent                      string
}

// CreateFirst makes the platform's first person, its owner, and logs in. Of several at once one succeeds.
func (s *Service) CreateFirst(ctx context.Context, req FirstOwner) (*Session, error) {
	if err := s.guess(ctx, "setup code", nil, req.Source, ofSource("setup "+req.Source)); err != nil {
		return nil, err
	}
	if first, err := s.FirstRun(ctx); err != nil || !first {
		return nil, cmpErr(err, errNotFirst())
	}
	code := strings.TrimSpace(req.Code)
	byToken := false
	if a, err := s.reg.Administrator(ctx, code); err == nil {
		if byToken = a.Org == "" && a.Scope == store.ScopeAdmin; !byToken {
			return nil, errBadSetup()
		}
	}
	login, err := checkLogin(req.Login)
	if err != nil {
		return nil, err
	}
	if err := CheckPassword(req.Password, login, req.Name); err != nil {
		return nil, err
	}
	hash, err := s.hash.make(ctx, req.Password)
	if err != nil {
		return nil, err
	}
	var out *Session
	err = s.reg.Transact(registry.WithActor(ctx, personActor(login)), func(c *registry.Change) error {
		n, err := c.CountPeople(ctx)
		if err != nil {
			return err
		}
		if n > 0 {
			return errNotFirst()
		}
		if !byToken {
			if _, err := c.SpendTicket(ctx, hashOf(plain(code)), ticketSetup, c.Now()); err != nil {
				if notFound(err) {
					return errBadSetup()
				}
				return err
			}
		}
		if err := c.DeleteTickets(ctx, ticketSetup, ""); err != nil {
			return err
		}
		p := &store.Person{
			ID: identity.NewID("person"), Org: Platform, Login: login, Name: clip(req.Name, maxNameRunes), Email: clip(req.Email, 254),
			Password: hash, PasswordChanged: c.Now(), Created: c.Now(),
		}
		if err := c.InsertPerson(ctx, p); err != nil {
			return err
		}
		if err := c.PutPersonRole(ctx, &store.PersonRole{Person: p.ID, Org: Platform, Role: string(Owner), Created: c.Now()}); err != nil {
			return err
		}
		if err := c.Record(ctx, Platform, "person.create", "person/"+p.ID, map[string]any{"login": login, "role": string(Owner), "first": true}); err != nil {
			return err
		}
		out, err = s.newSession(ctx, c, p, req.Source, req.Agent, "")
		return err
	})
	if registry.Code(err) == CodeBadSetup {
		return nil, errors.Join(err, s.reg.Refused(ctx, Platform, "person.create", "first", CodeBadSetup, req.Source))
	}
	return out, err
}

func errNotFirst() error {
	return registry.Refuse(http.StatusConflict, CodeNotFirst, "log in, or have an owner invite you", "the platform has its first owner already")
}

func errBadSetup() error {
	return registry.Refuse(http.StatusForbidden, CodeBadSetup, "take the code from the platform's log (its newest start), or the token in admin.token in its data folder",
		"the setup code is not the right one")
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// Login is a try to log in with a password.
type Login struct {
	Name, Password string
	Source, Agent  string
	// Device is the browser's mark from an earlier login: KnownBrowser(r).
	Device string
}

// KnownBrowser is the mark that a browser got at an earlier login, for Login.Device.
func KnownBrowser(r *http.Request) string { return cookie(r, deviceCookie) }

// LogInResult is a session, or what is still needed: then Second is a ticket for SecondFactor.
type LogInResult struct {
	Session *Session
	Second  string
}

func errBadLogin() error {
	return unauthorized(CodeBadLogin, "try again; whoever manages your organization's people can send you a link for a new password", "login or password is wrong")
}

// LogIn checks a password. What is refused takes as long and reads the same whether the account exists or not.
func (s *Service) LogIn(ctx context.Context, req Login) (*LogInResult, error) {
	login := strings.ToLower(strings.TrimSpace(req.Name))
	if len(login) > maxLogin || len(req.Password) > maxPassword {
		login = "-"
	}
	var p *store.Person
	err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		p, err = tx.FindPerson(ctx, login)
		if notFound(err) || err == nil && p.Login != login { // ids are no logins
			p, err = nil, nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	from := req.Source
	hash, id := "", ""
	if p != nil {
		id = p.ID
		if !p.Disabled {
			hash = p.Password
		}
	}
	if d := s.knownDevice(req.Device, id); d != "" {
		from = d
	}
	account, source := ofAccount("password", login, from), ofSource(from)
	if err := s.guess(ctx, "password", p, req.Source, account, source); err != nil {
		return nil, errors.Join(err, s.refuseLogin(ctx, p, control.CodeRateLimited, req.Source))
	}
	ok, renew, err := s.hash.check(ctx, hash, req.Password)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errors.Join(errBadLogin(), s.refuseLogin(ctx, p, CodeBadLogin, req.Source))
	}
	s.guard.succeeded(account, source)
	if renew {
		if hash, err = s.hash.make(ctx, req.Password); err != nil {
			return nil, err
		}
	}
	out := &LogInResult{}
	err = s.reg.Transact(registry.WithActor(ctx, personActor(p.Login)), func(c *registry.Change) error {
		*out = LogInResult{}
		now, err := c.Person(ctx, p.ID)
		if err != nil || now.Disabled || now.Password != p.Password { // changed meanwhile
			return errBadLogin()
		}
		now.Password = hash
		if now.TOTP != nil {
			ticket := secret()
			out.Second = ticket
			if err := c.UpdatePerson(ctx, now); err != nil {
				return err
			}
			return c.InsertTicket(ctx, &store.Ticket{Hash: hashOf(ticket), Kind: ticketSecond, Subject: p.ID, Created: c.Now(), Expires: c.Now().Add(secondLife)})
		}
		if out.Session, err = s.newSession(ctx, c, now, req.Source, req.Agent, ""); err != nil {
			return err
		}
		return c.Record(ctx, now.Org, "person.login", "person/"+now.ID, map[string]any{"login": now.Login, "source": req.Source, "factors": 1})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// refuseLogin audits a refused login, in the chain of the person's home where there is such a person.
func (s *Service) refuseLogin(ctx context.Context, p *store.Person, code, source string) error {
	org, object := Platform, "unknown"
	if p != nil {
		org, object = p.Org, "person/"+p.ID
	}
	return s.reg.Refused(ctx, org, "person.login", object, code, source)
}

// ofTicket finds the person that a ticket of a kind was made for: gone if there is no such ticket any more.
func (s *Service) ofTicket(ctx context.Context, ticket, kind string, gone error) (p *store.Person, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		t, err := tx.Ticket(ctx, hashOf(ticket), kind, s.reg.Now())
		if notFound(err) {
			return gone
		}
		if err != nil {
			return err
		}
		p, err = tx.Person(ctx, t.Subject)
		return err
	})
	return p, err
}

// SecondFactor ends a login that LogIn began, with a code of the authenticator or a recovery code. A wrong one may be tried again.
func (s *Service) SecondFactor(ctx context.Context, ticket, code, source, agent string) (*Session, error) {
	gone := unauthorized(CodeTicketGone, "log in again with your password", "this login has taken too long, or is done")
	p, err := s.ofTicket(ctx, ticket, ticketSecond, gone)
	if err != nil {
		return nil, err
	}
	// Whoever comes here has the password: guesses are counted for the account, wherever they come from.
	account, from := ofAccount("code", p.ID, ""), ofSource(source)
	if err := s.guess(ctx, "second factor", p, source, account, from); err != nil {
		return nil, errors.Join(err, s.refuseLogin(ctx, p, control.CodeRateLimited, source))
	}
	var out *Session
	err = s.reg.Transact(registry.WithActor(ctx, personActor(p.Login)), func(c *registry.Change) error {
		now, err := c.Person(ctx, p.ID)
		if err != nil {
			return err
		}
		if now.Disabled || now.TOTP == nil {
			return gone
		}
		how, err := s.spendCode(ctx, c, now, code)
		if err != nil {
			return err
		}
		if _, err := c.SpendTicket(ctx, hashOf(ticket), ticketSecond, c.Now()); err != nil {
			if notFound(err) {
				return gone
			}
			return err
		}
		if out, err = s.newSession(ctx, c, now, source, agent, ""); err != nil {
			return err
		}
		return c.Record(ctx, now.Org, "person.login", "person/"+now.ID, map[string]any{"login": now.Login, "source": source, "factors": 2, "second": how})
	})
	if registry.Code(err) == CodeBadCode {
		return nil, errors.Join(err, s.refuseLogin(ctx, p, CodeBadCode, source))
	}
	if err != nil {
		return nil, err
	}
	s.guard.succeeded(account, from)
	return out, nil
}

func errBadCode() error {
	return unauthorized(CodeBadCode, "wait for the next code, and see that the clock of your phone is right; a recovery code works, too", "the code is wrong, or was used before")
}

// spendCode uses up a code of the authenticator, or a recovery code.
func (s *Service) spendCode(ctx context.Context, c *registry.Change, p *store.Person, code string) (string, error) {
	key, err := s.reg.Seal.Open(registry.TOTPLabel(p.ID), p.TOTP)
	if err != nil {
		return "", err
	}
	if step, ok := totpMatch(key, code, c.Now()); ok {
		if err := c.StepTOTP(ctx, p.ID, step); err != nil {
			if notFound(err) {
				return "", errBadCode()
			}
			return "", err
		}
		return "totp", nil
	}
	if err := c.SpendRecoveryCode(ctx, p.ID, recoveryHash(p.ID, code)); err != nil {
		if notFound(err) {
			return "", errBadCode()
		}
		return "", err
	}
	return "recovery code", nil
}

func recoveryHash(person, code string) [32]byte { return hashOf(person + " " + plain(code)) }
