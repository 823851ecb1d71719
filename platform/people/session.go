package people

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Cookies. The prefix __Host- has browsers take them over HTTPS (or from localhost) only, for this host alone and all of its paths
// (RFC 6265bis §4.1.3.2).
const (
	sessionCookie = "__Host-sallyway"
	deviceCookie  = "__Host-sallyway-device"
	deviceLife    = 90 * 24 * time.Hour
)

// Session is a browser's login. It is not changed after it was made.
type Session struct {
	ID       string
	Person   string // id
	Created  time.Time
	Seen     time.Time
	Expires  time.Time
	Source   string
	Agent    string
	Provider string // name of the provider of single sign-on, empty for a password

	secret string // of the cookie
	device string // for the cookie that a login sets, empty for none
}

// SetCookie gives a browser its session. Call it at once after a login, before anything is written.
func SetCookie(w http.ResponseWriter, s *Session) {
	setCookie(w, sessionCookie, s.secret, 0)
	if s.device != "" {
		setCookie(w, deviceCookie, s.device, deviceLife)
	}
}

// ClearCookie takes a browser its session.
func ClearCookie(w http.ResponseWriter) { setCookie(w, sessionCookie, "", -time.Second) }

// setCookie sets a cookie for life; zero is until the browser is closed.
func setCookie(w http.ResponseWriter, name, value string, life time.Duration) {
	http.SetCookie(w, &http.Cookie{
		Name: name, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: int(life / time.Second),
	})
}

func cookie(r *http.Request, name string) string {
	c, err := r.Cookie(name)
	if err != nil || len(c.Value) > 1024 {
		return ""
	}
	return c.Value
}

// HasCookie says whether a request carries a session's cookie, good or not.
func HasCookie(r *http.Request) bool { return cookie(r, sessionCookie) != "" }

// CSRF is the token that forms of this session carry, in a field or the header X-CSRF-Token.
func (s *Session) CSRF() string {
	mac := hmac.New(sha256.New, []byte(s.secret))
	mac.Write([]byte("sallyway csrf"))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// Names of where forms carry the token.
const (
	CSRFField  = "csrf"
	CSRFHeader = "X-CSRF-Token"
)

// CheckCSRF refuses a token that is not the session's.
func (s *Session) CheckCSRF(token string) error {
	if subtle.ConstantTimeCompare([]byte(token), []byte(s.CSRF())) != 1 {
		return forbidden("load the page again and send the form once more", "the form is not of this session")
	}
	return nil
}

// newSession makes a session in a transaction.
func (s *Service) newSession(ctx context.Context, c *registry.Change, p *store.Person, source, agent, provider string) (*Session, error) {
	v := &store.WebSession{
		ID: identity.NewID("session"), Person: p.ID, Created: c.Now(), Seen: c.Now(), Expires: c.Now().Add(SessionLife),
		Source: clip(source, 64), Agent: clip(agent, 200), Provider: provider,
	}
	cookie := secret()
	v.Hash = hashOf(cookie)
	if err := c.InsertWebSession(ctx, v); err != nil {
		return nil, err
	}
	p.LastLogin = c.Now()
	if err := c.UpdatePerson(ctx, p); err != nil {
		return nil, err
	}
	out := sessionOf(v, cookie)
	out.device = s.deviceValue(p.ID, c.Now())
	return out, nil
}

func sessionOf(v *store.WebSession, cookie string) *Session {
	return &Session{
		ID: v.ID, Person: v.Person, Created: v.Created, Seen: v.Seen, Expires: v.Expires, Source: v.Source, Agent: v.Agent, Provider: v.Provider, secret: cookie,
	}
}

// CodeNoSession says that a request has no session, or one that has ended.
const CodeNoSession = "no_session"

func noSession() error {
	return unauthorized(CodeNoSession, "log in at /login", "not logged in, or the session has ended")
}

// FromRequest returns who a browser's request is of. A *registry.Error with CodeNoSession says that nobody is logged in.
func (s *Service) FromRequest(r *http.Request) (*Principal, error) {
	v := cookie(r, sessionCookie)
	if v == "" {
		return nil, noSession()
	}
	return s.FromCookie(r.Context(), v)
}

// FromCookie returns who a session's cookie is of.
func (s *Service) FromCookie(ctx context.Context, value string) (*Principal, error) {
	now := s.reg.Now()
	var p *Principal
	var touch *store.WebSession
	err := s.reg.Store.View(ctx, func(tx store.Tx) error {
		touch = nil
		v, err := tx.WebSession(ctx, hashOf(value))
		if notFound(err) {
			return noSession()
		}
		if err != nil {
			return err
		}
		if !now.Before(v.Expires) || now.Sub(v.Seen) > SessionIdle {
			return noSession()
		}
		person, err := tx.Person(ctx, v.Person)
		if err != nil {
			return err
		}
		if person.Disabled {
			return noSession()
		}
		if p, err = principalOf(ctx, tx, person); err != nil {
			return err
		}
		p.Session = sessionOf(v, value)
		if now.Sub(v.Seen) > touchEvery {
			touch = v
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if touch != nil {
		err = s.reg.Store.Update(ctx, func(tx store.Tx) error { return tx.TouchWebSession(ctx, touch.ID, now) })
		if notFound(err) { // ended just now
			return nil, noSession()
		}
	}
	return p, err
}

// principalOf is a person with all that their roles grant.
func principalOf(ctx context.Context, tx store.Tx, p *store.Person) (*Principal, error) {
	out := &Principal{Kind: KindPerson, ID: p.ID, Name: p.Login, Display: p.Name, Actor: personActor(p.Login)}
	roles, err := tx.PersonRoles(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	for _, r := range roles {
		out.Grants = append(out.Grants, Grant{Org: r.Org, Role: Role(r.Role), Scopes: Role(r.Role).Scopes()})
	}
	return out, nil
}

// LogOut ends a session.
func (s *Service) LogOut(ctx context.Context, p *Principal) error {
	if p.Session == nil {
		return noSession()
	}
	return s.EndSession(ctx, p, p.Session.ID)
}

// Sessions lists a person's own sessions, newest first.
func (s *Service) Sessions(ctx context.Context, p *Principal) (out []control.WebSession, err error) {
	if err := p.person(); err != nil {
		return nil, err
	}
	now := s.reg.Now()
	err = s.reg.Store.View(ctx, func(tx store.Tx) error {
		out = []control.WebSession{}
		vs, err := tx.WebSessions(ctx, p.ID)
		if err != nil {
			return err
		}
		for _, v := range vs {
			if !now.Before(v.Expires) || now.Sub(v.Seen) > SessionIdle {
				continue
			}
			out = append(out, control.WebSession{
				ID: v.ID, Created: v.Created, LastSeen: v.Seen, Expires: v.Expires, Source: v.Source, Agent: v.Agent, Provider: v.Provider,
				Current: p.Session != nil && p.Session.ID == v.ID,
			})
		}
		return nil
	})
	return out, err
}

// EndSession ends one of a person's own sessions.
func (s *Service) EndSession(ctx context.Context, p *Principal, id string) error {
	if err := p.person(); err != nil {
		return err
	}
	return s.transact(ctx, p, func(c *registry.Change) error {
		if err := c.DeleteWebSession(ctx, p.ID, id); err != nil {
			return registry.NotFound(err, "session", id, "")
		}
		return c.Record(ctx, homeOf(ctx, c, p.ID), "session.end", "person/"+p.ID, map[string]any{"login": p.Name, "session": id})
	})
}

// EndOtherSessions ends a person's own sessions but the one that asks.
func (s *Service) EndOtherSessions(ctx context.Context, p *Principal) error {
	if err := p.person(); err != nil {
		return err
	}
	keep := ""
	if p.Session != nil {
		keep = p.Session.ID
	}
	return s.transact(ctx, p, func(c *registry.Change) error {
		if err := c.DeleteWebSessions(ctx, p.ID, keep); err != nil {
			return err
		}
		return c.Record(ctx, homeOf(ctx, c, p.ID), "session.end", "person/"+p.ID, map[string]any{"login": p.Name, "session": "all others"})
	})
}

// transact is a transaction of a principal.
func (s *Service) transact(ctx context.Context, p *Principal, fn func(c *registry.Change) error) error {
	return s.reg.Transact(registry.WithActor(ctx, p.Actor), fn)
}

// homeOf is the chain in which a person's own doings are audited.
func homeOf(ctx context.Context, tx store.Tx, person string) string {
	if p, err := tx.Person(ctx, person); err == nil {
		return p.Org
	}
	return Platform
}

// deviceValue is a sealed mark for a browser in which a person has logged in: guesses from elsewhere do not slow it down.
func (s *Service) deviceValue(person string, now time.Time) string {
	return base64.RawURLEncoding.EncodeToString(s.reg.Seal.Seal("known browser", []byte(person+" "+now.Add(deviceLife).Format(time.RFC3339)+" "+secret()[:16])))
}

// knownDevice is the key of a browser that an account knows, "" for none.
func (s *Service) knownDevice(value, person string) string {
	b, err := base64.RawURLEncoding.DecodeString(value)
	if err != nil || value == "" {
		return ""
	}
	if b, err = s.reg.Seal.Open("known browser", b); err != nil {
		return ""
	}
	var who, until, id string
	if n := splitThree(string(b), &who, &until, &id); !n || who != person {
		return ""
	}
	if t, err := time.Parse(time.RFC3339, until); err != nil || s.reg.Now().After(t) {
		return ""
	}
	return "browser " + id
}
