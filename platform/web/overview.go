package web

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/web/history"
)

// finding is something that somebody should look at, with what to do about it.
type finding struct {
	Class  string // bad, warn or info: the worst stands first
	Title  string
	Why    string
	Action string // on the button
	URL    string
}

// Icon is the icon of its class.
func (f finding) Icon() string { return f.Class }

// tile is a number with where to go from it.
type tile struct {
	Label, Icon, URL string
	Value            string
	Sub              string
	Class            string
}

// step is one of the first steps of an organization.
type step struct {
	Title, Text, Action, URL string
	Done                     bool
}

const (
	maxFindings  = 25
	openSessions = 5
)

func (q *request) overview() error {
	ns := make(map[identity.Kind]*registry.NodePage)
	for _, k := range kinds {
		found, err := q.s.reg.FindNodes(q.ctx, q.org, k.Kind, registry.NodeFilter{
			States: []control.NodeState{control.StateUnreachable, control.StateDegraded, control.StateDraining, control.StatePending}, Limit: maxFindings,
		})
		if err != nil {
			return err
		}
		ns[k.Kind] = found
	}
	summary, err := q.s.reg.ResourceSummary(q.ctx, q.org)
	if err != nil {
		return err
	}
	sessions, err := q.s.reg.Sessions(q.ctx, q.org)
	if err != nil {
		return err
	}
	certs, err := q.s.reg.Certificates(q.ctx, q.org)
	if err != nil {
		return err
	}
	relays, gateways, clients := ns[identity.Relay], ns[identity.Gateway], ns[identity.Client]
	now := q.s.now()
	points, events := q.s.history.Org(q.org, history.Hour, now), q.s.history.Events(q.org, history.Hour, now)
	audited, err := q.s.reg.FindAudit(q.ctx, q.org, registry.AuditFilter{Limit: 8})
	if err != nil {
		return err
	}
	data := struct {
		Steps    []step
		Setup    bool
		Findings []finding
		More     int
		Tiles    []tile
		Chart    *chart
		Entries  []control.AuditEntry
		Sessions []sessionRow
	}{Chart: chartOf(points, events, now), Entries: audited.Items}
	data.Steps = []step{
		{"Create a relay", "A small server with a static address that nodes meet at.", "Create Relay", q.url("networking", "relays", "new"), relays.All-relays.States[control.StatePending] > 0},
		{"Create a gateway", "On a host inside the private network. It opens no port.", "Create Gateway", q.url("networking", "gateways", "new"), gateways.All-gateways.States[control.StatePending] > 0},
		{"Create a resource", "A database, a web app, a subnet: what is to be reached.", "Create Resource", q.url("resources", "new"), summary.All > 0},
		{"Create a client", "A laptop, server or program that is to reach it.", "Create Client", q.url("networking", "clients", "new"), clients.All-clients.States[control.StatePending] > 0},
		{"Allow it", "A policy says who reaches what. Without one, nobody reaches anything.", "Create Policy", q.url("policies", "new"), summary.Policies > 0},
	}
	data.Setup = slices.ContainsFunc(data.Steps, func(s step) bool { return !s.Done })
	found := q.findings(ns, summary, certs)
	data.Findings = found[:min(len(found), maxFindings)]
	data.More = len(found) - len(data.Findings)
	data.Tiles = []tile{
		q.nodeTile(kinds[0], relays), q.nodeTile(kinds[1], gateways), q.nodeTile(kinds[2], clients),
		{Label: "Resources", Icon: "resource", URL: q.url("resources"), Value: countText(summary.All), Sub: resourceSub(summary), Class: resourceClass(summary)},
		{Label: "Sessions", Icon: "session", URL: q.url("sessions"), Value: countText(len(sessions)), Sub: bytesText(data.Chart.Now) + "/s now"},
	}
	for _, v := range sessions[:min(len(sessions), openSessions)] {
		row := sessionRow{SessionRecord: v}
		row.Via, row.Rung = via(v.Relay)
		data.Sessions = append(data.Sessions, row)
	}
	return q.render(http.StatusOK, "overview", page{Title: "Overview", Nav: "overview", Live: true, Data: data})
}

func resourceSub(s *registry.ResourceSummary) string {
	if s.All == 0 {
		return "none yet"
	}
	if n := len(s.Unreached); n > 0 {
		return plural(n, "not reached", "not reached")
	}
	return plural(s.Policies, "policy", "policies")
}

func resourceClass(s *registry.ResourceSummary) string {
	if len(s.Unreached) > 0 {
		return "bad"
	}
	return ""
}

func (q *request) nodeTile(k kindView, p *registry.NodePage) tile {
	t := tile{Label: k.Title, Icon: k.Icon, URL: q.url("networking", k.Plural), Value: countText(p.All)}
	switch away, off := p.States[control.StateUnreachable], p.States[control.StateDegraded]; {
	case p.All == 0:
		t.Sub = "none yet"
	case away > 0 && k.Kind != identity.Client:
		t.Sub, t.Class = countText(away)+" unreachable", "bad"
	case off > 0:
		t.Sub, t.Class = countText(off)+" degraded", "warn"
	case k.Kind == identity.Client:
		t.Sub = countText(p.States[control.StateHealthy]) + " connected"
	case p.States[control.StateHealthy] == p.All:
		t.Sub, t.Class = "all healthy", "good"
	default:
		t.Sub = countText(p.States[control.StateHealthy]) + " healthy"
	}
	return t
}

// findings say what is not as it should be, the worst first. Clients that are not there are no finding: laptops sleep.
func (q *request) findings(ns map[identity.Kind]*registry.NodePage, summary *registry.ResourceSummary, certs []registry.CertificateRecord) []finding {
	var out []finding
	relays, gateways := ns[identity.Relay], ns[identity.Gateway]
	if up := relays.States[control.StateHealthy] + relays.States[control.StateDegraded]; relays.All > relays.States[control.StatePending] && up == 0 && summary.SharedRelays == 0 {
		out = append(out, finding{"bad", "No relay is up", "Nothing new can connect, and sessions that need a relay are interrupted.", "Show relays", q.url("networking", "relays")})
	} else if up == 1 && gateways.All > 0 && relays.All-relays.States[control.StatePending] == 1 && summary.SharedRelays == 0 {
		out = append(out, finding{"info", "There is only one relay", "When it stops, everything waits for it. With a second one, sessions go on there within a moment.", "Create Relay", q.url("networking", "relays", "new")})
	}
	for _, k := range kinds {
		for _, n := range ns[k.Kind].Items {
			f := finding{URL: q.nodeURL(k, n.Name), Action: "Show " + n.Name, Title: fmt.Sprintf("%s %s", k.One(), n.Name)}
			switch n.State {
			case control.StateUnreachable:
				if k.Kind == identity.Client {
					continue
				}
				f.Class = "bad"
				f.Title += " is unreachable"
				f.Why = "No heartbeat for 30 seconds. On its host: is it running (systemctl status sallyway-" + string(k.Kind) + "), and does it reach this platform (" + string(k.Kind) + "d doctor)?"
				if n.LastSeen != nil {
					f.Why = "Last heard " + span(q.s.now().Sub(*n.LastSeen)) + " ago. " + strings.TrimPrefix(f.Why, "No heartbeat for 30 seconds. ")
				}
			case control.StateDegraded:
				f.Class = "warn"
				f.Title += " is degraded"
				f.Why = cmp.Or(strings.Join(n.Problems, "; "), "It says so itself, without a reason.")
			case control.StateDraining:
				f.Class = "info"
				f.Title += " drains"
				f.Why = "Nodes move to other relays. Enable it when it is to serve again."
			case control.StatePending:
				f.Class = "info"
				f.Title += " has never connected"
				f.Why = "Run its deploy command on the host, or delete it."
				f.Action, f.URL = "Show deploy command", q.nodeURL(k, n.Name, "deploy")
			}
			out = append(out, f)
		}
	}
	for _, u := range summary.Unreached {
		out = append(out, finding{"bad", "Resource " + u.Name + " is not reached", u.Why, "Show " + u.Name, q.url("resources", url.PathEscape(u.Name))})
	}
	for _, c := range certs {
		if row := q.certificateRow(c); c.CA && row.Remedy != "" {
			out = append(out, finding{row.View.Class, row.Name + ": " + strings.ToLower(row.View.Word), "To do: " + row.Remedy, "Show certificates", q.url("certificates")})
		}
	}
	rank := []string{"bad", "warn", "info"}
	slices.SortStableFunc(out, func(a, b finding) int {
		return cmp.Compare(slices.Index(rank, a.Class), slices.Index(rank, b.Class))
	})
	return out
}
