package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// wishesMost is how many relays a node may name for each wish.
const wishesMost = 64

func checkLabel(field, what, s string) error {
	if s != "" && !identity.ValidLabel(s) {
		return invalid("body."+field, "use lower-case letters, digits and hyphens, such as eu-central, or leave it empty", "%s %.80q is not a label in lower case (a-z, 0-9, hyphen; at most 63)", what, s)
	}
	return nil
}

// created are the places of a new node as a change of one that has none.
func created(p control.Places) control.UpdatePlaces {
	text := func(s string) *string {
		if s == "" {
			return nil
		}
		return &s
	}
	names := func(l []string) *[]string {
		if len(l) == 0 {
			return nil
		}
		return &l
	}
	return control.UpdatePlaces{
		Region: text(p.Region), FailureDomain: text(p.FailureDomain),
		PinRelays: names(p.PinRelays), ExcludeRelays: names(p.ExcludeRelays), PreferRelays: names(p.PreferRelays),
	}
}

// setPlaces changes where a node is and which relays it is to have.
func (c *change) setPlaces(ctx context.Context, n *store.Node, u control.UpdatePlaces, detail map[string]any) error {
	if u == (control.UpdatePlaces{}) {
		return nil
	}
	if n.Kind == identity.Relay && (u.PinRelays != nil || u.ExcludeRelays != nil || u.PreferRelays != nil) {
		return invalid("body.pin_relays", "set it on the gateways or clients that are to have relays", "a relay has no relays to pin, exclude or prefer")
	}
	if n.Kind != identity.Relay && u.FailureDomain != nil && *u.FailureDomain != "" {
		return invalid("body.failure_domain", "leave it out", "only relays have a failure domain")
	}
	w, err := c.NodeWishes(ctx, n.ID)
	if err != nil {
		return err
	}
	w.Node = n.ID
	for _, f := range []struct {
		field, what string
		from        *string
		into        *string
	}{{"region", "region", u.Region, &w.Region}, {"failure_domain", "failure domain", u.FailureDomain, &w.Domain}} {
		if f.from == nil {
			continue
		}
		if err := checkLabel(f.field, f.what, *f.from); err != nil {
			return err
		}
		*f.into, detail[f.field] = *f.from, *f.from
	}
	for _, f := range []struct {
		field string
		from  *[]string
		into  *[]string
	}{{"pin_relays", u.PinRelays, &w.Pin}, {"exclude_relays", u.ExcludeRelays, &w.Exclude}, {"prefer_relays", u.PreferRelays, &w.Prefer}} {
		if f.from == nil {
			continue
		}
		if *f.into, err = c.relayIDs(ctx, n.Org, f.field, *f.from, *f.into); err != nil {
			return err
		}
		detail[f.field] = *f.from
	}
	for _, id := range w.Pin {
		if slices.Contains(w.Exclude, id) && (u.PinRelays != nil || u.ExcludeRelays != nil) {
			names, err := c.r.relayNames(ctx, c.Tx, []string{id})
			if err != nil {
				return err
			}
			return invalid("body.exclude_relays", "take it out of one of the two", "relay %s is pinned and excluded", names[0])
		}
	}
	return c.PutWishes(ctx, w)
}

// relayIDs finds relays of an organization and shared ones by name or id. What is there already may stay, though it be deleted.
func (c *change) relayIDs(ctx context.Context, org, field string, names, had []string) ([]string, error) {
	if len(names) > wishesMost {
		return nil, invalid("body."+field, "", "%d relays, at most %d", len(names), wishesMost)
	}
	ids := []string{}
	for _, name := range names {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		n, err := c.FindNode(ctx, org, identity.Relay, name)
		if errors.Is(err, store.ErrNotFound) && org != identity.SharedOrg {
			n, err = c.FindNode(ctx, identity.SharedOrg, identity.Relay, name)
		}
		id := ""
		switch {
		case err == nil:
			id = n.ID
		case !errors.Is(err, store.ErrNotFound):
			return nil, err
		default:
			if id, err = c.goneRelay(ctx, had, name); err != nil {
				return nil, err
			}
		}
		if id == "" {
			there, err := c.relaysThere(ctx, org)
			if err != nil {
				return nil, err
			}
			remedy := "make one first: sallyway relay create NAME --host HOST"
			if len(there) > 0 {
				remedy = "relays that there are: " + strings.Join(there, ", ")
			}
			return nil, invalid("body."+field, remedy, "organization %s has no relay %.80q, and the platform shares none of that name", org, name)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// goneRelay finds a deleted relay among those that were named before.
func (c *change) goneRelay(ctx context.Context, had []string, name string) (string, error) {
	names, err := c.r.relayNames(ctx, c.Tx, had)
	if err != nil {
		return "", err
	}
	for i, id := range had {
		if id == name || names[i] == name {
			return id, nil
		}
	}
	return "", nil
}

// relaysThere are the names of the relays that a node of an organization can be given, sorted.
func (c *change) relaysThere(ctx context.Context, org string) ([]string, error) {
	var out []string
	for _, o := range []string{org, identity.SharedOrg} {
		ns, err := c.Nodes(ctx, o, identity.Relay, store.Page{Limit: wishesMost})
		if err != nil {
			return nil, err
		}
		for _, n := range ns {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// relayNames are the names of relays, deleted ones included; what is purged keeps its id.
func (r *Registry) relayNames(ctx context.Context, tx store.Tx, ids []string) ([]string, error) {
	out := make([]string, len(ids))
	for i, id := range ids {
		n, err := tx.Node(ctx, id)
		switch {
		case err == nil:
			out[i] = n.Name
		case errors.Is(err, store.ErrNotFound):
			out[i] = id
		default:
			return nil, err
		}
	}
	return out, nil
}

// fillPlaces fills in a record where the node is, and what was found of a relay from outside.
func (r *Registry) fillPlaces(ctx context.Context, tx store.Tx, n *store.Node, rec *control.NodeRecord, l *lookups) (err error) {
	if l.wishes == nil {
		if l.wishes, err = tx.Wishes(ctx, n.Org); err != nil {
			return err
		}
	}
	if w := l.wishes[n.ID]; w != nil {
		rec.Region, rec.FailureDomain = w.Region, w.Domain
		if rec.PinRelays, err = r.relayNames(ctx, tx, w.Pin); err != nil {
			return err
		}
		if rec.ExcludeRelays, err = r.relayNames(ctx, tx, w.Exclude); err != nil {
			return err
		}
		if rec.PreferRelays, err = r.relayNames(ctx, tx, w.Prefer); err != nil {
			return err
		}
	}
	if n.Kind != identity.Relay {
		return nil
	}
	if l.trips == nil {
		if l.trips, err = r.roundTrips(ctx, tx, n.Org); err != nil {
			return err
		}
	}
	rec.RTT = l.trips[n.ID].Median
	now := r.Now()
	if o, ok := r.Board.Outside(n.ID, now); ok {
		rec.Outside = &o
		if rec.RTT == 0 {
			rec.RTT = o.RTT
		}
		if why, remedy := r.Board.Doubt(n.ID, now); why != "" && n.Status == store.Active {
			if remedy != "" {
				why += ": " + remedy
			}
			rec.Problems = append(slices.Clone(rec.Problems), why)
		}
	}
	return nil
}

// ErrOtherRegion says that a database belongs to a deployment of another region.
var ErrOtherRegion = errors.New("the database is of another region")

// BindRegion says in which region this deployment is. A database without a region takes the name, and so do its organizations; one that has another is
// refused with both names (ErrOtherRegion), unless adopt is set: then the database and its organizations move to this one. An empty name keeps what is.
func (r *Registry) BindRegion(ctx context.Context, name string, adopt bool) error {
	if err := checkLabel("region", "region", name); err != nil {
		return err
	}
	if err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		r.Region, err = view.Region(ctx, tx)
		return err
	}); err != nil {
		return err
	}
	if name == "" || name == r.Region {
		return nil
	}
	was := r.Region
	if was != "" && !adopt {
		return fmt.Errorf("%w: it is of %s, and this deployment is to be %s: every region has a database of its own; start it with --region %s, or with the database of %s", ErrOtherRegion, was, name, was, name)
	}
	err := r.update(ctx, func(c *change) error {
		if err := c.PutMeta(ctx, view.RegionMeta, []byte(name)); err != nil {
			return err
		}
		orgs, err := c.Orgs(ctx, store.Page{})
		if err != nil {
			return err
		}
		for _, o := range orgs {
			if o.Name == identity.SharedOrg {
				continue
			}
			region, err := c.OrgRegion(ctx, o.Name)
			if err != nil {
				return err
			}
			region.Region = name
			if err := c.PutOrgRegion(ctx, region); err != nil {
				return err
			}
		}
		if err := c.audit(ctx, identity.SharedOrg, "platform.region", name, audit.OK, map[string]any{"before": was}); err != nil {
			return err
		}
		return c.bump(ctx, identity.SharedOrg)
	})
	if err == nil {
		r.Region = name
	}
	return err
}

// regionRecord fills in the regions of an organization.
func regionRecord(ctx context.Context, tx store.Tx, o *control.Organization) error {
	r, err := tx.OrgRegion(ctx, o.Name)
	if err != nil {
		return err
	}
	o.Region, o.RelayRegions = r.Region, r.Relays
	return nil
}

// setRelayRegions says in which regions shared relays may serve an organization.
func (c *change) setRelayRegions(ctx context.Context, org string, regions []string, detail map[string]any) error {
	list := []string{}
	for _, s := range regions {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		if err := checkLabel("relay_regions", "region", s); err != nil {
			return err
		}
		list = append(list, s)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	sharing, err := view.LoadSharing(ctx, c.Tx)
	if err != nil {
		return err
	}
	relays, err := c.Nodes(ctx, identity.SharedOrg, identity.Relay, store.Page{})
	if err != nil {
		return err
	}
	known := []string{}
	for _, n := range relays {
		if s := sharing.Region(n.ID); s != "" {
			known = append(known, s)
		}
	}
	slices.Sort(known)
	known = slices.Compact(known)
	for _, s := range list {
		// A mistyped region would leave the organization without shared relays.
		if len(known) > 0 && !slices.Contains(known, s) {
			return invalid("body.relay_regions", "regions that shared relays are in: "+strings.Join(known, ", "), "no shared relay is in region %s", s)
		}
	}
	r, err := c.OrgRegion(ctx, org)
	if err != nil {
		return err
	}
	r.Org, r.Relays = org, list
	detail["relay_regions"] = list
	if err := c.PutOrgRegion(ctx, r); err != nil {
		return err
	}
	return c.bump(ctx, identity.SharedOrg) // shared relays learn whom they serve
}

// mayShare refuses a shared relay of a region that an organization does not use.
func (c *change) mayShare(ctx context.Context, org string, relay *store.Node) error {
	if relay.Org != identity.SharedOrg || org == identity.SharedOrg {
		return nil
	}
	region, err := c.OrgRegion(ctx, org)
	if err != nil {
		return err
	}
	sharing, err := view.LoadSharing(ctx, c.Tx)
	if err != nil || sharing.Allows(region.Relays, relay.ID) {
		return err
	}
	return refuse(http.StatusConflict, control.CodeConflict, "allow its region, or use another relay: sallyway organization update --regions "+strings.Join(append(slices.Clone(region.Relays), sharing.Region(relay.ID)), ","),
		"organization %s uses shared relays in %s only, and %s is in %s", org, strings.Join(region.Relays, ", "), relay.Name, orUnknown(sharing.Region(relay.ID)))
}

func orUnknown(region string) string {
	if region == "" {
		return "no named region"
	}
	return region
}
