// Package audit keeps a hash chain for each organization of everything that grants access. An entry's hash covers the entry and
// the hash before it, and the chain's head is kept apart, so that a changed, removed or cut-off entry is found:
//
//	hash = SHA-256( previous hash as hex, JSON of the entry without its hash )
//
// Entries are appended in the transaction of the change that they tell of. The head is signed every hour (sign.go), and Export writes a file that
// can be checked without the platform (package auditfile).
package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sallyway/internal/auditfile"
	"sallyway/internal/control"
	"sallyway/platform/store"
)

// Results of an action.
const (
	OK      = "ok"
	Refused = "refused"
)

// Entry is what happened.
type Entry struct {
	Actor  string // who: token:NAME, node:ORG/KIND/ID, platform, or an address where nobody is known
	Action string // such as node.enrol
	Object string
	Result string
	Detail map[string]any // no secrets
}

// line is the entry as an export has it; its hash is computed from that.
func line(e *store.AuditEntry) *auditfile.Entry {
	return &auditfile.Entry{
		Type: auditfile.TypeEntry, Seq: e.Seq, At: e.At.UTC(), Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Detail: e.Detail, Hash: e.Hash,
	}
}

// Append adds an entry to the chain of org in the transaction tx.
func Append(ctx context.Context, tx store.Tx, org string, at time.Time, e Entry) error {
	seq, prev, err := tx.AuditHead(ctx, org)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if e.Detail == nil {
		e.Detail = map[string]any{}
	}
	detail, err := json.Marshal(e.Detail)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	row := &store.AuditEntry{
		Seq: seq + 1, At: at.UTC().Truncate(time.Microsecond), Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Detail: detail,
	}
	if row.Hash, err = auditfile.Hash(prev, org, line(row)); err != nil {
		return err
	}
	if err := tx.AppendAudit(ctx, org, row); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}

// batch is how many entries Verify holds at once.
const batch = 1000

// Verify recomputes the chain of org. An error means that it could not be read; a broken chain is an answer.
func Verify(ctx context.Context, st store.Store, org string) (*control.AuditVerification, error) {
	v := &control.AuditVerification{}
	err := st.View(ctx, func(tx store.Tx) error {
		headSeq, headHash, err := tx.AuditHead(ctx, org)
		if err != nil {
			return err
		}
		signed, err := newSignatures(ctx, tx, org)
		if err != nil {
			return err
		}
		prev := ""
		for {
			rows, err := tx.Audit(ctx, org, v.Entries, batch)
			if err != nil {
				return err
			}
			for _, e := range rows {
				if e.Seq != v.Entries+1 {
					v.Problem = fmt.Sprintf("entry %d is missing", v.Entries+1)
					return nil
				}
				want, err := auditfile.Hash(prev, org, line(e))
				if err != nil || want != e.Hash {
					v.Problem = fmt.Sprintf("entry %d (%s at %s) was changed", e.Seq, e.Action, e.At.Format(time.RFC3339))
					return nil
				}
				prev, v.Entries = e.Hash, e.Seq
				if v.Problem = signed.check(e); v.Problem != "" {
					return nil
				}
			}
			if len(rows) < batch {
				break
			}
		}
		if v.Entries != headSeq || prev != headHash {
			v.Problem = fmt.Sprintf("the chain ends at entry %d, its head says %d: entries were cut off", v.Entries, headSeq)
			return nil
		}
		if v.Signed, v.SignedAt = signed.last(); v.Signed > v.Entries {
			v.Problem = fmt.Sprintf("entry %d was signed, and the chain ends at entry %d: entries were cut off", v.Signed, v.Entries)
			return nil
		}
		v.OK = true
		return nil
	})
	return v, err
}

// Page returns entries after a sequence number.
func Page(ctx context.Context, tx store.Tx, org string, after int64, limit int) ([]control.AuditEntry, error) {
	rows, err := tx.Audit(ctx, org, after, limit)
	if err != nil {
		return nil, err
	}
	out := make([]control.AuditEntry, 0, len(rows))
	for _, e := range rows {
		a := control.AuditEntry{Seq: e.Seq, At: e.At, Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Hash: e.Hash}
		if err := json.Unmarshal(e.Detail, &a.Detail); err != nil {
			return nil, errors.New("audit: the detail of an entry is not JSON: run audit:verify")
		}
		out = append(out, a)
	}
	return out, nil
}
