package registry

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// DefaultOrg is made at the first start.
const DefaultOrg = "default"

// defaultRange is the virtual IPv4 range of an organization that asks for none: a part of 100.64.0.0/10 (RFC 6598) that few carriers use.
var defaultRange = netip.MustParsePrefix("100.112.0.0/12")

// firstAddress is the first index into a range that is handed out: those below are for hosts' own use (resolver, gateway).
const firstAddress = 16

// reserved can not be names of organizations: with them the SPIFFE trust domains of an organization and of the platform would nest.
var reserved = []string{"shared", "platform"}

// kinds of leaves that an organization issues; the platform itself issues for relays only.
var (
	orgKinds    = []identity.Kind{identity.Relay, identity.Gateway, identity.Client, identity.Site, identity.Platform, identity.Policy}
	sharedKinds = []identity.Kind{identity.Relay, identity.Policy}
)

func authorityLabel(org, kind string, generation int) string {
	return fmt.Sprintf("authority/%s/%s/%d", org, kind, generation)
}

// Bootstrap makes what a new database lacks: the platform itself and the organization default; and what one of an older version does. It says whether this was the first start.
func (r *Registry) Bootstrap(ctx context.Context) (first bool, err error) {
	err = r.update(ctx, func(c *change) error {
		if _, err := c.Org(ctx, identity.SharedOrg); err == nil {
			return c.completeAuthorities(ctx)
		} else if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		first = true
		if err := c.createOrg(ctx, identity.SharedOrg, nil, nil); err != nil {
			return err
		}
		ca, err := pki.NewServerCA(c.now)
		if err != nil {
			return err
		}
		if _, err := c.insert(ctx, &rotating{org: identity.SharedOrg}, pki.KindTLS, store.Current, ca.Certificate.Raw, ca.Key); err != nil {
			return err
		}
		return c.createOrg(ctx, DefaultOrg, nil, nil)
	})
	if err != nil {
		return false, err
	}
	return first, r.loadAccessKey(ctx)
}

// createOrg makes an organization with its PKI. root is one whose key is kept offline; nil: the platform makes it and keeps the key.
func (c *change) createOrg(ctx context.Context, name string, ranges []netip.Prefix, root *x509.Certificate) error {
	o := &store.Org{Name: name, Range4: defaultRange, Range6: newULA(), Created: c.now, Version: uint64(c.now.Unix()), NextAddress: firstAddress, Direct: true, PlatformDial: true}
	if err := setRanges(o, ranges); err != nil {
		return err
	}
	if err := c.InsertOrg(ctx, o); err != nil {
		if errors.Is(err, store.ErrExists) {
			return refuse(http.StatusConflict, control.CodeConflict, "choose another name", "there already is an organization %q", name)
		}
		return err
	}
	top := &pki.Authority{Certificate: root}
	if root == nil {
		var err error
		if top, err = pki.NewRoot(name, c.now); err != nil {
			return err
		}
	}
	all := &rotating{org: name}
	a, err := c.insert(ctx, all, pki.KindRoot, store.Current, top.Certificate.Raw, top.Key)
	if err != nil {
		return err
	}
	made, err := c.nextIntermediates(ctx, all, a, all.kinds()...)
	if err != nil {
		return err
	}
	for _, a := range made {
		if a.State == store.Next { // nobody has to hear of it
			a.State, a.Announced = store.Current, nil
			if err := c.UpdateAuthority(ctx, a); err != nil {
				return err
			}
		}
	}
	if err := c.putSSHAuthority(ctx, name); err != nil {
		return err
	}
	return c.audit(ctx, name, "organization.create", name, audit.OK, map[string]any{
		"range4": o.Range4.String(), "range6": o.Range6.String(), "root_key": identity.CertificateKeyHash(top.Certificate).String(), "offline_root": root != nil,
	})
}

// putSSHAuthority makes the SSH CA of an organization. Where other CAs have their certificate it has its public key.
func (c *change) putSSHAuthority(ctx context.Context, org string) error {
	ca, err := pki.NewSSHAuthority()
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(ca.Key.Public())
	if err != nil {
		return err
	}
	_, err = c.insert(ctx, &rotating{org: org}, pki.KindSSH, store.Current, public, ca.Key)
	return err
}

// completeAuthorities makes the SSH CA of organizations that were made before there was one.
func (c *change) completeAuthorities(ctx context.Context) error {
	orgs, err := c.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	for _, o := range orgs {
		as, err := c.Authorities(ctx, o.Name)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(as, func(a *store.Authority) bool { return a.Kind == pki.KindSSH }) {
			continue
		}
		if err := c.putSSHAuthority(ctx, o.Name); err != nil {
			return err
		}
		if err := c.audit(ctx, o.Name, "organization.ssh-ca", o.Name, audit.OK, nil); err != nil {
			return err
		}
		if err := c.bump(ctx, o.Name); err != nil {
			return err
		}
	}
	return nil
}

// sshAuthority opens the SSH CA of an organization that issues.
func (r *Registry) sshAuthority(ctx context.Context, tx store.Tx, org string) (*pki.SSHAuthority, error) {
	ca, err := r.Authority(ctx, tx, org, pki.KindSSH)
	if err != nil {
		return nil, err
	}
	return pki.OpenSSHAuthority(ca.Key)
}

// Authority opens the CA of a kind that issues; that of an SSH CA has no certificate. It refuses while the owner of an offline root has
// not signed one.
func (r *Registry) Authority(ctx context.Context, tx store.Tx, org, kind string) (*pki.Authority, error) {
	all, err := tx.Authorities(ctx, org)
	if err != nil {
		return nil, err
	}
	o := &rotating{org, all}
	a := o.in(kind, store.Current)
	switch {
	case a == nil && o.in(kind, store.Requested) != nil:
		return nil, refuse(http.StatusConflict, control.CodeConflict, "where the root's key is: sallyway --org "+org+" ca sign --root-key FILE",
			"the owner of the root of organization %s has not signed its %s CA yet", org, kind)
	case a == nil:
		return nil, fmt.Errorf("organization %s has no CA for %s: %w", org, kind, store.ErrNotFound)
	}
	ca, err := r.open(a)
	if err == nil && ca.Key == nil {
		err = fmt.Errorf("the key of the %s CA of %s is not kept here", kind, org)
	}
	return ca, err
}

// newULA is a random /48 (RFC 4193 §3.2.2).
func newULA() netip.Prefix {
	var b [16]byte
	_, _ = rand.Read(b[1:6]) // never fails (crypto/rand)
	b[0] = 0xfd
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}

var ula = netip.MustParsePrefix("fc00::/7")

// setRanges takes over what a user chose.
func setRanges(o *store.Org, ranges []netip.Prefix) error {
	if len(ranges) > 2 {
		return invalid("body.range", "give one IPv4 and one IPv6 prefix", "%d virtual ranges, at most two", len(ranges))
	}
	seen4, seen6 := false, false
	for _, p := range ranges {
		p = p.Masked()
		switch {
		case !p.IsValid():
			return invalid("body.range", "such as 100.112.0.0/12", "a virtual range is not a prefix")
		case p.Addr().Is4() && !seen4 && p.Bits() >= 8 && p.Bits() <= 24 && !p.Addr().IsMulticast() && !p.Addr().IsLoopback() && p.Addr().As4()[0] != 0:
			o.Range4, seen4 = p, true
		case p.Addr().Is6() && !seen6 && ula.Contains(p.Addr()) && p.Bits() >= 32 && p.Bits() <= 96:
			o.Range6, seen6 = p, true
		default:
			return invalid("body.range", "give one IPv4 prefix from /8 to /24 and one IPv6 prefix in fc00::/7 from /32 to /96",
				"virtual range %v can not be used", p)
		}
	}
	return nil
}

// address hands out the next index into an organization's ranges. Indexes are reused only when all have been used once.
func (c *change) address(ctx context.Context, org string) (uint32, error) {
	o, err := c.Org(ctx, org)
	if err != nil {
		return 0, err
	}
	size := uint32(1) << (32 - o.Range4.Bits()) // /8 at the largest: no overflow
	if o.NextAddress < size-1 {                 // the last one is the broadcast address
		o.NextAddress++
		return o.NextAddress - 1, c.UpdateOrg(ctx, o)
	}
	used := make(map[uint32]bool)
	nodes, err := c.Nodes(ctx, org, "", store.Page{})
	if err != nil {
		return 0, err
	}
	for _, n := range nodes {
		used[n.Address] = true
	}
	resources, err := c.Resources(ctx, org, store.Page{})
	if err != nil {
		return 0, err
	}
	for _, v := range resources {
		used[v.Address] = true
	}
	for i := uint32(firstAddress); i < size-1; i++ {
		if !used[i] {
			return i, nil
		}
	}
	return 0, refuse(http.StatusConflict, control.CodeConflict, "delete nodes or resources that are not needed, or use an organization with a larger range",
		"the virtual range %v of organization %s is used up", o.Range4, org)
}

// CreateOrg makes an organization.
func (r *Registry) CreateOrg(ctx context.Context, req control.CreateOrganization) (*control.Organization, error) {
	if err := checkName("organization", req.Name); err != nil {
		return nil, err
	}
	if slices.Contains(reserved, req.Name) {
		return nil, invalid("body.name", "choose another name", "the name %q is reserved", req.Name)
	}
	var root *x509.Certificate
	if req.Root != "" {
		certs, err := identity.DecodeCertificates([]byte(req.Root))
		if err != nil || len(certs) != 1 {
			return nil, invalid("body.root", "one certificate, PEM", "the root is not a certificate")
		}
		root = certs[0]
		if err := pki.CheckRoot(root, req.Name, nil, r.Now()); err != nil {
			return nil, invalid("body.root", "make it with `sallyway organization create NAME --offline-root`", "root: %v", err)
		}
	}
	var out *control.Organization
	err := r.update(ctx, func(c *change) error {
		if err := c.createOrg(ctx, req.Name, req.Range, root); err != nil {
			return err
		}
		o, err := c.Org(ctx, req.Name)
		if err != nil {
			return err
		}
		if out, err = orgRecord(ctx, c.Tx, o); err != nil {
			return err
		}
		return c.bump(ctx, req.Name)
	})
	return out, err
}

func orgRecord(ctx context.Context, tx store.Tx, o *store.Org) (*control.Organization, error) {
	out := &control.Organization{Name: o.Name, Range: []netip.Prefix{o.Range4, o.Range6}, Created: o.Created, Direct: control.Direct{On: o.Direct, Private: o.DirectPrivate}, PlatformDial: o.PlatformDial}
	return out, regionRecord(ctx, tx, out)
}

// Org returns an organization.
func (r *Registry) Org(ctx context.Context, name string) (*control.Organization, error) {
	var out *control.Organization
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, name)
		if err == nil {
			out, err = orgRecord(ctx, tx, o)
		}
		return err
	})
	return out, err
}

// Orgs lists the organizations.
func (r *Registry) Orgs(ctx context.Context, p store.Page) (*control.List[control.Organization], error) {
	out := &control.List[control.Organization]{Items: []control.Organization{}}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		q := more(p)
		if q.Limit > 0 {
			q.Limit++ // the platform itself is not shown
		}
		os, err := tx.Orgs(ctx, q)
		if err != nil {
			return err
		}
		os = slices.DeleteFunc(os, func(o *store.Org) bool { return o.Name == identity.SharedOrg })
		os, out.NextCursor = trim(os, p.Limit, func(o *store.Org) string { return o.Name })
		for _, o := range os {
			rec, err := orgRecord(ctx, tx, o)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// UpdateOrg changes what an organization allows, and its virtual ranges, which is possible only while it has neither nodes nor resources.
func (r *Registry) UpdateOrg(ctx context.Context, name string, req control.UpdateOrganization) (*control.Organization, error) {
	var out *control.Organization
	err := r.update(ctx, func(c *change) error {
		o, err := c.org(ctx, name)
		if err != nil {
			return err
		}
		if len(req.Range) > 0 {
			if err := c.mustBeEmpty(ctx, name, "its virtual range can not change while it has"); err != nil {
				return err
			}
			if err := setRanges(o, req.Range); err != nil {
				return err
			}
			o.NextAddress = firstAddress
		}
		if req.Direct != nil {
			o.Direct = *req.Direct
		}
		if req.DirectPrivate != nil {
			o.DirectPrivate = *req.DirectPrivate
		}
		if err := c.setPlatformDial(ctx, o, req.PlatformDial); err != nil {
			return err
		}
		if err := c.UpdateOrg(ctx, o); err != nil {
			return err
		}
		detail := map[string]any{
			"range4": o.Range4.String(), "range6": o.Range6.String(), "direct": o.Direct, "direct_private": o.DirectPrivate, "platform_dial": o.PlatformDial,
		}
		if req.RelayRegions != nil {
			if err := c.setRelayRegions(ctx, name, *req.RelayRegions, detail); err != nil {
				return err
			}
		}
		if out, err = orgRecord(ctx, c.Tx, o); err != nil {
			return err
		}
		if err := c.audit(ctx, name, "organization.update", name, audit.OK, detail); err != nil {
			return err
		}
		return c.bump(ctx, name)
	})
	return out, err
}

func (c *change) mustBeEmpty(ctx context.Context, org, why string) error {
	nodes, err := c.Nodes(ctx, org, "", store.Page{})
	if err != nil {
		return err
	}
	resources, err := c.Resources(ctx, org, store.Page{})
	if err != nil {
		return err
	}
	if len(nodes)+len(resources) > 0 {
		return refuse(http.StatusConflict, control.CodeConflict, "delete its relays, gateways, clients and resources first",
			"organization %s: %s %d nodes and %d resources", org, why, len(nodes), len(resources))
	}
	return nil
}

// DeleteOrg deletes an empty organization. Its audit chain stays.
func (r *Registry) DeleteOrg(ctx context.Context, name string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, name); err != nil {
			return err
		}
		if err := c.mustBeEmpty(ctx, name, "it can not be deleted while it has"); err != nil {
			return err
		}
		for _, chain := range []string{name, identity.SharedOrg} {
			if err := c.audit(ctx, chain, "organization.delete", name, audit.OK, nil); err != nil {
				return err
			}
		}
		if err := c.DeleteOrg(ctx, name); err != nil {
			return err
		}
		return c.bump(ctx, identity.SharedOrg)
	})
}

// OrgNames lists every organization, with identity.SharedOrg.
func (r *Registry) OrgNames(ctx context.Context) ([]string, error) {
	var out []string
	err := r.Store.View(ctx, func(tx store.Tx) error {
		os, err := tx.Orgs(ctx, store.Page{})
		for _, o := range os {
			out = append(out, o.Name)
		}
		return err
	})
	return out, err
}

// newPolicyLeaf makes a fresh key with a certificate of kind policy, and returns them with the certificate of their CA.
func (r *Registry) newPolicyLeaf(ctx context.Context, org string, life time.Duration) (*pki.Authority, *x509.Certificate, error) {
	var ca *pki.Authority
	if err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		ca, err = r.Authority(ctx, tx, org, string(identity.Policy))
		return err
	}); err != nil {
		return nil, nil, err
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, nil, err
	}
	leaf, err := ca.Leaf(identity.Node{Org: org, Kind: identity.Policy, ID: identity.NewID(identity.Policy)}, key.Public(), r.Now(), life)
	if err != nil {
		return nil, nil, err
	}
	return &pki.Authority{Certificate: leaf, Key: key}, ca.Certificate, nil
}
