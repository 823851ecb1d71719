package web

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people"
	"sallyway/platform/store"
)

func (s *Server) peopleRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "/users", "people", people.Read, (*request).listUsers)
	s.org(mux, "GET", "/users/new", "people", people.Write, (*request).newUser)
	s.org(mux, "POST", "/users/new", "people", people.Write, (*request).createUser)
	s.org(mux, "GET", "/users/{name}", "people", people.Read, (*request).showUser)
	s.org(mux, "POST", "/users/{name}", "people", people.Write, (*request).updateUser)
	s.org(mux, "POST", "/users/{name}/do/{verb}", "people", people.Write, (*request).userVerb)
	s.org(mux, "GET", "/service-accounts", "service-accounts", people.Read, (*request).listAccounts)
	s.org(mux, "POST", "/service-accounts", "service-accounts", people.Write, (*request).createAccount)
	s.org(mux, "GET", "/service-accounts/{name}", "service-accounts", people.Read, (*request).showAccount)
	s.org(mux, "POST", "/service-accounts/{name}/do/{verb}", "service-accounts", people.Write, (*request).accountVerb)
	s.org(mux, "GET", "/my", "", people.Read, (*request).mine)
	s.org(mux, "POST", "/my/clients", "self", people.Write, (*request).createMine)
	s.org(mux, "POST", "/my/clients/{name}/{verb}", "self", people.Write, (*request).mineVerb)
	s.org(mux, "GET", "/my/clients/{name}", "self", people.Read, (*request).deployMine)
}

// roleWords say what a role may, for the forms.
var roleWords = [][2]string{
	{string(people.Owner), "everything, people and single sign-on included"},
	{string(people.Admin), "everything but people and single sign-on"},
	{string(people.Auditor), "reads everything, the audit log included"},
	{string(people.Member), "own client devices, and what they reach"},
}

func (q *request) peopleCrumbs(name, path string) []crumb {
	c := []crumb{{"Organization Settings", q.url("organization")}}
	if name != "" {
		c = append(c, crumb{name, q.url(path)})
	}
	return c
}

func (q *request) listUsers() error {
	l, err := q.s.cfg.People.People(q.ctx, q.org, store.Page{After: q.value("after"), Limit: pageSize})
	if err != nil {
		return err
	}
	return q.render(http.StatusOK, "users", page{Title: "Users", Nav: "users", Crumb: q.peopleCrumbs("", ""), Data: struct {
		Items []control.PersonRecord
		Pager pager
	}{l.Items, q.cursorPager("users", len(l.Items), "user", "users", l.NextCursor)}})
}

// cursorPager is the pager of a list that goes on after a name.
func (q *request) cursorPager(path string, n int, one, many, next string) pager {
	p := pager{Text: plural(n, one, many) + " on this page", Total: n}
	if q.value("after") != "" {
		p.Prev = q.url(path)
	}
	if next != "" {
		p.Next = "?after=" + url.QueryEscape(next)
	}
	return p
}

func (q *request) newUser() error {
	return q.userForm(http.StatusOK, newForm("role", string(people.Member)))
}

func (q *request) userForm(status int, f *form) error {
	return q.render(status, "user-new", page{Title: "Invite somebody", Nav: "users", Crumb: q.peopleCrumbs("Users", "users"), Data: struct {
		Form  *form
		Roles [][2]string
	}{f, roleWords}})
}

func (q *request) createUser() error {
	made, err := q.s.cfg.People.CreatePerson(q.ctx, q.who, q.org, control.CreatePerson{
		Login: strings.ToLower(q.value("login")), Name: q.value("name"), Email: q.value("email"), Role: q.value("role"),
	})
	if p := anyRefusal(err); p != nil {
		return q.userForm(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	to := q.url("users", url.PathEscape(made.Login))
	if made.Invitation != nil {
		if err := q.keepOnce(to, "invitation", made.Invitation.URL); err != nil {
			return err
		}
	} else {
		q.tell("good", made.Login+" has the role "+made.Role+" here now.")
	}
	return q.redirect(to)
}

func (q *request) showUser() error {
	p, err := q.s.cfg.People.Person(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	return q.userPage(http.StatusOK, p, nil)
}

func (q *request) userPage(status int, p *control.PersonRecord, f *form) error {
	if f == nil {
		f = newForm("name", p.Name, "email", p.Email, "role", p.Role)
	}
	return q.render(status, "user", page{Title: p.Login, Nav: "users", Crumb: q.peopleCrumbs("Users", "users"), Data: struct {
		P     *control.PersonRecord
		Form  *form
		Roles [][2]string
		URL   string
		Once  *secretOnce
	}{p, f, roleWords, q.url("users", url.PathEscape(p.Login)), q.takeOnce()}})
}

func (q *request) updateUser() error {
	before, err := q.s.cfg.People.Person(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	var up control.UpdatePerson
	for _, f := range []struct {
		field, was string
		into       **string
	}{{"name", before.Name, &up.Name}, {"email", before.Email, &up.Email}, {"role", before.Role, &up.Role}} {
		if v := q.value(f.field); v != f.was {
			*f.into = &v
		}
	}
	p, err := q.s.cfg.People.UpdatePerson(q.ctx, q.who, q.org, before.Login, up)
	if r := anyRefusal(err); r != nil {
		return q.userPage(r.Status, before, q.again(r))
	}
	if err != nil {
		return err
	}
	q.tell("good", p.Login+" is saved.")
	return q.redirect(q.url("users", url.PathEscape(p.Login)))
}

func (q *request) userVerb() error {
	svc, name := q.s.cfg.People, q.r.PathValue("name")
	to := q.url("users", url.PathEscape(name))
	switch verb := q.r.PathValue("verb"); verb {
	case "disable", "enable":
		off := verb == "disable"
		if _, err := svc.UpdatePerson(q.ctx, q.who, q.org, name, control.UpdatePerson{Disabled: &off}); err != nil {
			return err
		}
		if off {
			q.tell("good", name+" is logged out everywhere and can not log in; their client devices are revoked.")
		} else {
			q.tell("good", name+" can log in again.")
		}
	case "invite":
		link, err := svc.Invite(q.ctx, q.who, q.org, name)
		if err != nil {
			return err
		}
		if err := q.keepOnce(to, "invitation", link.URL); err != nil {
			return err
		}
	case "forget-factor":
		if _, err := svc.ForgetFactor(q.ctx, q.who, q.org, name); err != nil {
			return err
		}
		q.tell("good", "The second factor of "+name+" is off. They can set up a new one.")
	case "delete":
		if err := svc.DeletePerson(q.ctx, q.who, q.org, name); err != nil {
			return err
		}
		q.tell("good", name+" is removed, and their client devices are revoked.")
		return q.redirect(q.url("users"))
	default:
		return problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such action")
	}
	return q.redirect(to)
}

func (q *request) listAccounts() error {
	return q.accountsPage(http.StatusOK, newForm("scopes", "*:read"))
}

func (q *request) accountsPage(status int, f *form) error {
	l, err := q.s.cfg.People.ServiceAccounts(q.ctx, q.org, store.Page{After: q.value("after"), Limit: pageSize})
	if err != nil {
		return err
	}
	return q.render(status, "service-accounts", page{Title: "Service accounts", Nav: "service-accounts", Crumb: q.peopleCrumbs("", ""), Data: struct {
		Items []control.ServiceAccountRecord
		Form  *form
		Pager pager
	}{l.Items, f, q.cursorPager("service-accounts", len(l.Items), "service account", "service accounts", l.NextCursor)}})
}

func (q *request) createAccount() error {
	made, err := q.s.cfg.People.CreateServiceAccount(q.ctx, q.who, q.org, control.CreateServiceAccount{Name: strings.ToLower(q.value("name")), Scopes: words(q.value("scopes"))})
	if p := anyRefusal(err); p != nil {
		return q.accountsPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Service account "+made.Name+" is there. It needs a token to do anything.")
	return q.redirect(q.url("service-accounts", url.PathEscape(made.Name)))
}

func (q *request) showAccount() error { return q.serviceAccountPage(http.StatusOK, newForm()) }

func (q *request) serviceAccountPage(status int, f *form) error {
	name := q.r.PathValue("name")
	a, err := q.s.cfg.People.ServiceAccount(q.ctx, q.org, name)
	if err != nil {
		return err
	}
	tokens, err := q.s.cfg.People.AccountTokens(q.ctx, q.org, name)
	if err != nil {
		return err
	}
	tokens = slices.DeleteFunc(tokens, func(t control.APIToken) bool { return t.Revoked != nil })
	return q.render(status, "service-account", page{Title: a.Name, Nav: "service-accounts", Crumb: q.peopleCrumbs("Service accounts", "service-accounts"), Data: struct {
		A      *control.ServiceAccountRecord
		Tokens []control.APIToken
		Form   *form
		URL    string
		Once   *secretOnce
	}{a, tokens, f, q.url("service-accounts", url.PathEscape(a.Name)), q.takeOnce()}})
}

func (q *request) accountVerb() error {
	svc, name := q.s.cfg.People, q.r.PathValue("name")
	to := q.url("service-accounts", url.PathEscape(name))
	var err error
	switch verb := q.r.PathValue("verb"); verb {
	case "disable", "enable":
		off := verb == "disable"
		if _, err = svc.UpdateServiceAccount(q.ctx, q.who, q.org, name, control.UpdateServiceAccount{Disabled: &off}); err == nil {
			q.tell("good", name+" is "+verb+"d.")
		}
	case "scopes":
		scopes := words(q.value("scopes"))
		if _, err = svc.UpdateServiceAccount(q.ctx, q.who, q.org, name, control.UpdateServiceAccount{Scopes: &scopes}); err == nil {
			q.tell("good", "The scopes of "+name+" are saved.")
		}
	case "token":
		var made *control.CreatedAPIToken
		if made, err = svc.CreateAccountToken(q.ctx, q.who, q.org, name, q.tokenRequest()); err == nil {
			err = q.keepOnce(to, "token", made.Token)
		}
	case "token-revoke":
		if err = svc.RevokeAccountToken(q.ctx, q.who, q.org, name, q.value("id")); err == nil {
			q.tell("good", "The token is revoked.")
		}
	case "delete":
		if err = svc.DeleteServiceAccount(q.ctx, q.who, q.org, name); err == nil {
			q.tell("good", "Service account "+name+" and its tokens are gone.")
			to = q.url("service-accounts")
		}
	default:
		err = problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such action")
	}
	if p := refusal(err); p != nil {
		return q.serviceAccountPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	return q.redirect(to)
}

// mine shows a person's own devices and what they reach.
func (q *request) mine() error { return q.minePage(http.StatusOK, newForm()) }

func (q *request) minePage(status int, f *form) error {
	clients, err := q.s.cfg.People.MyClients(q.ctx, q.who, q.org)
	if err != nil {
		return err
	}
	reach, err := q.s.reg.Reach(q.ctx, q.org)
	if err != nil {
		return err
	}
	type device struct {
		control.NodeRecord
		Reaches []string
	}
	var devices []device
	for _, c := range clients {
		devices = append(devices, device{c, reach.Subjects[string(identity.Client)+":"+c.Name]})
	}
	return q.render(status, "my", page{Title: "My devices", Nav: "my", Live: q.may.Read("status"), Data: struct {
		Devices []device
		Form    *form
		URL     string
		CLI     string
	}{devices, f, q.url("my"), q.commandLine()}})
}

// clients is the kind of what a person has.
var clientKind = kinds[2]

func (q *request) createMine() error {
	made, err := q.s.cfg.People.CreateMyClient(q.ctx, q.who, q.org, control.CreateNode{Name: strings.ToLower(q.value("name"))})
	if p := refusal(err); p != nil {
		return q.minePage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	return q.myDeployment(made)
}

func (q *request) myDeployment(made *control.CreatedNode) error {
	to := q.url("my", "clients", url.PathEscape(made.Name))
	if err := q.keepDeploymentAt(clientKind, made, to); err != nil {
		return err
	}
	return q.redirect(to)
}

// deployMine is the deploy page of a person's own device.
func (q *request) deployMine() error {
	clients, err := q.s.cfg.People.MyClients(q.ctx, q.who, q.org)
	if err != nil {
		return err
	}
	name := q.r.PathValue("name")
	for i := range clients {
		if clients[i].Name == name || clients[i].ID == name {
			return q.deployPage(clientKind, &clients[i], q.url("my", "clients", url.PathEscape(clients[i].Name)), []crumb{{"My devices", q.url("my")}})
		}
	}
	return problem(http.StatusNotFound, "", "see My devices", "you have no device "+clip(name, 63))
}

func (q *request) mineVerb() error {
	name := q.r.PathValue("name")
	switch q.r.PathValue("verb") {
	case "token":
		made, err := q.s.cfg.People.ReissueMyClient(q.ctx, q.who, q.org, name)
		if err != nil {
			return err
		}
		return q.myDeployment(made)
	case "delete":
		if err := q.s.cfg.People.DeleteMyClient(q.ctx, q.who, q.org, name); err != nil {
			return err
		}
		q.tell("good", "Your device "+name+" is deleted, and its key is denied.")
		return q.redirect(q.url("my"))
	}
	return problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such action")
}
