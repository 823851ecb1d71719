// Package view is one organization as the database has it at one version, and what every node is told of it: the node's
// control.Config, with the signed snapshot and grants inside. A View is loaded in one transaction and then never changes, so that any
// number of streams build from it at once.
package view

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// Domain is the suffix of the names that resources and gateways have for users.
const Domain = "sallyway.internal"

// DeniedMargin is how long after its last leaf expired a revoked key stays on the deny lists: two clocks that are off.
const DeniedMargin = 2 * identity.ClockSkew

// View is an organization at a version.
type View struct {
	Org   *store.Org
	Trust control.Trust // Denied included
	// PolicyCA is the key hash of the CA that issues to those who sign documents; zero when there is none.
	PolicyCA identity.KeyHash

	nodes       map[string]*store.Node // live ones, by id
	sorted      []*store.Node          // by name
	keys        map[string]*store.Key  // newest good key, by node
	good        map[identity.KeyHash]string
	resources   []*store.Resource
	policies    []*store.Policy
	groups      map[string]*store.Group // with the nodes of their people
	people      map[string][]string     // nodes by person
	assignments map[string][]string
	relayKeys   map[string][]control.RelayKey // newest first, by relay
	denied      []identity.Node
	ends        []*store.SessionEnd
	shared      *View              // the platform's relays; nil in the platform's own view
	orgs        []control.RelayOrg // in the platform's own view: every organization
	orgRegions  map[string]store.OrgRegion
	rungs       map[string]*store.RelayRungs
	wishes      map[string]*store.Wishes // by node
	regions     []string                 // whose shared relays are used; empty is all
	sharing     *Sharing
	sshCAs      []string
	flowLog     bool  // gateways tell of flows
	bandwidth   int64 // bytes per second that the organization may have through each relay; 0 is the relay's default

	// What everybody needs who asks for what nodes are told, and nobody changes: made by the first.
	once     sync.Once
	inForce  map[string][]policy.Rule // by resource id; rules for the same subjects share the list of them
	gateways []*store.Node            // active ones, by name
	digests  digests
	told     told
}

// Load reads org in tx.
func Load(ctx context.Context, tx store.Tx, seal *pki.Sealer, org string, now time.Time) (*View, error) {
	v, err := load(ctx, tx, seal, org, now)
	if err != nil {
		return nil, fmt.Errorf("load organization %s: %w", org, err)
	}
	if org == identity.SharedOrg {
		return v, v.loadOrgs(ctx, tx, now)
	}
	if v.shared, err = load(ctx, tx, seal, identity.SharedOrg, now); err != nil {
		return nil, fmt.Errorf("load shared relays: %w", err)
	}
	return v, nil
}

func load(ctx context.Context, tx store.Tx, seal *pki.Sealer, org string, now time.Time) (*View, error) {
	o, err := tx.Org(ctx, org)
	if err != nil {
		return nil, err
	}
	v := &View{
		Org: o, nodes: make(map[string]*store.Node), keys: make(map[string]*store.Key), groups: make(map[string]*store.Group),
		good:      make(map[identity.KeyHash]string),
		relayKeys: make(map[string][]control.RelayKey),
	}
	if v.Trust, err = LoadTrust(ctx, tx, org, now); err != nil {
		return nil, err
	}
	if v.PolicyCA, err = policyCA(ctx, tx, org); err != nil {
		return nil, err
	}
	off, err := tx.FlowLogOff(ctx, org)
	if err != nil {
		return nil, err
	}
	v.flowLog = !off
	if v.sorted, err = tx.Nodes(ctx, org, "", store.Page{}); err != nil {
		return nil, err
	}
	for _, n := range v.sorted {
		v.nodes[n.ID] = n
	}
	keys, err := tx.OrgKeys(ctx, org)
	if err != nil {
		return nil, err
	}
	for _, k := range keys { // newest first
		n := v.nodes[k.Node]
		if n == nil || n.Status != store.Active || k.Denied || k.Enrolment != n.Enrolment {
			continue
		}
		v.good[k.Hash] = n.ID
		if v.keys[n.ID] == nil {
			v.keys[n.ID] = k
		}
	}
	if v.denied, err = deniedNodes(ctx, tx, org, v.sorted, keys, now); err != nil {
		return nil, err
	}
	for _, n := range v.sorted {
		if n.Kind != identity.Relay {
			continue
		}
		if v.relayKeys[n.ID], err = RelayKeys(ctx, tx, seal, n.ID); err != nil {
			return nil, err
		}
	}
	if v.resources, err = tx.Resources(ctx, org, store.Page{}); err != nil {
		return nil, err
	}
	if v.policies, err = tx.Policies(ctx, org, store.Page{}); err != nil {
		return nil, err
	}
	groups, err := Groups(ctx, tx, org)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		v.groups[g.ID] = g
	}
	if v.people, err = PeopleNodes(ctx, tx, org); err != nil {
		return nil, err
	}
	if v.rungs, err = tx.RelayRungs(ctx, org); err != nil {
		return nil, err
	}
	if v.sshCAs, err = sshCAs(ctx, tx, org); err != nil {
		return nil, err
	}
	if v.wishes, err = tx.Wishes(ctx, org); err != nil {
		return nil, err
	}
	region, err := tx.OrgRegion(ctx, org)
	if err != nil {
		return nil, err
	}
	v.regions = region.Relays
	if v.sharing, err = LoadSharing(ctx, tx); err != nil {
		return nil, err
	}
	if v.assignments, err = tx.Assignments(ctx, org); err != nil {
		return nil, err
	}
	if v.bandwidth, err = bandwidthOf(ctx, tx, org); err != nil {
		return nil, err
	}
	v.ends, err = tx.SessionEnds(ctx, org)
	return v, err
}

// bandwidthOf is what an organization may have through each relay by its licence, in bytes per second; 0 is the relay's default. It stays when the licence
// ends.
func bandwidthOf(ctx context.Context, tx store.Tx, org string) (int64, error) {
	l, err := tx.Licence(ctx, org)
	if errors.Is(err, store.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return l.Bandwidth, nil
}

// loadOrgs fills in what shared relays serve: every organization.
func (v *View) loadOrgs(ctx context.Context, tx store.Tx, now time.Time) error {
	orgs, err := tx.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	if v.orgRegions, err = tx.OrgRegions(ctx); err != nil {
		return err
	}
	for _, o := range orgs {
		if o.Name == identity.SharedOrg {
			continue
		}
		trust, err := LoadTrust(ctx, tx, o.Name, now)
		if err != nil {
			return err
		}
		cas, err := sshCAs(ctx, tx, o.Name)
		if err != nil {
			return err
		}
		bandwidth, err := bandwidthOf(ctx, tx, o.Name)
		if err != nil {
			return err
		}
		v.orgs = append(v.orgs, control.RelayOrg{Org: o.Name, Trust: &trust, SSHCAs: cas, BytesPerSecond: bandwidth})
		live, err := tx.Nodes(ctx, o.Name, "", store.Page{})
		if err != nil {
			return err
		}
		keys, err := tx.OrgKeys(ctx, o.Name)
		if err != nil {
			return err
		}
		denied, err := deniedNodes(ctx, tx, o.Name, live, keys, now)
		if err != nil {
			return err
		}
		v.denied = append(v.denied, denied...)
	}
	return nil
}

// maxLineage is how many roots of the past nodes are told of, newest first: one that slept through more enrols anew.
const maxLineage = 8

// policyCA is the key hash of the CA that issues leaves of kind policy: whoever signs documents has one by it. It is zero when there is none.
func policyCA(ctx context.Context, tx store.Tx, org string) (identity.KeyHash, error) {
	as, err := tx.Authorities(ctx, org)
	if err != nil {
		return identity.KeyHash{}, err
	}
	for _, a := range as {
		if a.Kind == string(identity.Policy) && a.State == store.Current {
			c, err := x509.ParseCertificate(a.Certificate)
			if err != nil {
				return identity.KeyHash{}, fmt.Errorf("certificate of the policy CA: %w", err)
			}
			return identity.CertificateKeyHash(c), nil
		}
	}
	return identity.KeyHash{}, nil
}

// LoadTrust reads what nodes of org trust: roots, pins of every kind, denied keys.
func LoadTrust(ctx context.Context, tx store.Tx, org string, now time.Time) (control.Trust, error) {
	t := control.Trust{Pins: make(map[identity.Kind][]identity.KeyHash)}
	as, err := tx.Authorities(ctx, org)
	if err != nil {
		return t, err
	}
	var roots, lineage []*x509.Certificate
	for _, a := range as {
		if a.Kind == pki.KindSSH || len(a.Certificate) == 0 {
			continue // a key, see sshCAs; or nothing yet
		}
		c, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return t, fmt.Errorf("certificate of the %s CA: %w", a.Kind, err)
		}
		switch kind := identity.Kind(a.Kind); {
		case a.Kind == pki.KindRoot && a.Pinned():
			roots = append(roots, c)
		case a.Kind == pki.KindRoot && !a.Until.IsZero(): // it has been current
			lineage = append(lineage, c)
		case kind.Valid() && a.Pinned():
			t.Pins[kind] = append(t.Pins[kind], identity.CertificateKeyHash(c))
		}
	}
	t.Roots = string(identity.EncodeCertificates(roots...))
	t.Lineage = string(identity.EncodeCertificates(lineage[:min(len(lineage), maxLineage)]...))
	if t.Denied, err = tx.DeniedKeys(ctx, org, now.Add(-DeniedMargin)); err != nil {
		return t, err
	}
	dialling, err := tx.PlatformKeys(ctx, org)
	if err != nil {
		return t, err
	}
	for _, k := range dialling {
		if k.Denied && k.NotAfter.Add(DeniedMargin).After(now) {
			t.Denied = append(t.Denied, k.Hash)
		}
	}
	slices.SortFunc(t.Denied, func(a, b identity.KeyHash) int { return slices.Compare(a[:], b[:]) })
	return t, nil
}

// sshCAs reads the public keys of an organization's SSH CAs.
func sshCAs(ctx context.Context, tx store.Tx, org string) ([]string, error) {
	as, err := tx.Authorities(ctx, org)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, a := range as {
		if a.Kind != pki.KindSSH || !a.Pinned() {
			continue
		}
		key, err := x509.ParsePKIXPublicKey(a.Certificate)
		if err != nil {
			return nil, fmt.Errorf("key of the SSH CA: %w", err)
		}
		line, err := pki.SSHPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("key of the SSH CA: %w", err)
		}
		out = append(out, line)
	}
	return out, nil
}

// deniedNodes are the nodes whose relay credentials could still be alive although they may not use them.
func deniedNodes(ctx context.Context, tx store.Tx, org string, live []*store.Node, keys []*store.Key, now time.Time) ([]identity.Node, error) {
	dangerous, good := make(map[string]bool), make(map[string]bool)
	for _, k := range keys {
		if !k.Denied {
			good[k.Node] = true
		}
		if k.NotAfter.Add(DeniedMargin).After(now) {
			dangerous[k.Node] = true
		}
	}
	gone, err := tx.DeletedNodes(ctx, org)
	if err != nil {
		return nil, err
	}
	var out []identity.Node
	for _, n := range slices.Concat(live, gone) {
		// A node that was revoked and has a fresh token is active again, but until the token is spent only the revoked key speaks for it.
		if !dangerous[n.ID] || (n.Status == store.Active && n.Deleted.IsZero() && good[n.ID]) {
			continue
		}
		out = append(out, n.Identity())
		if n.Kind == identity.Gateway {
			out = append(out, site(n.Identity()))
		}
	}
	dialling, err := tx.PlatformKeys(ctx, org)
	if err != nil {
		return nil, err
	}
	for _, k := range dialling {
		if k.Denied && k.NotAfter.Add(DeniedMargin).After(now) {
			out = append(out, identity.Node{Org: org, Kind: identity.Platform, ID: k.Node})
		}
	}
	slices.SortFunc(out, func(a, b identity.Node) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}

// RelayKeyLabel is the label under which a relay's key is sealed.
func RelayKeyLabel(relay, id string) string { return "relay-key/" + relay + "/" + id }

// RelayKeys reads a relay's TURN keys, newest first.
func RelayKeys(ctx context.Context, tx store.Tx, seal *pki.Sealer, relay string) ([]control.RelayKey, error) {
	rows, err := tx.RelayKeys(ctx, relay)
	if err != nil {
		return nil, err
	}
	var out []control.RelayKey
	for _, k := range rows {
		secret, err := seal.Open(RelayKeyLabel(relay, k.ID), k.Secret)
		if err != nil {
			return nil, err
		}
		out = append(out, control.RelayKey{ID: k.ID, Secret: secret})
	}
	return out, nil
}

// site is a gateway's identity when it dials another.
func site(n identity.Node) identity.Node {
	n.Kind = identity.Site
	return n
}

// FQDN is the name that users have for a resource or gateway.
func FQDN(name, org string) string { return name + "." + org + "." + Domain }

// Addresses are the virtual addresses with an index in an organization's ranges: IPv4 and IPv6; nil for index 0.
func Addresses(o *store.Org, index uint32) []netip.Addr {
	if index == 0 {
		return nil
	}
	v4 := o.Range4.Addr().As4()
	binary.BigEndian.PutUint32(v4[:], binary.BigEndian.Uint32(v4[:])+index)
	v6 := o.Range6.Addr().As16()
	binary.BigEndian.PutUint32(v6[12:], binary.BigEndian.Uint32(v6[12:])+index)
	return []netip.Addr{netip.AddrFrom4(v4), netip.AddrFrom16(v6)}
}

// relay finds an organization's or a shared relay and the view it belongs to.
func (v *View) relay(id string) (*store.Node, *View) {
	if n := v.nodes[id]; n != nil && n.Kind == identity.Relay {
		return n, v
	}
	if v.shared != nil {
		return v.shared.relay(id)
	}
	return nil, nil
}

// resource is a resource as documents carry it.
func (v *View) resource(r *store.Resource) policy.Resource {
	return policy.Resource{
		ID: r.ID, Name: r.Name, Address: r.Target, TCP: r.TCP, UDP: r.UDP, ICMP: r.ICMP, Domains: r.Domains, Virtual: Addresses(v.Org, r.Address),
		Health: r.Health,
	}
}

// subjects are the active nodes that a policy is for, sorted.
func (v *View) subjects(p *store.Policy) []identity.Node {
	ids := []string{p.Subject}
	switch p.SubjectKind {
	case SubjectPlatform:
		if !v.Org.PlatformDial {
			return nil
		}
		return []identity.Node{policy.Platform(v.Org.Name)}
	case "group":
		g := v.groups[p.Subject]
		if g == nil {
			return nil
		}
		ids = g.Members
	case SubjectPerson:
		ids = v.people[p.Subject]
	}
	out := make([]identity.Node, 0, len(ids))
	for _, id := range ids {
		if n := v.nodes[id]; n != nil && n.Status == store.Active {
			out = append(out, n.Identity())
		}
	}
	slices.SortFunc(out, func(a, b identity.Node) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID)) })
	return out
}

// prepare makes what is needed for what nodes are told.
func (v *View) prepare() {
	v.inForce = make(map[string][]policy.Rule)
	subjects := make(map[string][]identity.Node) // by whom policies are for: many are for the same
	for _, p := range v.policies {
		if p.Disabled {
			continue
		}
		by := p.SubjectKind + " " + p.Subject
		s, known := subjects[by]
		if !known {
			s = v.subjects(p)
			subjects[by] = s
		}
		if len(s) == 0 {
			continue
		}
		v.inForce[p.Resource] = append(v.inForce[p.Resource], policy.Rule{ID: p.ID, Name: p.Name, Resource: p.Resource, Subjects: s})
	}
	for _, n := range v.sorted {
		if n.Kind == identity.Gateway && n.Status == store.Active {
			v.gateways = append(v.gateways, n)
		}
	}
	v.prepareDigests()
}

// rules are the rules in force, by resource id. They are shared: nobody changes them.
func (v *View) rules() map[string][]policy.Rule {
	v.once.Do(v.prepare)
	return v.inForce
}

// Speaks reports whether a key speaks for a live node that has its rights.
func (v *View) Speaks(node string, key identity.KeyHash) bool { return v.good[key] == node }
