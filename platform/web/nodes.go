package web

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/web/history"
)

// kindView is how pages speak of a kind of node.
type kindView struct {
	Kind   identity.Kind
	Plural string // in URLs and in the menu
	Title  string
	Icon   string
	About  string
}

var kinds = []kindView{
	{identity.Relay, "relays", "Relays", "relay", "Relays join gateways and clients that can not reach each other. They pass on ciphertext and can read none of it."},
	{identity.Gateway, "gateways", "Gateways", "gateway", "Gateways stand in a private network, connect outward to a relay, and decide there who reaches what."},
	{identity.Client, "clients", "Clients", "client", "Clients are the people's and programs' ends: laptops, servers, build jobs."},
}

// One is the singular with a capital letter, One what stands inside of a sentence.
func (k kindView) One() string { return strings.ToUpper(string(k.Kind[:1])) + string(k.Kind[1:]) }

// nodeCrumbs lead to a page of a node.
func (q *request) nodeCrumbs(k kindView, name string) []crumb {
	c := []crumb{{"Organization Settings", q.url("organization")}, {"Networking", q.url("networking", "relays")}}
	if name == "" {
		return c
	}
	c = append(c, crumb{k.Title, q.url("networking", k.Plural)})
	if name == "-" {
		return c
	}
	return append(c, crumb{name, q.url("networking", k.Plural, url.PathEscape(name))})
}

// pager is where a list goes on.
type pager struct {
	Prev, Next, Text string
	Total            int
}

// pageOf makes the pager of a list of which matches entries exist, from the query's page on.
func (q *request) pageOf(matches int, what string) (offset int, p pager) {
	n := max(q.number("page", 1), 1)
	offset = (n - 1) * pageSize
	at := func(n int) string {
		v := q.r.URL.Query()
		v.Set("page", strconv.Itoa(n))
		return q.r.URL.Path + "?" + v.Encode()
	}
	p.Total = matches
	if n > 1 {
		p.Prev = at(n - 1)
	}
	if offset+pageSize < matches {
		p.Next = at(n + 1)
	}
	if matches > 0 && offset < matches {
		p.Text = fmt.Sprintf("%s to %s of %s %s", countText(offset+1), countText(min(offset+pageSize, matches)), countText(matches), what)
	}
	return offset, p
}

type stateChip struct {
	State   control.NodeState
	View    stateView
	Count   int
	URL     string
	Current bool
}

func (q *request) listNodes(k kindView) error {
	f := registry.NodeFilter{Query: strings.ToLower(q.value("q")), Limit: pageSize}
	if st := control.NodeState(q.value("state")); st != "" {
		f.States = []control.NodeState{st}
	}
	f.Offset = (max(q.number("page", 1), 1) - 1) * pageSize
	found, err := q.s.reg.FindNodes(q.ctx, q.org, k.Kind, f)
	if err != nil {
		return err
	}
	_, pg := q.pageOf(found.Matches, k.Plural)
	var chips []stateChip
	for _, st := range states {
		if n := found.States[st]; n > 0 {
			chips = append(chips, stateChip{st, stateViews[st], n, "?" + url.Values{"state": {string(st)}, "q": {q.value("q")}}.Encode(), q.value("state") == string(st)})
		}
	}
	trips, err := q.roundTrips(k)
	if err != nil {
		return err
	}
	return q.render(http.StatusOK, "nodes", page{
		Title: k.Title, Nav: k.Plural, Crumb: q.nodeCrumbs(k, ""), Live: true,
		Data: struct {
			K            kindView
			Found        *registry.NodePage
			Query, State string
			Chips        []stateChip
			Pager        pager
			New          string
			RTT          map[string]registry.RoundTrip
		}{k, found, q.value("q"), q.value("state"), chips, pg, q.url("networking", k.Plural, "new"), trips},
	})
}

// roundTrips are the distances of relays; other nodes have none.
func (q *request) roundTrips(k kindView) (map[string]registry.RoundTrip, error) {
	if k.Kind != identity.Relay {
		return nil, nil
	}
	return q.s.reg.RoundTrips(q.ctx, q.org)
}

func (q *request) newNode(k kindView) error { return q.nodeForm(k, http.StatusOK, newForm()) }

func (q *request) nodeForm(k kindView, status int, f *form) error {
	return q.render(status, "node-new", page{
		Title: "Create " + k.One(), Nav: k.Plural, Crumb: q.nodeCrumbs(k, "-"),
		Data: struct {
			K    kindView
			Form *form
		}{k, f},
	})
}

func (q *request) createNode(k kindView) error {
	req := control.CreateNode{Name: strings.ToLower(q.value("name")), Places: q.newPlaces(k)}
	if k.Kind == identity.Relay {
		req.Host = q.value("host")
		port, err := optionalPort(q, "port")
		if err != nil {
			return q.nodeForm(k, http.StatusUnprocessableEntity, q.again(refusal(err)))
		}
		req.Port = port
	}
	made, err := q.s.reg.CreateNode(q.ctx, q.org, k.Kind, req)
	if p := refusal(err); p != nil {
		return q.nodeForm(k, p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	if err := q.keepDeployment(k, made); err != nil {
		return err
	}
	return q.redirect(q.nodeURL(k, made.Name, "deploy"))
}

func optionalPort(q *request, field string) (uint16, error) {
	v := q.value(field)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n == 0 {
		return 0, problem(http.StatusUnprocessableEntity, field, "a number from 1 to 65535, or leave it empty for the default", fmt.Sprintf("%.20q is not a port", v))
	}
	return uint16(n), nil
}

func (q *request) nodeURL(k kindView, name string, more ...string) string {
	return q.url(append([]string{"networking", k.Plural, url.PathEscape(name)}, more...)...)
}

// node reads the node that the path names.
func (q *request) node(k kindView) (*control.NodeRecord, error) {
	return q.s.reg.Node(q.ctx, q.org, k.Kind, q.r.PathValue("name"))
}

type nodePage struct {
	K       kindView
	Node    *control.NodeRecord
	URL     string
	Form    *form
	Deploy  *deployment
	Entries []control.AuditEntry
	Chart   *chart
	RTT     registry.RoundTrip
	placesOf
}

func (q *request) showNode(k kindView) error {
	n, err := q.node(k)
	if err != nil {
		return err
	}
	return q.nodeDetail(k, n, http.StatusOK, nil)
}

func (q *request) nodeDetail(k kindView, n *control.NodeRecord, status int, f *form) error {
	// Every field that was not sent shows what is: the page has several forms.
	now := newForm("name", n.Name, "host", n.Host, "authentication", cmp.Or(n.Authentication, control.AuthToken))
	if k.Kind == identity.Relay {
		now.values.Set("port", strconv.Itoa(int(n.Port)))
		now.values.Set("ssh_port", strconv.Itoa(int(n.SSHPort)))
		now.values.Set("tls_port", strconv.Itoa(int(n.TLSPort)))
	}
	if n.AWS != nil {
		now.values.Set("accounts", strings.Join(n.AWS.Accounts, " "))
		now.values.Set("principals", strings.Join(n.AWS.Principals, "\n"))
	}
	shownPlaces(now, n)
	if f != nil {
		maps.Copy(now.values, f.values)
		now.Err = f.Err
	}
	f = now
	d := nodePage{K: k, Node: n, URL: q.nodeURL(k, n.Name), Form: f, Deploy: q.deployment(k, n)}
	object := identity.Node{Org: q.org, Kind: k.Kind, ID: n.ID}.String()
	found, err := q.s.reg.FindAudit(q.ctx, q.org, registry.AuditFilter{Object: object, Limit: 8})
	if err != nil {
		return err
	}
	d.Entries = found.Items
	trips, err := q.roundTrips(k)
	if err != nil {
		return err
	}
	d.RTT = trips[n.ID]
	if err := q.explained(k, n, &d); err != nil {
		return err
	}
	if k.Kind != identity.Client {
		d.Chart = chartOf(q.s.history.Node(n.ID, history.Hour, q.s.now()), nil, q.s.now())
	}
	return q.render(status, "node", page{Title: n.Name, Nav: k.Plural, Crumb: q.nodeCrumbs(k, "-"), Live: true, Data: d})
}

func (q *request) updateNode(k kindView) error {
	n, err := q.node(k)
	if err != nil {
		return err
	}
	var req control.UpdateNode
	if v := q.value("name"); v != n.Name {
		req.Name = &v
	}
	if k.Kind == identity.Relay {
		if v := q.value("host"); v != n.Host {
			req.Host = &v
		}
		if v := q.value("from"); v != "" {
			at, err := time.Parse(time.DateOnly, v)
			if err != nil {
				return q.nodeDetail(k, n, http.StatusUnprocessableEntity, q.again(&problem(http.StatusUnprocessableEntity, "from", "such as 2027-01-31", "that is not a date").Problem))
			}
			req.From = &at
		}
		for _, f := range []struct {
			name string
			was  uint16
			into **uint16
		}{{"port", n.Port, &req.Port}, {"ssh_port", n.SSHPort, &req.SSHPort}, {"tls_port", n.TLSPort, &req.TLSPort}} {
			if !q.r.PostForm.Has(f.name) {
				continue
			}
			v := uint16(0)
			if text := q.value(f.name); text != "0" || f.name == "port" {
				if v, err = optionalPort(q, f.name); err != nil {
					return q.nodeDetail(k, n, http.StatusUnprocessableEntity, q.again(refusal(err)))
				}
			}
			if v != f.was {
				*f.into = &v
			}
		}
	}
	changed, err := q.s.reg.UpdateNode(q.ctx, q.org, k.Kind, n.ID, req)
	if p := refusal(err); p != nil {
		return q.nodeDetail(k, n, p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", k.One()+" "+changed.Name+" is saved. Nodes are told within a second.")
	return q.redirect(q.nodeURL(k, changed.Name))
}

// nodeVerb does what a button of a node's page says.
func (q *request) nodeVerb(k kindView) error {
	name, verb := q.r.PathValue("name"), q.r.PathValue("verb")
	var err error
	var n *control.NodeRecord
	said := ""
	switch verb {
	case "disable":
		n, err = q.s.reg.DisableNode(q.ctx, q.org, k.Kind, name)
		said = "is disabled: it keeps its key and has no rights until it is enabled"
	case "enable":
		n, err = q.s.reg.EnableNode(q.ctx, q.org, k.Kind, name)
		said = "is enabled"
		if n != nil && n.Kind == identity.Relay && n.State == control.StateDraining {
			said = "is enabled. It still drains, and its relayd ends by that: start it on its host when it has"
		}
	case "revoke":
		n, err = q.s.reg.RevokeNode(q.ctx, q.org, k.Kind, name)
		said = "is revoked: its open sessions end within 5 seconds, and its key is never trusted again"
	case "drain":
		n, err = q.s.reg.DrainNode(q.ctx, q.org, k.Kind, name)
		said = "drains: nodes move to other relays, and it takes no new ones"
	case "delete":
		if err := q.s.reg.DeleteNode(q.ctx, q.org, k.Kind, name); err != nil {
			return err
		}
		q.tell("good", k.One()+" "+name+" is deleted, and its keys are denied.")
		return q.redirect(q.url("networking", k.Plural))
	default:
		return problem(http.StatusNotFound, "", "use the buttons of its page", "there is no such action")
	}
	if err != nil {
		return err
	}
	q.tell("good", k.One()+" "+n.Name+" "+said+".")
	return q.redirect(q.nodeURL(k, n.Name))
}

// deployment is a deploy command that was shown and may be shown again to the same person, until it is used or expires.
type deployment struct {
	Command    string    `json:"c"`
	Foreground string    `json:"f"`
	Issued     time.Time `json:"i"`
	Expires    time.Time `json:"e"`
}

const deployCookie = "sallyway_deploy"

// label binds a sealed deployment to the person and the node that it is for.
func (q *request) label(k kindView, id string) string {
	return "web/deploy/" + q.org + "/" + string(k.Kind) + "/" + id + "/" + q.who.ID
}

// keepDeployment gives the browser the command, sealed under the platform's key: the platform itself keeps only the token's hash, and any
// replica can show the page.
func (q *request) keepDeployment(k kindView, made *control.CreatedNode) error {
	return q.keepDeploymentAt(k, made, q.nodeURL(k, made.Name))
}

// keepDeploymentAt is keepDeployment for the page at path.
func (q *request) keepDeploymentAt(k kindView, made *control.CreatedNode, path string) error {
	if made.Authentication == control.AuthAWS { // it holds no secret: shown as long as one with a token
		made.Expires = q.s.now().Add(control.TokenLife).UTC()
	}
	b, err := json.Marshal(deployment{made.Command, made.Foreground, q.s.now().UTC(), made.Expires})
	if err != nil {
		return err
	}
	life := int(made.Expires.Sub(q.s.now()).Seconds())
	q.cookie(&http.Cookie{
		Name: deployCookie, Value: base64.RawURLEncoding.EncodeToString(q.s.reg.Seal.Seal(q.label(k, made.ID), b)),
		Path: path, MaxAge: max(life, 1), HttpOnly: true,
	})
	return nil
}

// deployment opens what keepDeployment gave, nil when there is none.
func (q *request) deployment(k kindView, n *control.NodeRecord) *deployment {
	for _, c := range q.r.CookiesNamed(deployCookie) {
		sealed, err := base64.RawURLEncoding.DecodeString(c.Value)
		if err != nil {
			continue
		}
		b, err := q.s.reg.Seal.Open(q.label(k, n.ID), sealed)
		if err != nil {
			continue // of another node or person
		}
		var d deployment
		if json.Unmarshal(b, &d) == nil {
			return &d
		}
	}
	return nil
}

// issueToken makes a new deploy command.
func (q *request) issueToken(k kindView) error {
	made, err := q.s.reg.ReissueToken(q.ctx, q.org, k.Kind, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	if err := q.keepDeployment(k, made); err != nil {
		return err
	}
	return q.redirect(q.nodeURL(k, made.Name, "deploy"))
}

func (q *request) deploy(k kindView) error {
	n, err := q.node(k)
	if err != nil {
		return err
	}
	return q.deployPage(k, n, q.nodeURL(k, n.Name), q.nodeCrumbs(k, n.Name))
}

// deployPage shows the deploy command of a node whose own page is at home.
func (q *request) deployPage(k kindView, n *control.NodeRecord, home string, crumbs []crumb) error {
	d := q.deployment(k, n)
	data := struct {
		K         kindView
		Node      *control.NodeRecord
		URL       string
		Deploy    *deployment
		Expired   bool
		Connected bool
	}{K: k, Node: n, URL: home, Deploy: d}
	if d != nil {
		data.Expired = !q.s.now().Before(d.Expires)
		// The store keeps microseconds.
		data.Connected = n.Enrolled != nil && !n.Enrolled.Before(d.Issued.Truncate(time.Second))
	} else {
		data.Connected = n.State != control.StatePending
	}
	return q.render(http.StatusOK, "deploy", page{Title: "Deploy", Nav: k.Plural, Crumb: crumbs, Live: true, Data: data})
}
