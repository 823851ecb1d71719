package view

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
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
	gateways []control.ServingGateway
	json     []byte // control.ReachableResource
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
	err      error
}

// special is what few nodes have in what concerns them alone.
type special struct {
	Wishes  *store.Wishes
	Gateway *control.Gateway // without its snapshot
}

// Digest is a hash over what a node is told, without the version, signatures and their times. It differs where that does; where it does not it is
// the same but for rare cases, which cost a push that nobody needed. It costs next to nothing beside the text: what many nodes are told alike is hashed
// once for all. Digests are compared with others of the same node. False is a node that the view does not have.
func (v *View) Digest(id string, expiry time.Time) (Sum, bool, error) {
	n := v.nodes[id]
	if n == nil {
		return Sum{}, false, nil
	}
	v.once.Do(v.prepare)
	d := &v.digests
	if d.err != nil {
		return Sum{}, true, v.cannotTell(d.err)
	}
	if n.Kind == identity.Relay {
		s, err := sumOf(control.Config{Node: n.Identity(), Name: n.Name, Trust: v.Trust, Relay: v.relayConfig(n)})
		if err != nil {
			err = fmt.Errorf("encode what %v is told: %w", n.Identity(), err)
		}
		return s, true, err
	}
	b := append(make([]byte, 0, 2<<10), d.base[:]...)
	for _, text := range []string{string(n.Kind), n.ID, n.Name} {
		b = append(append(b, text...), 0)
	}
	b = binary.BigEndian.AppendUint32(b, n.Address)
	b = binary.BigEndian.AppendUint64(b, uint64(expiry.Unix())) //nolint:gosec // any bits of it
	if k := v.keys[n.ID]; k != nil {
		b = binary.BigEndian.AppendUint64(append(b, k.Hash[:]...), uint64(k.NotAfter.Unix())) //nolint:gosec // any bits of it
	}
	more := special{Wishes: v.wishes[id]}
	if n.Kind == identity.Gateway {
		more.Gateway = v.gatewayConfig(n, expiry)
	}
	if more != (special{}) {
		s, err := sumOf(more)
		if err != nil {
			return Sum{}, true, fmt.Errorf("encode what %v is told: %w", n.Identity(), err)
		}
		b = append(b, s[:]...)
	}
	for _, r := range d.usable[id] {
		b = append(b, r.sum[:]...)
	}
	for _, g := range v.dialledBy(n) {
		s := d.gateways[g.ID]
		b = append(b, s[:]...)
	}
	if n.Kind == identity.Gateway {
		b = append(b, d.peers[:]...)
		for _, s := range d.served[id] {
			b = append(b, s[:]...)
		}
	}
	return sha256.Sum256(b), true, nil
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
	subjects := make(map[*identity.Node]Sum)
	for _, r := range v.resources {
		if r.Disabled {
			continue
		}
		v.prepareServed(r, subjects, note)
		reached := control.ReachableResource{Resource: v.resource(r), FQDN: FQDN(r.Name, v.Org.Name), Gateways: v.Serving(r, true)}
		if len(reached.Gateways) == 0 {
			continue
		}
		b, err := json.Marshal(reached)
		reach := &reachable{resource: r, gateways: reached.Gateways, json: b, sum: note(sha256.Sum256(b), err)}
		for _, rule := range v.inForce[r.ID] {
			for _, n := range rule.Subjects {
				// Several rules may be for one node.
				if has := d.usable[n.ID]; (len(has) == 0 || has[len(has)-1] != reach) && !r.ServedBy(n.ID) {
					d.usable[n.ID] = append(has, reach)
				}
			}
		}
	}
	peers := []policy.Peer{}
	for _, g := range v.gateways {
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
	for _, r := range v.refs(g.ID, credential{}) {
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

// sumOfSubjects hashes nodes, maybe very many, as gateways know those who may use something.
func (v *View) sumOfSubjects(subjects []identity.Node) Sum {
	var b []byte
	for _, s := range subjects {
		for _, text := range []string{s.Org, string(s.Kind), s.ID} {
			b = append(append(b, text...), 0)
		}
		if n := v.nodes[s.ID]; n != nil {
			b = binary.BigEndian.AppendUint32(append(append(b, n.Name...), 0), n.Address)
		}
		b = append(b, '\n')
	}
	return sha256.Sum256(b)
}

// prepareServed hashes a resource as the gateways enforce it that serve it. Known are the hashes of lists of subjects, by where they begin.
func (v *View) prepareServed(r *store.Resource, known map[*identity.Node]Sum, note func(Sum, error) Sum) {
	type served struct {
		Rule     policy.Rule
		Subjects Sum
	}
	var rules []served
	for _, rule := range v.inForce[r.ID] {
		first := &rule.Subjects[0]
		sum, ok := known[first]
		if !ok {
			sum = v.sumOfSubjects(rule.Subjects)
			known[first] = sum
		}
		rule.Subjects = nil
		rules = append(rules, served{rule, sum})
	}
	s := note(sumOf(struct {
		Resource policy.Resource
		Rules    []served
	}{v.resource(r), rules}))
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
				for _, g := range r.gateways {
					needed[g.Node.ID] = true
				}
			}
			set = slices.DeleteFunc(slices.Clone(v.gateways), func(g *store.Node) bool { return !needed[g.ID] })
			sets[string(key)] = set
		}
		d.dialled[node] = set
	}
}
