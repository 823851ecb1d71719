package store

import "context"

const authorityColumns = `org, kind, generation, certificate, key, created, state, since, until, announced`

func scanAuthority(r row) (*Authority, error) {
	var a Authority
	return &a, r.Scan(&a.Org, &a.Kind, &a.Generation, &a.Certificate, &a.Key, stamp{&a.Created}, &a.State, stamp{&a.Since}, stamp{&a.Until},
		list[map[string]uint64]{&a.Announced})
}

func (t *sqlTx) InsertAuthority(ctx context.Context, a *Authority) error {
	return t.insert(ctx, `INSERT INTO authorities (`+authorityColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		a.Org, a.Kind, a.Generation, blob(a.Certificate), blob(a.Key), micros(a.Created), string(a.State), micros(a.Since), micros(a.Until), encode(a.Announced))
}

// blob is b for a column that is never NULL.
func blob(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func (t *sqlTx) Authorities(ctx context.Context, org string) ([]*Authority, error) {
	return many(ctx, t, scanAuthority, `SELECT `+authorityColumns+` FROM authorities WHERE org = ? ORDER BY kind, generation DESC`, org)
}

func (t *sqlTx) MovingAuthorities(ctx context.Context) ([]*Authority, error) {
	return many(ctx, t, scanAuthority, `SELECT `+authorityColumns+` FROM authorities WHERE state IN ('next', 'retiring') ORDER BY org, kind, generation DESC`)
}

func (t *sqlTx) UpdateAuthorityKey(ctx context.Context, a *Authority) error {
	return t.exec(ctx, true, `UPDATE authorities SET key = ? WHERE org = ? AND kind = ? AND generation = ?`, blob(a.Key), a.Org, a.Kind, a.Generation)
}

func (t *sqlTx) UpdateAuthority(ctx context.Context, a *Authority) error {
	return t.exec(ctx, true, `UPDATE authorities SET certificate = ?, key = ?, state = ?, since = ?, until = ?, announced = ? WHERE org = ? AND kind = ? AND generation = ?`,
		blob(a.Certificate), blob(a.Key), string(a.State), micros(a.Since), micros(a.Until), encode(a.Announced), a.Org, a.Kind, a.Generation)
}

func (t *sqlTx) ExpiryWarnings(ctx context.Context, org string) ([]*ExpiryWarning, error) {
	return many(ctx, t, func(r row) (*ExpiryWarning, error) {
		var w ExpiryWarning
		return &w, r.Scan(&w.Org, &w.Subject, stamp{&w.Ends}, &w.Days)
	}, `SELECT org, subject, ends, days FROM expiry_warnings WHERE org = ? ORDER BY subject`, org)
}

func (t *sqlTx) PutExpiryWarning(ctx context.Context, w *ExpiryWarning) error {
	return t.exec(ctx, true, `INSERT INTO expiry_warnings (org, subject, ends, days) VALUES (?, ?, ?, ?)
		ON CONFLICT (org, subject) DO UPDATE SET ends = excluded.ends, days = excluded.days`, w.Org, w.Subject, micros(w.Ends), w.Days)
}

func (t *sqlTx) DeleteExpiryWarning(ctx context.Context, org, subject string) error {
	return t.exec(ctx, false, `DELETE FROM expiry_warnings WHERE org = ? AND subject = ?`, org, subject)
}
