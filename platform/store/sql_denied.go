package store

import (
	"context"
	"time"

	"sallyway/internal/identity"
)

// DeniedKeys are those keys of an organization's nodes with a leaf that ends after a time that are not good: denied, or of a node that was
// deleted or is not active.
func (t *sqlTx) DeniedKeys(ctx context.Context, org string, after time.Time) ([]identity.KeyHash, error) {
	hashes, err := many(ctx, t, scanHash, `SELECT k.hash FROM node_keys k JOIN nodes n ON n.id = k.node WHERE k.denied AND k.not_after > ? AND n.org = ?
		UNION SELECT k.hash FROM nodes n JOIN node_keys k ON k.node = n.id
		WHERE n.org = ? AND (n.status <> 'active' OR n.deleted IS NOT NULL) AND k.not_after > ? ORDER BY 1`, micros(after), org, org, micros(after))
	out := make([]identity.KeyHash, 0, len(hashes))
	for _, h := range hashes {
		out = append(out, *h)
	}
	return out, err
}

func scanHash(r row) (*identity.KeyHash, error) {
	var text string
	if err := r.Scan(&text); err != nil {
		return nil, err
	}
	h := new(identity.KeyHash)
	return h, h.UnmarshalText([]byte(text))
}
