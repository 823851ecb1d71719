package web

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/people"
)

func (s *Server) publicRoutes(mux *http.ServeMux) {
	s.public(mux, "GET /setup", (*request).setup)
	s.public(mux, "POST /setup", (*request).createFirst)
	s.public(mux, "GET /login", (*request).login)
	s.public(mux, "POST /login", (*request).logIn)
	s.public(mux, "POST /login/code", (*request).logInCode)
	s.public(mux, "GET /invite", (*request).invite)
	s.public(mux, "POST /invite", (*request).acceptInvite)
	s.public(mux, "POST /theme", (*request).setTheme)
}

func (s *Server) personRoutes(mux *http.ServeMux) {
	s.person(mux, "POST /logout", (*request).logOut)
	s.person(mux, "GET /device", (*request).device)
	s.person(mux, "POST /device", (*request).decideDevice)
	s.person(mux, "GET /login/program", (*request).program)
	s.person(mux, "POST /login/program", (*request).decideProgram)
	s.person(mux, "GET /account", (*request).account)
	s.person(mux, "POST /account/{what}", (*request).changeAccount)
	s.person(mux, "GET /orgs/new", (*request).newOrganization)
	s.person(mux, "POST /orgs/new", (*request).createOrganization)
}

func (q *request) source() string { return q.s.cfg.Source(q.r) }

func (q *request) setup() error {
	first, err := q.s.cfg.People.FirstRun(q.ctx)
	if err != nil {
		return err
	}
	if !first {
		return q.redirect("/login")
	}
	return q.render(http.StatusOK, "setup", page{Title: "First run", Gate: true, Data: newForm("code", q.value("code"))})
}

// createFirst makes the platform's owner.
func (q *request) createFirst() error {
	again := func(p *control.Problem) error {
		return q.render(p.Status, "setup", page{Title: "First run", Gate: true, Data: q.again(p)})
	}
	if q.r.PostFormValue("password") != q.r.PostFormValue("password2") {
		return again(&problem(http.StatusUnprocessableEntity, "password2", "type the same in both", "the passwords differ").Problem)
	}
	session, err := q.s.cfg.People.CreateFirst(q.ctx, people.FirstOwner{
		Code: q.value("code"), Login: q.value("login"), Name: q.value("name"), Email: q.value("email"), Password: q.r.PostFormValue("password"),
		Source: q.source(), Agent: q.r.UserAgent(),
	})
	if p := refusal(err); p != nil {
		return again(p)
	}
	if err != nil {
		return err
	}
	people.SetCookie(q.w, session)
	q.tell("good", "Welcome. You own this platform. The steps below lead to the first connection.")
	return q.redirect("/")
}

// loginData is what the login page shows.
type loginData struct {
	Form   *form
	Next   string
	Ticket string // of a login that needs a code
	SSO    []signOnButton
	Org    string // whose single sign-on is offered, too
}

func (q *request) login() error {
	if q.who != nil {
		return q.redirect(local(q.value("next"), "/"))
	}
	first, err := q.s.cfg.People.FirstRun(q.ctx)
	if err != nil {
		return err
	}
	if first {
		return q.redirect("/setup")
	}
	return q.loginPage(http.StatusOK, loginData{Form: newForm()})
}

func (q *request) loginPage(status int, d loginData) error {
	d.Next = local(q.value("next"), "")
	d.Org = q.value("org")
	var err error
	if d.Ticket == "" {
		if d.SSO, err = q.signOnButtons(d.Next); err != nil {
			return err
		}
	}
	return q.render(status, "login", page{Title: "Log in", Gate: true, Data: d})
}

func (q *request) retryAfter(p *control.Problem) {
	if v := people.RetryAfter(p); v != "" {
		q.w.Header().Set("Retry-After", v)
	}
}

func (q *request) logIn() error {
	res, err := q.s.cfg.People.LogIn(q.ctx, people.Login{
		Name: q.value("login"), Password: q.r.PostFormValue("password"), Source: q.source(), Agent: q.r.UserAgent(), Device: people.KnownBrowser(q.r),
	})
	if p := refusal(err); p != nil {
		q.retryAfter(p)
		return q.loginPage(p.Status, loginData{Form: q.again(p)})
	}
	if err != nil {
		return err
	}
	return q.loggedIn(res)
}

// loggedIn goes on after a password: to the second factor, or in.
func (q *request) loggedIn(res *people.LogInResult) error {
	if res.Second != "" {
		return q.loginPage(http.StatusOK, loginData{Form: newForm(), Ticket: res.Second})
	}
	people.SetCookie(q.w, res.Session)
	return q.redirect(local(q.value("next"), "/"))
}

func (q *request) logInCode() error {
	ticket := q.r.PostFormValue("ticket")
	session, err := q.s.cfg.People.SecondFactor(q.ctx, ticket, q.value("code"), q.source(), q.r.UserAgent())
	if p := refusal(err); p != nil {
		q.retryAfter(p)
		d := loginData{Form: q.again(p), Ticket: ticket}
		if p.Code == people.CodeTicketGone {
			d.Ticket = ""
		}
		return q.loginPage(p.Status, d)
	}
	if err != nil {
		return err
	}
	people.SetCookie(q.w, session)
	return q.redirect(local(q.value("next"), "/"))
}

func (q *request) logOut() error {
	if err := q.s.cfg.People.LogOut(q.ctx, q.who); err != nil {
		return err
	}
	people.ClearCookie(q.w)
	q.tell("good", "You are logged out.")
	return q.redirect("/login")
}

// invite shows where a person chooses a password. The code stands behind the # of the link, which browsers keep to themselves: the script
// puts it into the field.
func (q *request) invite() error {
	return q.render(http.StatusOK, "invite", page{Title: "Choose a password", Gate: true, Data: newForm()})
}

func (q *request) acceptInvite() error {
	again := func(p *control.Problem) error {
		f := q.again(p)
		f.values.Set("code", q.value("code"))
		return q.render(p.Status, "invite", page{Title: "Choose a password", Gate: true, Data: f})
	}
	if q.r.PostFormValue("password") != q.r.PostFormValue("password2") {
		return again(&problem(http.StatusUnprocessableEntity, "password2", "type the same in both", "the passwords differ").Problem)
	}
	res, err := q.s.cfg.People.AcceptInvite(q.ctx, q.value("code"), q.r.PostFormValue("password"), q.source(), q.r.UserAgent())
	if p := refusal(err); p != nil {
		return again(p)
	}
	if err != nil {
		return err
	}
	return q.loggedIn(res)
}

// device lets a person let a program in that shows a code (RFC 8628 §3.3).
func (q *request) device() error {
	return q.devicePage(http.StatusOK, newForm("user_code", strings.ToUpper(q.value("user_code"))), nil)
}

func (q *request) devicePage(status int, f *form, d *people.WaitingDevice) error {
	return q.render(status, "device", page{Title: "Log in a program", Gate: true, Data: struct {
		Form   *form
		Device *people.WaitingDevice
	}{f, d}})
}

func (q *request) decideDevice() error {
	code := q.value("user_code")
	fail := func(err error) error {
		if p := anyRefusal(err); p != nil {
			q.retryAfter(p)
			return q.devicePage(p.Status, q.again(p), nil)
		}
		return err
	}
	switch decision := q.value("decision"); decision {
	case "approve", "deny":
		if err := q.s.cfg.People.DecideDevice(q.ctx, q.who, code, decision == "approve"); err != nil {
			return fail(err)
		}
		return q.render(http.StatusOK, "device-done", page{Title: "Done", Gate: true, Data: decision == "approve"})
	}
	d, err := q.s.cfg.People.Device(q.ctx, q.who, code)
	if err != nil {
		return fail(err)
	}
	return q.devicePage(http.StatusOK, newForm("user_code", strings.ToUpper(code)), d)
}

// program lets a person let a program of the same host in, which waits for the browser at a loopback address (RFC 8252 §7.3).
func (q *request) program() error {
	l, err := people.ParseProgramLogin(q.r.URL.Query())
	if err != nil {
		return err
	}
	// The answer to the form leads to the program: say so, or browsers stop there.
	u, err := url.Parse(l.Redirect)
	if err != nil {
		return err
	}
	q.w.Header().Set("Content-Security-Policy", strings.Replace(contentPolicy, "form-action 'self'", "form-action 'self' http://"+u.Host, 1))
	return q.render(http.StatusOK, "program", page{Title: "Log in a program", Gate: true, Data: struct {
		Program *people.ProgramLogin
		Query   string
	}{l, q.r.URL.RawQuery}})
}

func (q *request) decideProgram() error {
	l, err := people.ParseProgramLogin(q.r.URL.Query())
	if err != nil {
		return err
	}
	to := q.s.cfg.People.DenyProgram(l)
	if q.value("decision") == "approve" {
		if to, err = q.s.cfg.People.ApproveProgram(q.ctx, q.who, l); err != nil {
			return err
		}
	}
	http.Redirect(q.w, q.r, to, http.StatusSeeOther)
	return nil
}

// anyRefusal is refusal for pages on which not found is an answer, too.
func anyRefusal(err error) *control.Problem {
	if p := refusal(err); p != nil {
		return p
	}
	return refusalOf(err)
}

// accountData is what a person sees of their own account.
type accountData struct {
	Me       *control.PersonRecord
	Sessions []control.WebSession
	Tokens   []control.APIToken
	Recovery int // codes that are left
	Form     *form
	At       string // the form that Form is of
	Factor   *people.Factor
	Picture  *qr
	Codes    []string // recovery codes, shown once
	Token    string   // shown once
	CLI      string   // the command that logs in
}

// commandLine is the command by which a person logs in to this platform, with the pin of its CA where it has its own.
func (q *request) commandLine() string {
	line := "sallyway login --url " + q.s.reg.URL
	if q.s.reg.Pin != "" {
		line += " --ca-pin " + q.s.reg.Pin
	}
	return line
}

func (q *request) account() error { return q.accountPage(http.StatusOK, accountData{}) }

func (q *request) accountPage(status int, d accountData) error {
	svc := q.s.cfg.People
	me, err := svc.Me(q.ctx, q.who)
	if err != nil {
		return err
	}
	d.Me, d.CLI = me.Person, q.commandLine()
	if d.Sessions, err = svc.Sessions(q.ctx, q.who); err != nil {
		return err
	}
	if d.Tokens, err = svc.MyTokens(q.ctx, q.who); err != nil {
		return err
	}
	now := q.s.now()
	d.Tokens = slices.DeleteFunc(d.Tokens, func(t control.APIToken) bool { return t.Revoked != nil || t.Expires != nil && now.After(*t.Expires) })
	if d.Me != nil && d.Me.TOTP {
		if d.Recovery, err = svc.RecoveryLeft(q.ctx, q.who); err != nil {
			return err
		}
	}
	if d.Form == nil {
		d.Form = newForm()
	}
	return q.render(status, "account", page{Title: "Your account", Nav: "account", Data: d})
}

// changeAccount does what a form of the account page says.
func (q *request) changeAccount() error {
	svc, what := q.s.cfg.People, q.r.PathValue("what")
	password := q.r.PostFormValue("password")
	var err error
	said := ""
	switch what {
	case "profile":
		name, email := q.value("name"), q.value("email")
		_, err = svc.UpdateMe(q.ctx, q.who, control.UpdateMe{Name: &name, Email: &email})
		said = "Your profile is saved."
	case "password":
		fresh := q.r.PostFormValue("new_password")
		if fresh != q.r.PostFormValue("new_password2") {
			err = problem(http.StatusUnprocessableEntity, "new_password2", "type the same in both", "the new passwords differ")
			break
		}
		var session *people.Session
		if session, err = svc.ChangePassword(q.ctx, q.who, password, fresh, q.source()); err == nil {
			people.SetCookie(q.w, session)
		}
		said = "Your password is changed, and every other browser is logged out."
	case "factor":
		var f *people.Factor
		if f, err = svc.BeginFactor(q.ctx, q.who, password, q.source()); err == nil {
			return q.accountPage(http.StatusOK, accountData{Factor: f, Picture: qrOf(f.URL)})
		}
	case "factor-confirm":
		var codes []string
		if codes, err = svc.ConfirmFactor(q.ctx, q.who, q.r.PostFormValue("ticket"), q.value("code")); err == nil {
			return q.accountPage(http.StatusOK, accountData{Codes: codes})
		}
		if p := anyRefusal(err); p != nil {
			secret := q.value("secret")
			f := &people.Factor{Secret: secret, URL: q.value("url"), Ticket: q.r.PostFormValue("ticket")}
			return q.accountPage(p.Status, accountData{Factor: f, Picture: qrOf(f.URL), Form: q.again(p), At: what})
		}
	case "factor-remove":
		err = svc.RemoveFactor(q.ctx, q.who, password, q.source())
		said = "The second factor is off. Your password alone logs in."
	case "recovery":
		var codes []string
		if codes, err = svc.RenewRecovery(q.ctx, q.who, password, q.source()); err == nil {
			return q.accountPage(http.StatusOK, accountData{Codes: codes})
		}
	case "session-end":
		err = svc.EndSession(q.ctx, q.who, q.value("id"))
		said = "That browser is logged out."
	case "sessions-end":
		err = svc.EndOtherSessions(q.ctx, q.who)
		said = "All other browsers are logged out."
	case "token":
		var made *control.CreatedAPIToken
		if made, err = svc.CreateMyToken(q.ctx, q.who, q.tokenRequest()); err == nil {
			return q.accountPage(http.StatusOK, accountData{Token: made.Token})
		}
	case "token-revoke":
		err = svc.RevokeMyToken(q.ctx, q.who, q.value("id"))
		said = "The token is revoked."
	default:
		return problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such action")
	}
	if p := anyRefusal(err); p != nil {
		q.retryAfter(p)
		return q.accountPage(p.Status, accountData{Form: q.again(p), At: what})
	}
	if err != nil {
		return err
	}
	q.tell("good", said)
	return q.redirect("/account")
}

// tokenRequest reads the form of a new API token.
func (q *request) tokenRequest() control.CreateAPIToken {
	req := control.CreateAPIToken{Name: cmp.Or(q.value("name"), "token"), Scopes: words(q.value("scopes"))}
	if days := q.number("days", 0); days > 0 {
		req.Life = int((time.Duration(days) * 24 * time.Hour).Seconds())
	}
	return req
}

// words splits text at commas and space.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' || r == '\t' })
}

// secretOnce is a secret that the page after a form shows, sealed in a cookie of that page for a few minutes, so that the page can be
// loaded again and any replica can show it.
type secretOnce struct {
	What, Value string
	Until       time.Time
}

const onceCookie = "sallyway_once"

func (q *request) keepOnce(path, what, value string) error {
	b, err := json.Marshal(secretOnce{what, value, q.s.now().Add(onceLife)})
	if err != nil {
		return err
	}
	q.cookie(&http.Cookie{
		Name: onceCookie, Value: base64.RawURLEncoding.EncodeToString(q.s.reg.Seal.Seal("web/once/"+q.who.ID+path, b)),
		Path: path, MaxAge: int(onceLife.Seconds()), HttpOnly: true,
	})
	return nil
}

const onceLife = 5 * time.Minute

// takeOnce is what keepOnce kept for this page, nil when there is nothing.
func (q *request) takeOnce() *secretOnce {
	path := q.r.URL.Path
	c, err := q.r.Cookie(onceCookie)
	if err != nil {
		return nil
	}
	q.cookie(&http.Cookie{Name: onceCookie, Path: path, MaxAge: -1, HttpOnly: true})
	sealed, err := base64.RawURLEncoding.DecodeString(c.Value)
	if err != nil {
		return nil
	}
	b, err := q.s.reg.Seal.Open("web/once/"+q.who.ID+path, sealed)
	if err != nil {
		return nil
	}
	var o secretOnce
	if json.Unmarshal(b, &o) != nil || q.s.now().After(o.Until) {
		return nil
	}
	return &o
}
