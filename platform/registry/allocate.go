package registry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/allocation"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// places is what this process remembers of decisions about relays, by organization: what waits to be better for long enough, and the reasons.
// It is lost with the process, which delays what is only better. The zero value is empty.
type places struct {
	mu     sync.Mutex
	memory map[string]*allocation.Memory // guarded by mu
	why    map[string]map[string]allocation.Assignment
}

func (p *places) recall(org string) *allocation.Memory {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.memory[org]
}

func (p *places) remember(org string, d *decision) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.memory == nil {
		p.memory, p.why = make(map[string]*allocation.Memory), make(map[string]map[string]allocation.Assignment)
	}
	p.memory[org], p.why[org] = d.memory, d.want
}

// reasons says of each relay of a gateway why it is assigned, as long as relays are what the newest decision here was; nil is not known here: another
// platform on the same database decides, or this one has just started.
func (p *places) reasons(org, gateway string, relays []string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.why[org][gateway]; len(a.Why) > 0 && slices.Equal(a.Relays, relays) {
		return a.Why
	}
	return nil
}

// decision is what allocation says of an organization.
type decision struct {
	want    map[string]allocation.Assignment
	current map[string][]string
	memory  *allocation.Memory
	same    bool // nothing changes
}

// Allocate assigns relays to org's gateways by what is known of them now. started is when this process began to listen for heartbeats:
// what was not heard since may just not have had the time.
func (r *Registry) Allocate(ctx context.Context, org string, started time.Time) error {
	if org == identity.SharedOrg {
		return nil
	}
	d, err := r.decide(ctx, r.Store.View, org, started)
	if err != nil {
		return err
	}
	if !d.same {
		err = r.update(ctx, func(c *change) error {
			// Once more inside of the transaction: what was read before may be old.
			in := func(_ context.Context, fn func(store.Tx) error) error { return fn(c.Tx) }
			if d, err = r.decide(ctx, in, org, started); err != nil || d.same {
				return err
			}
			for gateway, a := range d.want {
				if slices.Equal(d.current[gateway], a.Relays) {
					continue
				}
				if err := c.PutAssignment(ctx, gateway, a.Relays); err != nil {
					return err
				}
				r.Log.Info("relays assigned", "org", org, "gateway", gateway, "relays", a.Relays, "before", d.current[gateway], "why", a.Why)
			}
			return c.bump(ctx, org)
		})
		if err != nil {
			return err
		}
	}
	r.places.remember(org, d)
	return nil
}

func (r *Registry) decide(ctx context.Context, read func(context.Context, func(store.Tx) error) error, org string, started time.Time) (*decision, error) {
	d := new(decision)
	err := read(ctx, func(tx store.Tx) error {
		in, err := r.facts(ctx, tx, org, started)
		if err != nil {
			return err
		}
		d.current = in.Current
		d.want, d.memory = allocation.Decide(*in, r.places.recall(org))
		d.same = true
		for g, a := range d.want {
			d.same = d.same && slices.Equal(a.Relays, d.current[g])
		}
		return nil
	})
	return d, err
}

// facts are what is known of an organization's gateways, and of the relays that they may have or wish.
func (r *Registry) facts(ctx context.Context, tx store.Tx, org string, started time.Time) (*allocation.Input, error) {
	relays, err := tx.Nodes(ctx, org, identity.Relay, store.Page{})
	if err != nil {
		return nil, err
	}
	gateways, err := tx.Nodes(ctx, org, identity.Gateway, store.Page{})
	if err != nil {
		return nil, err
	}
	shared, err := tx.Nodes(ctx, identity.SharedOrg, identity.Relay, store.Page{})
	if err != nil {
		return nil, err
	}
	in := &allocation.Input{Now: r.Now()}
	if in.Current, err = tx.Assignments(ctx, org); err != nil {
		return nil, err
	}
	wishes, err := tx.Wishes(ctx, org)
	if err != nil {
		return nil, err
	}
	region, err := tx.OrgRegion(ctx, org)
	if err != nil {
		return nil, err
	}
	sharing, err := view.LoadSharing(ctx, tx)
	if err != nil {
		return nil, err
	}
	there := make(map[string]bool)
	for _, n := range slices.Concat(relays, gateways, shared) {
		switch {
		case n.Kind == identity.Gateway && n.Status == store.Active:
			in.Gateways = append(in.Gateways, r.wants(n, wishes[n.ID]))
		case n.Kind == identity.Relay && !n.Enrolled.IsZero():
			c := r.candidate(n, started)
			if w := wishes[n.ID]; w != nil {
				c.Region, c.Domain = w.Region, w.Domain
			}
			if n.Org == identity.SharedOrg {
				c.Region, c.Domain = sharing.Region(n.ID), sharing.Domain(n.ID)
				if c.Out == "" && !sharing.Allows(region.Relays, n.ID) {
					c.Out = fmt.Sprintf("in %s, and the organization allows shared relays in %s only", orUnknown(c.Region), strings.Join(region.Relays, ", "))
				}
			}
			in.Relays, there[n.ID] = append(in.Relays, c), true
		}
	}
	return in, r.gone(ctx, tx, in, there)
}

// gone adds relays that gateways have or wish although there are none any more, for the sake of reasons.
func (r *Registry) gone(ctx context.Context, tx store.Tx, in *allocation.Input, there map[string]bool) error {
	var ids []string
	for i := range in.Gateways {
		g := &in.Gateways[i]
		for _, id := range slices.Concat(g.Pin, in.Current[g.ID]) {
			if !there[id] {
				ids, there[id] = append(ids, id), true
			}
		}
	}
	for _, id := range ids {
		c := allocation.Relay{ID: id, Name: id, Out: allocation.Deleted}
		n, err := tx.Node(ctx, id)
		switch {
		case err == nil && n.Deleted.IsZero():
			c.Name, c.Out = n.Name, "not enrolled yet"
		case err == nil:
			c.Name = n.Name
		case !errors.Is(err, store.ErrNotFound):
			return err
		}
		in.Relays = append(in.Relays, c)
	}
	return nil
}

// wants is what allocation is told of a gateway.
func (r *Registry) wants(n *store.Node, w *store.Wishes) allocation.Gateway {
	g := allocation.Gateway{ID: n.ID}
	if w != nil {
		g.Region, g.Pin, g.Exclude, g.Prefer = w.Region, w.Pin, w.Exclude, w.Prefer
	}
	if beat, ok := r.Board.Get(n.ID); ok {
		g.RTT = beat.RelayRTT
	}
	return g
}

// candidate is what allocation is told of a relay.
func (r *Registry) candidate(n *store.Node, started time.Time) allocation.Relay {
	now := r.Now()
	c := allocation.Relay{ID: n.ID, Name: n.Name}
	switch n.Status {
	case store.Disabled:
		c.Out = allocation.Disabled
		return c
	case store.Revoked:
		c.Out = "revoked"
		return c
	}
	if why, _ := r.Board.Doubt(n.ID, now); why != "" {
		c.Doubt = why
	}
	switch r.Board.Said(n, now) {
	case control.StateHealthy:
		c.Healthy = true
	case control.StateDegraded:
		c.Degraded = true
	case control.StateDraining:
		c.Draining = true
	case control.StateUnreachable:
		// It became unreachable when its last heartbeat turned too old, but nobody listened before started.
		seen := r.Board.LastSeen(n)
		if seen.Before(started) {
			seen = started
		}
		c.Silent = max(now.Sub(seen)-presenceTimeout, 1)
		if n.Draining {
			c.Draining = true
		}
	}
	if beat, ok := r.Board.Get(n.ID); ok {
		// In steps of a place, so that noise does not decide between equals.
		c.Load = math.Floor(beat.Load["bytes_per_second"]/bytesPerPlace + beat.Load["allocations"]/allocationsPerPlace)
	}
	return c
}

// What a relay carries counts like a gateway more for each of these.
const (
	bytesPerPlace       = 12.5e6 // bytes per second: 100 Mbit/s
	allocationsPerPlace = 50
)
