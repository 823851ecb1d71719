package web

import (
	"bytes"
	"fmt"
	"html/template"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/policy"
	"sallyway/platform/people"
)

// pages are the parsed templates by name, each with the layout it stands in.
type pages map[string]*template.Template

// parsePages reads templates: base.html and parts.html belong to all, every other file is a page that defines "main".
func parsePages(dir fs.FS, assetURL func(string) string) (pages, error) {
	common := template.New("").Funcs(functions()).Funcs(template.FuncMap{"asset": assetURL})
	common, err := common.ParseFS(dir, "base.html", "parts.html")
	if err != nil {
		return nil, err
	}
	names, err := fs.Glob(dir, "*.html")
	if err != nil {
		return nil, err
	}
	out := make(pages)
	for _, name := range names {
		if name == "base.html" || name == "parts.html" {
			continue
		}
		t, err := common.Clone()
		if err != nil {
			return nil, err
		}
		if out[strings.TrimSuffix(path.Base(name), ".html")], err = t.ParseFS(dir, name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// page is what a handler shows.
type page struct {
	Title string
	Nav   string // which entry of the menu is the current one
	Crumb []crumb
	Gate  bool // stands without the frame, as the login does
	Live  bool // is read again when something of the organization changes
	Data  any
}

type crumb struct{ Name, URL string }

// layout is what templates see.
type layout struct {
	page
	Path   string // with the query
	Org    string
	Orgs   []string
	Who    *people.Principal
	Theme  string
	Flash  *flash
	May    rights
	Now    time.Time
	Broken map[string]string // what does not work at the platform itself
	// LicenceProblem says why nothing can be added, or will be soon.
	LicenceProblem string
}

// URL is the address of something of the organization.
func (l *layout) URL(parts ...string) string { return orgURL(l.Org, parts...) }

// CSRF is what forms carry.
func (l *layout) CSRF() string {
	if l.Who == nil || l.Who.Session == nil {
		return ""
	}
	return l.Who.Session.CSRF()
}

func orgURL(org string, parts ...string) string {
	b := "/orgs/" + url.PathEscape(org)
	for _, p := range parts {
		b += "/" + p
	}
	return b
}

// render shows a page.
func (q *request) render(status int, name string, p page) error {
	t := q.s.pages[name]
	if t == nil {
		return fmt.Errorf("there is no page %q", name)
	}
	l := &layout{page: p, Path: q.r.URL.RequestURI(), Org: q.org, Who: q.who, Theme: q.theme(), Flash: q.takeFlash(), Now: q.s.now()}
	if q.who != nil {
		l.Orgs, l.May = q.orgs, q.may
		l.LicenceProblem = q.licenceNotice()
		if q.s.cfg.Conditions != nil && q.may.Operator() {
			l.Broken = q.s.cfg.Conditions()
		}
	}
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, "page", l); err != nil {
		return fmt.Errorf("page %s: %w", name, err)
	}
	body := l.protect(b.Bytes())
	h := q.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	q.w.WriteHeader(status)
	_, _ = q.w.Write(body) // the reader has gone: nobody is left to tell
	return nil
}

// postForm is how every form that changes something begins in the templates.
var postForm = []byte(`<form method="post"`)

// protect gives every form the session's token, so that no template can forget it. Text of users is escaped: it holds no tags.
func (l *layout) protect(body []byte) []byte {
	token := l.CSRF()
	if token == "" {
		return body
	}
	field := []byte(`<input type="hidden" name="` + people.CSRFField + `" value="` + template.HTMLEscapeString(token) + `">`)
	var out []byte
	for {
		at := bytes.Index(body, postForm)
		if at < 0 {
			return append(out, body...)
		}
		end := at + bytes.IndexByte(body[at:], '>') + 1
		out = append(append(out, body[:end]...), field...)
		body = body[end:]
	}
}

// stateView is how a node's state looks: its word, its icon and its class.
type stateView struct{ Word, Icon, Class string }

var stateViews = map[control.NodeState]stateView{
	control.StatePending:     {"Pending", "wait", "idle"},
	control.StateHealthy:     {"Healthy", "good", "good"},
	control.StateDegraded:    {"Degraded", "warn", "warn"},
	control.StateDraining:    {"Draining", "drain", "drain"},
	control.StateUnreachable: {"Unreachable", "bad", "bad"},
	control.StateDisabled:    {"Disabled", "off", "idle"},
	control.StateRevoked:     {"Revoked", "off", "bad"},
}

// states is the order in which states are shown.
var states = []control.NodeState{
	control.StateHealthy, control.StateDegraded, control.StateDraining, control.StateUnreachable, control.StatePending, control.StateDisabled, control.StateRevoked,
}

func functions() template.FuncMap {
	return template.FuncMap{
		"icon":      icon,
		"state":     func(s control.NodeState) stateView { return stateViews[s] },
		"bytes":     func(v uint64) string { return bytesText(v) },
		"rate":      func(v float64) string { return bytesText(v) + "/s" },
		"ago":       ago,
		"until":     until,
		"utc":       func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
		"rfc":       func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"ports":     portsText,
		"plural":    plural,
		"join":      strings.Join,
		"first":     func(n int, s string) string { return clip(s, n) },
		"list":      func(v ...any) []any { return v },
		"pair":      func(a, b any) [2]any { return [2]any{a, b} },
		"pathpart":  url.PathEscape,
		"msof":      func(d time.Duration) string { return strconv.FormatFloat(float64(d)/1e6, 'f', 1, 64) + " ms" },
		"nodestate": func(s string) control.NodeState { return control.NodeState(s) },
		"details":   details,
		"short":     shortTime,
		"once":      func(what, value string) *secretOnce { return &secretOnce{What: what, Value: value} },
		"hop":       hop,
		"add":       func(a, b int) int { return a + b },
		"count":     countText,
	}
}

// bytesText writes an amount of bytes as people read it: 1.2 MB. Units are powers of 1000.
func bytesText[T float64 | uint64](v T) string {
	f, units := float64(v), []string{"B", "kB", "MB", "GB", "TB", "PB"}
	i := 0
	for f >= 999.5 && i < len(units)-1 {
		f /= 1000
		i++
	}
	if i == 0 || f >= 99.5 {
		return strconv.FormatFloat(f, 'f', 0, 64) + " " + units[i]
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + " " + units[i]
}

// countText writes 12 345.
func countText(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// span writes a duration in its largest unit.
func span(d time.Duration) string {
	switch {
	case d < 2*time.Second:
		return "1 s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	case d < 800*24*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
	return fmt.Sprintf("%d years", int(d.Hours()/24/365))
}

// ago writes a moment as seen from now, with the exact one behind it.
func ago(now time.Time, t any) template.HTML {
	at, ok := moment(t)
	if !ok || at.IsZero() {
		return "never"
	}
	text := "in " + span(at.Sub(now))
	if d := now.Sub(at); d >= 0 {
		text = span(d) + " ago"
		if d < 5*time.Second {
			text = "just now"
		}
	}
	return stamp(at, text)
}

// until writes how long a moment is ahead.
func until(now time.Time, t any) template.HTML {
	at, ok := moment(t)
	if !ok || at.IsZero() {
		return "never"
	}
	if !at.After(now) {
		return stamp(at, "expired "+span(now.Sub(at))+" ago")
	}
	return stamp(at, span(at.Sub(now)))
}

func moment(t any) (time.Time, bool) {
	switch v := t.(type) {
	case time.Time:
		return v, true
	case *time.Time:
		if v == nil {
			return time.Time{}, false
		}
		return *v, true
	}
	return time.Time{}, false
}

func stamp(at time.Time, text string) template.HTML {
	at = at.UTC()
	return template.HTML(`<time datetime="` + at.Format(time.RFC3339) + `" title="` + at.Format("2006-01-02 15:04:05 UTC") + `">` + text + `</time>`) // our own text alone
}

func portsText(ps []policy.PortRange) string {
	if len(ps) == 0 {
		return ""
	}
	out := make([]string, len(ps))
	for i, p := range ps {
		out[i] = p.String()
	}
	return strings.Join(out, ", ")
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return countText(n) + " " + many
}

func clip(s string, most int) string {
	r := []rune(s)
	if len(r) <= most {
		return s
	}
	return string(r[:most]) + "…"
}

// redirect sends the browser on after a form.
func (q *request) redirect(to string) error {
	http.Redirect(q.w, q.r, to, http.StatusSeeOther)
	return nil
}

// details are what an audit entry says besides its name: what is empty or false says nothing.
func details(m map[string]any) [][2]string {
	var out [][2]string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		text := ""
		switch v := m[k].(type) {
		case nil, bool:
			if v == true {
				text = "yes"
			}
		case string:
			text = v
		case []any:
			words := make([]string, len(v))
			for i := range v {
				words[i] = fmt.Sprint(v[i])
			}
			text = strings.Join(words, ", ")
		default:
			text = fmt.Sprint(v)
		}
		if text != "" && k != "name" {
			out = append(out, [2]string{strings.ReplaceAll(k, "_", " "), text})
		}
	}
	return out
}

// shortTime is a moment in UTC without what is the same as now.
func shortTime(now, t time.Time) string {
	now, t = now.UTC(), t.UTC()
	switch {
	case now.Format(time.DateOnly) == t.Format(time.DateOnly):
		return t.Format("15:04:05")
	case now.Year() == t.Year():
		return t.Format("2 Jan 15:04:05")
	}
	return t.Format("2 Jan 2006 15:04")
}
