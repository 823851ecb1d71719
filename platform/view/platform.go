package view

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
)

// SubjectPlatform is the kind of a policy's subject that is the platform itself, as a node that dials gateways.
const SubjectPlatform = string(identity.Platform)

// Platform is the platform as the subject of a policy of an organization.
func Platform(org string) *store.Node {
	n := policy.Platform(org)
	return &store.Node{ID: n.ID, Org: n.Org, Name: SubjectPlatform, Kind: n.Kind, Status: store.Active}
}

// Route is how the platform reaches an address behind gateways.
type Route struct {
	Resource *store.Resource
	Host     string // as gateways know it: an address or a name
	Port     uint16
	Gateways []RouteGateway // most preferred first
}

// RouteGateway is a gateway that serves a resource.
type RouteGateway struct {
	Node     identity.Node
	Name     string
	Enrolled bool
	Priority int
}

// Refs are a gateway's relays, active first, with credentials for a node of the platform whose leaf ends at end.
func (v *View) Refs(gateway string, as identity.Node, end time.Time) []control.RelayRef {
	return v.refs(gateway, credentialOf(as, end, time.Time{}))
}

// MayDial asks for a resource what Explain does, for the platform.
func (v *View) MayDial(r *store.Resource, proto policy.Proto, port uint16) control.Explanation {
	return v.Explain(SubjectPlatform, []*store.Node{Platform(v.Org.Name)}, r, proto, port)
}

// GatewayServes reports whether a gateway is there and not disabled.
func (v *View) GatewayServes(id string) bool {
	n := v.nodes[id]
	return n != nil && n.Kind == identity.Gateway && n.Status == store.Active
}

// FindResource finds a resource by name or id; nil is none.
func (v *View) FindResource(name string) *store.Resource {
	for _, r := range v.resources {
		if r.Name == name || r.ID == name {
			return r
		}
	}
	return nil
}

// RouteTo is the way to a resource's own address, or to host where the resource is a network or a domain.
func (v *View) RouteTo(r *store.Resource, host string, port uint16) (*Route, error) {
	res := v.resource(r)
	p, isAddr := res.Prefix()
	a, err := netip.ParseAddr(host)
	switch {
	case host == "" && isAddr && p.IsSingleIP():
		host = p.Addr().String()
	case host == "" && !isAddr && !strings.HasPrefix(res.Address, "*."):
		host = res.Address
	case host == "":
		return nil, fmt.Errorf("resource %q is %s, many hosts: name one of them", r.Name, res.Address)
	case err == nil && isAddr && p.Contains(a.Unmap()):
		host = a.Unmap().String()
	case err != nil && !isAddr && res.MatchesHost(host):
	default:
		return nil, fmt.Errorf("host %.80q is not one of resource %q (%s)", host, r.Name, res.Address)
	}
	out := &Route{Resource: r, Host: host, Port: port}
	for _, s := range v.Serving(r, true) {
		g := v.nodes[s.Node.ID]
		out.Gateways = append(out.Gateways, RouteGateway{Node: g.Identity(), Name: g.Name, Enrolled: !g.Enrolled.IsZero(), Priority: s.Priority})
	}
	return out, nil
}

// RouteFor finds the resource by which the platform may reach a TCP port of host: the name of a resource, or an address or host name that one
// covers, the most exact one. When no policy allows it, the error says of what.
func (v *View) RouteFor(host string, port uint16) (*Route, error) {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	var found []*store.Resource
	for _, r := range v.resources {
		if host == FQDN(r.Name, v.Org.Name) {
			return v.allowedRoute(r, "", port)
		}
		if _, err := v.RouteTo(r, host, port); err == nil && !r.Disabled {
			found = append(found, r)
		}
	}
	slices.SortStableFunc(found, func(a, b *store.Resource) int { return cmp.Compare(exactness(b), exactness(a)) })
	err := fmt.Errorf("no resource of organization %q covers %s: sallyway resource create NAME --gateway G --address %s --tcp %d; sallyway policy allow --from platform --resource NAME",
		v.Org.Name, host, host, port)
	for i, r := range found {
		route, no := v.allowedRoute(r, host, port)
		if no == nil {
			return route, nil
		}
		if i == 0 {
			err = no
		}
	}
	return nil, err
}

// allowedRoute is RouteTo where a policy allows it.
func (v *View) allowedRoute(r *store.Resource, host string, port uint16) (*Route, error) {
	if e := v.MayDial(r, policy.TCP, port); !e.Allowed {
		return nil, fmt.Errorf("%s: %s", e.Reason, e.Remedy)
	}
	return v.RouteTo(r, host, port)
}

// exactness orders resources that cover one host: names and addresses before networks, long prefixes before short ones.
func exactness(r *store.Resource) int {
	res := policy.Resource{Address: r.Target}
	if p, ok := res.Prefix(); ok {
		return p.Bits()
	}
	return len(r.Target)
}
