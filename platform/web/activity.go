package web

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/web/history"
)

// sessionRow is a live session as people read it.
type sessionRow struct {
	control.SessionRecord
	Via, Rung string // the relay, or "direct"; the transport
}

// via splits a path's name, such as "fra-1 udp" or "direct 192.0.2.7:4433".
func via(path string) (relay, rung string) {
	relay, rung, _ = strings.Cut(path, " ")
	return relay, rung
}

func (q *request) listSessions() error {
	all, err := q.s.reg.Sessions(q.ctx, q.org)
	if err != nil {
		return err
	}
	query := strings.ToLower(q.value("q"))
	rows := make([]sessionRow, 0, len(all))
	sites := 0
	for _, v := range all {
		if query != "" && !strings.Contains(strings.ToLower(v.Peer+" "+v.Gateway+" "+v.Relay), query) {
			continue
		}
		row := sessionRow{SessionRecord: v}
		row.Via, row.Rung = via(v.Relay)
		rows = append(rows, row)
		sites++
	}
	offset, pg := q.pageOf(len(rows), "sessions")
	shown := rows[min(offset, len(rows)):]
	shown = shown[:min(pageSize, len(shown))]
	reach, err := q.s.reg.Reach(q.ctx, q.org)
	if err != nil {
		return err
	}
	return q.render(http.StatusOK, "sessions", page{Title: "Sessions", Nav: "sessions", Live: true, Data: struct {
		Rows  []sessionRow
		All   int
		Query string
		Pager pager
		Reach *registry.Reach
	}{shown, len(all), q.value("q"), pg, reach}})
}

// endSessions ends the sessions of a client or gateway.
func (q *request) endSessions() error {
	peer := q.r.PathValue("name")
	if err := q.s.reg.EndSessions(q.ctx, q.org, peer); err != nil {
		return err
	}
	q.tell("good", "The sessions of "+cmp.Or(q.value("name"), peer)+" that began until now are ended. It may open new ones: revoke it, or disable its policies, to keep it out.")
	return q.redirect(q.url("sessions"))
}

func (q *request) showHistory() error {
	span := history.Hour
	if q.value("span") == "day" {
		span = history.Day
	}
	now := q.s.now()
	points, events := q.s.history.Org(q.org, span, now), q.s.history.Events(q.org, span, now)
	moves := 0
	for _, e := range events {
		if e.Kind == history.Moved {
			moves++
		}
	}
	type nodeChart struct {
		Name  string
		URL   string
		State control.NodeState
		Chart *chart
	}
	var relays []nodeChart
	found, err := q.s.reg.FindNodes(q.ctx, q.org, kinds[0].Kind, registry.NodeFilter{Limit: 12})
	if err != nil {
		return err
	}
	for _, n := range found.Items {
		relays = append(relays, nodeChart{n.Name, q.nodeURL(kinds[0], n.Name), n.State, chartOf(q.s.history.Node(n.ID, span, now), nil, now)})
	}
	const most = 100
	return q.render(http.StatusOK, "history", page{Title: "History", Nav: "history", Live: true, Data: struct {
		Day    bool
		Chart  *chart
		Moves  int
		Events []history.Event
		More   int
		Relays any
	}{span == history.Day, chartOf(points, events, now), moves, events[:min(len(events), most)], max(0, len(events)-most), relays}})
}

// auditPage is how many entries a page has: they are taller than rows of lists.
const auditPage = 30

// auditFilter reads what is searched for.
func (q *request) auditFilter() (registry.AuditFilter, error) {
	f := registry.AuditFilter{
		Query: strings.ToLower(q.value("q")), Actor: q.value("actor"), Action: q.value("action"), Object: q.value("object"), Result: q.value("result"), Limit: auditPage,
	}
	for _, d := range []struct {
		name string
		into *time.Time
		add  time.Duration
	}{{"from", &f.From, 0}, {"to", &f.To, 24 * time.Hour}} {
		if v := q.value(d.name); v != "" {
			t, err := time.Parse(time.DateOnly, v)
			if err != nil {
				return f, problem(http.StatusUnprocessableEntity, d.name, "such as 2027-01-31", fmt.Sprintf("%.20q is not a date", v))
			}
			*d.into = t.Add(d.add)
		}
	}
	if v := q.value("before"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 1 {
			return f, problem(http.StatusUnprocessableEntity, "before", "follow the links of the list", "that is no place in the log")
		}
		f.Before = n
	}
	return f, nil
}

// auditGroups are the sorts of entries that the search offers.
var auditGroups = [][2]string{
	{"node.", "Nodes"},
	{"token.", "Enrolment tokens"},
	{"certificate.", "Certificates"},
	{"relay.", "Relays"},
	{"resource.", "Resources"},
	{"policy.", "Policies"},
	{"group.", "Groups"},
	{"session.", "Sessions"},
	{"organization.", "Organization"},
	{"person.", "People"},
	{"guessing.", "Guessing"},
	{"webhook.", "Webhooks"},
	{"api-token.", "API tokens"},
	{"service-account.", "Service accounts"},
}

func (q *request) listAudit() error {
	f, err := q.auditFilter()
	if err != nil {
		return err
	}
	found, err := q.s.reg.FindAudit(q.ctx, q.org, f)
	if err != nil {
		return err
	}
	vals := q.r.URL.Query()
	vals.Del("before")
	pg := pager{Text: fmt.Sprintf("%s of %s in the chain", plural(len(found.Items), "entry", "entries"), countText(int(found.Head))), Total: int(found.Head)}
	if f.Before > 0 {
		pg.Prev = "?" + vals.Encode()
	}
	if found.Older > 1 {
		v := url.Values{}
		for k := range vals {
			v.Set(k, vals.Get(k))
		}
		v.Set("before", strconv.FormatInt(found.Older, 10))
		pg.Next = "?" + v.Encode()
	}
	vals.Del("format")
	shown := newForm()
	shown.values = q.r.URL.Query()
	return q.render(http.StatusOK, "audit", page{Title: "Audit log", Nav: "audit", Crumb: q.settingsCrumbs(), Data: struct {
		Items    []control.AuditEntry
		Form     *form
		Groups   [][2]string
		Pager    pager
		Export   template.URL // the query
		Filtered bool
		Searched bool // there may be more further down
	}{found.Items, shown, auditGroups, pg, template.URL(vals.Encode()), len(vals) > 0, found.Older > 1 && len(found.Items) < f.Limit}})
}

// exportAudit streams what a search finds, oldest first.
func (q *request) exportAudit() error {
	f, err := q.auditFilter()
	if err != nil {
		return err
	}
	name := "audit-" + q.org + "-" + q.s.now().UTC().Format("20060102-150405")
	rc := http.NewResponseController(q.w)
	slow := func() { _ = rc.SetWriteDeadline(time.Now().Add(time.Minute)) } // a long export takes longer than a page
	h := q.w.Header()
	h.Set("Cache-Control", "no-store")
	if q.value("format") == "csv" {
		h.Set("Content-Type", "text/csv; charset=utf-8")
		h.Set("Content-Disposition", `attachment; filename="`+name+`.csv"`)
		w := csv.NewWriter(q.w)
		_ = w.Write([]string{"seq", "at", "actor", "action", "object", "result", "detail", "hash"}) // Error below tells
		err := q.s.reg.EachAudit(q.ctx, q.org, f, func(e control.AuditEntry) error {
			slow()
			detail, err := json.Marshal(e.Detail)
			if err != nil {
				return err
			}
			return w.Write([]string{strconv.FormatInt(e.Seq, 10), e.At.UTC().Format(time.RFC3339Nano), cell(e.Actor), cell(e.Action), cell(e.Object), cell(e.Result), cell(string(detail)), e.Hash})
		})
		w.Flush()
		q.broken(cmp.Or(err, w.Error()))
		return nil
	}
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Content-Disposition", `attachment; filename="`+name+`.jsonl"`)
	enc := json.NewEncoder(q.w)
	q.broken(q.s.reg.EachAudit(q.ctx, q.org, f, func(e control.AuditEntry) error {
		slow()
		return enc.Encode(e)
	}))
	return nil
}

// broken notes that an answer which had begun could not be ended.
func (q *request) broken(err error) {
	if err != nil && q.ctx.Err() == nil {
		q.s.log.Error("an export broke off", "org", q.org, "error", err)
		panic(http.ErrAbortHandler) // the browser is to see that it is not whole
	}
}

// cell keeps a spreadsheet from taking text for a formula.
func cell(s string) string {
	if s != "" && strings.ContainsRune("=+-@\t\r", rune(s[0])) {
		return "'" + s
	}
	return s
}

// certificateRow is a certificate on the board.
type certificateRow struct {
	registry.CertificateRecord
	Name, URL string
	View      stateView
	Remedy    string
}

// Warnings before the end of what does not renew by itself, and for what should have been renewed.
const (
	certNotice = 30 * 24 * time.Hour
	certWarn   = 7 * 24 * time.Hour
	certLast   = 24 * time.Hour
	certLate   = 8 * time.Hour // a leaf of 24 h is renewed at half of it, with jitter
)

func (q *request) certificateRow(c registry.CertificateRecord) certificateRow {
	row := certificateRow{CertificateRecord: c}
	left := c.NotAfter.Sub(q.s.now())
	if c.CA {
		row.Name = authorityName(c.Kind)
		row.View, row.Remedy = authorityView(&c, q.org, left, c.NotAfter.IsZero())
		if c.Kind != registry.KindServer {
			row.URL = q.url("certificates", c.Kind, "rotation")
		}
		return row
	}
	row.Name = c.Subject
	for _, k := range kinds {
		if string(k.Kind) == c.Kind {
			row.URL = q.nodeURL(k, c.Subject)
		}
	}
	switch {
	case c.Denied:
		row.View = stateView{"Revoked", "off", "idle"}
	case left <= 0:
		row.View, row.Remedy = stateView{"Expired", "bad", "bad"}, "the node has not been here for long: start it, or give it a new token"
	case left <= certLate:
		row.View, row.Remedy = stateView{"Renewal is late", "warn", "warn"}, "see that the node runs and reaches this platform"
	default:
		row.View = stateView{"Renews itself", "good", "good"}
	}
	return row
}

func (q *request) certificates() error {
	all, err := q.s.reg.Certificates(q.ctx, q.org)
	if err != nil {
		return err
	}
	if server := q.s.reg.Server; server != nil {
		if c := server(); !c.NotAfter.IsZero() {
			all = append(all, registry.CertificateRecord{Kind: registry.KindServer, CA: true, NotAfter: c.NotAfter, Renews: c.Renews})
		}
	}
	var cas, leaves []certificateRow
	counts := map[string]int{}
	for _, c := range all {
		row := q.certificateRow(c)
		counts[row.View.Class]++
		if c.CA {
			cas = append(cas, row)
		} else {
			leaves = append(leaves, row)
		}
	}
	slices.SortStableFunc(leaves, func(a, b certificateRow) int {
		rank := map[string]int{"bad": 0, "warn": 1, "good": 2, "idle": 3}
		return cmp.Compare(rank[a.View.Class], rank[b.View.Class])
	})
	offset, pg := q.pageOf(len(leaves), "certificates")
	leaves = leaves[min(offset, len(leaves)):]
	leaves = leaves[:min(pageSize, len(leaves))]
	return q.render(http.StatusOK, "certificates", page{Title: "Certificates", Nav: "certificates", Crumb: q.settingsCrumbs(), Live: true, Data: struct {
		CAs, Leaves []certificateRow
		Counts      map[string]int
		Pager       pager
	}{cas, leaves, counts, pg}})
}

func (q *request) settingsCrumbs() []crumb {
	return []crumb{{"Organization Settings", q.url("organization")}}
}
