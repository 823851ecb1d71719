package store

import (
	"context"
	"time"
)

func scanPlatformKey(r row) (*PlatformKey, error) {
	var k PlatformKey
	var hash string
	if err := r.Scan(&hash, &k.Org, &k.Node, stamp{&k.NotAfter}, &k.Denied); err != nil {
		return nil, err
	}
	return &k, k.Hash.UnmarshalText([]byte(hash))
}

func (t *sqlTx) PutPlatformKey(ctx context.Context, k *PlatformKey) error {
	return t.exec(ctx, true, `INSERT INTO platform_keys (hash, org, node, not_after, denied) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (hash) DO UPDATE SET not_after = excluded.not_after, denied = excluded.denied`, k.Hash.String(), k.Org, k.Node, micros(k.NotAfter), k.Denied)
}

func (t *sqlTx) PlatformKeys(ctx context.Context, org string) ([]*PlatformKey, error) {
	return many(ctx, t, scanPlatformKey, `SELECT hash, org, node, not_after, denied FROM platform_keys WHERE org = ? ORDER BY not_after DESC, hash`, org)
}

// purgePlatformKeys removes what expired before old.
func (t *sqlTx) purgePlatformKeys(ctx context.Context, old time.Time) error {
	return t.exec(ctx, false, `DELETE FROM platform_keys WHERE not_after < ?`, micros(old))
}
