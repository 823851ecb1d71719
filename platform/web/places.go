package web

import (
	"net/http"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/people"
	"sallyway/platform/registry"
)

func (s *Server) placesRoutes(mux *http.ServeMux) {
	for _, k := range kinds {
		s.org(mux, "POST", "/networking/"+k.Plural+"/{name}/places", k.Plural, people.Write, func(q *request) error { return q.setPlaces(k) })
	}
	s.org(mux, "POST", "/organization/regions", "organizations", people.Write, (*request).setRegions)
}

// relayFields are the lists of relays that gateways and clients wish, as forms name them.
var relayFields = []string{"pin_relays", "exclude_relays", "prefer_relays"}

// listed reads names that stand in one field, apart by spaces or commas.
func listed(s string) []string {
	return append([]string{}, words(s)...) // never nil, which would be no change
}

// newPlaces reads where a new node is, and which relays it is to have.
func (q *request) newPlaces(k kindView) control.Places {
	p := control.Places{Region: strings.ToLower(q.value("region"))}
	if k.Kind == identity.Relay {
		p.FailureDomain = strings.ToLower(q.value("failure_domain"))
		return p
	}
	p.PinRelays, p.ExcludeRelays, p.PreferRelays = listed(q.value("pin_relays")), listed(q.value("exclude_relays")), listed(q.value("prefer_relays"))
	return p
}

// shownPlaces fills a form with what is.
func shownPlaces(f *form, n *control.NodeRecord) {
	f.values.Set("region", n.Region)
	f.values.Set("failure_domain", n.FailureDomain)
	for i, names := range [][]string{n.PinRelays, n.ExcludeRelays, n.PreferRelays} {
		f.values.Set(relayFields[i], strings.Join(names, ", "))
	}
}

// setPlaces changes where a node is, and which relays it is to have.
func (q *request) setPlaces(k kindView) error {
	n, err := q.node(k)
	if err != nil {
		return err
	}
	p := q.newPlaces(k)
	var req control.UpdateNode
	if p.Region != n.Region {
		req.Region = &p.Region
	}
	if p.FailureDomain != n.FailureDomain {
		req.FailureDomain = &p.FailureDomain
	}
	if k.Kind != identity.Relay {
		for _, l := range []struct {
			is, was []string
			into    **[]string
		}{{p.PinRelays, n.PinRelays, &req.PinRelays}, {p.ExcludeRelays, n.ExcludeRelays, &req.ExcludeRelays}, {p.PreferRelays, n.PreferRelays, &req.PreferRelays}} {
			if !slices.Equal(l.is, l.was) {
				*l.into = &l.is
			}
		}
	}
	changed, err := q.s.reg.UpdateNode(q.ctx, q.org, k.Kind, n.ID, req)
	if p := refusal(err); p != nil {
		f := q.again(p)
		f.values.Set("at", "places")
		return q.nodeDetail(k, n, p.Status, f)
	}
	if err != nil {
		return err
	}
	q.tell("good", "Place and wishes of "+changed.Name+" are saved. What they change is done within a minute.")
	return q.redirect(q.nodeURL(k, changed.Name))
}

// setRegions says in which regions shared relays serve the organization.
func (q *request) setRegions() error {
	regions := listed(strings.ToLower(q.value("relay_regions")))
	_, err := q.s.reg.UpdateOrg(q.ctx, q.org, control.UpdateOrganization{RelayRegions: &regions})
	if p := refusal(err); p != nil {
		q.tell("bad", strings.TrimSpace(p.Detail+". "+p.Remedy))
		return q.redirect(q.url("organization"))
	}
	if err != nil {
		return err
	}
	q.tell("good", "Regions of shared relays are saved.")
	return q.redirect(q.url("organization"))
}

// explained fills in why a gateway has its relays, or which gateways have a relay.
func (q *request) explained(k kindView, n *control.NodeRecord, d *nodePage) (err error) {
	switch k.Kind {
	case identity.Gateway:
		d.Choices, err = q.s.reg.ExplainRelays(q.ctx, q.org, n.ID)
	case identity.Relay:
		d.Users, err = q.s.reg.RelayUsers(q.ctx, q.org, n.ID)
	}
	return err
}

// placesOf are the parts of a node's page about where it is.
type placesOf struct {
	Choices *control.RelayChoices // of a gateway
	Users   []registry.RelayUser  // of a relay
}
