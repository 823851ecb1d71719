package view

import (
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

// Signed are the grants of a node that were signed last, by the gateway's id, in few bytes. The zero value is none.
type Signed map[string]policy.Kept

// Signing is how documents are signed that a node is told: from Now for Life.
type Signing struct {
	Signer *policy.Signer
	Now    time.Time
	Life   time.Duration
	// Kept are the grants that were signed before: those whose content is the same go out again as they are. It is left holding the new ones. A nil
	// map has all signed.
	Kept Signed
}

// AppendEvent appends to b the event of the control stream (control.Event), as a line of JSON, that brings a live node its whole configuration. Its
// credentials for relays end at expiry, and in an outage of the platform with the node's leaf; with the leaf in every case when that is earlier, or expiry
// is zero.
func (v *View) AppendEvent(b []byte, id string, expiry time.Time, s Signing) ([]byte, error) {
	n := v.nodes[id]
	if n == nil {
		return b, fmt.Errorf("node %s is not one of organization %s", id, v.Org.Name)
	}
	v.told.once.Do(func() { v.told.err = v.prepareTold() })
	if v.told.err != nil {
		return b, v.cannotTell(v.told.err)
	}
	s.Now = s.Now.UTC().Truncate(time.Second)
	c := control.Config{Version: v.Org.Version, Node: n.Identity(), Name: n.Name}
	switch n.Kind {
	case identity.Relay:
		c.Relay = v.relayConfig(n)
	case identity.Gateway:
		c.Gateway = v.gatewayConfig(n, expiry)
	}
	return v.appendEvent(b, n, &c, expiry, &s)
}

// gatewayConfig is a gateway's share without its snapshot.
func (v *View) gatewayConfig(n *store.Node, expiry time.Time) *control.Gateway {
	return &control.Gateway{Relays: v.refs(n.ID, v.credential(n, n.Identity(), expiry)), Probe: v.probes(), EndSessions: v.endSessions(), FlowLog: v.flowLog}
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

// snapshot is what a gateway enforces, without times: its resources, who may use them, and every other gateway of the organization as a peer, so that
// gateways reach each other.
func (v *View) snapshot(g *store.Node) *policy.Snapshot {
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
	s.Peers = slices.Grow(s.Peers, len(peers)+len(v.gateways))
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

// credential is what a node has its passwords for relays by.
type credential struct{ username string }

// credentialOf is that of a node whose leaf ends at end. No credential outlives the leaf: before the node has one, end is zero, there is none.
func credentialOf(as identity.Node, end, expiry time.Time) credential {
	if end.IsZero() {
		return credential{}
	}
	name := wire.Username{Expiry: end, Node: as, Flags: wire.FlagPlainData}
	if !expiry.IsZero() && expiry.Before(end) {
		name.Expiry, name.Outage = expiry, end
	}
	return credential{name.String()}
}

// credential is that of a node of the view under the identity as. See AppendEvent for expiry.
func (v *View) credential(n *store.Node, as identity.Node, expiry time.Time) credential {
	k := v.keys[n.ID]
	if k == nil {
		return credential{}
	}
	return credentialOf(as, k.NotAfter, expiry)
}

// at returns the user name and password at a relay with these keys; none where the relay has no key.
func (c credential) at(keys []control.RelayKey) (username, password string) {
	if c.username == "" || len(keys) == 0 {
		return "", ""
	}
	return c.username, wire.Password(keys[0].Secret, c.username)
}

// refs are the relays of a gateway, active first, with credentials.
func (v *View) refs(gateway string, c credential) []control.RelayRef {
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
		ref.Username, ref.Password = c.at(home.relayKeys[id])
		out = append(out, ref)
	}
	return out
}
