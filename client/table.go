package client

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Route says how a destination is reached: which gateways serve it, best first, and under which name they know it.
type Route struct {
	// Resource is nil when the destination is a gateway itself.
	Resource *control.ReachableResource
	Gateways []identity.Node
	// Host is what to ask the gateway for: the resource's own address or name.
	Host string
}

// NoRouteError says that nothing this node may reach covers a destination.
type NoRouteError struct{ Host string }

func (e *NoRouteError) Error() string {
	return fmt.Sprintf("no resource that this node may reach covers %.100q: see `sallyway policy explain`, or have a policy allow it", e.Host)
}

// table answers where destinations lie. It is made from one configuration and never changes.
type table struct {
	cfg       *control.Dialling
	byName    map[string]*control.ReachableResource // FQDN, name, and address where that is a host name; lower case, no final dot
	byVirtual map[netip.Addr]*control.ReachableResource
	gwName    map[string]*control.GatewayRef
	gwVirtual map[netip.Addr]*control.GatewayRef
	gateways  map[identity.Node]*control.GatewayRef
}

func newTable(cfg *control.Dialling) *table {
	if cfg == nil {
		cfg = &control.Dialling{}
	}
	t := &table{
		cfg: cfg, byName: map[string]*control.ReachableResource{}, byVirtual: map[netip.Addr]*control.ReachableResource{},
		gwName: map[string]*control.GatewayRef{}, gwVirtual: map[netip.Addr]*control.GatewayRef{}, gateways: map[identity.Node]*control.GatewayRef{},
	}
	for i := range cfg.Gateways {
		g := &cfg.Gateways[i]
		t.gateways[g.Node] = g
		t.gwName[canonical(g.FQDN)] = g
		for _, a := range g.Virtual {
			t.gwVirtual[a] = g
		}
	}
	for i := range cfg.Resources {
		r := &cfg.Resources[i]
		t.byName[canonical(r.Name)] = r
		t.byName[canonical(r.FQDN)] = r
		// Of several resources of one host the first with an address of its own speaks for the host's name.
		if _, isAddr := r.Prefix(); !isAddr && !strings.HasPrefix(r.Address, "*.") {
			if have := t.byName[canonical(r.Address)]; have == nil || len(have.Virtual) == 0 {
				t.byName[canonical(r.Address)] = r
			}
		}
		for _, a := range r.Virtual {
			t.byVirtual[a] = r
		}
	}
	return t
}

// lookup finds the route of a host, which is a name or an IP address, for a protocol and port (0 where there is none).
func (t *table) lookup(host string, proto policy.Proto, port uint16) (Route, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return t.lookupAddr(a.Unmap(), proto, port)
	}
	name := canonical(host)
	if r := t.byName[name]; r != nil && !r.MatchesHost(name) {
		return t.route(r, targetOf(r, host)), nil
	}
	if g := t.gwName[name]; g != nil && len(g.Virtual) > 0 {
		return Route{Gateways: []identity.Node{g.Node}, Host: g.Virtual[0].String()}, nil
	}
	// As with addresses: one that has the port wins, then the one that names the host most closely.
	var best *control.ReachableResource
	var bestHas bool
	var bestLen int
	for i := range t.cfg.Resources {
		r := &t.cfg.Resources[i]
		size := closeness(&r.Resource, name)
		if size == 0 {
			continue
		}
		has := offers(&r.Resource, proto, port)
		if best == nil || (has && !bestHas) || (has == bestHas && size > bestLen) {
			best, bestHas, bestLen = r, has, size
		}
	}
	if best == nil {
		return Route{}, &NoRouteError{host}
	}
	return t.route(best, host), nil
}

// closeness is how many bytes of a host's name a resource names, 0 where it does not cover it.
func closeness(r *policy.Resource, name string) int {
	n := 0
	if r.MatchesHost(name) {
		n = len(strings.TrimPrefix(canonical(r.Address), "*"))
	}
	for _, d := range r.Domains {
		if one := (policy.Resource{Domains: []string{d}}); one.MatchesDomain(name) {
			n = max(n, len(canonical(d)))
		}
	}
	return n
}

func (t *table) lookupAddr(a netip.Addr, proto policy.Proto, port uint16) (Route, error) {
	if r := t.byVirtual[a]; r != nil {
		if t.byName[canonical(r.Address)] == r && !offers(&r.Resource, proto, port) {
			return t.lookup(r.Address, proto, port) // what the host's name was resolved to: another resource of the host may have the port
		}
		return t.route(r, targetOf(r, a.String())), nil
	}
	if g := t.gwVirtual[a]; g != nil {
		return Route{Gateways: []identity.Node{g.Node}, Host: a.String()}, nil
	}
	// Of the resources whose prefix covers the address, one that has the port wins over one that has not, then the longer prefix.
	// Where none has the port, the gateway is asked all the same: its refusal names the reason.
	var best *control.ReachableResource
	var bestHas bool
	var bestBits int
	for i := range t.cfg.Resources {
		r := &t.cfg.Resources[i]
		p, ok := r.Prefix()
		if !ok || !p.Contains(a) {
			continue
		}
		has := offers(&r.Resource, proto, port)
		if best == nil || (has && !bestHas) || (has == bestHas && p.Bits() > bestBits) {
			best, bestHas, bestBits = r, has, p.Bits()
		}
	}
	if best == nil {
		return Route{}, &NoRouteError{a.String()}
	}
	return t.route(best, a.String()), nil
}

func (t *table) route(r *control.ReachableResource, host string) Route {
	out := Route{Resource: r, Host: host}
	for _, s := range ranked(r.Gateways) {
		if t.gateways[s.Node] != nil {
			out.Gateways = append(out.Gateways, s.Node)
		}
	}
	return out
}

// targetOf is what to ask a gateway for when a resource was named by name or virtual address.
func targetOf(r *control.ReachableResource, asked string) string {
	p, isAddr := r.Prefix()
	switch {
	case isAddr && p.IsSingleIP():
		return p.Addr().String()
	case isAddr, strings.HasPrefix(r.Address, "*."):
		return asked
	}
	return r.Address
}

func offers(r *policy.Resource, proto policy.Proto, port uint16) bool {
	ports := r.TCP
	switch proto {
	case policy.ICMP:
		return r.ICMP
	case policy.UDP:
		ports = r.UDP
	case policy.TCP, policy.DNS:
	}
	return slices.ContainsFunc(ports, func(p policy.PortRange) bool { return p.Contains(port) })
}

// routes are the prefixes that belong into a TUN: the virtual range and the resources' own addresses.
func (t *table) routes() []netip.Prefix {
	out := slices.Clone(t.cfg.Range)
	for i := range t.cfg.Resources {
		if p, ok := t.cfg.Resources[i].Prefix(); ok && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// domains are the DNS suffixes and names that the stub resolver answers for.
func (t *table) domains() []string {
	var out []string
	add := func(d string) {
		if d = canonical(d); d != "" && !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	org := ""
	for i := range t.cfg.Gateways {
		org = t.cfg.Gateways[i].Node.Org
	}
	for i := range t.cfg.Resources {
		r := &t.cfg.Resources[i]
		if len(r.Gateways) > 0 {
			org = r.Gateways[0].Node.Org
		}
		for _, d := range r.Domains {
			add(d)
		}
		if _, isAddr := r.Prefix(); !isAddr {
			add(strings.TrimPrefix(r.Address, "*."))
		}
	}
	if org != "" {
		add(org + ".sallyway.internal")
	}
	return out
}

// resolver says which gateways resolve a name that the table has no address for: those of the resource that names it most closely. known
// reports whether there is one, so that a name behind gateways of which none is known goes nowhere else.
func (t *table) resolver(name string) (gateways []identity.Node, known bool) {
	name = canonical(name)
	var best *control.ReachableResource
	var bestLen int
	for i := range t.cfg.Resources {
		r := &t.cfg.Resources[i]
		if size := closeness(&r.Resource, name); size > bestLen {
			best, bestLen = r, size
		}
	}
	if best == nil {
		return nil, false
	}
	return t.route(best, name).Gateways, true
}

// addresses are the virtual addresses of a name in the table; known reports whether the table has the name at all.
func (t *table) addresses(name string) (addrs []netip.Addr, known bool) {
	name = canonical(name)
	if g := t.gwName[name]; g != nil {
		return g.Virtual, true
	}
	if r := t.byName[name]; r != nil && strings.Contains(name, ".") {
		if len(r.Virtual) == 0 {
			if p, ok := r.Prefix(); ok && p.IsSingleIP() {
				return []netip.Addr{p.Addr()}, true
			}
		}
		return r.Virtual, true
	}
	return nil, false
}

// canonical lowers a DNS name and takes off its final dot.
func canonical(s string) string { return strings.TrimSuffix(strings.ToLower(s), ".") }

// stubAddrs are the addresses of the stub resolver: the last but one of each virtual range, which a platform never gives away.
func (t *table) stubAddrs() []netip.Addr {
	var out []netip.Addr
	for _, p := range t.cfg.Range {
		out = append(out, control.StubAddr(p))
	}
	return out
}
