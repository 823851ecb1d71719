package store

import (
	"context"
	"errors"
)

func scanWishes(r row) (*Wishes, error) {
	var w Wishes
	return &w, r.Scan(&w.Node, &w.Region, &w.Domain, list[[]string]{&w.Pin}, list[[]string]{&w.Exclude}, list[[]string]{&w.Prefer})
}

func (t *sqlTx) PutWishes(ctx context.Context, w *Wishes) error {
	return t.exec(ctx, true, `INSERT INTO node_wishes (node, region, failure_domain, pin, exclude, prefer) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (node) DO UPDATE SET region = excluded.region, failure_domain = excluded.failure_domain, pin = excluded.pin,
		exclude = excluded.exclude, prefer = excluded.prefer`, w.Node, w.Region, w.Domain, encode(w.Pin), encode(w.Exclude), encode(w.Prefer))
}

func (t *sqlTx) Wishes(ctx context.Context, org string) (map[string]*Wishes, error) {
	rows, err := many(ctx, t, scanWishes, `SELECT w.node, w.region, w.failure_domain, w.pin, w.exclude, w.prefer
		FROM node_wishes w JOIN nodes n ON n.id = w.node WHERE n.org = ?`, org)
	out := make(map[string]*Wishes, len(rows))
	for _, w := range rows {
		out[w.Node] = w
	}
	return out, err
}

func (t *sqlTx) NodeWishes(ctx context.Context, node string) (*Wishes, error) {
	w, err := one(ctx, t, scanWishes, `SELECT node, region, failure_domain, pin, exclude, prefer FROM node_wishes WHERE node = ?`, node)
	if errors.Is(err, ErrNotFound) {
		return &Wishes{Node: node}, nil
	}
	return w, err
}

func (t *sqlTx) PutOrgRegion(ctx context.Context, r *OrgRegion) error {
	return t.exec(ctx, true, `INSERT INTO org_regions (org, region, relays) VALUES (?, ?, ?)
		ON CONFLICT (org) DO UPDATE SET region = excluded.region, relays = excluded.relays`, r.Org, r.Region, encode(r.Relays))
}

func scanOrgRegion(r row) (*OrgRegion, error) {
	var v OrgRegion
	return &v, r.Scan(&v.Org, &v.Region, list[[]string]{&v.Relays})
}

func (t *sqlTx) OrgRegion(ctx context.Context, org string) (*OrgRegion, error) {
	v, err := one(ctx, t, scanOrgRegion, `SELECT org, region, relays FROM org_regions WHERE org = ?`, org)
	if errors.Is(err, ErrNotFound) {
		return &OrgRegion{Org: org}, nil
	}
	return v, err
}

func (t *sqlTx) OrgRegions(ctx context.Context) (map[string]OrgRegion, error) {
	rows, err := many(ctx, t, scanOrgRegion, `SELECT org, region, relays FROM org_regions`)
	out := make(map[string]OrgRegion, len(rows))
	for _, v := range rows {
		out[v.Org] = *v
	}
	return out, err
}

func (t *sqlTx) PutRelayProbe(ctx context.Context, p *RelayProbe) error {
	return t.exec(ctx, true, `INSERT INTO relay_probes (relay, at, found) VALUES (?, ?, ?)
		ON CONFLICT (relay) DO UPDATE SET at = excluded.at, found = excluded.found`, p.Relay, micros(p.At), string(p.Found))
}

func (t *sqlTx) RelayProbes(ctx context.Context) ([]*RelayProbe, error) {
	return many(ctx, t, func(r row) (*RelayProbe, error) {
		var p RelayProbe
		return &p, r.Scan(&p.Relay, stamp{&p.At}, &p.Found)
	}, `SELECT p.relay, p.at, p.found FROM relay_probes p JOIN nodes n ON n.id = p.relay WHERE n.deleted IS NULL`)
}

func (t *sqlTx) DropRelayProbe(ctx context.Context, relay string) error {
	return t.exec(ctx, false, `DELETE FROM relay_probes WHERE relay = ?`, relay)
}
