package registry

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/version"
	"sallyway/platform/audit"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// Sessions lists the live sessions as the gateways reported them.
func (r *Registry) Sessions(ctx context.Context, org string) ([]control.SessionRecord, error) {
	out := []control.SessionRecord{}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		nodes, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		names := make(map[string]string, len(nodes))
		for _, n := range nodes {
			names[n.ID] = n.Name
		}
		now := r.Now()
		for _, g := range nodes {
			beat, ok := r.Board.Get(g.ID)
			if !ok || g.Kind != identity.Gateway || now.Sub(beat.At) >= presenceTimeout {
				continue
			}
			for _, s := range beat.Sessions {
				if s.Peer.Org != org {
					continue // a gateway can not put anything into another organization's list
				}
				peer := cmp.Or(names[s.Peer.ID], s.Peer.ID)
				if s.Peer.Kind == identity.Platform {
					peer = view.SubjectPlatform
				}
				out = append(out, control.SessionRecord{Gateway: g.Name, Peer: peer, SessionReport: s})
			}
		}
		slices.SortFunc(out, func(a, b control.SessionRecord) int {
			return cmp.Or(cmp.Compare(a.Gateway, b.Gateway), cmp.Compare(a.Peer, b.Peer), a.Since.Compare(b.Since))
		})
		return nil
	})
	return out, err
}

// EndSessions has the gateways end the sessions of a client or gateway that have begun until now. Its key stays good.
func (r *Registry) EndSessions(ctx context.Context, org, peer string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		n, err := c.FindNode(ctx, org, identity.Client, peer)
		if errors.Is(err, store.ErrNotFound) {
			n, err = c.FindNode(ctx, org, identity.Gateway, peer)
		}
		if errors.Is(err, store.ErrNotFound) && peer == view.SubjectPlatform {
			return Conflict("sallyway organization update "+org+" --platform-dial off",
				"the platform's own sessions end by themselves, a minute after their last use; at once, and for good, when the organization does not let the platform dial")
		}
		if err != nil {
			return notFound(err, "client", peer, org)
		}
		if err := c.PutSessionEnd(ctx, &store.SessionEnd{Org: org, Node: n.ID, Before: c.now}); err != nil {
			return err
		}
		if err := c.audit(ctx, org, "session.end", n.Identity().String(), audit.OK, map[string]any{"name": n.Name, "before": c.now.Format(time.RFC3339Nano)}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
}

// Status is an overview of an organization.
func (r *Registry) Status(ctx context.Context, org string) (*control.OrgStatus, error) {
	out := &control.OrgStatus{
		Organization: org, Version: version.Get().Version,
		Relays: []control.NodeRecord{}, Gateways: []control.NodeRecord{}, Clients: []control.NodeRecord{},
	}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		nodes, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		var l lookups
		for _, n := range nodes {
			rec, err := r.recordBy(ctx, tx, o, n, &l)
			if err != nil {
				return err
			}
			switch n.Kind {
			case identity.Relay:
				out.Relays = append(out.Relays, *rec)
			case identity.Gateway:
				out.Gateways = append(out.Gateways, *rec)
			case identity.Client:
				out.Clients = append(out.Clients, *rec)
			}
		}
		resources, err := tx.Resources(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		policies, err := tx.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		out.Resources, out.Policies = len(resources), len(policies)
		return nil
	})
	if err != nil {
		return nil, err
	}
	sessions, err := r.Sessions(ctx, org)
	out.Sessions = len(sessions)
	return out, err
}
