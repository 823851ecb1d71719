package web

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// resourceRow is a resource in a list.
type resourceRow struct {
	control.ResourceRecord
	Up, Down int // gateways that reach it, and that do not
}

func rowOf(r control.ResourceRecord) resourceRow {
	row := resourceRow{ResourceRecord: r}
	for _, h := range r.Reached {
		if h.OK {
			row.Up++
		} else {
			row.Down++
		}
	}
	return row
}

// Health is how a resource looks to its gateways.
func (r resourceRow) Health() stateView {
	switch {
	case r.Disabled:
		return stateView{"Disabled", "off", "idle"}
	case len(r.Names) == 0:
		return stateView{"No gateway", "bad", "bad"}
	case r.Up > 0 && r.Down == 0:
		return stateView{"Reached", "good", "good"}
	case r.Up > 0:
		return stateView{"Reached in part", "warn", "warn"}
	case r.Down > 0:
		return stateView{"Not reached", "bad", "bad"}
	}
	return stateView{"Not probed", "wait", "idle"}
}

func (q *request) listResources() error {
	query := strings.ToLower(q.value("q"))
	offset := (max(q.number("page", 1), 1) - 1) * pageSize
	found, err := q.s.reg.FindResources(q.ctx, q.org, query, offset, pageSize)
	if err != nil {
		return err
	}
	rows := make([]resourceRow, len(found.Items))
	for i, r := range found.Items {
		rows[i] = rowOf(r)
	}
	_, pg := q.pageOf(found.Matches, "resources")
	return q.render(http.StatusOK, "resources", page{Title: "Resources", Nav: "resources", Live: true, Data: struct {
		Rows     []resourceRow
		All      int
		Query    string
		Pager    pager
		Gateways bool
	}{rows, found.All, q.value("q"), pg, found.Gateways > 0}})
}

// gatewayChoice is a gateway that a form offers.
type gatewayChoice struct {
	Name    string
	State   control.NodeState
	Chosen  bool
	Ranking string // priority[:weight], "" for the place in the list
}

func (q *request) resourceForm(status int, title, name string, f *form) error {
	gs, err := q.s.reg.FindNodes(q.ctx, q.org, identity.Gateway, registry.NodeFilter{Limit: 500})
	if err != nil {
		return err
	}
	var choices []gatewayChoice
	for _, g := range gs.Items {
		choices = append(choices, gatewayChoice{g.Name, g.State, f.Is("gateway", g.Name), f.Value("rank-" + g.Name)})
	}
	// Those that serve it stand first, in a long list.
	slices.SortStableFunc(choices, func(a, b gatewayChoice) int {
		switch {
		case a.Chosen == b.Chosen:
			return 0
		case a.Chosen:
			return -1
		}
		return 1
	})
	crumbs := []crumb{{"Resources", q.url("resources")}}
	if name != "" {
		crumbs = append(crumbs, crumb{name, q.url("resources", url.PathEscape(name))})
	}
	return q.render(status, "resource-form", page{Title: title, Nav: "resources", Crumb: crumbs, Data: struct {
		Name     string
		Form     *form
		Gateways []gatewayChoice
	}{name, f, choices}})
}

func (q *request) newResource() error {
	f := newForm("tcp", "")
	if g := q.value("gateway"); g != "" {
		f.values.Add("gateway", g)
	}
	return q.resourceForm(http.StatusOK, "Create Resource", "", f)
}

// resourceInput reads a resource's form.
func (q *request) resourceInput() (*control.CreateResource, error) {
	req := &control.CreateResource{Name: strings.ToLower(q.value("name")), Address: q.value("address"), ICMP: q.value("icmp") != ""}
	bad := func(field string, err error) error {
		return problem(http.StatusUnprocessableEntity, field, "", err.Error())
	}
	var err error
	if req.TCP, err = policy.ParsePorts(q.value("tcp")); err != nil {
		return nil, bad("tcp", err)
	}
	if req.UDP, err = policy.ParsePorts(q.value("udp")); err != nil {
		return nil, bad("udp", err)
	}
	if req.Health, err = policy.ParseHealth(q.value("health")); err != nil {
		return nil, bad("health", err)
	}
	for d := range strings.FieldsFuncSeq(q.value("domains"), func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' }) {
		req.Domains = append(req.Domains, d)
	}
	for _, g := range q.r.PostForm["gateway"] {
		if rank := q.value("rank-" + g); rank != "" {
			g += ":" + rank
		}
		req.Gateways = append(req.Gateways, g)
	}
	if len(req.Gateways) == 0 {
		return nil, problem(http.StatusUnprocessableEntity, "gateways", "choose at least one", "a resource needs a gateway that serves it")
	}
	return req, nil
}

func (q *request) createResource() error {
	req, err := q.resourceInput()
	var made *control.ResourceRecord
	if err == nil {
		made, err = q.s.reg.CreateResource(q.ctx, q.org, *req)
	}
	if p := refusal(err); p != nil {
		return q.resourceForm(p.Status, "Create Resource", "", q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Resource "+made.Name+" is there. Nobody may reach it yet: allow somebody.")
	return q.redirect(q.url("policies", "new") + "?resource=" + url.QueryEscape(made.Name))
}

func (q *request) showResource() error {
	r, err := q.s.reg.Resource(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	ps, err := q.s.reg.PoliciesFor(q.ctx, q.org, r.ID)
	if err != nil {
		return err
	}
	type served struct {
		Name             string
		State            control.NodeState
		Priority, Weight int
		Reached          *control.Reached
	}
	var gws []served
	for i, g := range r.Gateways {
		n, err := q.s.reg.Node(q.ctx, q.org, identity.Gateway, g.Node.ID)
		if err != nil {
			return err
		}
		s := served{Name: n.Name, State: n.State, Priority: g.Priority, Weight: g.Weight}
		for j := range r.Reached {
			if r.Reached[j].Gateway == r.Names[i] {
				s.Reached = &r.Reached[j]
			}
		}
		gws = append(gws, s)
	}
	return q.render(http.StatusOK, "resource", page{Title: r.Name, Nav: "resources", Crumb: []crumb{{"Resources", q.url("resources")}}, Live: true, Data: struct {
		R        resourceRow
		Gateways any
		Policies []control.PolicyRecord
		URL      string
		Health   string
		Many     bool
	}{rowOf(*r), gws, ps, q.url("resources", url.PathEscape(r.Name)), r.Resource.Health.String(), manyHosts(r)}})
}

func (q *request) editResource() error {
	r, err := q.s.reg.Resource(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	f := newForm("name", r.Name, "address", r.Address, "tcp", portsText(r.TCP), "udp", portsText(r.UDP), "domains", strings.Join(r.Domains, ", "), "health", r.Resource.Health.String())
	if r.ICMP {
		f.values.Set("icmp", "1")
	}
	for i, g := range r.Gateways {
		f.values.Add("gateway", r.Names[i])
		f.values.Set("rank-"+r.Names[i], fmt.Sprintf("%d:%d", g.Priority, g.Weight))
	}
	return q.resourceForm(http.StatusOK, "Edit", r.Name, f)
}

func (q *request) updateResource() error {
	name := q.r.PathValue("name")
	req, err := q.resourceInput()
	var changed *control.ResourceRecord
	if err == nil {
		if req.Domains == nil {
			req.Domains = []string{}
		}
		up := control.UpdateResource{Gateways: &req.Gateways, Address: &req.Address, TCP: &req.TCP, UDP: &req.UDP, ICMP: &req.ICMP, Domains: &req.Domains, Health: &req.Health}
		if req.Name != name {
			up.Name = &req.Name
		}
		changed, err = q.s.reg.UpdateResource(q.ctx, q.org, name, up)
	}
	if p := refusal(err); p != nil {
		return q.resourceForm(p.Status, "Edit", name, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Resource "+changed.Name+" is saved. Its gateways are told within a second.")
	return q.redirect(q.url("resources", url.PathEscape(changed.Name)))
}

func (q *request) resourceVerb() error {
	name := q.r.PathValue("name")
	switch verb := q.r.PathValue("verb"); verb {
	case "delete":
		if err := q.s.reg.DeleteResource(q.ctx, q.org, name); err != nil {
			return err
		}
		q.tell("good", "Resource "+name+" and the policies for it are deleted.")
		return q.redirect(q.url("resources"))
	case "disable", "enable":
		off := verb == "disable"
		if _, err := q.s.reg.UpdateResource(q.ctx, q.org, name, control.UpdateResource{Disabled: &off}); err != nil {
			return err
		}
		q.tell("good", "Resource "+name+" is "+verb+"d.")
		return q.redirect(q.url("resources", url.PathEscape(name)))
	}
	return problem(http.StatusNotFound, "", "use the buttons of its page", "there is no such action")
}

// choices are what forms about policies offer.
type choices struct {
	Clients, Gateways, Groups, Resources []string
}

// maxChoices bounds what a list in a form offers; more is typed.
const maxChoices = 2000

func (q *request) choices() (*choices, error) {
	c := &choices{}
	for _, k := range []struct {
		kind identity.Kind
		into *[]string
	}{{identity.Client, &c.Clients}, {identity.Gateway, &c.Gateways}} {
		names, err := q.s.reg.NodeNames(q.ctx, q.org, k.kind, maxChoices)
		if err != nil {
			return nil, err
		}
		*k.into = names
	}
	groups, err := q.s.reg.Groups(q.ctx, q.org, store.Page{Limit: maxChoices})
	if err != nil {
		return nil, err
	}
	for _, g := range groups.Items {
		c.Groups = append(c.Groups, g.Name)
	}
	c.Resources, err = q.s.reg.ResourceNames(q.ctx, q.org, maxChoices)
	return c, err
}

func (q *request) listPolicies() error {
	query := strings.ToLower(q.value("q"))
	p := store.Page{After: q.value("after"), Limit: pageSize}
	if query != "" {
		p = store.Page{}
	}
	l, err := q.s.reg.Policies(q.ctx, q.org, p)
	if err != nil {
		return err
	}
	var pg pager
	if query != "" {
		l.Items = slices.DeleteFunc(l.Items, func(p control.PolicyRecord) bool {
			return !strings.Contains(p.Name+" "+p.Subject+" "+p.Resource, query)
		})
		pg.Text = plural(len(l.Items), "policy", "policies")
		l.Items = l.Items[:min(len(l.Items), 4*pageSize)]
	} else {
		pg.Text = plural(len(l.Items), "policy", "policies") + " on this page"
		if p.After != "" {
			pg.Prev = q.url("policies")
		}
		if l.NextCursor != "" {
			pg.Next = "?after=" + url.QueryEscape(l.NextCursor)
		}
	}
	pg.Total = len(l.Items)
	return q.render(http.StatusOK, "policies", page{Title: "Policies", Nav: "policies", Live: true, Data: struct {
		Items []control.PolicyRecord
		Query string
		First bool
		Pager pager
	}{l.Items, q.value("q"), p.After == "" && query == "", pg}})
}

func (q *request) newPolicy() error {
	f := newForm("resource", q.value("resource"), "subject", q.value("subject"))
	return q.policyForm(http.StatusOK, f)
}

func (q *request) policyForm(status int, f *form) error {
	c, err := q.choices()
	if err != nil {
		return err
	}
	return q.render(status, "policy-new", page{Title: "Create Policy", Nav: "policies", Crumb: []crumb{{"Policies", q.url("policies")}}, Data: struct {
		Form    *form
		Choices *choices
	}{f, c}})
}

func (q *request) createPolicy() error {
	made, err := q.s.reg.CreatePolicy(q.ctx, q.org, control.CreatePolicy{Name: strings.ToLower(q.value("name")), Subject: q.value("subject"), Resource: q.value("resource")})
	if p := refusal(err); p != nil {
		return q.policyForm(p.Status, q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Policy "+made.Name+": "+made.Subject+" may reach "+made.Resource+". It is in force within a second.")
	return q.redirect(q.url("policies"))
}

func (q *request) policyVerb() error {
	name := q.r.PathValue("name")
	var err error
	said := "deleted; what it allowed ends within 5 seconds"
	switch verb := q.r.PathValue("verb"); verb {
	case "delete":
		err = q.s.reg.DeletePolicy(q.ctx, q.org, name)
	case "disable", "enable":
		off := verb == "disable"
		said = verb + "d"
		_, err = q.s.reg.UpdatePolicy(q.ctx, q.org, name, control.UpdatePolicy{Disabled: &off})
	default:
		return problem(http.StatusNotFound, "", "use the buttons of the list", "there is no such action")
	}
	if err != nil {
		return err
	}
	q.tell("good", "Policy "+name+" is "+said+".")
	return q.redirect(q.url("policies"))
}

// explain says whether somebody would reach something, by what the gateways enforce.
func (q *request) explain() error {
	c, err := q.choices()
	if err != nil {
		return err
	}
	f := newForm("subject", q.value("subject"), "resource", q.value("resource"), "proto", q.value("proto"), "port", q.value("port"))
	var out *control.Explanation
	status := http.StatusOK
	if f.Value("subject") != "" && f.Value("resource") != "" {
		req := control.ExplainRequest{Subject: f.Value("subject"), Resource: f.Value("resource"), Proto: policy.Proto(f.Value("proto"))}
		port, err := optionalPort(q, "port")
		if err == nil {
			req.Port = port
			if port != 0 && req.Proto == "" {
				req.Proto = policy.TCP
			}
			out, err = q.s.reg.Explain(q.ctx, q.org, req)
		}
		if registry.Code(err) == control.CodeNotFound {
			f.Err = &control.Problem{Detail: err.Error(), Remedy: "choose one of the list"}
			err, status = nil, http.StatusNotFound
		}
		if p := refusal(err); p != nil {
			f.Err, status = p, p.Status
		} else if err != nil {
			return err
		}
		if f.Err != nil {
			out = nil
		}
		if out != nil {
			out.Reason = q.named(out.Reason, f.Value("subject"))
		}
	}
	return q.render(status, "explain", page{Title: "Test and explain", Nav: "policies", Crumb: []crumb{{"Policies", q.url("policies")}}, Data: struct {
		Form    *form
		Choices *choices
		Result  *control.Explanation
		Allow   string
	}{f, c, out, q.url("policies", "new") + "?" + url.Values{"subject": {f.Value("subject")}, "resource": {f.Value("resource")}}.Encode()}})
}

// named writes a client's or gateway's name in the place of its identity.
func (q *request) named(text, subject string) string {
	kind, name, _ := strings.Cut(subject, ":")
	n, err := q.s.reg.Node(q.ctx, q.org, identity.Kind(kind), name)
	if err != nil {
		return text // a group, whose members are named by their identities
	}
	return strings.ReplaceAll(text, identity.Node{Org: q.org, Kind: n.Kind, ID: n.ID}.String(), kind+" "+n.Name)
}

func (q *request) listGroups() error {
	l, err := q.s.reg.Groups(q.ctx, q.org, store.Page{After: q.value("after"), Limit: pageSize})
	if err != nil {
		return err
	}
	pg := pager{Text: plural(len(l.Items), "group", "groups") + " on this page", Total: len(l.Items)}
	if q.value("after") != "" {
		pg.Prev = q.url("groups")
	}
	if l.NextCursor != "" {
		pg.Next = "?after=" + url.QueryEscape(l.NextCursor)
	}
	return q.render(http.StatusOK, "groups", page{Title: "Groups", Nav: "groups", Data: struct {
		Items []control.GroupRecord
		Pager pager
	}{l.Items, pg}})
}

func (q *request) groupForm(status int, name string, f *form) error {
	c, err := q.choices()
	if err != nil {
		return err
	}
	title := "Create Group"
	if name != "" {
		title = name
	}
	return q.render(status, "group", page{Title: title, Nav: "groups", Crumb: []crumb{{"Groups", q.url("groups")}}, Data: struct {
		Name    string
		Form    *form
		Choices *choices
		URL     string
	}{name, f, c, q.url("groups", url.PathEscape(name))}})
}

func (q *request) newGroup() error { return q.groupForm(http.StatusOK, "", newForm()) }

func (q *request) showGroup() error {
	g, err := q.s.reg.Group(q.ctx, q.org, q.r.PathValue("name"))
	if err != nil {
		return err
	}
	f := newForm("name", g.Name)
	f.values["member"] = g.Members
	return q.groupForm(http.StatusOK, g.Name, f)
}

// saveGroup makes a group or replaces the members of one.
func (q *request) saveGroup() error {
	name, create := q.r.PathValue("name"), false
	if name == "" {
		name, create = strings.ToLower(q.value("name")), true
	}
	members := slices.Clone(q.r.PostForm["member"])
	g, err := q.s.reg.PutGroup(q.ctx, q.org, name, &members, create)
	if p := refusal(err); p != nil {
		return q.groupForm(p.Status, q.r.PathValue("name"), q.again(p))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Group "+g.Name+" has "+strconv.Itoa(len(g.Members))+" members.")
	return q.redirect(q.url("groups"))
}

func (q *request) deleteGroup() error {
	name := q.r.PathValue("name")
	if err := q.s.reg.DeleteGroup(q.ctx, q.org, name); err != nil {
		return err
	}
	q.tell("good", "Group "+name+" and the policies for it are deleted.")
	return q.redirect(q.url("groups"))
}
