package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"sallyway/internal/policy"
)

// strs reads a column of strings.
func (t *sqlTx) strs(ctx context.Context, q string, args ...any) ([]string, error) {
	out, err := many(ctx, t, func(r row) (*string, error) {
		var s string
		return &s, r.Scan(&s)
	}, q, args...)
	ss := make([]string, len(out))
	for i, s := range out {
		ss[i] = *s
	}
	return ss, err
}

const resourceColumns = `id, org, name, target, tcp, udp, icmp, domains, address, disabled, created, health`

func scanResource(r row) (*Resource, error) {
	var v Resource
	var health string
	err := r.Scan(&v.ID, &v.Org, &v.Name, &v.Target, list[[]policy.PortRange]{&v.TCP}, list[[]policy.PortRange]{&v.UDP}, &v.ICMP,
		list[[]string]{&v.Domains}, &v.Address, &v.Disabled, stamp{&v.Created}, &health)
	if err == nil {
		v.Health, err = policy.ParseHealth(health)
	}
	return &v, err
}

func (t *sqlTx) InsertResource(ctx context.Context, v *Resource) error {
	if err := t.insert(ctx, `INSERT INTO resources (`+resourceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		v.ID, v.Org, v.Name, v.Target, encode(v.TCP), encode(v.UDP), v.ICMP, encode(v.Domains), v.Address, v.Disabled, micros(v.Created), v.Health.String()); err != nil {
		return err
	}
	return t.putGateways(ctx, v)
}

func (t *sqlTx) putGateways(ctx context.Context, v *Resource) error {
	if err := t.exec(ctx, false, `DELETE FROM resource_gateways WHERE resource = ?`, v.ID); err != nil {
		return err
	}
	for i, g := range v.Gateways {
		if err := t.insert(ctx, `INSERT INTO resource_gateways (resource, gateway, position, priority, weight) VALUES (?, ?, ?, ?, ?)`, v.ID, g.ID, i, g.Priority, g.Weight); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) gateways(ctx context.Context, id string) ([]ServingGateway, error) {
	vs, err := many(ctx, t, func(r row) (*ServingGateway, error) {
		var g ServingGateway
		return &g, r.Scan(&g.ID, &g.Priority, &g.Weight)
	}, `SELECT gateway, priority, weight FROM resource_gateways WHERE resource = ? ORDER BY priority, position`, id)
	out := make([]ServingGateway, len(vs))
	for i, v := range vs {
		out[i] = *v
	}
	return out, err
}

func (t *sqlTx) FindResource(ctx context.Context, org, name string) (*Resource, error) {
	v, err := one(ctx, t, scanResource, `SELECT `+resourceColumns+` FROM resources WHERE org = ? AND (name = ? OR id = ?)`, org, name, name)
	if err != nil {
		return nil, err
	}
	v.Gateways, err = t.gateways(ctx, v.ID)
	return v, err
}

func (t *sqlTx) Resources(ctx context.Context, org string, p Page) ([]*Resource, error) {
	vs, err := many(ctx, t, scanResource, `SELECT `+resourceColumns+` FROM resources WHERE org = ? AND name > ? ORDER BY name LIMIT ?`, org, p.After, p.limit())
	if err != nil {
		return nil, err
	}
	for _, v := range vs {
		if v.Gateways, err = t.gateways(ctx, v.ID); err != nil {
			return nil, err
		}
	}
	return vs, nil
}

func (t *sqlTx) UpdateResource(ctx context.Context, v *Resource) error {
	if err := t.exec(ctx, true, `UPDATE resources SET name = ?, target = ?, tcp = ?, udp = ?, icmp = ?, domains = ?, address = ?, disabled = ?, health = ? WHERE id = ?`,
		v.Name, v.Target, encode(v.TCP), encode(v.UDP), v.ICMP, encode(v.Domains), v.Address, v.Disabled, v.Health.String(), v.ID); err != nil {
		return err
	}
	return t.putGateways(ctx, v)
}

func (t *sqlTx) DeleteResource(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM resources WHERE id = ?`, id)
}

const groupColumns = `id, org, name, created`

func scanGroup(r row) (*Group, error) {
	var g Group
	return &g, r.Scan(&g.ID, &g.Org, &g.Name, stamp{&g.Created})
}

func (t *sqlTx) InsertGroup(ctx context.Context, g *Group) error {
	if err := t.insert(ctx, `INSERT INTO groups (`+groupColumns+`) VALUES (?, ?, ?, ?)`, g.ID, g.Org, g.Name, micros(g.Created)); err != nil {
		return err
	}
	return t.putMembers(ctx, g)
}

func (t *sqlTx) putMembers(ctx context.Context, g *Group) error {
	if err := t.exec(ctx, false, `DELETE FROM group_members WHERE group_id = ?`, g.ID); err != nil {
		return err
	}
	for _, m := range g.Members {
		if err := t.exec(ctx, false, `INSERT INTO group_members (group_id, node) VALUES (?, ?) ON CONFLICT DO NOTHING`, g.ID, m); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) members(ctx context.Context, id string) ([]string, error) {
	return t.strs(ctx, `SELECT m.node FROM group_members m JOIN nodes n ON n.id = m.node WHERE m.group_id = ? AND n.deleted IS NULL ORDER BY n.kind, n.name`, id)
}

func (t *sqlTx) FindGroup(ctx context.Context, org, name string) (*Group, error) {
	g, err := one(ctx, t, scanGroup, `SELECT `+groupColumns+` FROM groups WHERE org = ? AND (name = ? OR id = ?)`, org, name, name)
	if err != nil {
		return nil, err
	}
	g.Members, err = t.members(ctx, g.ID)
	return g, err
}

func (t *sqlTx) Groups(ctx context.Context, org string, p Page) ([]*Group, error) {
	gs, err := many(ctx, t, scanGroup, `SELECT `+groupColumns+` FROM groups WHERE org = ? AND name > ? ORDER BY name LIMIT ?`, org, p.After, p.limit())
	if err != nil {
		return nil, err
	}
	for _, g := range gs {
		if g.Members, err = t.members(ctx, g.ID); err != nil {
			return nil, err
		}
	}
	return gs, nil
}

func (t *sqlTx) UpdateGroup(ctx context.Context, g *Group) error {
	if err := t.exec(ctx, true, `UPDATE groups SET name = ? WHERE id = ?`, g.Name, g.ID); err != nil {
		return err
	}
	return t.putMembers(ctx, g)
}

func (t *sqlTx) DeleteGroup(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM groups WHERE id = ?`, id)
}

const policyColumns = `id, org, name, subject_kind, subject, resource, disabled, created`

func scanPolicy(r row) (*Policy, error) {
	var p Policy
	return &p, r.Scan(&p.ID, &p.Org, &p.Name, &p.SubjectKind, &p.Subject, &p.Resource, &p.Disabled, stamp{&p.Created})
}

func (t *sqlTx) InsertPolicy(ctx context.Context, p *Policy) error {
	return t.insert(ctx, `INSERT INTO policies (`+policyColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
		p.ID, p.Org, p.Name, p.SubjectKind, p.Subject, p.Resource, p.Disabled, micros(p.Created))
}

func (t *sqlTx) FindPolicy(ctx context.Context, org, name string) (*Policy, error) {
	return one(ctx, t, scanPolicy, `SELECT `+policyColumns+` FROM policies WHERE org = ? AND (name = ? OR id = ?)`, org, name, name)
}

func (t *sqlTx) Policies(ctx context.Context, org string, p Page) ([]*Policy, error) {
	return many(ctx, t, scanPolicy, `SELECT `+policyColumns+` FROM policies WHERE org = ? AND name > ? ORDER BY name LIMIT ?`, org, p.After, p.limit())
}

func (t *sqlTx) UpdatePolicy(ctx context.Context, p *Policy) error {
	return t.exec(ctx, true, `UPDATE policies SET name = ?, disabled = ? WHERE id = ?`, p.Name, p.Disabled, p.ID)
}

func (t *sqlTx) DeletePolicy(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM policies WHERE id = ?`, id)
}

func (t *sqlTx) Assignments(ctx context.Context, org string) (map[string][]string, error) {
	rows, err := t.query(ctx, `SELECT a.gateway, a.relay FROM relay_assignments a JOIN nodes n ON n.id = a.gateway
		WHERE n.org = ? ORDER BY a.gateway, a.position`, org)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := make(map[string][]string)
	for rows.Next() {
		var g, r string
		if err := rows.Scan(&g, &r); err != nil {
			return nil, t.note(err)
		}
		out[g] = append(out[g], r)
	}
	return out, t.note(rows.Err())
}

func (t *sqlTx) PutAssignment(ctx context.Context, gateway string, relays []string) error {
	if err := t.exec(ctx, false, `DELETE FROM relay_assignments WHERE gateway = ?`, gateway); err != nil {
		return err
	}
	for i, r := range relays {
		if err := t.insert(ctx, `INSERT INTO relay_assignments (gateway, relay, position) VALUES (?, ?, ?)`, gateway, r, i); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) InsertRelayKey(ctx context.Context, k *RelayKey) error {
	return t.insert(ctx, `INSERT INTO relay_keys (relay, id, secret, created) VALUES (?, ?, ?, ?)`, k.Relay, k.ID, k.Secret, micros(k.Created))
}

func (t *sqlTx) RelayKeys(ctx context.Context, relay string) ([]*RelayKey, error) {
	return many(ctx, t, func(r row) (*RelayKey, error) {
		var k RelayKey
		return &k, r.Scan(&k.Relay, &k.ID, &k.Secret, stamp{&k.Created})
	}, `SELECT relay, id, secret, created FROM relay_keys WHERE relay = ? ORDER BY created DESC, id`, relay)
}

func (t *sqlTx) DeleteRelayKey(ctx context.Context, relay, id string) error {
	return t.exec(ctx, true, `DELETE FROM relay_keys WHERE relay = ? AND id = ?`, relay, id)
}

func (t *sqlTx) PutSessionEnd(ctx context.Context, e *SessionEnd) error {
	return t.exec(ctx, true, `INSERT INTO session_ends (org, node, before) VALUES (?, ?, ?) ON CONFLICT (org, node) DO UPDATE SET before = excluded.before`,
		e.Org, e.Node, micros(e.Before))
}

func (t *sqlTx) SessionEnds(ctx context.Context, org string) ([]*SessionEnd, error) {
	return many(ctx, t, func(r row) (*SessionEnd, error) {
		var e SessionEnd
		return &e, r.Scan(&e.Org, &e.Node, stamp{&e.Before})
	}, `SELECT org, node, before FROM session_ends WHERE org = ? ORDER BY node`, org)
}

const apiTokenColumns = `id, hash, name, org, scope, created, expires, revoked`

func scanAPIToken(r row) (*APIToken, error) {
	var k APIToken
	var hash []byte
	var org sql.NullString
	if err := r.Scan(&k.ID, &hash, &k.Name, &org, &k.Scope, stamp{&k.Created}, stamp{&k.Expires}, stamp{&k.Revoked}); err != nil {
		return nil, err
	}
	if len(hash) != len(k.Hash) {
		return nil, fmt.Errorf("hash of API token %s has %d bytes", k.ID, len(hash))
	}
	copy(k.Hash[:], hash)
	k.Org = org.String
	return &k, nil
}

func (t *sqlTx) InsertAPIToken(ctx context.Context, k *APIToken) error {
	return t.insert(ctx, `INSERT INTO api_tokens (`+apiTokenColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
		k.ID, k.Hash[:], k.Name, sql.NullString{String: k.Org, Valid: k.Org != ""}, string(k.Scope), micros(k.Created), micros(k.Expires), micros(k.Revoked))
}

func (t *sqlTx) APIToken(ctx context.Context, hash [32]byte) (*APIToken, error) {
	return one(ctx, t, scanAPIToken, `SELECT `+apiTokenColumns+` FROM api_tokens WHERE hash = ?`, hash[:])
}

func (t *sqlTx) APITokens(ctx context.Context, org string) ([]*APIToken, error) {
	return many(ctx, t, scanAPIToken, `SELECT `+apiTokenColumns+` FROM api_tokens WHERE COALESCE(org, '') = ? ORDER BY created, id`, org)
}

func (t *sqlTx) RevokeAPIToken(ctx context.Context, id string, at time.Time) error {
	return t.exec(ctx, true, `UPDATE api_tokens SET revoked = ? WHERE id = ? AND revoked IS NULL`, micros(at), id)
}

func (t *sqlTx) AuditHead(ctx context.Context, org string) (int64, string, error) {
	var seq int64
	var hash string
	err := t.row(ctx, `SELECT seq, hash FROM audit_heads WHERE org = ?`, org).Scan(&seq, &hash)
	if errors.Is(err, ErrNotFound) {
		return 0, "", nil
	}
	return seq, hash, err
}

func (t *sqlTx) AppendAudit(ctx context.Context, org string, e *AuditEntry) error {
	if err := t.insert(ctx, `INSERT INTO audit (org, seq, at, actor, action, object, result, detail, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		org, e.Seq, micros(e.At), e.Actor, e.Action, e.Object, e.Result, string(e.Detail), e.Hash); err != nil {
		return err
	}
	return t.exec(ctx, true, `INSERT INTO audit_heads (org, seq, hash) VALUES (?, ?, ?) ON CONFLICT (org) DO UPDATE SET seq = excluded.seq, hash = excluded.hash`,
		org, e.Seq, e.Hash)
}

func (t *sqlTx) Audit(ctx context.Context, org string, after int64, limit int) ([]*AuditEntry, error) {
	return many(ctx, t, func(r row) (*AuditEntry, error) {
		var e AuditEntry
		var detail string
		err := r.Scan(&e.Seq, stamp{&e.At}, &e.Actor, &e.Action, &e.Object, &e.Result, &detail, &e.Hash)
		e.Detail = []byte(detail)
		return &e, err
	}, `SELECT seq, at, actor, action, object, result, detail, hash FROM audit WHERE org = ? AND seq > ? ORDER BY seq LIMIT ?`, org, after, Page{Limit: limit}.limit())
}
