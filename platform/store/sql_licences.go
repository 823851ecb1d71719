package store

import (
	"context"
	"errors"

	"sallyway/internal/identity"
)

const licenceColumns = `org, document, id, issuer, serial, bandwidth, expires, source, installed, warned`

func scanLicence(r row) (*Licence, error) {
	var l Licence
	return &l, r.Scan(&l.Org, &l.Document, &l.ID, &l.Issuer, &l.Serial, &l.Bandwidth, stamp{&l.Expires}, &l.Source, stamp{&l.Installed}, &l.Warned)
}

func (t *sqlTx) PutLicence(ctx context.Context, l *Licence) error {
	if err := t.exec(ctx, true, `INSERT INTO licences (`+licenceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (org) DO UPDATE SET document = excluded.document, id = excluded.id, issuer = excluded.issuer, serial = excluded.serial,
		bandwidth = excluded.bandwidth, expires = excluded.expires, source = excluded.source, installed = excluded.installed, warned = excluded.warned`,
		l.Org, l.Document, l.ID, l.Issuer, l.Serial, l.Bandwidth, micros(l.Expires), l.Source, micros(l.Installed), l.Warned); err != nil {
		return err
	}
	return t.exec(ctx, false, `INSERT INTO licence_serials (org, issuer, serial) VALUES (?, ?, ?)
		ON CONFLICT (org, issuer) DO UPDATE SET serial = excluded.serial WHERE excluded.serial > licence_serials.serial`, l.Org, l.Issuer, l.Serial)
}

func (t *sqlTx) Licence(ctx context.Context, org string) (*Licence, error) {
	return one(ctx, t, scanLicence, `SELECT `+licenceColumns+` FROM licences WHERE org = ?`, org)
}

func (t *sqlTx) Licences(ctx context.Context) ([]*Licence, error) {
	return many(ctx, t, scanLicence, `SELECT `+licenceColumns+` FROM licences ORDER BY org`)
}

func (t *sqlTx) DeleteLicence(ctx context.Context, org string) error {
	return t.exec(ctx, true, `DELETE FROM licences WHERE org = ?`, org)
}

func (t *sqlTx) LicenceSerial(ctx context.Context, org, issuer string) (n int64, err error) {
	err = t.row(ctx, `SELECT serial FROM licence_serials WHERE org = ? AND issuer = ?`, org, issuer).Scan(&n)
	if errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	return n, err
}

func (t *sqlTx) CountNodes(ctx context.Context, org string) (map[identity.Kind]Counted, error) {
	type counted struct {
		kind identity.Kind
		Counted
	}
	all, err := many(ctx, t, func(r row) (*counted, error) {
		var c counted
		return &c, r.Scan(&c.kind, &c.All, &c.Enrolled)
	}, `SELECT kind, COUNT(*), COUNT(enrolled) FROM nodes WHERE org = ? AND deleted IS NULL GROUP BY kind`, org)
	if err != nil {
		return nil, err
	}
	out := make(map[identity.Kind]Counted)
	for _, c := range all {
		out[c.kind] = c.Counted
	}
	return out, nil
}
