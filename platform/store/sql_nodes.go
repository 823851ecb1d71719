package store

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyway/internal/identity"
)

func (t *sqlTx) Meta(ctx context.Context, key string) ([]byte, error) {
	var v []byte
	err := t.row(ctx, `SELECT value FROM meta WHERE key = ?`, key).Scan(&v)
	return v, err
}

func (t *sqlTx) PutMeta(ctx context.Context, key string, value []byte) error {
	return t.exec(ctx, true, `INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, value)
}

const orgColumns = `name, range4, range6, created, version, next_address, direct, direct_private, platform_dial`

func scanOrg(r row) (*Org, error) {
	var o Org
	var r4, r6 string
	if err := r.Scan(&o.Name, &r4, &r6, stamp{&o.Created}, &o.Version, &o.NextAddress, &o.Direct, &o.DirectPrivate, &o.PlatformDial); err != nil {
		return nil, err
	}
	var err error
	if o.Range4, err = netip.ParsePrefix(r4); err != nil {
		return nil, fmt.Errorf("range of %s: %w", o.Name, err)
	}
	if o.Range6, err = netip.ParsePrefix(r6); err != nil {
		return nil, fmt.Errorf("range of %s: %w", o.Name, err)
	}
	return &o, nil
}

func (t *sqlTx) InsertOrg(ctx context.Context, o *Org) error {
	return t.insert(ctx, `INSERT INTO orgs (`+orgColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		o.Name, o.Range4.String(), o.Range6.String(), micros(o.Created), int64(o.Version), o.NextAddress, o.Direct, o.DirectPrivate, o.PlatformDial)
}

func (t *sqlTx) Org(ctx context.Context, name string) (*Org, error) {
	return one(ctx, t, scanOrg, `SELECT `+orgColumns+` FROM orgs WHERE name = ?`, name)
}

func (t *sqlTx) Orgs(ctx context.Context, p Page) ([]*Org, error) {
	return many(ctx, t, scanOrg, `SELECT `+orgColumns+` FROM orgs WHERE name > ? ORDER BY name LIMIT ?`, p.After, p.limit())
}

func (t *sqlTx) UpdateOrg(ctx context.Context, o *Org) error {
	return t.exec(ctx, true, `UPDATE orgs SET range4 = ?, range6 = ?, next_address = ?, direct = ?, direct_private = ?, platform_dial = ? WHERE name = ?`,
		o.Range4.String(), o.Range6.String(), o.NextAddress, o.Direct, o.DirectPrivate, o.PlatformDial, o.Name)
}

func (t *sqlTx) DeleteOrg(ctx context.Context, name string) error {
	return t.exec(ctx, true, `DELETE FROM orgs WHERE name = ?`, name)
}

func (t *sqlTx) BumpVersion(ctx context.Context, org string, floor uint64) (uint64, error) {
	var v uint64
	err := t.row(ctx, `UPDATE orgs SET version = CASE WHEN version + 1 > ? THEN version + 1 ELSE ? END WHERE name = ? RETURNING version`,
		int64(floor), int64(floor), org).Scan(&v)
	return v, err
}

const nodeColumns = `id, org, kind, name, status, host, port, peers, draining, address, enrolment, version, created, enrolled, last_seen, deleted, next_host, next_from`

func scanNode(r row) (*Node, error) {
	var n Node
	return &n, r.Scan(&n.ID, &n.Org, &n.Kind, &n.Name, &n.Status, &n.Host, &n.Port, list[[]netip.AddrPort]{&n.Peers}, &n.Draining, &n.Address,
		&n.Enrolment, &n.Version, stamp{&n.Created}, stamp{&n.Enrolled}, stamp{&n.LastSeen}, stamp{&n.Deleted}, &n.NextHost, stamp{&n.NextFrom})
}

func (t *sqlTx) InsertNode(ctx context.Context, n *Node) error {
	return t.insert(ctx, `INSERT INTO nodes (`+nodeColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		n.ID, n.Org, string(n.Kind), n.Name, string(n.Status), n.Host, n.Port, encode(n.Peers), n.Draining, n.Address,
		n.Enrolment, n.Version, micros(n.Created), micros(n.Enrolled), micros(n.LastSeen), micros(n.Deleted), n.NextHost, micros(n.NextFrom))
}

func (t *sqlTx) Node(ctx context.Context, id string) (*Node, error) {
	return one(ctx, t, scanNode, `SELECT `+nodeColumns+` FROM nodes WHERE id = ?`, id)
}

func (t *sqlTx) FindNode(ctx context.Context, org string, kind identity.Kind, name string) (*Node, error) {
	return one(ctx, t, scanNode, `SELECT `+nodeColumns+` FROM nodes WHERE org = ? AND kind = ? AND (name = ? OR id = ?) AND deleted IS NULL`,
		org, string(kind), name, name)
}

func (t *sqlTx) Nodes(ctx context.Context, org string, kind identity.Kind, p Page) ([]*Node, error) {
	return many(ctx, t, scanNode, `SELECT `+nodeColumns+` FROM nodes
		WHERE org = ? AND (kind = ? OR ? = '') AND name > ? AND deleted IS NULL ORDER BY name, kind LIMIT ?`,
		org, string(kind), string(kind), p.After, p.limit())
}

func (t *sqlTx) DeletedNodes(ctx context.Context, org string) ([]*Node, error) {
	return many(ctx, t, scanNode, `SELECT `+nodeColumns+` FROM nodes WHERE org = ? AND deleted IS NOT NULL ORDER BY id`, org)
}

func (t *sqlTx) UpdateNode(ctx context.Context, n *Node) error {
	return t.exec(ctx, true, `UPDATE nodes SET name = ?, status = ?, host = ?, port = ?, peers = ?, draining = ?, address = ?, enrolment = ?,
		version = ?, enrolled = ?, last_seen = ?, deleted = ?, next_host = ?, next_from = ? WHERE id = ?`,
		n.Name, string(n.Status), n.Host, n.Port, encode(n.Peers), n.Draining, n.Address, n.Enrolment,
		n.Version, micros(n.Enrolled), micros(n.LastSeen), micros(n.Deleted), n.NextHost, micros(n.NextFrom), n.ID)
}

func (t *sqlTx) PurgeNode(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM nodes WHERE id = ?`, id)
}

// touchedAtOnce is how many nodes one statement touches.
const touchedAtOnce = 100

func (t *sqlTx) TouchNodes(ctx context.Context, seen []Seen) error {
	for part := range slices.Chunk(seen, touchedAtOnce) {
		args := make([]any, 0, 3*len(part))
		for _, s := range part {
			args = append(args, s.Node, micros(s.At), s.Version)
		}
		if err := t.exec(ctx, false, `UPDATE nodes SET last_seen = v.column2, version = v.column3
			FROM (VALUES (?, CAST(? AS BIGINT), ?)`+strings.Repeat(`, (?, CAST(? AS BIGINT), ?)`, len(part)-1)+`) AS v WHERE nodes.id = v.column1`, args...); err != nil {
			return err
		}
	}
	return nil
}

const keyColumns = `hash, node, public, enrolment, created, not_after, denied`

func scanKey(r row) (*Key, error) {
	var k Key
	var hash string
	if err := r.Scan(&hash, &k.Node, &k.Public, &k.Enrolment, stamp{&k.Created}, stamp{&k.NotAfter}, &k.Denied); err != nil {
		return nil, err
	}
	return &k, k.Hash.UnmarshalText([]byte(hash))
}

func (t *sqlTx) PutKey(ctx context.Context, k *Key) error {
	return t.exec(ctx, true, `INSERT INTO node_keys (`+keyColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (hash) DO UPDATE SET
		node = excluded.node, enrolment = excluded.enrolment, created = excluded.created, not_after = excluded.not_after, denied = excluded.denied`,
		k.Hash.String(), k.Node, k.Public, k.Enrolment, micros(k.Created), micros(k.NotAfter), k.Denied)
}

func (t *sqlTx) Key(ctx context.Context, h identity.KeyHash) (*Key, error) {
	return one(ctx, t, scanKey, `SELECT `+keyColumns+` FROM node_keys WHERE hash = ?`, h.String())
}

func (t *sqlTx) Keys(ctx context.Context, node string) ([]*Key, error) {
	return many(ctx, t, scanKey, `SELECT `+keyColumns+` FROM node_keys WHERE node = ? ORDER BY created DESC, hash`, node)
}

func (t *sqlTx) OrgKeys(ctx context.Context, org string) ([]*Key, error) {
	return many(ctx, t, scanKey, `SELECT k.hash, k.node, k.public, k.enrolment, k.created, k.not_after, k.denied
		FROM node_keys k JOIN nodes n ON n.id = k.node WHERE n.org = ? ORDER BY k.created DESC, k.hash`, org)
}

const tokenColumns = `hash, node, org, kind, created, expires, used_at`

func scanToken(r row) (*EnrolmentToken, error) {
	var k EnrolmentToken
	var hash []byte
	if err := r.Scan(&hash, &k.Node, &k.Org, &k.Kind, stamp{&k.Created}, stamp{&k.Expires}, stamp{&k.Used}); err != nil {
		return nil, err
	}
	copy(k.Hash[:], hash)
	return &k, nil
}

func (t *sqlTx) InsertEnrolmentToken(ctx context.Context, k *EnrolmentToken) error {
	return t.insert(ctx, `INSERT INTO enrolment_tokens (`+tokenColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		k.Hash[:], k.Node, k.Org, string(k.Kind), micros(k.Created), micros(k.Expires), micros(k.Used))
}

func (t *sqlTx) SpendEnrolmentToken(ctx context.Context, hash [32]byte, node identity.Node, now time.Time) (*EnrolmentToken, error) {
	return one(ctx, t, scanToken, `UPDATE enrolment_tokens SET used_at = ?
		WHERE hash = ? AND org = ? AND kind = ? AND node = ? AND used_at IS NULL AND expires > ? RETURNING `+tokenColumns,
		micros(now), hash[:], node.Org, string(node.Kind), node.ID, micros(now))
}

func (t *sqlTx) EnrolmentToken(ctx context.Context, hash [32]byte) (*EnrolmentToken, error) {
	return one(ctx, t, scanToken, `SELECT `+tokenColumns+` FROM enrolment_tokens WHERE hash = ?`, hash[:])
}

func (t *sqlTx) DropEnrolmentTokens(ctx context.Context, node string) error {
	return t.exec(ctx, false, `DELETE FROM enrolment_tokens WHERE node = ? AND used_at IS NULL`, node)
}

func (t *sqlTx) InsertAssertion(ctx context.Context, jti [32]byte, expires time.Time) error {
	return t.insert(ctx, `INSERT INTO assertions (jti, expires) VALUES (?, ?)`, jti[:], micros(expires))
}

func (t *sqlTx) Purge(ctx context.Context, now, old time.Time) error {
	if err := t.exec(ctx, false, `DELETE FROM assertions WHERE expires < ?`, micros(now)); err != nil {
		return err
	}
	if err := t.exec(ctx, false, `DELETE FROM answers WHERE expires < ?`, micros(now)); err != nil {
		return err
	}
	if err := t.exec(ctx, false, `DELETE FROM enrolment_tokens WHERE expires < ?`, micros(old)); err != nil {
		return err
	}
	if err := t.purgePlatformKeys(ctx, old); err != nil {
		return err
	}
	return t.exec(ctx, false, `DELETE FROM session_ends WHERE before < ?`, micros(old))
}
