package store

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"time"
)

// flowsAtOnce is how many flows one statement writes: with 22 columns each it stays below the limits of both databases (32766 and 65535 arguments).
const flowsAtOnce = 500

const flowColumns = `gateway, id, org, gateway_name, client, client_name, person, login, resource, resource_name, rule, protocol, destination, address, relay, path,
	started, seen, open, sent, received, reason`

const flowValues = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`

func (t *sqlTx) PutFlows(ctx context.Context, fs []*Flow) error {
	for part := range slices.Chunk(fs, flowsAtOnce) {
		args := make([]any, 0, 22*len(part))
		for _, f := range part {
			args = append(args, f.Gateway, f.ID, f.Org, f.GatewayName, f.Client, f.ClientName, f.Person, f.Login, f.Resource, f.ResourceName, f.Rule, f.Protocol,
				f.Destination, f.Address, f.Relay, f.Path, micros(f.Started), micros(f.Seen), f.Open, f.Sent, f.Received, f.Reason)
		}
		if err := t.exec(ctx, false, `INSERT INTO flows (`+flowColumns+`) VALUES `+flowValues+strings.Repeat(`, `+flowValues, len(part)-1)+
			` ON CONFLICT (gateway, id) DO UPDATE SET relay = excluded.relay, path = excluded.path, seen = excluded.seen, open = excluded.open, sent = excluded.sent,
			received = excluded.received, reason = excluded.reason WHERE flows.open`, args...); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) Flows(ctx context.Context, org string, f FlowFilter) ([]*Flow, error) {
	q, args := `SELECT `+flowColumns+` FROM flows WHERE org = ?`, []any{org}
	for _, c := range [][2]string{{"client", f.Client}, {"person", f.Person}, {"resource", f.Resource}, {"gateway", f.Gateway}} {
		if c[1] != "" {
			q, args = q+` AND `+c[0]+` = ?`, append(args, c[1])
		}
	}
	if !f.From.IsZero() {
		q, args = q+` AND started >= ?`, append(args, micros(f.From))
	}
	if !f.To.IsZero() {
		q, args = q+` AND started < ?`, append(args, micros(f.To))
	}
	if f.BeforeID != "" {
		q, args = q+` AND (started < ? OR (started = ? AND id < ?))`, append(args, micros(f.BeforeStarted), micros(f.BeforeStarted), f.BeforeID)
	}
	limit := int64(math.MaxInt64)
	if f.Limit > 0 {
		limit = int64(f.Limit)
	}
	return many(ctx, t, func(r row) (*Flow, error) {
		var v Flow
		return &v, r.Scan(&v.Gateway, &v.ID, &v.Org, &v.GatewayName, &v.Client, &v.ClientName, &v.Person, &v.Login, &v.Resource, &v.ResourceName, &v.Rule, &v.Protocol,
			&v.Destination, &v.Address, &v.Relay, &v.Path, stamp{&v.Started}, stamp{&v.Seen}, &v.Open, &v.Sent, &v.Received, &v.Reason)
	}, q+` ORDER BY started DESC, id DESC LIMIT ?`, append(args, limit)...)
}

func (t *sqlTx) CountFlows(ctx context.Context, org string) (n int64, err error) {
	err = t.row(ctx, `SELECT COUNT(*) FROM flows WHERE org = ?`, org).Scan(&n)
	return n, err
}

func (t *sqlTx) PurgeFlows(ctx context.Context, before time.Time, limit int) (int64, error) {
	return t.affect(ctx, `DELETE FROM flows WHERE (gateway, id) IN (SELECT gateway, id FROM flows WHERE seen < ? ORDER BY seen LIMIT ?)`, micros(before), limit)
}

func (t *sqlTx) TrimFlows(ctx context.Context, org string, keep, limit int) (int64, error) {
	var last int64
	err := t.row(ctx, `SELECT started FROM flows WHERE org = ? ORDER BY started DESC, id DESC LIMIT 1 OFFSET ?`, org, keep).Scan(&last)
	if errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return t.affect(ctx, `DELETE FROM flows WHERE (gateway, id) IN (SELECT gateway, id FROM flows WHERE org = ? AND started <= ? ORDER BY started, id LIMIT ?)`, org, last, limit)
}

func (t *sqlTx) FlowLogOff(ctx context.Context, org string) (bool, error) {
	var name string
	err := t.row(ctx, `SELECT org FROM flow_log_off WHERE org = ?`, org).Scan(&name)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

func (t *sqlTx) SetFlowLogOff(ctx context.Context, org string, off bool) error {
	if off {
		return t.exec(ctx, false, `INSERT INTO flow_log_off (org) VALUES (?) ON CONFLICT (org) DO NOTHING`, org)
	}
	return t.exec(ctx, false, `DELETE FROM flow_log_off WHERE org = ?`, org)
}
