package web

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"sallyway/internal/control"
	"sallyway/platform/incoming"
	"sallyway/platform/people"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Names of cookies that are no secrets. The session's own is package people's.
const (
	flashCookie = "sallyway_flash"
	themeCookie = "sallyway_theme"
	orgCookie   = "sallyway_org"
)

// request is a request with what is known of it.
type request struct {
	s    *Server
	w    http.ResponseWriter
	r    *http.Request
	ctx  context.Context
	who  *people.Principal // nil on public pages when nobody is logged in
	orgs []string
	org  string // of the path, seen by who; "" where the path has none
	may  rights
}

// url is the address of something of the request's organization.
func (q *request) url(parts ...string) string { return orgURL(q.org, parts...) }

// value is a form's field without space around it.
func (q *request) value(name string) string { return strings.TrimSpace(q.r.FormValue(name)) }

// number is a field that holds a number from 0 on, or otherwise what is given.
func (q *request) number(name string, otherwise int) int {
	n, err := strconv.Atoi(q.value(name))
	if err != nil || n < 0 {
		return otherwise
	}
	return n
}

// flash is a message that the next page shows once.
type flash struct {
	Kind string // good, warn, bad, info
	Text string
}

// tell has the next page say something.
func (q *request) tell(kind, text string) {
	b, err := json.Marshal(flash{kind, clip(text, 600)})
	if err != nil {
		return
	}
	q.cookie(&http.Cookie{Name: flashCookie, Value: base64.RawURLEncoding.EncodeToString(b), MaxAge: 60, HttpOnly: true})
}

func (q *request) takeFlash() *flash {
	c, err := q.r.Cookie(flashCookie)
	if err != nil || q.r.Header.Get("X-Sallyway-Live") != "" {
		return nil
	}
	q.cookie(&http.Cookie{Name: flashCookie, MaxAge: -1, HttpOnly: true})
	b, err := base64.RawURLEncoding.DecodeString(c.Value)
	if err != nil {
		return nil
	}
	var f flash
	if json.Unmarshal(b, &f) != nil || !slices.Contains([]string{"good", "warn", "bad", "info"}, f.Kind) {
		return nil
	}
	return &f
}

// cookie sets a cookie of this site alone.
func (q *request) cookie(c *http.Cookie) {
	if c.Path == "" {
		c.Path = "/"
	}
	c.SameSite, c.Secure = http.SameSiteLaxMode, q.secure()
	http.SetCookie(q.w, c)
}

// secure says whether the browser came over TLS, here or at the load balancer.
func (q *request) secure() bool {
	return q.r.TLS != nil || strings.HasPrefix(q.r.Header.Get("X-Forwarded-Proto"), "https")
}

// theme is light or dark as chosen, or "" for what the system says.
func (q *request) theme() string {
	if c, err := q.r.Cookie(themeCookie); err == nil && (c.Value == "light" || c.Value == "dark") {
		return c.Value
	}
	return ""
}

// local is a path of this site, or otherwise what is given: it never leads elsewhere.
func local(to, otherwise string) string {
	u, err := url.Parse(to)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(to, "//") || strings.Contains(to, `\`) {
		return otherwise
	}
	return to
}

// form is what a form shows: what was typed, and what is wrong with it.
type form struct {
	values url.Values
	Err    *control.Problem
}

// Value is what was typed into a field.
func (f *form) Value(name string) string { return f.values.Get(name) }

// Is says whether a field has a value, for options.
func (f *form) Is(name, value string) bool { return slices.Contains(f.values[name], value) }

// Wrong says what is wrong with a field: by its name in the API.
func (f *form) Wrong(name string) string {
	if f.Err == nil {
		return ""
	}
	for _, e := range f.Err.Errors {
		if e.Location == "body."+name {
			return e.Message
		}
	}
	return ""
}

// newForm is a form with first values: name, value, name, value.
func newForm(pairs ...string) *form {
	f := &form{values: url.Values{}}
	for i := 0; i+1 < len(pairs); i += 2 {
		f.values.Add(pairs[i], pairs[i+1])
	}
	return f
}

// again is the form as it was sent, with what is wrong. Passwords are not sent back.
func (q *request) again(p *control.Problem) *form {
	f := &form{values: url.Values{}, Err: p}
	for k, v := range q.r.PostForm {
		if !strings.Contains(k, "password") && k != "code" {
			f.values[k] = v
		}
	}
	return f
}

// refusal is the problem in an error that a form can show, nil when the error is another.
func refusal(err error) *control.Problem {
	var e *registry.Error
	if errors.As(err, &e) && e.Status != http.StatusNotFound {
		return &e.Problem
	}
	return nil
}

// refusalOf is the problem in an error, nil when the error is another.
func refusalOf(err error) *control.Problem {
	var e *registry.Error
	if errors.As(err, &e) {
		return &e.Problem
	}
	return nil
}

// problem makes a refusal of our own.
func problem(status int, field, remedy, detail string) *registry.Error {
	e := &registry.Error{Problem: control.Problem{Status: status, Title: http.StatusText(status), Detail: detail, Remedy: remedy}}
	if field != "" {
		e.Errors = []control.ProblemPart{{Message: detail, Location: "body." + field}}
	}
	return e
}

// fail shows an error as a page with its remedy.
func (q *request) fail(err error) {
	p := control.Problem{
		Status: http.StatusInternalServerError, Title: "The platform failed at this", Detail: "Something went wrong here, not at your end.",
		Remedy: "Try again. The platform's log says more: journalctl -u sallyway-platform",
	}
	var e *registry.Error
	switch {
	case errors.As(err, &e):
		p = e.Problem
	case errors.Is(err, store.ErrUnavailable):
		if q.s.cfg.Unavailable != nil {
			q.s.cfg.Unavailable(err)
		}
		q.s.log.Error("database unavailable", "error", err)
		p = control.Problem{
			Status: http.StatusServiceUnavailable, Title: "The database is not available", Detail: "The platform can not read or write its database just now. What runs goes on meanwhile.",
			Remedy: "On the platform's host, make room on the disk of its data folder and see that it can be written: df -h; platformd doctor",
		}
	case q.r.Context().Err() != nil:
		return // the reader has gone
	default:
		q.s.log.Error("page failed", "path", q.r.URL.Path, "error", err, "request_id", incoming.ID(q.ctx))
	}
	title := p.Title
	if p.Status == http.StatusNotFound {
		title = "Not found"
	}
	data := struct {
		Problem control.Problem
		Back    string
	}{p, q.back()}
	if err := q.render(p.Status, "error", page{Title: title, Gate: q.who == nil, Data: data}); err != nil {
		q.s.log.Error("error page failed", "error", err)
		http.Error(q.w, p.Detail+"\n"+p.Remedy, p.Status)
	}
}

// back is the page of this site that the reader came from.
func (q *request) back() string {
	u, err := url.Parse(q.r.Referer())
	if err != nil || u.Host != q.r.Host {
		return "/"
	}
	u.Scheme, u.Host = "", ""
	return local(u.String(), "/")
}
