package view

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
	"sallyway/relay/wire"
)

// Model is what a node is told, found the plain way: everything for each node anew, and encoded as it is. AppendEvent tells the same.
type Model struct {
	Config   control.Config   // without documents
	Snapshot *policy.Snapshot // without times
	Grants   []policy.Grant   // as Config.Dialling.Gateways, without times
}

// Hash is over the content.
func (m *Model) Hash() ([sha256.Size]byte, error) {
	q := *m
	q.Config.Version = 0
	if q.Snapshot != nil {
		s := *q.Snapshot
		s.Version = 0
		q.Snapshot = &s
	}
	b, err := json.Marshal(q)
	return sha256.Sum256(b), err
}

// Model makes it for a live node.
func (v *View) Model(id string, expiry time.Time) *Model {
	n := v.nodes[id]
	m := &Model{Config: control.Config{Version: v.Org.Version, Node: n.Identity(), Name: n.Name, Trust: v.Trust}}
	switch n.Kind {
	case identity.Relay:
		m.Config.Relay = v.relayConfig(n)
	case identity.Gateway:
		m.Snapshot = v.modelSnapshot(n)
		m.Config.Gateway = &control.Gateway{Relays: v.modelRelays(n, n.ID, n.Identity(), expiry), Probe: v.probes(), EndSessions: v.endSessions(), FlowLog: v.flowLog}
		v.modelDialling(m, n, expiry)
	case identity.Client:
		v.modelDialling(m, n, expiry)
	}
	return m
}

// modelRules are the rules in force for a resource.
func (v *View) modelRules(r *store.Resource) (out []policy.Rule) {
	for _, p := range v.policies {
		if s := v.subjects(p); !p.Disabled && p.Resource == r.ID && len(s) > 0 {
			out = append(out, policy.Rule{ID: p.ID, Name: p.Name, Resource: p.Resource, Subjects: s})
		}
	}
	return out
}

func (v *View) modelSnapshot(g *store.Node) *policy.Snapshot {
	s := &policy.Snapshot{
		Org: v.Org.Name, Audience: g.Identity(), Version: v.Org.Version, Denied: v.Trust.Denied,
		Peers: []policy.Peer{}, Resource: []policy.Resource{}, Rules: []policy.Rule{},
	}
	peers := make(map[string]bool)
	for _, r := range v.resources {
		if r.Disabled || !r.ServedBy(g.ID) {
			continue
		}
		s.Resource = append(s.Resource, v.resource(r))
		for _, rule := range v.modelRules(r) {
			s.Rules = append(s.Rules, rule)
			for _, n := range rule.Subjects {
				peers[n.ID] = true
			}
		}
	}
	if dials := policy.Platform(v.Org.Name); peers[dials.ID] {
		s.Peers = append(s.Peers, policy.Peer{Node: dials, Name: SubjectPlatform, Virtual: []netip.Addr{}})
	}
	for _, n := range v.sorted {
		if n.ID != g.ID && n.Status == store.Active && (peers[n.ID] || n.Kind == identity.Gateway) {
			s.Peers = append(s.Peers, policy.Peer{Node: n.Identity(), Name: n.Name, Virtual: Addresses(v.Org, n.Address)})
		}
	}
	return s
}

func (v *View) modelDialling(m *Model, n *store.Node, expiry time.Time) {
	d := v.emptyDialling()
	d.Virtual = Addresses(v.Org, n.Address)
	m.Config.Dialling = d
	needed := make(map[string]bool)
	for _, r := range v.resources {
		allowed := slices.ContainsFunc(v.modelRules(r), func(rule policy.Rule) bool { return slices.Contains(rule.Subjects, n.Identity()) })
		gateways := v.Serving(r, true)
		if r.Disabled || r.ServedBy(n.ID) || !allowed || len(gateways) == 0 {
			continue
		}
		for _, g := range gateways {
			needed[g.Node.ID] = true
		}
		d.Resources = append(d.Resources, control.ReachableResource{Resource: v.resource(r), FQDN: FQDN(r.Name, v.Org.Name), Gateways: gateways})
	}
	as := n.Identity()
	if n.Kind == identity.Gateway {
		as = site(as)
	}
	for _, g := range v.sorted {
		if g.Kind != identity.Gateway || g.Status != store.Active || g.ID == n.ID || (n.Kind != identity.Gateway && !needed[g.ID]) {
			continue
		}
		ref := control.GatewayRef{
			Node: g.Identity(), Name: g.Name, FQDN: FQDN(g.Name, v.Org.Name), Virtual: Addresses(v.Org, g.Address),
			Relays: v.modelArrange(n, v.modelRelays(n, g.ID, as, expiry)),
		}
		grant := policy.Grant{Org: v.Org.Name, Node: as, Gateway: g.Identity(), Pins: v.Trust.Pins[identity.Gateway]}
		if key := v.keys[n.ID]; key != nil {
			grant.Key = key.Hash
		}
		for _, r := range ref.Relays {
			grant.Relays = append(grant.Relays, r.Node)
		}
		d.Gateways = append(d.Gateways, ref)
		m.Grants = append(m.Grants, grant)
	}
}

func (v *View) modelRelays(n *store.Node, gateway string, as identity.Node, expiry time.Time) []control.RelayRef {
	out := []control.RelayRef{}
	for _, id := range v.assignments[gateway] {
		r, home := v.relay(id)
		if r == nil || r.Status != store.Active || !v.mayUseRelay(home, id) {
			continue
		}
		ref := control.RelayRef{Node: r.Identity(), Name: r.Name, Host: r.Host, Port: r.Port, Roots: home.Trust.Roots, Pins: home.Trust.Pins[identity.Relay]}
		if rungs := home.rungs[id]; rungs != nil {
			ref.SSHPort, ref.TLSPort = rungs.SSHPort, rungs.TLSPort
			if rungs.SSHPort != 0 {
				ref.SSHCAs = home.sshCAs
			}
		}
		if key, keys := v.keys[n.ID], home.relayKeys[id]; key != nil && len(keys) > 0 {
			name := wire.Username{Expiry: key.NotAfter, Node: as, Flags: wire.FlagPlainData}
			if !expiry.IsZero() && expiry.Before(key.NotAfter) {
				name.Expiry, name.Outage = expiry, key.NotAfter
			}
			ref.Username, ref.Password = name.String(), wire.Password(keys[0].Secret, name.String())
		}
		out = append(out, ref)
	}
	return out
}

func (v *View) modelArrange(n *store.Node, refs []control.RelayRef) []control.RelayRef {
	w := v.wishes[n.ID]
	if w == nil {
		return refs
	}
	refs = slices.DeleteFunc(refs, func(r control.RelayRef) bool { return slices.Contains(w.Exclude, r.Node.ID) })
	rank := func(r control.RelayRef) int {
		const many = 1000
		id := r.Node.ID
		switch {
		case slices.Contains(w.Pin, id):
			return slices.Index(w.Pin, id)
		case slices.Contains(w.Prefer, id):
			return many + slices.Index(w.Prefer, id)
		case w.Region != "" && v.regionOf(id) == w.Region:
			return 2 * many
		}
		return 3 * many
	}
	slices.SortStableFunc(refs, func(a, b control.RelayRef) int { return cmp.Compare(rank(a), rank(b)) })
	return refs
}
