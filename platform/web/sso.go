package web

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/platform/people"
	"sallyway/platform/store"
)

func (s *Server) signOnRoutes(mux *http.ServeMux) {
	s.cfg.People.SSORoutes(mux, s.cfg.Source, func(w http.ResponseWriter, r *http.Request, err error) {
		q := &request{s: s, w: w, r: r, ctx: r.Context()}
		q.fail(err)
	})
	s.org(mux, "GET", "/sso", "providers", people.Read, (*request).listProviders)
	s.org(mux, "POST", "/sso", "providers", people.Write, (*request).createProvider)
	s.org(mux, "GET", "/sso/{name}", "providers", people.Read, (*request).showProvider)
	s.org(mux, "POST", "/sso/{name}", "providers", people.Write, (*request).updateProvider)
	s.org(mux, "POST", "/sso/{name}/do/{verb}", "providers", people.Write, (*request).providerVerb)
	s.org(mux, "GET", "/api-tokens", "tokens", people.Read, (*request).listTokens)
	s.org(mux, "POST", "/api-tokens", "tokens", people.Write, (*request).createToken)
	s.org(mux, "POST", "/api-tokens/revoke", "tokens", people.Write, (*request).revokeToken)
}

// signOnButton is a provider of single sign-on that the login page offers.
type signOnButton struct{ Name, URL string }

func (q *request) signOnButtons(next string) ([]signOnButton, error) {
	l, err := q.s.cfg.People.LoginProviders(q.ctx, q.value("org"))
	if err != nil {
		return nil, err
	}
	var out []signOnButton
	for _, p := range l {
		to := p.URL
		if next != "" {
			to += "?" + url.Values{"return": {next}}.Encode()
		}
		out = append(out, signOnButton{p.Name, to})
	}
	return out, nil
}

// rulesOf reads who of a provider's users may come in: lines of GROUP = ROLE.
func (q *request) rulesOf() (control.ProviderRules, error) {
	r := control.ProviderRules{Scopes: words(q.value("scopes")), Groups: q.value("groups"), Create: q.value("create") != "", LinkByEmail: q.value("link") != ""}
	for line := range strings.Lines(q.value("mapping")) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		i := strings.LastIndex(line, "=")
		if i < 1 {
			return r, problem(http.StatusUnprocessableEntity, "mapping", "a line for each group, such as: engineering = admin", fmt.Sprintf("%.60q is no line of the form GROUP = ROLE", line))
		}
		r.Mapping = append(r.Mapping, control.GroupToRole{Group: strings.TrimSpace(line[:i]), Role: strings.TrimSpace(line[i+1:])})
	}
	return r, nil
}

func mappingText(m []control.GroupToRole) string {
	var b strings.Builder
	for _, g := range m {
		fmt.Fprintf(&b, "%s = %s\n", g.Group, g.Role)
	}
	return b.String()
}

func (q *request) listProviders() error {
	return q.providersPage(http.StatusOK, newForm("groups", "groups"))
}

func (q *request) providersPage(status int, f *form) error {
	l, err := q.s.cfg.People.Providers(q.ctx, q.org, store.Page{Limit: 200})
	if err != nil {
		return err
	}
	return q.render(status, "sso", page{Title: "Single sign-on", Nav: "sso", Crumb: q.peopleCrumbs("", ""), Data: struct {
		Items []control.ProviderRecord
		Form  *form
	}{l.Items, f}})
}

func (q *request) createProvider() error {
	rules, err := q.rulesOf()
	var made *control.ProviderRecord
	if err == nil {
		made, err = q.s.cfg.People.CreateProvider(q.ctx, q.who, q.org, control.CreateProvider{
			Name: strings.ToLower(q.value("name")), Issuer: q.value("issuer"), ClientID: q.value("client_id"), Secret: q.r.PostFormValue("client_secret_password"), ProviderRules: rules,
		})
	}
	if p := anyRefusal(err); p != nil {
		return q.providersPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Single sign-on with "+made.Name+" is there. Register its redirect address at the provider.")
	return q.redirect(q.url("sso", url.PathEscape(made.Name)))
}

func (q *request) showProvider() error { return q.providerPage(http.StatusOK, nil) }

func (q *request) providerPage(status int, f *form) error {
	p, err := q.s.cfg.People.Provider(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	if f == nil {
		f = newForm("client_id", p.ClientID, "groups", p.Groups, "mapping", mappingText(p.Mapping), "scopes", strings.Join(p.Scopes, " "))
		if p.Create {
			f.values.Set("create", "1")
		}
		if p.LinkByEmail {
			f.values.Set("link", "1")
		}
	}
	return q.render(status, "sso-provider", page{Title: p.Name, Nav: "sso", Crumb: q.peopleCrumbs("Single sign-on", "sso"), Data: struct {
		P    *control.ProviderRecord
		Form *form
		URL  string
	}{p, f, q.url("sso", url.PathEscape(p.Name))}})
}

func (q *request) updateProvider() error {
	name := q.r.PathValue("name")
	rules, err := q.rulesOf()
	if err == nil {
		id := q.value("client_id")
		up := control.UpdateProvider{ClientID: &id, Rules: &rules}
		if secret := q.r.PostFormValue("client_secret_password"); secret != "" {
			up.Secret = &secret
		}
		_, err = q.s.cfg.People.UpdateProvider(q.ctx, q.who, q.org, name, up)
	}
	if p := refusal(err); p != nil {
		return q.providerPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Single sign-on with "+name+" is saved.")
	return q.redirect(q.url("sso", url.PathEscape(name)))
}

func (q *request) providerVerb() error {
	name := q.r.PathValue("name")
	switch verb := q.r.PathValue("verb"); verb {
	case "disable", "enable":
		off := verb == "disable"
		if _, err := q.s.cfg.People.UpdateProvider(q.ctx, q.who, q.org, name, control.UpdateProvider{Disabled: &off}); err != nil {
			return err
		}
		q.tell("good", "Single sign-on with "+name+" is "+verb+"d.")
		return q.redirect(q.url("sso", url.PathEscape(name)))
	case "delete":
		if err := q.s.cfg.People.DeleteProvider(q.ctx, q.who, q.org, name); err != nil {
			return err
		}
		q.tell("good", "Single sign-on with "+name+" is deleted.")
		return q.redirect(q.url("sso"))
	}
	return problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such action")
}

func (q *request) listTokens() error { return q.tokensPage(http.StatusOK, newForm()) }

func (q *request) tokensPage(status int, f *form) error {
	l, err := q.s.cfg.People.Tokens(q.ctx, q.org)
	if err != nil {
		return err
	}
	now := q.s.now()
	l = slices.DeleteFunc(l, func(t control.APIToken) bool { return t.Revoked != nil || t.Expires != nil && now.After(*t.Expires) })
	return q.render(status, "api-tokens", page{Title: "API tokens", Nav: "api-tokens", Crumb: q.peopleCrumbs("", ""), Data: struct {
		Tokens []control.APIToken
		Form   *form
		Once   *secretOnce
	}{l, f, q.takeOnce()}})
}

func (q *request) createToken() error {
	req := q.tokenRequest()
	if len(req.Scopes) == 0 {
		return q.tokensPage(http.StatusUnprocessableEntity, q.again(&problem(http.StatusUnprocessableEntity, "scopes", "such as *:read", "a token that belongs to nobody needs scopes").Problem))
	}
	made, err := q.s.cfg.People.CreateToken(q.ctx, q.who, q.org, req)
	if p := anyRefusal(err); p != nil {
		return q.tokensPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	if err := q.keepOnce(q.url("api-tokens"), "token", made.Token); err != nil {
		return err
	}
	return q.redirect(q.url("api-tokens"))
}

func (q *request) revokeToken() error {
	if err := q.s.cfg.People.RevokeToken(q.ctx, q.who, q.org, q.value("id")); err != nil {
		return err
	}
	q.tell("good", "The token is revoked.")
	return q.redirect(q.url("api-tokens"))
}
