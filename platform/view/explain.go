package view

import (
	"fmt"
	"net/netip"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
)

// d4 starts the list of an organization's prefixes.
func d4(o *store.Org) []netip.Prefix { return []netip.Prefix{o.Range4} }

// Explain says whether subjects reach a resource, by the snapshots that the gateways get. subject is how the caller named them.
func (v *View) Explain(subject string, nodes []*store.Node, r *store.Resource, proto policy.Proto, port uint16) control.Explanation {
	e := control.Explanation{Rule: policy.DefaultDeny, Gateways: []string{}}
	cli := strings.NewReplacer("client:", "--client ", "gateway:", "--from gateway:", "group:", "--from group:", SubjectPlatform, "--from platform").Replace(subject)
	if len(nodes) == 0 {
		e.Reason = fmt.Sprintf("%s has no members", subject)
		e.Remedy = "add a client or a gateway to the group"
		return e
	}
	if subject == SubjectPlatform && !v.Org.PlatformDial {
		e.Reason = fmt.Sprintf("organization %q does not let the platform dial its gateways", v.Org.Name)
		e.Remedy = fmt.Sprintf("sallyway organization update %s --platform-dial on", v.Org.Name)
		return e
	}
	for _, n := range nodes {
		if n.Status != store.Active {
			e.Reason = fmt.Sprintf("%s %q is %s", n.Kind, n.Name, n.Status)
			e.Remedy = fmt.Sprintf("sallyway %s enable %s", n.Kind, n.Name)
			if n.Status == store.Revoked {
				e.Remedy = fmt.Sprintf("delete it and create it anew: sallyway %s delete %s; sallyway %s create %s", n.Kind, n.Name, n.Kind, n.Name)
			}
			return e
		}
	}
	if r.Disabled {
		e.Reason = fmt.Sprintf("resource %q is disabled", r.Name)
		e.Remedy = "sallyway resource enable " + r.Name
		return e
	}
	targets := targets(r, proto, port)
	if len(targets) == 0 {
		e.Reason = fmt.Sprintf("resource %q has no ports", r.Name)
		e.Remedy = fmt.Sprintf("sallyway resource update %s --tcp PORT", r.Name)
		return e
	}
	serving := v.Serving(r, true)
	if len(serving) == 0 {
		e.Reason = fmt.Sprintf("no enabled gateway serves resource %q", r.Name)
		e.Remedy = fmt.Sprintf("sallyway resource update %s --gateway NAME", r.Name)
		return e
	}
	for _, sg := range serving {
		g := v.nodes[sg.Node.ID]
		s := v.snapshot(g)
		d := v.decide(s, nodes, targets)
		d.Reason = strings.ReplaceAll(d.Reason, policy.Platform(v.Org.Name).String(), "the platform")
		if d.Allowed {
			e.Allowed, e.Rule, e.Reason, e.Remedy = true, d.Rule, d.Reason, ""
			e.Gateways = append(e.Gateways, g.Name)
			continue
		}
		if !e.Allowed {
			e.Reason, e.Remedy = d.Reason, fmt.Sprintf("sallyway policy allow %s --resource %s", cli, r.Name)
			if v.ruled(s, nodes, r) {
				e.Remedy = fmt.Sprintf("widen the resource: sallyway resource update %s --tcp|--udp|--icmp …", r.Name)
			}
		}
	}
	if e.Allowed {
		for _, name := range e.Gateways {
			for _, g := range v.sorted {
				if g.Kind == identity.Gateway && g.Name == name && g.Enrolled.IsZero() {
					e.Remedy = fmt.Sprintf("gateway %q has not enrolled yet: sallyway gateway token %s", name, name)
				}
			}
		}
	}
	return e
}

// decide asks for every node and target: the first refusal of the first node counts, unless some target is allowed.
func (v *View) decide(s *policy.Snapshot, nodes []*store.Node, targets []policy.Target) policy.Decision {
	var last policy.Decision
	for _, n := range nodes {
		allowed := false
		for _, t := range targets {
			if last = s.Evaluate(n.Identity(), t); last.Allowed {
				allowed = true
				break
			}
		}
		if !allowed {
			return last
		}
	}
	return last
}

// ruled says whether rules allow all the nodes the resource, so that only its ports stand against them.
func (v *View) ruled(s *policy.Snapshot, nodes []*store.Node, r *store.Resource) bool {
	for _, n := range nodes {
		found := false
		for _, rule := range s.Rules {
			for _, sub := range rule.Subjects {
				found = found || (rule.Resource == r.ID && sub == n.Identity())
			}
		}
		if !found {
			return false
		}
	}
	return true
}

// targets are what a flow to the resource could ask for: the given protocol and port, or whatever the resource has.
func targets(r *store.Resource, proto policy.Proto, port uint16) []policy.Target {
	base := policy.Target{Host: strings.Replace(r.Target, "*", "any", 1)}
	res := policy.Resource{Address: r.Target}
	if p, ok := res.Prefix(); ok {
		base.Addr, base.Host = p.Addr(), p.Addr().String()
	}
	var out []policy.Target
	add := func(p policy.Proto, ports []policy.PortRange) {
		if proto != "" && proto != p {
			return
		}
		t := base
		t.Proto, t.Port = p, port
		switch {
		case p == policy.ICMP:
			t.Port = 0
		case port == 0 && len(ports) > 0:
			t.Port = ports[0].First
		case port == 0 && proto == "":
			return // no port of this protocol: not what was asked for
		}
		out = append(out, t)
	}
	add(policy.TCP, r.TCP)
	add(policy.UDP, r.UDP)
	if proto == policy.ICMP || (proto == "" && port == 0 && r.ICMP) {
		add(policy.ICMP, nil)
	}
	return out
}
