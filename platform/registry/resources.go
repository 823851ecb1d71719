package registry

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/audit"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// Limits of one resource.
const (
	maxRanges   = 64
	maxDomains  = 64
	maxGateways = 16
	maxPriority = 1000
	maxWeight   = 1000
)

// checkTarget canonicalises a resource's address: an IP address, a CIDR or a host name that may start with "*.".
func checkTarget(s string) (target string, cidr bool, err error) {
	bad := func(why string) (string, bool, error) {
		return "", false, invalid("body.address", "give an address (10.0.3.7), a network (10.0.3.0/24) or a name (db.internal, *.internal)", "resource address %.80q %s", s, why)
	}
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap()
		if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return bad("is not an address of a host")
		}
		return a.String(), false, nil
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		if p.Addr().Is4In6() {
			return bad("is an IPv4 network written as IPv6")
		}
		if p.Masked() != p {
			return bad("has bits set behind its prefix; " + p.Masked().String() + " is the network")
		}
		return p.String(), p.Bits() < p.Addr().BitLen(), nil
	}
	if !validHost(s, true) || allDigits(s) {
		return bad("is not an address, network or host name")
	}
	return strings.ToLower(strings.TrimSuffix(s, ".")), false, nil
}

func checkPorts(what string, ports []policy.PortRange) error {
	if len(ports) > maxRanges {
		return invalid("body."+what, "use ranges", "%d port ranges, limit %d", len(ports), maxRanges)
	}
	for _, p := range ports {
		if p.First == 0 || p.Last < p.First {
			return invalid("body."+what, "such as 5432, 8000-8100 or all", "port range %v is empty", p)
		}
	}
	return nil
}

func checkDomains(ds []string) ([]string, error) {
	if len(ds) > maxDomains {
		return nil, invalid("body.domains", "", "%d domains, limit %d", len(ds), maxDomains)
	}
	out := make([]string, 0, len(ds))
	for _, d := range ds {
		d = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(d, "."), "."))
		if !validHost(d, false) {
			return nil, invalid("body.domains", "such as corp.internal", "domain %.80q is not a DNS name; a catch-all is not possible", d)
		}
		out = append(out, d)
	}
	return out, nil
}

// findGateways reads gateways in the form NAME[:PRIORITY[:WEIGHT]], by name or id. Without a priority it is the place in the list.
func (c *change) findGateways(ctx context.Context, org string, names []string) ([]store.ServingGateway, error) {
	if len(names) == 0 || len(names) > maxGateways {
		return nil, invalid("body.gateways", "name the gateways that serve it, most preferred first", "a resource has 1 to %d gateways, not %d", maxGateways, len(names))
	}
	var out []store.ServingGateway
	for i, spec := range names {
		s := store.ServingGateway{Priority: i, Weight: 1}
		name, rest, ranked := strings.Cut(spec, ":")
		priority, weight, weighted := strings.Cut(rest, ":")
		for _, n := range []struct {
			given    bool
			text     string
			min, max int
			into     *int
		}{{ranked, priority, 0, maxPriority, &s.Priority}, {weighted, weight, 1, maxWeight, &s.Weight}} {
			if !n.given {
				continue
			}
			v, err := strconv.Atoi(n.text)
			if err != nil || v < n.min || v > n.max {
				return nil, invalid("body.gateways", "NAME, NAME:PRIORITY or NAME:PRIORITY:WEIGHT, such as office:0:3", "gateway %.80q: %.20q is not a number from %d to %d", spec, n.text, n.min, n.max)
			}
			*n.into = v
		}
		g, err := c.FindNode(ctx, org, identity.Gateway, name)
		if err != nil {
			return nil, notFound(err, "gateway", name, org)
		}
		if s.ID = g.ID; slices.ContainsFunc(out, func(o store.ServingGateway) bool { return o.ID == s.ID }) {
			return nil, invalid("body.gateways", "name each once", "gateway %q is named twice", g.Name)
		}
		out = append(out, s)
	}
	slices.SortStableFunc(out, func(a, b store.ServingGateway) int { return cmp.Compare(a.Priority, b.Priority) })
	return out, nil
}

// gatewaySpecs writes what findGateways reads.
func gatewaySpecs(gs []store.ServingGateway) []string {
	out := make([]string, len(gs))
	for i, g := range gs {
		out[i] = fmt.Sprintf("%s:%d:%d", g.ID, g.Priority, g.Weight)
	}
	return out
}

// checkHealth refuses a probe that could never be made.
func checkHealth(v *store.Resource) error {
	if v.Health.Kind == policy.HealthDefault || v.Health.Kind == policy.HealthOff {
		return nil
	}
	probed := policy.Resource{Address: v.Target, TCP: v.TCP, Health: v.Health}
	_, h, ok := probed.Probe()
	if !ok {
		return invalid("body.health", "name a port: tcp:5432; a network or *.domain can not be probed", "resource %q has no address and port to probe", v.Name)
	}
	if !slices.ContainsFunc(v.TCP, func(p policy.PortRange) bool { return p.Contains(h.Port) }) {
		return invalid("body.health", "probe one of its own TCP ports", "port %d is none of resource %q", h.Port, v.Name)
	}
	return nil
}

func (r *Registry) resourceRecord(ctx context.Context, tx store.Tx, o *store.Org, v *store.Resource) (*control.ResourceRecord, error) {
	rec := &control.ResourceRecord{
		Resource: policy.Resource{
			ID: v.ID, Name: v.Name, Address: v.Target, TCP: v.TCP, UDP: v.UDP, ICMP: v.ICMP, Domains: v.Domains, Virtual: view.Addresses(o, v.Address),
			Health: v.Health,
		},
		FQDN: view.FQDN(v.Name, o.Name), Disabled: v.Disabled, Created: v.Created, Gateways: []control.ServingGateway{}, Names: []string{},
	}
	now := r.Now()
	for _, s := range v.Gateways {
		g, err := tx.Node(ctx, s.ID)
		if err != nil {
			return nil, err
		}
		rec.Gateways = append(rec.Gateways, control.ServingGateway{Node: g.Identity(), Priority: s.Priority, Weight: s.Weight})
		rec.Names = append(rec.Names, g.Name)
		beat, ok := r.Board.Get(g.ID)
		if !ok || now.Sub(beat.At) >= presenceTimeout {
			continue
		}
		for _, h := range beat.Resources {
			if h.ID == v.ID {
				rec.Reached = append(rec.Reached, control.Reached{Gateway: g.Name, ResourceHealth: h})
			}
		}
	}
	return rec, nil
}

// CreateResource makes a resource.
func (r *Registry) CreateResource(ctx context.Context, org string, req control.CreateResource) (*control.ResourceRecord, error) {
	if err := checkName("resource", req.Name); err != nil {
		return nil, err
	}
	var out *control.ResourceRecord
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, org)
		if err != nil {
			return err
		}
		v := &store.Resource{ID: identity.NewID("resource"), Org: org, Name: req.Name, TCP: req.TCP, UDP: req.UDP, ICMP: req.ICMP, Health: req.Health, Created: c.now}
		if err := c.fillResource(ctx, v, req.Address, req.Gateways, req.Domains); err != nil {
			return err
		}
		if err := c.InsertResource(ctx, v); err != nil {
			return taken(err, "resource", req.Name, org)
		}
		return c.resourceDone(ctx, o, v, "resource.create", &out)
	})
	return out, err
}

// fillResource checks and sets what a resource is made of.
func (c *change) fillResource(ctx context.Context, v *store.Resource, address string, gateways, domains []string) error {
	target, cidr, err := checkTarget(address)
	if err != nil {
		return err
	}
	v.Target = target
	if v.Domains, err = checkDomains(domains); err != nil {
		return err
	}
	if err := checkPorts("tcp", v.TCP); err != nil {
		return err
	}
	if err := checkPorts("udp", v.UDP); err != nil {
		return err
	}
	if len(v.TCP)+len(v.UDP)+len(v.Domains) == 0 && !v.ICMP {
		return invalid("body.tcp", "--tcp 5432, --tcp all, --udp 53 or --icmp", "resource %q allows nothing: it has no ports, no ICMP and no domains", v.Name)
	}
	if err := checkHealth(v); err != nil {
		return err
	}
	if v.Gateways, err = c.findGateways(ctx, v.Org, gateways); err != nil {
		return err
	}
	switch {
	case cidr:
		v.Address = 0
	case v.Address == 0:
		v.Address, err = c.address(ctx, v.Org)
	}
	return err
}

// resourceDone audits, pushes and renders a change of a resource.
func (c *change) resourceDone(ctx context.Context, o *store.Org, v *store.Resource, action string, out **control.ResourceRecord) error {
	rec, err := c.r.resourceRecord(ctx, c.Tx, o, v)
	if err != nil {
		return err
	}
	*out = rec
	if err := c.audit(ctx, o.Name, action, "resource/"+v.ID, audit.OK, map[string]any{
		"name": v.Name, "address": v.Target, "tcp": v.TCP, "udp": v.UDP, "icmp": v.ICMP, "domains": v.Domains, "gateways": rec.Names, "health": v.Health, "disabled": v.Disabled,
	}); err != nil {
		return err
	}
	return c.bump(ctx, o.Name)
}

// Resources lists resources.
func (r *Registry) Resources(ctx context.Context, org string, p store.Page) (*control.List[control.ResourceRecord], error) {
	out := &control.List[control.ResourceRecord]{Items: []control.ResourceRecord{}}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		vs, err := tx.Resources(ctx, org, more(p))
		if err != nil {
			return err
		}
		vs, out.NextCursor = trim(vs, p.Limit, func(v *store.Resource) string { return v.Name })
		for _, v := range vs {
			rec, err := r.resourceRecord(ctx, tx, o, v)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// Resource returns a resource by name or id.
func (r *Registry) Resource(ctx context.Context, org, name string) (*control.ResourceRecord, error) {
	var out *control.ResourceRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		v, err := tx.FindResource(ctx, org, name)
		if err != nil {
			return notFound(err, "resource", name, org)
		}
		out, err = r.resourceRecord(ctx, tx, o, v)
		return err
	})
	return out, err
}

// UpdateResource changes what is not nil.
func (r *Registry) UpdateResource(ctx context.Context, org, name string, req control.UpdateResource) (*control.ResourceRecord, error) {
	var out *control.ResourceRecord
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, org)
		if err != nil {
			return err
		}
		v, err := c.FindResource(ctx, org, name)
		if err != nil {
			return notFound(err, "resource", name, org)
		}
		if req.Name != nil {
			if err := checkName("resource", *req.Name); err != nil {
				return err
			}
			v.Name = *req.Name
		}
		address, gateways, domains := v.Target, gatewaySpecs(v.Gateways), v.Domains
		set(&address, req.Address)
		set(&gateways, req.Gateways)
		set(&domains, req.Domains)
		set(&v.TCP, req.TCP)
		set(&v.UDP, req.UDP)
		set(&v.ICMP, req.ICMP)
		set(&v.Health, req.Health)
		set(&v.Disabled, req.Disabled)
		// A resource whose gateways were all deleted can still be renamed or disabled.
		if len(gateways) == 0 && req.Gateways == nil {
			if req.Address != nil || req.Domains != nil || req.TCP != nil || req.UDP != nil || req.ICMP != nil {
				return invalid("body.gateways", "name a gateway, too", "resource %q has no gateway left", v.Name)
			}
		} else if err := c.fillResource(ctx, v, address, gateways, domains); err != nil {
			return err
		}
		if err := c.UpdateResource(ctx, v); err != nil {
			return taken(err, "resource", v.Name, org)
		}
		return c.resourceDone(ctx, o, v, "resource.update", &out)
	})
	return out, err
}

func set[T any](dst *T, v *T) {
	if v != nil {
		*dst = *v
	}
}

// DeleteResource deletes a resource and the policies for it.
func (r *Registry) DeleteResource(ctx context.Context, org, name string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		v, err := c.FindResource(ctx, org, name)
		if err != nil {
			return notFound(err, "resource", name, org)
		}
		if err := c.DeleteResource(ctx, v.ID); err != nil {
			return err
		}
		if err := c.audit(ctx, org, "resource.delete", "resource/"+v.ID, audit.OK, map[string]any{"name": v.Name}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
}
