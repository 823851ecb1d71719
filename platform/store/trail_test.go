package store

import (
	"context"
	"fmt"
	"testing"
	"time"
)

func appendEntries(t *testing.T, s Store, org string, from, to int) {
	t.Helper()
	update(t, s, func(ctx context.Context, tx Tx) error {
		for i := from; i <= to; i++ {
			if err := tx.AppendAudit(ctx, org, &AuditEntry{Seq: int64(i), At: at, Actor: "x", Action: "y", Object: "z", Result: "ok", Detail: []byte(`{}`), Hash: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		return nil
	})
}

func testTrail(t *testing.T, s Store) {
	appendEntries(t, s, "a", 1, 5)
	appendEntries(t, s, "b", 1, 2)
	k := &AuditKey{ID: "k1", Org: "a", Chain: []byte("pem"), Sealed: []byte{1, 2}, Created: at, NotAfter: at.Add(time.Hour)}
	c := &Checkpoint{Org: "a", Seq: 3, Hash: "3", At: at, Key: "k1", Signature: []byte{9}}
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := tx.InsertAuditKey(ctx, k); err != nil {
			return err
		}
		is(t, "a checkpoint", tx.InsertCheckpoint(ctx, c), nil)
		is(t, "the same again", tx.InsertCheckpoint(ctx, c), ErrExists)
		is(t, "a cursor", tx.PutCursor(ctx, "syslog", "a", 5), nil)
		is(t, "a cursor", tx.PutCursor(ctx, "syslog", "b", 1), nil)
		is(t, "a sink", tx.PutSink(ctx, "syslog", &SinkState{Success: at, Problem: "no"}), nil)
		return nil
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		keys, err := tx.AuditKeys(ctx, "a")
		is(t, "keys", err, nil)
		equal(t, "keys", *keys[0], *k)
		orgs, err := tx.AuditOrgs(ctx)
		is(t, "organizations with keys", err, nil)
		equal(t, "organizations with keys", orgs, []string{"a"})
		cs, err := tx.Checkpoints(ctx, "a", 0, 0)
		is(t, "checkpoints", err, nil)
		equal(t, "checkpoints", *cs[0], *c)
		open, err := tx.Unsigned(ctx)
		is(t, "unsigned", err, nil)
		equal(t, "unsigned", open, []ChainHead{{"a", 5, 3}, {"b", 2, 0}})
		behind, err := tx.Behind(ctx, "syslog")
		is(t, "behind", err, nil)
		equal(t, "behind", behind, []ChainHead{{"b", 2, 1}})
		state, err := tx.Sink(ctx, "syslog")
		is(t, "sink", err, nil)
		equal(t, "sink", *state, SinkState{Success: at, Problem: "no"})
		is(t, "retire a key", tx.SealAuditKey(ctx, "k1", nil), nil)
		is(t, "no key", tx.SealAuditKey(ctx, "k2", nil), ErrNotFound)
		return nil
	})
}

func testWebhooks(t *testing.T, s Store) {
	w := &Webhook{ID: "w-1", Org: "a", Name: "siem", URL: "https://x.example", Events: []string{"relay.*"}, Secret: []byte("s"), Created: at, Cursor: 1, Next: at}
	update(t, s, func(ctx context.Context, tx Tx) error {
		is(t, "an organization", tx.InsertOrg(ctx, org("a")), nil)
		is(t, "a webhook", tx.InsertWebhook(ctx, w), nil)
		is(t, "its name again", tx.InsertWebhook(ctx, &Webhook{ID: "w-2", Org: "a", Name: "siem", Created: at}), ErrExists)
		return nil
	})
	due := func(now time.Time) int {
		n := 0
		update(t, s, func(ctx context.Context, tx Tx) error {
			ws, err := tx.DueWebhooks(ctx, now, 10)
			is(t, "due", err, nil)
			n = len(ws)
			return nil
		})
		return n
	}
	equal(t, "nothing to deliver", due(at), 0)
	appendEntries(t, s, "a", 1, 3)
	equal(t, "too early", due(at.Add(-time.Second)), 0)
	equal(t, "due", due(at), 1)
	update(t, s, func(ctx context.Context, tx Tx) error {
		got, err := tx.FindWebhook(ctx, "a", "siem")
		is(t, "find", err, nil)
		w.Head = 3
		equal(t, "webhook", *got, *w)
		got.Cursor, got.Success = 3, at
		is(t, "state", tx.PutWebhookState(ctx, got), nil)
		got.Cursor = 2
		is(t, "state that goes back", tx.PutWebhookState(ctx, got), ErrNotFound)
		return nil
	})
	equal(t, "done", due(at), 0)
	update(t, s, func(ctx context.Context, tx Tx) error {
		got, _ := tx.FindWebhook(ctx, "a", "w-1")
		got.Disabled, got.Cursor = "by hand", 0
		is(t, "disable", tx.UpdateWebhook(ctx, got), nil)
		is(t, "state of a disabled one", tx.PutWebhookState(ctx, got), ErrNotFound)
		return nil
	})
	equal(t, "disabled", due(at), 0)
	update(t, s, func(ctx context.Context, tx Tx) error {
		ws, err := tx.Webhooks(ctx, "a", Page{})
		equal(t, "list", len(ws), 1)
		is(t, "delete", tx.DeleteWebhook(ctx, "w-1"), nil)
		is(t, "delete again", tx.DeleteWebhook(ctx, "w-1"), ErrNotFound)
		return err
	})
}

func testFlows(t *testing.T, s Store) {
	flow := func(id string, started time.Duration, open bool) *Flow {
		return &Flow{
			Gateway: "g-1", ID: id, Org: "a", GatewayName: "office", Client: "c-1", ClientName: "laptop", Person: "p-1", Login: "ada", Resource: "r-1", ResourceName: "db",
			Rule: "dba", Protocol: "tcp", Destination: "db:5432", Address: "10.0.0.1:5432", Relay: "fra-1", Path: "turn-udp", Started: at.Add(started), Seen: at.Add(started + time.Minute),
			Open: open, Sent: 1, Received: 2, Reason: "closed",
		}
	}
	update(t, s, func(ctx context.Context, tx Tx) error {
		is(t, "organizations", tx.InsertOrg(ctx, org("a")), nil)
		is(t, "organizations", tx.InsertOrg(ctx, org("b")), nil)
		var many []*Flow
		for i := range flowsAtOnce + 1 {
			f := flow(fmt.Sprintf("m%04d", i), time.Hour, false)
			f.Org = "b"
			many = append(many, f)
		}
		is(t, "many", tx.PutFlows(ctx, many), nil)
		return tx.PutFlows(ctx, []*Flow{flow("1", 0, true), flow("2", time.Second, false), flow("3", time.Second, false)})
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		end := flow("1", 0, false)
		end.Sent, end.Reason = 100, "reset"
		late := flow("1", 0, true)
		late.Sent = 7
		is(t, "its end", tx.PutFlows(ctx, []*Flow{end}), nil)
		return tx.PutFlows(ctx, []*Flow{late}) // a report that came late changes nothing
	})
	update(t, s, func(ctx context.Context, tx Tx) error {
		all, err := tx.Flows(ctx, "a", FlowFilter{})
		is(t, "all", err, nil)
		want := flow("1", 0, false)
		want.Sent, want.Reason = 100, "reset"
		equal(t, "an ended flow", *all[2], *want)
		page, err := tx.Flows(ctx, "a", FlowFilter{Limit: 1})
		is(t, "page", err, nil)
		equal(t, "newest", page[0].ID, "3")
		page, err = tx.Flows(ctx, "a", FlowFilter{BeforeStarted: page[0].Started, BeforeID: page[0].ID, Client: "c-1", Person: "p-1", Resource: "r-1", Gateway: "g-1", From: at, To: at.Add(time.Hour)})
		is(t, "next page", err, nil)
		equal(t, "next page", len(page), 2)
		none, err := tx.Flows(ctx, "a", FlowFilter{Client: "c-2"})
		is(t, "another client", err, nil)
		equal(t, "another client", len(none), 0)
		n, err := tx.TrimFlows(ctx, "a", 2, 100)
		is(t, "trim", err, nil)
		equal(t, "trimmed", n, 1)
		n, err = tx.TrimFlows(ctx, "a", 2, 100)
		is(t, "trim", err, nil)
		equal(t, "nothing to trim", n, 0)
		n, err = tx.PurgeFlows(ctx, at.Add(10*time.Minute), 1)
		is(t, "purge", err, nil)
		equal(t, "purged", n, 1)
		left, err := tx.CountFlows(ctx, "b")
		is(t, "count", err, nil)
		equal(t, "the other organization's", left, flowsAtOnce+1)
		off, err := tx.FlowLogOff(ctx, "a")
		equal(t, "on", off, false)
		is(t, "off", tx.SetFlowLogOff(ctx, "a", true), err)
		is(t, "off again", tx.SetFlowLogOff(ctx, "a", true), nil)
		off, err = tx.FlowLogOff(ctx, "a")
		equal(t, "off", off, true)
		return err
	})
}
