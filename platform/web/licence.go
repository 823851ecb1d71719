package web

import (
	"fmt"
	"html/template"
	"net/http"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/people"
)

// licenceRoutes are the page of an organization's licence. Who removes one looks after the platform: an organization does not free itself of its limits.
func (s *Server) licenceRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "/licence", "licence", people.Read, (*request).showLicence)
	s.org(mux, "POST", "/licence", "licence", people.Write, (*request).installLicence)
	s.org(mux, "POST", "/licence/do/remove", "licence", people.Write, (*request).removeLicence)
}

// licenceUse is a line of what there is and may be.
type licenceUse struct {
	control.LicenceUse
	Name, URL string
	Bar       template.HTML // "" without a limit
	Full      bool
}

// licencePage is what the template sees.
type licencePage struct {
	*control.Licence
	State stateView
	// Days are left, rounded up; negative when it is over.
	Days      int
	Use       []licenceUse
	Bandwidth string // "" without a limit
	Form      *form
	Removes   bool
	// Trusted says whether this platform trusts any issuer, so that a licence can be installed.
	Trusted bool
}

var licenceStates = map[string]stateView{
	control.LicenceNone:      {"No licence", "off", "idle"},
	control.LicenceValid:     {"Valid", "good", "good"},
	control.LicenceExpiring:  {"Ends soon", "warn", "warn"},
	control.LicenceExpired:   {"Over", "bad", "bad"},
	control.LicenceEarly:     {"Not yet valid", "bad", "bad"},
	control.LicenceUntrusted: {"Not trusted", "bad", "bad"},
}

func (q *request) showLicence() error { return q.licencePage(http.StatusOK, newForm()) }

func (q *request) licencePage(status int, f *form) error {
	l, err := q.s.reg.Licence(q.ctx, q.org)
	if err != nil {
		return err
	}
	d := licencePage{
		Licence: l, State: licenceStates[l.State], Form: f, Trusted: len(q.s.reg.LicenceTrust) > 0, Removes: q.who.May(people.Platform, "organizations", people.Write),
	}
	if e := l.Entitlement; e != nil {
		const day = 24 * time.Hour
		d.Days = int((e.Expires.Sub(q.s.now()) + day - 1) / day)
		if b := e.Limits.Bandwidth; b != nil {
			d.Bandwidth = bytesText(uint64(*b)) + "/s"
		}
	}
	for _, u := range l.Use {
		v := licenceUse{LicenceUse: u, Name: strings.ToUpper(u.What[:1]) + u.What[1:], URL: q.url("networking", u.What)}
		if u.Limit != nil {
			v.Bar, v.Full = useBar(u.Used, *u.Limit), u.Used >= *u.Limit
		}
		d.Use = append(d.Use, v)
	}
	return q.render(status, "licence", page{Title: "Licence", Nav: "licence", Crumb: []crumb{{"Organization Settings", ""}}, Data: d})
}

// useBar is a picture of how much of a limit there is; its words stand beside it.
func useBar(used, limit int64) template.HTML {
	part, class := 100.0, "full"
	if limit > 0 && used < limit {
		part, class = 100*float64(used)/float64(limit), "room"
		if part >= 80 {
			class = "near"
		}
	}
	return template.HTML(fmt.Sprintf(`<svg class="usebar %s" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true"><rect class="all" width="100" height="6" rx="1"/><rect class="used" width="%.1f" height="6" rx="1"/></svg>`,
		class, part)) // numbers alone
}

func (q *request) installLicence() error {
	l, err := q.s.reg.InstallLicence(q.ctx, q.org, control.InstallLicence{Licence: q.value("licence"), Source: "this page"})
	if p := refusal(err); p != nil {
		return q.licencePage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Licence "+l.Entitlement.ID+" is installed, until "+l.Entitlement.Expires.Format(time.DateOnly)+".")
	return q.redirect(q.url("licence"))
}

func (q *request) removeLicence() error {
	if err := q.who.Require(people.Platform, "organizations", people.Write); err != nil {
		return err
	}
	if err := q.s.reg.RemoveLicence(q.ctx, q.org); err != nil {
		return err
	}
	q.tell("good", "The licence is removed: nothing is limited.")
	return q.redirect(q.url("licence"))
}

// licenceNotice is what every page of an organization says of its licence; "" when all is well, or the reader may not know.
func (q *request) licenceNotice() string {
	if q.org == "" || q.who == nil || !q.who.May(q.org, "licence", people.Read) {
		return ""
	}
	why, err := q.s.reg.LicenceProblem(q.ctx, q.org)
	if err != nil {
		return "" // the page itself tells of a database that does not work
	}
	return why
}
