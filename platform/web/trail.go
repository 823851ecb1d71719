package web

import (
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
	"sallyway/platform/flowlog"
	"sallyway/platform/people"
	"sallyway/platform/store"
)

// trailRoutes are the pages of what is made of what happened.
func (s *Server) trailRoutes(mux *http.ServeMux) {
	s.org(mux, "GET", "/audit/signed", "audit", people.Read, (*request).exportSigned)
	s.org(mux, "GET", "/webhooks", "webhooks", people.Read, (*request).listWebhooks)
	s.org(mux, "POST", "/webhooks", "webhooks", people.Write, (*request).createWebhook)
	s.org(mux, "POST", "/webhooks/{name}/do/{verb}", "webhooks", people.Write, (*request).webhookVerb)
	s.org(mux, "GET", "/flows", "flows", people.Read, (*request).listFlows)
	s.org(mux, "GET", "/flows/export", "flows", people.Read, (*request).exportFlows)
	s.org(mux, "POST", "/flows/log", "flow-log", people.Write, (*request).setFlowLog)
}

// exportSigned streams the chain with its signatures, as `sallyway audit export` does.
func (q *request) exportSigned() error {
	h := q.w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Content-Disposition", `attachment; filename="audit-`+q.org+"-"+q.s.now().UTC().Format("20060102-150405")+`-signed.jsonl"`)
	q.broken(q.s.reg.ExportAudit(q.ctx, q.org, q.w, q.slowly()))
	return nil
}

// slowly puts off the deadline of an answer that takes longer than a page.
func (q *request) slowly() func() {
	rc := http.NewResponseController(q.w)
	return func() { _ = rc.SetWriteDeadline(time.Now().Add(time.Minute)) } // a server without deadlines needs none
}

// webhookState is a webhook's state as people see it.
var webhookState = map[string]stateView{
	control.WebhookIdle:       {"Nothing waits", "good", "good"},
	control.WebhookDelivering: {"Delivering", "wait", "wait"},
	control.WebhookFailing:    {"Failing", "bad", "bad"},
	control.WebhookDisabled:   {"Disabled", "off", "idle"},
}

type webhookRow struct {
	control.Webhook
	View stateView
	Do   string // URL of what is done to it
}

func (q *request) listWebhooks() error { return q.webhookPage(http.StatusOK, newForm()) }

func (q *request) webhookPage(status int, f *form) error {
	l, err := q.s.cfg.Webhooks.List(q.ctx, q.org, store.Page{})
	if err != nil {
		return err
	}
	rows := make([]webhookRow, len(l.Items))
	for i, w := range l.Items {
		rows[i] = webhookRow{w, webhookState[w.State], q.url("webhooks", url.PathEscape(w.ID), "do")}
	}
	return q.render(status, "webhooks", page{Title: "Webhooks", Nav: "webhooks", Crumb: q.settingsCrumbs(), Data: struct {
		Items []webhookRow
		Form  *form
		Once  *secretOnce
	}{rows, f, q.takeOnce()}})
}

func (q *request) createWebhook() error {
	events := strings.FieldsFunc(q.value("events"), func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' })
	w, err := q.s.cfg.Webhooks.Create(q.ctx, q.org, control.CreateWebhook{
		Name: strings.ToLower(q.value("name")), URL: q.value("url"), Events: events, ThroughGateways: q.value("through_gateways") != "",
	})
	if p := refusal(err); p != nil {
		return q.webhookPage(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	if err := q.keepOnce(q.url("webhooks"), "secret of "+w.Name, w.Secret); err != nil {
		return err
	}
	return q.redirect(q.url("webhooks"))
}

func (q *request) webhookVerb() error {
	name, hooks := q.r.PathValue("name"), q.s.cfg.Webhooks
	w, err := hooks.Show(q.ctx, q.org, name)
	if err != nil {
		return err
	}
	off := q.r.PathValue("verb") == "disable"
	switch q.r.PathValue("verb") {
	case "test":
		var r *control.WebhookTest
		if r, err = hooks.Test(q.ctx, q.org, name); err != nil {
			return err
		}
		if r.OK {
			q.tell("good", fmt.Sprintf("%s took the test event: HTTP %d after %d ms.", w.Name, r.Status, r.Millis))
		} else {
			q.tell("bad", w.Name+" did not take the test event: "+r.Problem)
		}
	case "enable", "disable":
		if _, err = hooks.Update(q.ctx, q.org, name, control.UpdateWebhook{Disabled: &off}); err == nil {
			q.tell("good", map[bool]string{true: w.Name + " is disabled: what happens now waits for it.", false: w.Name + " goes on where it was."}[off])
		}
	case "retry":
		if _, err = hooks.Update(q.ctx, q.org, name, control.UpdateWebhook{}); err == nil {
			q.tell("good", w.Name+" is tried now.")
		}
	case "secret":
		none := ""
		if w, err = hooks.Update(q.ctx, q.org, name, control.UpdateWebhook{Secret: &none}); err == nil {
			err = q.keepOnce(q.url("webhooks"), "new secret of "+w.Name, w.Secret)
		}
	case "delete":
		if err = hooks.Delete(q.ctx, q.org, name); err == nil {
			q.tell("good", w.Name+" is deleted.")
		}
	default:
		return problem(http.StatusNotFound, "", "use the buttons of the page", "there is no such thing to do to a webhook")
	}
	if err != nil {
		return err
	}
	return q.redirect(q.url("webhooks"))
}

// flowSpans are the times that the search of flows offers.
var flowSpans = [][2]string{{"1h", "Last hour"}, {"24h", "Last day"}, {"168h", "Last week"}, {"", "Any time"}}

// flowFilter reads what is searched for.
func (q *request) flowFilter() (flowlog.Filter, error) {
	f := flowlog.Filter{Client: q.value("client"), Person: q.value("person"), Resource: q.value("resource"), Gateway: q.value("gateway"), Cursor: q.value("cursor"), Limit: pageSize}
	if v := q.value("since"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil || d <= 0 {
			return f, problem(http.StatusUnprocessableEntity, "since", "such as 1h", fmt.Sprintf("%.20q is no length of time", v))
		}
		f.From = q.s.now().Add(-d)
	}
	return f, nil
}

// flowRow is a flow as people read it.
type flowRow struct {
	control.FlowRecord
	Took           string
	Up, Down       uint64
	ClientURL, End string
}

func (q *request) listFlows() error {
	f, err := q.flowFilter()
	if err != nil {
		return err
	}
	l, err := q.s.cfg.Flows.List(q.ctx, q.org, f)
	if err != nil {
		return err
	}
	log, err := q.s.cfg.Flows.On(q.ctx, q.org)
	if err != nil {
		return err
	}
	rows := make([]flowRow, len(l.Items))
	for i, r := range l.Items {
		rows[i] = flowRow{FlowRecord: r, Took: span(time.Duration(r.Seconds * float64(time.Second))), Up: uint64(max(0, r.Sent)), Down: uint64(max(0, r.Received)), End: r.Reason}
		if r.Ended.IsZero() {
			rows[i].End = "open"
		}
	}
	vals := q.r.URL.Query()
	vals.Del("cursor")
	filtered := slices.ContainsFunc([]string{"client", "person", "resource", "gateway", "since"}, func(k string) bool { return vals.Get(k) != "" })
	pg := pager{Text: plural(len(rows), "flow", "flows") + " on this page", Total: len(rows)}
	if f.Cursor != "" {
		pg.Prev = "?" + vals.Encode()
	}
	query := vals.Encode()
	if l.NextCursor != "" {
		vals.Set("cursor", l.NextCursor)
		pg.Next = "?" + vals.Encode()
	}
	shown := newForm()
	shown.values = q.r.URL.Query()
	return q.render(http.StatusOK, "flows", page{Title: "Flows", Nav: "flows", Data: struct {
		Rows     []flowRow
		Form     *form
		Spans    [][2]string
		Pager    pager
		Export   template.URL // the query
		Filtered bool
		On       bool
	}{rows, shown, flowSpans, pg, template.URL(query), filtered, log.On}})
}

// exportFlows streams what a search finds, newest first.
func (q *request) exportFlows() error {
	f, err := q.flowFilter()
	if err != nil {
		return err
	}
	name := "flows-" + q.org + "-" + q.s.now().UTC().Format("20060102-150405")
	slow := q.slowly()
	h := q.w.Header()
	h.Set("Cache-Control", "no-store")
	if q.value("format") == "csv" {
		h.Set("Content-Type", "text/csv; charset=utf-8")
		h.Set("Content-Disposition", `attachment; filename="`+name+`.csv"`)
		w := csv.NewWriter(q.w)
		_ = w.Write([]string{"started", "ended", "seconds", "client", "person", "resource", "destination", "address", "protocol", "gateway", "relay", "path", "rule", "sent", "received", "reason"}) // Error below tells
		err := q.s.cfg.Flows.Each(q.ctx, q.org, f, func(r control.FlowRecord) error {
			slow()
			ended := ""
			if !r.Ended.IsZero() {
				ended = r.Ended.UTC().Format(time.RFC3339Nano)
			}
			return w.Write([]string{
				r.Started.UTC().Format(time.RFC3339Nano), ended, strconv.FormatFloat(r.Seconds, 'f', 3, 64), cell(r.Client), cell(r.Person), cell(r.Resource), cell(r.Destination),
				cell(r.Address), cell(r.Protocol), cell(r.Gateway), cell(r.Relay), cell(r.Path), cell(r.Rule), strconv.FormatInt(r.Sent, 10), strconv.FormatInt(r.Received, 10), cell(r.Reason),
			})
		})
		w.Flush()
		if err == nil {
			err = w.Error()
		}
		q.broken(err)
		return nil
	}
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Content-Disposition", `attachment; filename="`+name+`.jsonl"`)
	enc := json.NewEncoder(q.w)
	q.broken(q.s.cfg.Flows.Each(q.ctx, q.org, f, func(r control.FlowRecord) error {
		slow()
		return enc.Encode(r)
	}))
	return nil
}

func (q *request) setFlowLog() error {
	on := q.value("on") != ""
	if _, err := q.s.cfg.Flows.Set(q.ctx, q.org, on); err != nil {
		return err
	}
	q.tell("good", map[bool]string{true: "Connections are written down from now on.", false: "Connections are not written down any more. What is there goes when its time is over."}[on])
	return q.redirect(q.url("flows"))
}
