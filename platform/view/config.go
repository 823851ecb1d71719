package view

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
	"sallyway/relay/wire"
)

// Plan is what a node is to be told, before signatures and times: two plans with the same Hash need no second push.
type Plan struct {
	Config   control.Config
	Snapshot *policy.Snapshot // for gateways; Issued and NotAfter are zero
	Grants   []policy.Grant   // as Config.Dialling.Gateways, in their order
}

// Hash is over the content; the version, which changes for everybody, is not content.
func (p *Plan) Hash() ([sha256.Size]byte, error) {
	q := *p
	q.Config.Version = 0
	if q.Snapshot != nil {
		s := *q.Snapshot
		s.Version = 0
		q.Snapshot = &s
	}
	b, err := json.Marshal(q)
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("encode plan of %v: %w", p.Config.Node, err)
	}
	return sha256.Sum256(b), nil
}

// Signed are the grants of a node that were signed last, by gateway, in few bytes. The zero value is none.
type Signed map[identity.Node]policy.Kept

// Sign fills in the signed documents, valid from now for life, and returns the configuration to send. Grants that were signed before and whose content is
// the same go out again as they are; old are these, and is left holding the new ones. A nil map has all signed.
func (p *Plan) Sign(signer *policy.Signer, now time.Time, life time.Duration, old Signed) (*control.Config, error) {
	c := p.Config
	now = now.UTC().Truncate(time.Second)
	if p.Snapshot != nil {
		s := *p.Snapshot
		s.Issued, s.NotAfter = now, now.Add(life)
		signed, err := signer.SignSnapshot(&s)
		if err != nil {
			return nil, err
		}
		g := *c.Gateway
		g.Snapshot = signed
		c.Gateway = &g
	}
	if c.Dialling != nil && len(p.Grants) > 0 {
		d := *c.Dialling
		d.Gateways = slices.Clone(d.Gateways)
		for i, gr := range p.Grants {
			gr.Issued, gr.NotAfter = now, now.Add(life)
			signed, kept, err := signer.SignGrantAgain(&gr, old[gr.Gateway])
			if err != nil {
				return nil, err
			}
			d.Gateways[i].Grant = signed
			if old != nil {
				old[gr.Gateway] = kept
			}
		}
		c.Dialling = &d
	}
	return &c, nil
}

// Plan makes the plan of a live node; nil when the view has no such node. Its credentials for relays end at expiry, and in an outage of the
// platform with the node's leaf; with the leaf in every case when that is earlier, or expiry is zero.
func (v *View) Plan(id string, expiry time.Time) *Plan {
	n := v.nodes[id]
	if n == nil {
		return nil
	}
	p := &Plan{Config: control.Config{Version: v.Org.Version, Node: n.Identity(), Name: n.Name, Trust: v.Trust}}
	switch n.Kind {
	case identity.Relay:
		p.Config.Relay = v.relayConfig(n)
	case identity.Gateway:
		p.Snapshot = v.Snapshot(n)
		p.Config.Gateway = v.gatewayConfig(n, expiry)
		v.dialling(p, n, expiry)
	case identity.Client:
		v.dialling(p, n, expiry)
	}
	return p
}

// gatewayConfig is a gateway's share without its snapshot.
func (v *View) gatewayConfig(n *store.Node, expiry time.Time) *control.Gateway {
	return &control.Gateway{Relays: v.relayRefs(n, n.ID, n.Identity(), expiry), Probe: v.probes(), EndSessions: v.endSessions(), FlowLog: v.flowLog}
}

func (v *View) relayConfig(n *store.Node) *control.Relay {
	c := &control.Relay{Host: n.Host, Port: n.Port, Keys: v.relayKeys[n.ID], Denied: v.denied, Draining: n.Draining}
	if v.Org.Name == identity.SharedOrg {
		c.Orgs = []control.RelayOrg{}
		for _, o := range v.orgs {
			if v.sharing.Allows(v.orgRegions[o.Org].Relays, n.ID) {
				c.Orgs = append(c.Orgs, o)
			}
		}
	} else {
		c.Orgs = []control.RelayOrg{{Org: v.Org.Name, Peers: n.Peers, Trust: &v.Trust, SSHCAs: v.sshCAs, BytesPerSecond: v.bandwidth}}
	}
	if r := v.rungs[n.ID]; r != nil {
		c.SSHPort, c.TLSPort = r.SSHPort, r.TLSPort
	}
	return c
}

func (v *View) endSessions() []control.EndSession {
	var out []control.EndSession
	for _, e := range v.ends {
		if n := v.nodes[e.Node]; n != nil {
			out = append(out, control.EndSession{Node: n.Identity(), Before: e.Before})
		}
	}
	return out
}

// Snapshot is what a gateway enforces: its resources, who may use them, and every other gateway of the organization as a peer, so that
// gateways reach each other.
func (v *View) Snapshot(g *store.Node) *policy.Snapshot {
	s := &policy.Snapshot{
		Org: v.Org.Name, Audience: g.Identity(), Version: v.Org.Version, Denied: v.Trust.Denied,
		Peers: []policy.Peer{}, Resource: []policy.Resource{}, Rules: []policy.Rule{},
	}
	rules := v.rules()
	peers := make(map[string]bool)
	for _, r := range v.resources {
		if r.Disabled || !r.ServedBy(g.ID) {
			continue
		}
		s.Resource = append(s.Resource, v.resource(r))
		for _, rule := range rules[r.ID] {
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

// emptyDialling is what is the same in what all nodes are told that dial.
func (v *View) emptyDialling() *control.Dialling {
	return &control.Dialling{
		Range: append(d4(v.Org), v.Org.Range6), Gateways: []control.GatewayRef{}, Resources: []control.ReachableResource{},
		Direct: control.Direct{On: v.Org.Direct, Private: v.Org.DirectPrivate},
	}
}

// dialling fills in what n, a client or a gateway, may reach. What is added here belongs into Digest, too.
func (v *View) dialling(p *Plan, n *store.Node, expiry time.Time) {
	d := v.emptyDialling()
	d.Virtual = Addresses(v.Org, n.Address)
	p.Config.Dialling = d
	for _, r := range v.usableBy(n) {
		d.Resources = append(d.Resources, r.told)
	}
	key := v.keys[n.ID]
	for _, g := range v.dialledBy(n) {
		if g.ID == n.ID {
			continue
		}
		ref := control.GatewayRef{
			Node: g.Identity(), Name: g.Name, FQDN: FQDN(g.Name, v.Org.Name), Virtual: v.digests.virtual[g.ID], Relays: v.arrange(n, v.relayRefs(n, g.ID, dialler(n), expiry)),
		}
		grant := policy.Grant{Org: v.Org.Name, Node: n.Identity(), Gateway: g.Identity(), Pins: v.Trust.Pins[identity.Gateway]}
		if n.Kind == identity.Gateway {
			grant.Node = site(grant.Node)
		}
		if key != nil {
			grant.Key = key.Hash
		}
		for _, r := range ref.Relays {
			grant.Relays = append(grant.Relays, r.Node)
		}
		d.Gateways = append(d.Gateways, ref)
		p.Grants = append(p.Grants, grant)
	}
}

// Serving is by which gateways a resource is reached, most preferred first; active leaves out those that are disabled.
func (v *View) Serving(r *store.Resource, active bool) []control.ServingGateway {
	out := []control.ServingGateway{}
	for _, s := range r.Gateways {
		if g := v.nodes[s.ID]; g != nil && (!active || g.Status == store.Active) {
			out = append(out, control.ServingGateway{Node: g.Identity(), Priority: s.Priority, Weight: s.Weight})
		}
	}
	return out
}

// dialler is as whom a node dials gateways: itself, and a gateway as site, which is another allocation than the one it serves on.
func dialler(n *store.Node) identity.Node {
	if n.Kind == identity.Gateway {
		return site(n.Identity())
	}
	return n.Identity()
}

// probesMost is how many relays a gateway measures at most.
const probesMost = 64

// probes are the relays that gateways measure: all that may be given to them. A single one is not worth it.
func (v *View) probes() []control.ProbeRelay {
	var out []control.ProbeRelay
	for _, home := range []*View{v, v.shared} {
		if home == nil {
			continue
		}
		for _, n := range home.sorted {
			if n.Kind == identity.Relay && n.Status == store.Active && !n.Enrolled.IsZero() && n.Host != "" && len(out) < probesMost && v.mayUseRelay(home, n.ID) {
				out = append(out, control.ProbeRelay{ID: n.ID, Host: n.Host, Port: n.Port})
			}
		}
	}
	if len(out) < 2 {
		return nil
	}
	return out
}

// relayRefs are the relays of a gateway with credentials for n under the identity as, active first. See Plan for expiry.
func (v *View) relayRefs(n *store.Node, gateway string, as identity.Node, expiry time.Time) []control.RelayRef {
	k := v.keys[n.ID]
	if k == nil {
		return v.refs(gateway, as, time.Time{}, expiry)
	}
	return v.refs(gateway, as, k.NotAfter, expiry)
}

// refs are the relays of a gateway, active first, with credentials for as, whose leaf ends at end; zero is no leaf, and no credentials.
func (v *View) refs(gateway string, as identity.Node, end, expiry time.Time) []control.RelayRef {
	out := []control.RelayRef{}
	for _, id := range v.assignments[gateway] {
		r, home := v.relay(id)
		if r == nil || r.Status != store.Active || !v.mayUseRelay(home, id) {
			continue
		}
		ref := control.RelayRef{
			Node: r.Identity(), Name: r.Name, Host: r.Host, Port: r.Port, Roots: home.Trust.Roots, Pins: home.Trust.Pins[identity.Relay],
		}
		if rungs := home.rungs[id]; rungs != nil {
			ref.SSHPort, ref.TLSPort = rungs.SSHPort, rungs.TLSPort
			if rungs.SSHPort != 0 {
				ref.SSHCAs = home.sshCAs
			}
		}
		// No credential outlives the node's leaf: before the node has one, or when the relay has no key, there is none.
		if keys := home.relayKeys[id]; !end.IsZero() && len(keys) > 0 {
			name := wire.Username{Expiry: end, Node: as, Flags: wire.FlagPlainData}
			if !expiry.IsZero() && expiry.Before(end) {
				name.Expiry, name.Outage = expiry, end
			}
			ref.Username = name.String()
			ref.Password = wire.Password(keys[0].Secret, ref.Username)
		}
		out = append(out, ref)
	}
	return out
}
