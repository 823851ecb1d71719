package people

import (
	"context"
	"crypto/subtle"
	"encoding/base32"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people/oidc"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Codes of refused single sign-on.
const (
	CodeProvider   = "provider_failed" // the provider can not be reached, or said no
	CodeBadAnswer  = "bad_answer"      // what came back is not of this login
	CodeNoAccount  = "no_account"      // nobody here is known under that identity
	CodeNoRole     = "no_role"         // no rule gives a role
	CodeUnverified = "email_unverified"
)

const (
	ticketSSO = "sso"
	ssoLife   = 10 * time.Minute
	ssoCookie = "__Host-sallyway-sso"
)

// ssoData is what is kept of a login that is at the provider; sealed.
type ssoData struct {
	Nonce, Verifier, Browser, Return string
}

// returnPath lets paths of this platform pass only.
func returnPath(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(s, "//") || strings.Contains(s, `\`) || len(s) > 500 {
		return "/"
	}
	return s
}

// Begin starts a login at a provider: where the browser goes, and the value of the cookie that binds the login to it.
func (s *Service) Begin(ctx context.Context, providerID, returnTo string) (redirect, browser string, err error) {
	v, set, err := s.liveProvider(ctx, providerID)
	if err != nil {
		return "", "", err
	}
	p, err := s.discover(ctx, v, set)
	if err != nil {
		return "", "", err
	}
	state, browser := secret(), secret()
	d := ssoData{Nonce: secret(), Verifier: oidc.NewVerifier(), Browser: browser, Return: returnPath(returnTo)}
	b, err := json.Marshal(d)
	if err != nil {
		return "", "", err
	}
	err = s.reg.Store.Update(ctx, func(tx store.Tx) error {
		now := s.reg.Now()
		return tx.InsertTicket(ctx, &store.Ticket{Hash: hashOf(state), Kind: ticketSSO, Subject: v.ID, Data: s.reg.Seal.Seal("sso "+v.ID, b), Created: now, Expires: now.Add(ssoLife)})
	})
	return p.AuthURL(state, d.Nonce, d.Verifier), browser, err
}

// liveProvider reads a provider that is there and not disabled.
func (s *Service) liveProvider(ctx context.Context, id string) (v *store.Provider, set *providerSettings, err error) {
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		if v, err = tx.Provider(ctx, id); err != nil {
			return err
		}
		set, err = settingsOf(v)
		return err
	})
	if notFound(err) || err == nil && v.Disabled {
		return nil, nil, registry.Refuse(http.StatusNotFound, control.CodeNotFound, "begin at /login", "there is no such single sign-on (any more)")
	}
	return v, set, err
}

func errAnswer(format string, args ...any) error {
	return registry.Refuse(http.StatusForbidden, CodeBadAnswer, "begin the login anew at /login, in one browser and within ten minutes", format, args...)
}

// Finish ends a login at a provider with the query that the browser brought back and its cookie. The account's second factor is not asked
// for: that is the provider's.
func (s *Service) Finish(ctx context.Context, providerID string, q url.Values, browser, source, agent string) (session *Session, returnTo string, err error) {
	v, set, err := s.liveProvider(ctx, providerID)
	if err != nil {
		return nil, "", err
	}
	session, returnTo, err = s.finish(ctx, v, set, q, browser, source, agent)
	if code := registry.Code(err); code != "" {
		err = errors.Join(err, s.reg.Refused(ctx, v.Org, "person.login", "provider/"+v.ID, code, source))
	}
	return session, returnTo, err
}

func (s *Service) finish(ctx context.Context, v *store.Provider, set *providerSettings, q url.Values, browser, source, agent string) (*Session, string, error) {
	var t *store.Ticket
	err := s.reg.Store.Update(ctx, func(tx store.Tx) (err error) {
		t, err = tx.SpendTicket(ctx, hashOf(q.Get("state")), ticketSSO, s.reg.Now())
		return err
	})
	if notFound(err) {
		return nil, "", errAnswer("the answer belongs to no login that waits (state)")
	}
	if err != nil {
		return nil, "", err
	}
	if t.Subject != v.ID {
		return nil, "", errAnswer("the answer is for another provider's login")
	}
	b, err := s.reg.Seal.Open("sso "+v.ID, t.Data)
	if err != nil {
		return nil, "", err
	}
	var d ssoData
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, "", err
	}
	if subtle.ConstantTimeCompare([]byte(browser), []byte(d.Browser)) != 1 {
		return nil, "", errAnswer("the login was begun in another browser")
	}
	p, err := s.discover(ctx, v, set)
	if err != nil {
		return nil, "", err
	}
	if err := p.CheckIssuer(q.Get("iss")); err != nil {
		return nil, "", errAnswer("%v", err)
	}
	if e := q.Get("error"); e != "" {
		return nil, "", registry.Refuse(http.StatusForbidden, CodeProvider, "begin the login anew at /login", "%s says %.60q", v.Name, oneLine(e))
	}
	claims, err := p.Exchange(ctx, s.clientOf(set), q.Get("code"), d.Nonce, d.Verifier)
	switch {
	case errors.Is(err, oidc.ErrToken), errors.Is(err, oidc.ErrNonce):
		s.log.Warn("an ID token was refused", "provider", v.Name, "org", v.Org, "error", err)
		return nil, "", errAnswer("%v", err)
	case err != nil:
		return nil, "", registry.Refuse(http.StatusBadGateway, CodeProvider, "try again; if it stays so, see the platform's log", "single sign-on with %s failed: %v", v.Name, err)
	}
	var out *Session
	err = s.reg.Transact(registry.WithActor(ctx, "provider:"+v.Name), func(c *registry.Change) error {
		out = nil
		person, err := s.whoIs(ctx, c, v, set, claims)
		if err != nil {
			return err
		}
		if err := s.applyRoles(ctx, c, v, set, claims, person); err != nil {
			return err
		}
		if out, err = s.newSession(ctx, c, person, source, agent, v.Name); err != nil {
			return err
		}
		return c.Record(registry.WithActor(ctx, personActor(person.Login)), person.Org, "person.login", "person/"+person.ID, map[string]any{"login": person.Login, "source": source, "provider": v.Name})
	})
	if err != nil {
		return nil, "", err
	}
	return out, d.Return, nil
}

// whoIs finds the person of an identity, or makes one where the rules say so.
func (s *Service) whoIs(ctx context.Context, c *registry.Change, v *store.Provider, set *providerSettings, claims *oidc.Claims) (*store.Person, error) {
	i, err := c.PersonIdentity(ctx, v.ID, claims.Subject)
	if err == nil {
		p, err := c.Person(ctx, i.Person)
		if err != nil {
			return nil, err
		}
		if p.Disabled {
			return nil, registry.Refuse(http.StatusForbidden, CodeNoAccount, "ask an owner of your organization", "the account is disabled")
		}
		return p, nil
	}
	if !notFound(err) {
		return nil, err
	}
	none := registry.Refuse(http.StatusForbidden, CodeNoAccount, "ask an owner of your organization to let you in", "%s knows you, but there is no account for you here", v.Name)
	email := strings.ToLower(claims.Email)
	bind := func(p *store.Person, how string) (*store.Person, error) {
		err := c.InsertPersonIdentity(ctx, &store.PersonIdentity{Provider: v.ID, Subject: claims.Subject, Person: p.ID, Email: clip(email, maxLogin), Created: c.Now()})
		if err != nil {
			return nil, err
		}
		return p, c.Record(ctx, v.Org, "person.link", "person/"+p.ID, map[string]any{"login": p.Login, "provider": v.Name, "how": how})
	}
	if set.LinkByEmail && email != "" {
		// The login, which an owner has chosen: not the address in the profile, which is the person's own word.
		p, err := c.FindPerson(ctx, email)
		switch {
		case err == nil && p.Login == email && (p.Org == v.Org || v.Org == Platform):
			if !claims.EmailVerified {
				return nil, registry.Refuse(http.StatusForbidden, CodeUnverified, "have the provider verify your e-mail address", "%s does not say that your e-mail address is verified", v.Name)
			}
			if p.Disabled {
				return nil, none
			}
			return bind(p, "e-mail")
		case err != nil && !notFound(err):
			return nil, err
		}
	}
	if !set.Create || len(s.rolesFor(v, set, claims)) == 0 {
		return nil, none
	}
	login, err := checkLogin(email)
	if err != nil || !claims.EmailVerified {
		sum := hashOf(v.ID + " " + claims.Subject)
		login = v.Name + "-" + strings.ToLower(base32.StdEncoding.EncodeToString(sum[:5]))
	}
	p := &store.Person{ID: identity.NewID("person"), Org: v.Org, Login: login, Name: clip(oneLine(claims.Name), maxNameRunes), Email: clip(email, maxLogin), Created: c.Now()}
	if err := c.InsertPerson(ctx, p); errors.Is(err, store.ErrExists) {
		return nil, registry.Conflict("ask an owner of your organization to have single sign-on take that account", "there is an account %s already", login)
	} else if err != nil {
		return nil, err
	}
	if err := c.Record(ctx, v.Org, "person.create", "person/"+p.ID, map[string]any{"login": login, "provider": v.Name}); err != nil {
		return nil, err
	}
	return bind(p, "new")
}

// rolesFor are the roles that a provider's rules give, by organization: the first that fits in each.
func (s *Service) rolesFor(v *store.Provider, set *providerSettings, claims *oidc.Claims) map[string]string {
	claim := set.Groups
	if claim == "" {
		claim = "groups"
	}
	groups := claims.Strings(claim)
	out := map[string]string{}
	for _, m := range set.Mapping {
		org := v.Org
		if m.Org != "" {
			org = m.Org
		}
		if _, done := out[org]; !done && (m.Group == "*" || slices.Contains(groups, m.Group)) {
			out[org] = m.Role
		}
	}
	return out
}

// applyRoles gives a person what the rules say now, and takes what they say no more. Without rules roles are given by hand and stay.
func (s *Service) applyRoles(ctx context.Context, c *registry.Change, v *store.Provider, set *providerSettings, claims *oidc.Claims, p *store.Person) error {
	if len(set.Mapping) == 0 {
		return nil
	}
	want := s.rolesFor(v, set, claims)
	orgs := map[string]bool{}
	for _, m := range set.Mapping {
		if m.Org != "" {
			orgs[m.Org] = true
		} else {
			orgs[v.Org] = true
		}
	}
	for org := range orgs {
		if _, err := c.Org(ctx, org); notFound(err) { // deleted since
			continue
		}
		have, err := roleOf(ctx, c, p.ID, org)
		if err != nil {
			return err
		}
		if have == want[org] {
			continue
		}
		if Role(have) == Owner {
			// The last owner stays one, whatever a provider says: nobody could undo it.
			if err := otherOwner(ctx, c, org, p.ID); registry.Code(err) == control.CodeConflict {
				s.log.Warn("single sign-on would take away the last owner, who stays", "org", org, "login", p.Login, "provider", v.Name)
				continue
			} else if err != nil {
				return err
			}
		}
		detail := map[string]any{"login": p.Login, "provider": v.Name, "role": want[org], "old_role": have}
		if want[org] == "" {
			if err := errors.Join(c.DeletePersonRole(ctx, p.ID, org), c.ForgetPerson(ctx, p.ID, org), revokeNodes(ctx, c, p.ID, org, "its person has no role any more")); err != nil {
				return err
			}
		} else if err := c.PutPersonRole(ctx, &store.PersonRole{Person: p.ID, Org: org, Role: want[org], Created: c.Now()}); err != nil {
			return err
		}
		if err := c.Record(ctx, org, "person.update", "person/"+p.ID, detail); err != nil {
			return err
		}
	}
	roles, err := c.PersonRoles(ctx, p.ID)
	if err == nil && len(roles) == 0 {
		s.log.Info("single sign-on gives a person no role", "login", p.Login, "provider", v.Name)
	}
	return err
}

// otherOwner refuses when org has no owner who can log in but one person.
func otherOwner(ctx context.Context, tx store.Tx, org, but string) error {
	roles, err := tx.OrgRoles(ctx, org)
	if err != nil {
		return err
	}
	for _, r := range roles {
		if Role(r.Role) != Owner || r.Person == but {
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
	return registry.Conflict("", "the last owner")
}

// SSORoutes serves the paths of single sign-on. source is where a request comes from (api.Source). fail shows a refusal to the person.
func (s *Service) SSORoutes(mux *http.ServeMux, source func(*http.Request) string, fail func(w http.ResponseWriter, r *http.Request, err error)) {
	mux.HandleFunc("GET "+StartPath+"{provider}", func(w http.ResponseWriter, r *http.Request) {
		to, browser, err := s.Begin(r.Context(), r.PathValue("provider"), r.URL.Query().Get("return"))
		if err != nil {
			fail(w, r, err)
			return
		}
		setCookie(w, ssoCookie, browser, ssoLife)
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, to, http.StatusSeeOther)
	})
	mux.HandleFunc("GET "+CallbackPath+"{provider}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Referrer-Policy", "no-referrer") // the code stands in this address
		session, to, err := s.Finish(r.Context(), r.PathValue("provider"), r.URL.Query(), cookie(r, ssoCookie), source(r), r.UserAgent())
		setCookie(w, ssoCookie, "", -time.Second)
		if err != nil {
			fail(w, r, err)
			return
		}
		s.endOld(r)
		SetCookie(w, session)
		http.Redirect(w, r, to, http.StatusSeeOther)
	})
}

// endOld ends the session that a browser had before it logged in anew.
func (s *Service) endOld(r *http.Request) {
	p, err := s.FromRequest(r)
	if err == nil {
		err = s.LogOut(r.Context(), p)
	}
	if err != nil && registry.Code(err) == "" {
		s.log.Warn("a browser's old session stays until it expires", "error", err)
	}
}
