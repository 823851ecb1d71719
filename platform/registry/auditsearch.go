package registry

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// AuditFilter chooses entries of a chain. The zero AuditFilter is all of them.
type AuditFilter struct {
	Query          string // part of actor, action, object, result or detail; lower case
	Actor, Action  string // as a whole; an action that ends in a dot is a prefix
	Object, Result string // as a whole
	From, To       time.Time
	// Before is the sequence number that entries are below; 0 is the newest on.
	Before int64
	Limit  int // of Items; 0 is 100
}

// AuditPage is what an AuditFilter finds, newest first.
type AuditPage struct {
	Items []control.AuditEntry
	// Older is where to go on with Before, 0 when nothing is older. It may be set although Items is short: a search looks at
	// auditReach entries at most.
	Older int64
	Head  int64 // how many entries the chain has
}

const (
	auditBatch = 500
	auditReach = 20_000
)

func (f *AuditFilter) matches(e *control.AuditEntry) bool {
	switch {
	case f.Actor != "" && e.Actor != f.Actor,
		f.Object != "" && e.Object != f.Object,
		f.Result != "" && e.Result != f.Result,
		!f.From.IsZero() && e.At.Before(f.From),
		!f.To.IsZero() && !e.At.Before(f.To):
		return false
	}
	if f.Action != "" && e.Action != f.Action && (!strings.HasSuffix(f.Action, ".") || !strings.HasPrefix(e.Action, f.Action)) {
		return false
	}
	if f.Query == "" {
		return true
	}
	detail, err := json.Marshal(e.Detail)
	text := strings.ToLower(strings.Join([]string{e.Actor, e.Action, e.Object, e.Result, string(detail)}, " "))
	return err == nil && strings.Contains(text, f.Query)
}

// FindAudit searches the chain of org, or of a deleted organization, from the newest entry on.
func (r *Registry) FindAudit(ctx context.Context, org string, f AuditFilter) (*AuditPage, error) {
	if f.Limit <= 0 {
		f.Limit = 100
	}
	out := &AuditPage{}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		head, _, err := tx.AuditHead(ctx, org)
		if err != nil {
			return err
		}
		*out = AuditPage{Items: []control.AuditEntry{}, Head: head}
		top := head + 1
		if f.Before > 0 {
			top = min(top, f.Before)
		}
		for seen := 0; top > 1 && seen < auditReach; {
			from := max(top-1-auditBatch, 0) // entries have the numbers from 1 on, without gaps
			es, err := audit.Page(ctx, tx, org, from, int(top-1-from))
			if err != nil {
				return err
			}
			seen += auditBatch
			for i := len(es) - 1; i >= 0; i-- {
				e := es[i]
				if !f.From.IsZero() && e.At.Before(f.From) {
					return nil // all that follows is older
				}
				if !f.matches(&e) {
					continue
				}
				if len(out.Items) == f.Limit {
					out.Older = e.Seq + 1
					return nil
				}
				out.Items = append(out.Items, e)
			}
			top = from + 1
			out.Older = top
		}
		if top <= 1 {
			out.Older = 0
		}
		return nil
	})
	return out, err
}

// EachAudit calls fn with the entries that a filter finds, oldest first, whatever Before and Limit say. It reads in pieces, so that a long
// export holds up nobody.
func (r *Registry) EachAudit(ctx context.Context, org string, f AuditFilter, fn func(control.AuditEntry) error) error {
	for after := int64(0); ; {
		var es []control.AuditEntry
		err := r.Store.View(ctx, func(tx store.Tx) (err error) {
			es, err = audit.Page(ctx, tx, org, after, auditBatch)
			return err
		})
		if err != nil {
			return err
		}
		for _, e := range es {
			after = e.Seq
			if f.matches(&e) {
				if err := fn(e); err != nil {
					return err
				}
			}
		}
		if len(es) < auditBatch {
			return nil
		}
	}
}
