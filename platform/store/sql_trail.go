package store

import (
	"context"
	"encoding/base64"
	"errors"
	"time"
)

// sealedText is a column with bytes as base64.
type sealedText struct{ b *[]byte }

// Scan implements sql.Scanner.
func (s sealedText) Scan(v any) error {
	text, ok := v.(string)
	if !ok || text == "" {
		*s.b = nil
		return nil
	}
	b, err := base64.StdEncoding.DecodeString(text)
	*s.b = b
	return err
}

func base64Text(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func (t *sqlTx) InsertAuditKey(ctx context.Context, k *AuditKey) error {
	return t.insert(ctx, `INSERT INTO audit_keys (id, org, chain, sealed, created, not_after) VALUES (?, ?, ?, ?, ?, ?)`,
		k.ID, k.Org, string(k.Chain), base64Text(k.Sealed), micros(k.Created), micros(k.NotAfter))
}

func (t *sqlTx) AuditKeys(ctx context.Context, org string) ([]*AuditKey, error) {
	return many(ctx, t, func(r row) (*AuditKey, error) {
		var k AuditKey
		var chain string
		err := r.Scan(&k.ID, &k.Org, &chain, sealedText{&k.Sealed}, stamp{&k.Created}, stamp{&k.NotAfter})
		k.Chain = []byte(chain)
		return &k, err
	}, `SELECT id, org, chain, sealed, created, not_after FROM audit_keys WHERE org = ? ORDER BY created DESC, id`, org)
}

func (t *sqlTx) SealAuditKey(ctx context.Context, id string, sealed []byte) error {
	return t.exec(ctx, true, `UPDATE audit_keys SET sealed = ? WHERE id = ?`, base64Text(sealed), id)
}

func (t *sqlTx) AuditOrgs(ctx context.Context) ([]string, error) {
	found, err := many(ctx, t, func(r row) (*string, error) {
		var s string
		return &s, r.Scan(&s)
	}, `SELECT DISTINCT org FROM audit_keys ORDER BY org`)
	out := make([]string, len(found))
	for i, s := range found {
		out[i] = *s
	}
	return out, err
}

func (t *sqlTx) InsertCheckpoint(ctx context.Context, c *Checkpoint) error {
	return t.insert(ctx, `INSERT INTO audit_checkpoints (org, seq, hash, at, key_id, signature) VALUES (?, ?, ?, ?, ?, ?)`,
		c.Org, c.Seq, c.Hash, micros(c.At), c.Key, base64Text(c.Signature))
}

func (t *sqlTx) Checkpoints(ctx context.Context, org string, after int64, limit int) ([]*Checkpoint, error) {
	return many(ctx, t, func(r row) (*Checkpoint, error) {
		var c Checkpoint
		return &c, r.Scan(&c.Org, &c.Seq, &c.Hash, stamp{&c.At}, &c.Key, sealedText{&c.Signature})
	}, `SELECT org, seq, hash, at, key_id, signature FROM audit_checkpoints WHERE org = ? AND seq > ? ORDER BY seq LIMIT ?`, org, after, Page{Limit: limit}.limit())
}

func (t *sqlTx) heads(ctx context.Context, q string, args ...any) ([]ChainHead, error) {
	found, err := many(ctx, t, func(r row) (*ChainHead, error) {
		var h ChainHead
		return &h, r.Scan(&h.Org, &h.Seq, &h.Done)
	}, q, args...)
	out := make([]ChainHead, len(found))
	for i, h := range found {
		out[i] = *h
	}
	return out, err
}

func (t *sqlTx) Unsigned(ctx context.Context) ([]ChainHead, error) {
	return t.heads(ctx, `SELECT h.org, h.seq, COALESCE((SELECT MAX(c.seq) FROM audit_checkpoints c WHERE c.org = h.org), 0) AS done FROM audit_heads h
		WHERE h.seq > COALESCE((SELECT MAX(c.seq) FROM audit_checkpoints c WHERE c.org = h.org), 0) ORDER BY h.org`)
}

func (t *sqlTx) Behind(ctx context.Context, sink string) ([]ChainHead, error) {
	return t.heads(ctx, `SELECT h.org, h.seq, COALESCE(c.seq, 0) FROM audit_heads h LEFT JOIN audit_cursors c ON c.org = h.org AND c.sink = ?
		WHERE h.seq > COALESCE(c.seq, 0) ORDER BY h.org`, sink)
}

func (t *sqlTx) PutCursor(ctx context.Context, sink, org string, seq int64) error {
	return t.exec(ctx, true, `INSERT INTO audit_cursors (sink, org, seq) VALUES (?, ?, ?) ON CONFLICT (sink, org) DO UPDATE SET seq = excluded.seq`, sink, org, seq)
}

func (t *sqlTx) PutSink(ctx context.Context, sink string, s *SinkState) error {
	return t.exec(ctx, true, `INSERT INTO audit_sinks (sink, success, failed, problem) VALUES (?, ?, ?, ?)
		ON CONFLICT (sink) DO UPDATE SET success = excluded.success, failed = excluded.failed, problem = excluded.problem`,
		sink, micros(s.Success), micros(s.Failed), s.Problem)
}

func (t *sqlTx) Sink(ctx context.Context, sink string) (*SinkState, error) {
	var s SinkState
	err := t.row(ctx, `SELECT success, failed, problem FROM audit_sinks WHERE sink = ?`, sink).Scan(stamp{&s.Success}, stamp{&s.Failed}, &s.Problem)
	if errors.Is(err, ErrNotFound) {
		return &s, nil
	}
	return &s, err
}

const webhookColumns = `w.id, w.org, w.name, w.url, w.events, w.secret, w.gateways, w.disabled, w.created, w.cursor, w.success, w.failed, w.tries, w.next_try, w.problem, COALESCE(h.seq, 0)`

const webhookTables = ` FROM webhooks w LEFT JOIN audit_heads h ON h.org = w.org `

func scanWebhook(r row) (*Webhook, error) {
	var w Webhook
	return &w, r.Scan(&w.ID, &w.Org, &w.Name, &w.URL, list[[]string]{&w.Events}, sealedText{&w.Secret}, &w.Gateways, &w.Disabled, stamp{&w.Created}, &w.Cursor,
		stamp{&w.Success}, stamp{&w.Failed}, &w.Tries, stamp{&w.Next}, &w.Problem, &w.Head)
}

func (t *sqlTx) InsertWebhook(ctx context.Context, w *Webhook) error {
	return t.insert(ctx, `INSERT INTO webhooks (id, org, name, url, events, secret, gateways, disabled, created, cursor, success, failed, tries, next_try, problem)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, w.ID, w.Org, w.Name, w.URL, encode(w.Events), base64Text(w.Secret), w.Gateways, w.Disabled, micros(w.Created),
		w.Cursor, micros(w.Success), micros(w.Failed), w.Tries, w.Next.UnixMicro(), w.Problem)
}

func (t *sqlTx) FindWebhook(ctx context.Context, org, name string) (*Webhook, error) {
	return one(ctx, t, scanWebhook, `SELECT `+webhookColumns+webhookTables+`WHERE w.org = ? AND (w.name = ? OR w.id = ?)`, org, name, name)
}

func (t *sqlTx) Webhooks(ctx context.Context, org string, p Page) ([]*Webhook, error) {
	return many(ctx, t, scanWebhook, `SELECT `+webhookColumns+webhookTables+`WHERE w.org = ? AND w.name > ? ORDER BY w.name LIMIT ?`, org, p.After, p.limit())
}

func (t *sqlTx) DueWebhooks(ctx context.Context, now time.Time, limit int) ([]*Webhook, error) {
	return many(ctx, t, scanWebhook, `SELECT `+webhookColumns+webhookTables+`WHERE w.disabled = '' AND w.next_try <= ? AND w.cursor < h.seq ORDER BY w.next_try, w.id LIMIT ?`,
		now.UnixMicro(), Page{Limit: limit}.limit())
}

func (t *sqlTx) UpdateWebhook(ctx context.Context, w *Webhook) error {
	return t.exec(ctx, true, `UPDATE webhooks SET name = ?, url = ?, events = ?, secret = ?, gateways = ?, disabled = ?, cursor = ?, success = ?, failed = ?, tries = ?, next_try = ?,
		problem = ? WHERE id = ?`, w.Name, w.URL, encode(w.Events), base64Text(w.Secret), w.Gateways, w.Disabled, w.Cursor, micros(w.Success), micros(w.Failed), w.Tries,
		w.Next.UnixMicro(), w.Problem, w.ID)
}

func (t *sqlTx) PutWebhookState(ctx context.Context, w *Webhook) error {
	return t.exec(ctx, true, `UPDATE webhooks SET cursor = ?, success = ?, failed = ?, tries = ?, next_try = ?, problem = ? WHERE id = ? AND disabled = '' AND cursor <= ?`,
		w.Cursor, micros(w.Success), micros(w.Failed), w.Tries, w.Next.UnixMicro(), w.Problem, w.ID, w.Cursor)
}

func (t *sqlTx) DeleteWebhook(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM webhooks WHERE id = ?`, id)
}
