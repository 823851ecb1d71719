package web

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/incoming"
	"sallyway/platform/people"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// handler shows a page or does what a form says. Its error is shown as a page.
type handler func(q *request) error

// routes are all pages. Every one in an organization names the object and the verb that its reader needs, in the words of the API's scopes.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /static/{name}", s.static)
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, s.assetURL("icon.svg"), http.StatusMovedPermanently)
	})
	s.publicRoutes(mux)
	s.personRoutes(mux)
	s.networkingRoutes(mux)
	s.placesRoutes(mux)
	s.accessRoutes(mux)
	s.testRoutes(mux)
	s.activityRoutes(mux)
	s.trailRoutes(mux)
	s.peopleRoutes(mux)
	s.signOnRoutes(mux)
	s.authenticationRoutes(mux)
	s.licenceRoutes(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, func(q *request) error {
			if q.r.URL.Path != "/" || q.r.Method != http.MethodGet && q.r.Method != http.MethodHead {
				return problem(http.StatusNotFound, "", "start at the overview: "+s.reg.URL, "there is no such page")
			}
			return q.home()
		}, false)
	})
	cross := http.NewCrossOriginProtection()
	cross.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := &request{s: s, w: w, r: r, ctx: r.Context()}
		q.fail(problem(http.StatusForbidden, "", "open the platform's own page and use the form there", "this form was sent by another site"))
	}))
	return secure(http.MaxBytesHandler(cross.Handler(incoming.Routed(mux)), maxBody))
}

func (s *Server) networkingRoutes(mux *http.ServeMux) {
	for _, k := range kinds {
		base, object := "/networking/"+k.Plural, k.Plural
		on := func(h func(*request, kindView) error) handler { return func(q *request) error { return h(q, k) } }
		s.org(mux, "GET", base, object, people.Read, on((*request).listNodes))
		s.org(mux, "GET", base+"/new", object, people.Write, on((*request).newNode))
		s.org(mux, "POST", base+"/new", object, people.Write, on((*request).createNode))
		s.org(mux, "GET", base+"/{name}", object, people.Read, on((*request).showNode))
		s.org(mux, "POST", base+"/{name}", object, people.Write, on((*request).updateNode))
		s.org(mux, "GET", base+"/{name}/deploy", object, people.Read, on((*request).deploy))
		s.org(mux, "POST", base+"/{name}/token", object, people.Write, on((*request).issueToken))
		s.org(mux, "POST", base+"/{name}/do/{verb}", object, people.Write, on((*request).nodeVerb))
	}
	s.org(mux, "GET", "/networking", "relays", people.Read, func(q *request) error { return q.redirect(q.url("networking", "relays")) })
}

func (s *Server) accessRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "/resources", "resources", people.Read, (*request).listResources)
	s.org(mux, "GET", "/resources/new", "resources", people.Write, (*request).newResource)
	s.org(mux, "POST", "/resources/new", "resources", people.Write, (*request).createResource)
	s.org(mux, "GET", "/resources/{name}", "resources", people.Read, (*request).showResource)
	s.org(mux, "GET", "/resources/{name}/edit", "resources", people.Write, (*request).editResource)
	s.org(mux, "POST", "/resources/{name}/edit", "resources", people.Write, (*request).updateResource)
	s.org(mux, "POST", "/resources/{name}/do/{verb}", "resources", people.Write, (*request).resourceVerb)
	s.org(mux, "GET", "/policies", "policies", people.Read, (*request).listPolicies)
	s.org(mux, "GET", "/policies/new", "policies", people.Write, (*request).newPolicy)
	s.org(mux, "POST", "/policies/new", "policies", people.Write, (*request).createPolicy)
	s.org(mux, "GET", "/policies/explain", "policies", people.Read, (*request).explain)
	s.org(mux, "POST", "/policies/{name}/do/{verb}", "policies", people.Write, (*request).policyVerb)
	s.org(mux, "GET", "/groups", "groups", people.Read, (*request).listGroups)
	s.org(mux, "GET", "/groups/new", "groups", people.Write, (*request).newGroup)
	s.org(mux, "POST", "/groups/new", "groups", people.Write, (*request).saveGroup)
	s.org(mux, "GET", "/groups/{name}", "groups", people.Read, (*request).showGroup)
	s.org(mux, "POST", "/groups/{name}", "groups", people.Write, (*request).saveGroup)
	s.org(mux, "POST", "/groups/{name}/delete", "groups", people.Write, (*request).deleteGroup)
}

func (s *Server) activityRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "", "", people.Read, (*request).orgHome)
	s.org(mux, "GET", "/overview", "status", people.Read, (*request).overview)
	s.org(mux, "GET", "/live", "status", people.Read, (*request).live)
	s.org(mux, "GET", "/sessions", "sessions", people.Read, (*request).listSessions)
	s.org(mux, "POST", "/sessions/{name}/end", "sessions", people.Write, (*request).endSessions)
	s.org(mux, "GET", "/topology", "status", people.Read, (*request).topology)
	s.org(mux, "GET", "/history", "status", people.Read, (*request).showHistory)
	s.org(mux, "GET", "/audit", "audit", people.Read, (*request).listAudit)
	s.org(mux, "GET", "/audit/export", "audit", people.Read, (*request).exportAudit)
	s.org(mux, "GET", "/certificates", "status", people.Read, (*request).certificates)
	s.org(mux, "GET", "/certificates/{kind}/rotation", "authorities", people.Read, (*request).showRotation)
	s.org(mux, "POST", "/certificates/{kind}/rotation", "authorities", people.Write, (*request).rotate)
	s.org(mux, "GET", "/organization", "organizations", people.Read, (*request).showOrganization)
	s.org(mux, "POST", "/organization", "organizations", people.Write, (*request).updateOrganization)
}

// public adds a page for everybody.
func (s *Server) public(mux *http.ServeMux, pattern string, h handler) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, h, true) })
}

// person adds a page for whoever is logged in.
func (s *Server) person(mux *http.ServeMux, pattern string, h handler) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, func(q *request) error {
			// The menu stays that of the organization that was looked at last.
			if c, err := r.Cookie(orgCookie); err == nil && slices.Contains(q.orgs, c.Value) {
				q.org, q.may = c.Value, rights{who: q.who, org: c.Value}
			}
			return h(q)
		}, false)
	})
}

// org adds a page of an organization. An empty object is for everybody who sees the organization.
func (s *Server) org(mux *http.ServeMux, method, path, object, verb string, h handler) {
	mux.HandleFunc(method+" /orgs/{org}"+path, func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, func(q *request) error {
			org := q.r.PathValue("org")
			if org == identity.SharedOrg || !q.who.Sees(org) {
				return problem(http.StatusNotFound, "", "choose one of yours in the menu", "there is no organization "+clip(org, 63)+" for you")
			}
			if object != "" {
				if err := q.who.Require(org, object, verb); err != nil {
					return err
				}
			}
			if _, err := s.reg.Org(q.ctx, org); err != nil {
				return err
			}
			q.org = org
			q.may = rights{q.who, org, object}
			q.remember(org)
			return h(q)
		}, false)
	})
}

// serve finds out who is there, checks forms, and shows errors.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, h handler, public bool) {
	q := &request{s: s, w: w, r: r, ctx: r.Context()}
	who, err := s.cfg.People.FromRequest(r)
	switch {
	case err == nil:
		q.who = who
		q.ctx = registry.WithActor(q.ctx, who.Actor)
		q.may = rights{who: who}
		if q.orgs, err = q.organizations(); err != nil {
			q.fail(err)
			return
		}
	case registry.Code(err) == people.CodeNoSession:
		if !public {
			q.needLogin()
			return
		}
	default:
		q.fail(err)
		return
	}
	if r.Method == http.MethodPost {
		if err := r.ParseForm(); err != nil {
			q.fail(problem(http.StatusBadRequest, "", "send it again, shorter", "the form could not be read"))
			return
		}
		if q.who != nil && !public {
			if err := q.who.Session.CheckCSRF(r.PostFormValue(people.CSRFField)); err != nil {
				q.fail(err)
				return
			}
		}
	}
	if err := h(q); err != nil {
		q.fail(err)
	}
}

// needLogin sends whoever is not logged in to where they can, and back afterwards.
func (q *request) needLogin() {
	first, err := q.s.cfg.People.FirstRun(q.ctx)
	switch {
	case err != nil:
		q.fail(err)
	case q.r.Header.Get("Accept") == "text/event-stream":
		http.Error(q.w, "log in", http.StatusNoContent) // an EventSource does not come back after this status
	case first:
		http.Redirect(q.w, q.r, "/setup", http.StatusSeeOther)
	default:
		to := "/login"
		if q.r.Method == http.MethodGet && q.r.URL.Path != "/" {
			to += "?" + url.Values{"next": {q.r.URL.RequestURI()}}.Encode()
		}
		http.Redirect(q.w, q.r, to, http.StatusSeeOther)
	}
}

// rights say what the reader may do, for templates: they only hide what would be refused.
type rights struct {
	who    *people.Principal
	org    string
	object string // what the page is about
}

// Change says whether the reader may change what the page is about.
func (r rights) Change() bool {
	return r.who != nil && r.object != "" && r.who.May(r.org, r.object, people.Write)
}

// Do says whether the reader may do verb to object in the page's organization.
func (r rights) Do(object, verb string) bool {
	return r.who != nil && r.org != "" && r.who.May(r.org, object, verb)
}

// Read is Do of reading.
func (r rights) Read(object string) bool { return r.Do(object, people.Read) }

// Platform says whether the reader may make organizations.
func (r rights) Platform() bool {
	return r.who != nil && r.who.May(people.Platform, "organizations", people.Write)
}

// Operator says whether the reader looks after the platform itself.
func (r rights) Operator() bool {
	return r.who != nil && r.who.May(people.Platform, "status", people.Read)
}

// organizations are the names that the reader sees.
func (q *request) organizations() ([]string, error) {
	names, all := q.who.Organizations()
	if all {
		l, err := q.s.reg.Orgs(q.ctx, store.Page{Limit: 500})
		if err != nil {
			return nil, err
		}
		names = nil
		for _, o := range l.Items {
			names = append(names, o.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// remember has the next visit begin in this organization.
func (q *request) remember(org string) {
	if c, err := q.r.Cookie(orgCookie); err == nil && c.Value == org {
		return
	}
	q.cookie(&http.Cookie{Name: orgCookie, Value: org, MaxAge: 365 * 24 * 3600, HttpOnly: true})
}

// home leads to the organization that was looked at last.
func (q *request) home() error {
	if c, err := q.r.Cookie(orgCookie); err == nil && slices.Contains(q.orgs, c.Value) {
		return q.redirect(orgURL(c.Value))
	}
	switch {
	case len(q.orgs) > 0:
		return q.redirect(orgURL(q.orgs[0]))
	case q.may.Platform():
		return q.redirect("/orgs/new")
	}
	return q.render(http.StatusOK, "nothing", page{Title: "Welcome"})
}

// orgHome leads to what the reader may see first.
func (q *request) orgHome() error {
	if q.may.Read("status") {
		return q.redirect(q.url("overview"))
	}
	return q.redirect(q.url("my"))
}

// setTheme keeps light, dark or what the system says.
func (q *request) setTheme() error {
	c := &http.Cookie{Name: themeCookie, Value: q.value("theme"), MaxAge: 365 * 24 * 3600, HttpOnly: true}
	if c.Value != "light" && c.Value != "dark" {
		c.Value, c.MaxAge = "", -1
	}
	q.cookie(c)
	return q.redirect(local(q.value("back"), "/"))
}

func (q *request) newOrganization() error {
	if err := q.who.Require(people.Platform, "organizations", people.Write); err != nil {
		return err
	}
	return q.render(http.StatusOK, "org-new", page{Title: "Create Organization", Data: newForm()})
}

func (q *request) createOrganization() error {
	if err := q.who.Require(people.Platform, "organizations", people.Write); err != nil {
		return err
	}
	o, err := q.s.reg.CreateOrg(q.ctx, control.CreateOrganization{Name: strings.ToLower(q.value("name"))})
	if p := refusal(err); p != nil {
		return q.render(p.Status, "org-new", page{Title: "Create Organization", Data: q.again(p)})
	}
	if err != nil {
		return err
	}
	q.tell("good", "Organization "+o.Name+" is there, with a PKI of its own.")
	return q.redirect(orgURL(o.Name))
}

func (q *request) showOrganization() error {
	o, err := q.s.reg.Org(q.ctx, q.org)
	if err != nil {
		return err
	}
	return q.render(http.StatusOK, "organization", page{Title: "Organization", Nav: "organization", Crumb: []crumb{{"Organization Settings", ""}}, Data: o})
}

func (q *request) updateOrganization() error {
	direct, private := q.value("direct") != "", q.value("direct_private") != ""
	if _, err := q.s.reg.UpdateOrg(q.ctx, q.org, control.UpdateOrganization{Direct: &direct, DirectPrivate: &private}); err != nil {
		return err
	}
	q.tell("good", "The organization's settings are saved.")
	return q.redirect(q.url("organization"))
}
