package view

import (
	"cmp"
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
)

// Sum is a hash over some content.
type Sum [sha256.Size]byte

// sumOf hashes what v is as JSON.
func sumOf(v any) (Sum, error) {
	b, err := json.Marshal(v)
	return Sum(sha256.Sum256(b)), err
}

// reachable is a resource as those are told of it who may use it.
type reachable struct {
	resource *store.Resource
	told     control.ReachableResource
	sum      Sum
}

// digests are hashes of what many nodes are told alike.
type digests struct {
	base     Sum                      // everything that is the whole organization's
	usable   map[string][]*reachable  // by node: what it may use and others serve, in the order of resources
	gateways map[string]Sum           // by gateway: as those who dial it are told
	peers    Sum                      // every active gateway, as other gateways know it
	served   map[string][]Sum         // by gateway: the resources that it serves, with their rules and whom they are for
	dialled  map[string][]*store.Node // by node: gateways that it is told of, where it is no gateway
	virtual  map[string][]netip.Addr  // of gateways
	err      error
}

// personal is what concerns one node alone in what it is told.
type personal struct {
	Node    identity.Node
	Name    string
	Virtual []netip.Addr
	Key     *identity.KeyHash
	End     time.Time // of its leaf, by which its credentials end
	Expiry  time.Time
	Wishes  *store.Wishes
	Gateway *control.Gateway // without its snapshot
}

// Digest is a hash over what a node is told, without the version, signatures and their times. It differs where plans differ; where they do not it is
// the same but for rare cases, which cost a push that nobody needed. It costs next to nothing beside a plan: what many nodes are told alike is hashed
// once for all. False is a node that the view does not have.
func (v *View) Digest(id string, expiry time.Time) (Sum, bool, error) {
	n := v.nodes[id]
	if n == nil {
		return Sum{}, false, nil
	}
	v.once.Do(v.prepare)
	d := &v.digests
	if d.err != nil {
		return Sum{}, true, fmt.Errorf("encode what nodes of %s are told: %w", v.Org.Name, d.err)
	}
	if n.Kind == identity.Relay {
		s, err := v.Plan(id, expiry).Hash()
		return Sum(s), true, err
	}
	own := personal{Node: n.Identity(), Name: n.Name, Virtual: Addresses(v.Org, n.Address), Expiry: expiry, Wishes: v.wishes[id]}
	if k := v.keys[id]; k != nil {
		own.Key, own.End = &k.Hash, k.NotAfter
	}
	if n.Kind == identity.Gateway {
		own.Gateway = v.gatewayConfig(n, expiry)
	}
	b, err := json.Marshal(own)
	if err != nil {
		return Sum{}, true, fmt.Errorf("encode what %v is told: %w", n.Identity(), err)
	}
	h := sha256.New()
	h.Write(d.base[:])
	h.Write(b)
	for _, r := range d.usable[id] {
		h.Write(r.sum[:])
	}
	for _, g := range v.dialledBy(n) {
		s := d.gateways[g.ID]
		h.Write(s[:])
	}
	if n.Kind == identity.Gateway {
		h.Write(d.peers[:])
		for _, s := range d.served[id] {
			h.Write(s[:])
		}
	}
	return Sum(h.Sum(nil)), true, nil
}

// dialledBy are the gateways that a node dials, by name: those that serve what it may use, and for a gateway every other one. They are shared, and one of
// them may be the node itself.
func (v *View) dialledBy(n *store.Node) []*store.Node {
	v.once.Do(v.prepare)
	if n.Kind == identity.Gateway {
		return v.gateways
	}
	return v.digests.dialled[n.ID]
}

// usableBy is what a node may use and others serve, in the order of resources. It is shared.
func (v *View) usableBy(n *store.Node) []*reachable {
	v.once.Do(v.prepare)
	return v.digests.usable[n.ID]
}

// prepareDigests hashes what is shared. Rules and gateways are prepared.
func (v *View) prepareDigests() {
	d := &v.digests
	d.usable, d.gateways, d.served = make(map[string][]*reachable), make(map[string]Sum), make(map[string][]Sum)
	d.virtual = make(map[string][]netip.Addr)
	note := func(s Sum, err error) Sum {
		d.err = cmp.Or(d.err, err)
		return s
	}
	d.base = note(sumOf(struct {
		Trust     control.Trust
		Dialling  *control.Dialling
		Rules     policy.Snapshot
		DialsHere bool
	}{v.Trust, v.emptyDialling(), policy.Snapshot{Org: v.Org.Name, Denied: v.Trust.Denied}, v.Org.PlatformDial}))
	for _, r := range v.resources {
		if r.Disabled {
			continue
		}
		v.prepareServed(r, note)
		told := control.ReachableResource{Resource: v.resource(r), FQDN: FQDN(r.Name, v.Org.Name), Gateways: v.Serving(r, true)}
		if len(told.Gateways) == 0 {
			continue
		}
		reach := &reachable{resource: r, told: told, sum: note(sumOf(told))}
		for node := range v.allowed[r.ID] {
			if !r.ServedBy(node) {
				d.usable[node] = append(d.usable[node], reach)
			}
		}
	}
	peers := []policy.Peer{}
	for _, g := range v.gateways {
		d.virtual[g.ID] = Addresses(v.Org, g.Address)
		d.gateways[g.ID] = note(sumOf(v.dialledGateway(g)))
		peers = append(peers, policy.Peer{Node: g.Identity(), Name: g.Name, Virtual: Addresses(v.Org, g.Address)})
	}
	d.peers = note(sumOf(peers))
	v.prepareDialled()
}

// dialledGateway is a gateway as those are told of it who dial it, with what their credentials are made of in place of these.
func (v *View) dialledGateway(g *store.Node) any {
	type relay struct {
		Ref    control.RelayRef
		Region string
		Key    *control.RelayKey // the newest
	}
	ref := control.GatewayRef{Node: g.Identity(), Name: g.Name, FQDN: FQDN(g.Name, v.Org.Name), Virtual: Addresses(v.Org, g.Address)}
	var relays []relay
	for _, r := range v.refs(g.ID, identity.Node{}, time.Time{}, time.Time{}) {
		one := relay{Ref: r, Region: v.regionOf(r.Node.ID)}
		if _, home := v.relay(r.Node.ID); home != nil && len(home.relayKeys[r.Node.ID]) > 0 {
			one.Key = &home.relayKeys[r.Node.ID][0]
		}
		relays = append(relays, one)
	}
	return struct {
		Ref    control.GatewayRef
		Relays []relay
	}{ref, relays}
}

// prepareServed hashes a resource as the gateways enforce it that serve it.
func (v *View) prepareServed(r *store.Resource, note func(Sum, error) Sum) {
	rules := v.inForce[r.ID]
	h := sha256.New()
	head := make([]policy.Rule, len(rules))
	for i, rule := range rules {
		head[i] = rule
		head[i].Subjects = nil
		for _, s := range rule.Subjects { // there may be very many
			fmt.Fprintf(h, "%d %s/%s/%s", i, s.Org, s.Kind, s.ID)
			if n := v.nodes[s.ID]; n != nil {
				fmt.Fprintf(h, " %s %d", n.Name, n.Address)
			}
			h.Write([]byte{'\n'})
		}
	}
	s := note(sumOf(struct {
		Resource policy.Resource
		Rules    []policy.Rule
		Subjects Sum
	}{v.resource(r), head, Sum(h.Sum(nil))}))
	for _, g := range r.Gateways {
		v.digests.served[g.ID] = append(v.digests.served[g.ID], s)
	}
}

// prepareDialled finds the gateways of what each node may use. Most nodes may use what many others may, so it is found once for each set.
func (v *View) prepareDialled() {
	d := &v.digests
	d.dialled = make(map[string][]*store.Node, len(d.usable))
	sets := make(map[string][]*store.Node)
	var key []byte
	for node, reach := range d.usable {
		key = key[:0]
		for _, r := range reach {
			key = append(append(key, r.resource.ID...), ' ')
		}
		set, known := sets[string(key)]
		if !known {
			needed := make(map[string]bool)
			for _, r := range reach {
				for _, g := range r.told.Gateways {
					needed[g.Node.ID] = true
				}
			}
			set = slices.DeleteFunc(slices.Clone(v.gateways), func(g *store.Node) bool { return !needed[g.ID] })
			sets[string(key)] = set
		}
		d.dialled[node] = set
	}
}
