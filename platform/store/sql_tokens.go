package store

import (
	"context"
	"time"
)

const serviceAccountColumns = `id, org, name, scopes, disabled, created, creator`

func scanServiceAccount(r row) (*ServiceAccount, error) {
	var a ServiceAccount
	return &a, r.Scan(&a.ID, &a.Org, &a.Name, list[[]string]{&a.Scopes}, &a.Disabled, stamp{&a.Created}, &a.Creator)
}

func (t *sqlTx) InsertServiceAccount(ctx context.Context, a *ServiceAccount) error {
	return t.insert(ctx, `INSERT INTO service_accounts (`+serviceAccountColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		a.ID, a.Org, a.Name, encode(a.Scopes), a.Disabled, micros(a.Created), a.Creator)
}

func (t *sqlTx) ServiceAccount(ctx context.Context, id string) (*ServiceAccount, error) {
	return one(ctx, t, scanServiceAccount, `SELECT `+serviceAccountColumns+` FROM service_accounts WHERE id = ?`, id)
}

func (t *sqlTx) FindServiceAccount(ctx context.Context, org, name string) (*ServiceAccount, error) {
	return one(ctx, t, scanServiceAccount, `SELECT `+serviceAccountColumns+` FROM service_accounts WHERE org = ? AND (name = ? OR id = ?)`, org, name, name)
}

func (t *sqlTx) ServiceAccounts(ctx context.Context, org string, p Page) ([]*ServiceAccount, error) {
	return many(ctx, t, scanServiceAccount, `SELECT `+serviceAccountColumns+` FROM service_accounts WHERE org = ? AND name > ? ORDER BY name LIMIT ?`, org, p.After, p.limit())
}

func (t *sqlTx) UpdateServiceAccount(ctx context.Context, a *ServiceAccount) error {
	return t.exec(ctx, true, `UPDATE service_accounts SET name = ?, scopes = ?, disabled = ? WHERE id = ?`, a.Name, encode(a.Scopes), a.Disabled, a.ID)
}

func (t *sqlTx) DeleteServiceAccount(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM service_accounts WHERE id = ?`, id)
}

const accessTokenColumns = `id, hash, person, account, name, scopes, created, expires, revoked, last_used, source`

func scanAccessToken(r row) (*AccessToken, error) {
	var k AccessToken
	return &k, r.Scan(&k.ID, digest{&k.Hash}, optional{&k.Person}, optional{&k.Account}, &k.Name, list[[]string]{&k.Scopes}, stamp{&k.Created}, stamp{&k.Expires},
		stamp{&k.Revoked}, stamp{&k.LastUsed}, &k.Source)
}

func (t *sqlTx) InsertAccessToken(ctx context.Context, k *AccessToken) error {
	return t.insert(ctx, `INSERT INTO access_tokens (`+accessTokenColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		k.ID, digits(k.Hash), reference(k.Person), reference(k.Account), k.Name, encode(k.Scopes), micros(k.Created), micros(k.Expires), micros(k.Revoked), micros(k.LastUsed), k.Source)
}

func (t *sqlTx) AccessToken(ctx context.Context, hash [32]byte) (*AccessToken, error) {
	return one(ctx, t, scanAccessToken, `SELECT `+accessTokenColumns+` FROM access_tokens WHERE hash = ?`, digits(hash))
}

func (t *sqlTx) PersonTokens(ctx context.Context, person string) ([]*AccessToken, error) {
	return many(ctx, t, scanAccessToken, `SELECT `+accessTokenColumns+` FROM access_tokens WHERE person = ? ORDER BY created, id`, person)
}

func (t *sqlTx) AccountTokens(ctx context.Context, account string) ([]*AccessToken, error) {
	return many(ctx, t, scanAccessToken, `SELECT `+accessTokenColumns+` FROM access_tokens WHERE account = ? ORDER BY created, id`, account)
}

func (t *sqlTx) TouchAccessToken(ctx context.Context, id string, at time.Time, source string) error {
	return t.exec(ctx, true, `UPDATE access_tokens SET last_used = ?, source = ? WHERE id = ?`, micros(at), source, id)
}

func (t *sqlTx) RevokeAccessToken(ctx context.Context, id string, at time.Time) error {
	return t.exec(ctx, true, `UPDATE access_tokens SET revoked = ? WHERE id = ? AND revoked IS NULL`, micros(at), id)
}

const providerColumns = `id, org, name, issuer, client_id, secret, settings, disabled, created`

func scanProvider(r row) (*Provider, error) {
	var p Provider
	return &p, r.Scan(&p.ID, &p.Org, &p.Name, &p.Issuer, &p.ClientID, bytesText{&p.Secret}, bytesText{&p.Settings}, &p.Disabled, stamp{&p.Created})
}

func (t *sqlTx) InsertProvider(ctx context.Context, p *Provider) error {
	return t.insert(ctx, `INSERT INTO oidc_providers (`+providerColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		p.ID, p.Org, p.Name, p.Issuer, p.ClientID, text(p.Secret), text(p.Settings), p.Disabled, micros(p.Created))
}

func (t *sqlTx) Provider(ctx context.Context, id string) (*Provider, error) {
	return one(ctx, t, scanProvider, `SELECT `+providerColumns+` FROM oidc_providers WHERE id = ?`, id)
}

func (t *sqlTx) FindProvider(ctx context.Context, org, name string) (*Provider, error) {
	return one(ctx, t, scanProvider, `SELECT `+providerColumns+` FROM oidc_providers WHERE org = ? AND (name = ? OR id = ?)`, org, name, name)
}

func (t *sqlTx) Providers(ctx context.Context, org string, p Page) ([]*Provider, error) {
	return many(ctx, t, scanProvider, `SELECT `+providerColumns+` FROM oidc_providers WHERE (org = ? OR ? = '') AND name > ? ORDER BY name, org LIMIT ?`, org, org, p.After, p.limit())
}

func (t *sqlTx) UpdateProvider(ctx context.Context, p *Provider) error {
	return t.exec(ctx, true, `UPDATE oidc_providers SET name = ?, issuer = ?, client_id = ?, secret = ?, settings = ?, disabled = ? WHERE id = ?`,
		p.Name, p.Issuer, p.ClientID, text(p.Secret), text(p.Settings), p.Disabled, p.ID)
}

func (t *sqlTx) DeleteProvider(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM oidc_providers WHERE id = ?`, id)
}

const identityColumns = `provider, subject, person, email, created`

func scanPersonIdentity(r row) (*PersonIdentity, error) {
	var i PersonIdentity
	return &i, r.Scan(&i.Provider, &i.Subject, &i.Person, &i.Email, stamp{&i.Created})
}

func (t *sqlTx) InsertPersonIdentity(ctx context.Context, i *PersonIdentity) error {
	return t.insert(ctx, `INSERT INTO people_identities (`+identityColumns+`) VALUES (?, ?, ?, ?, ?)`, i.Provider, i.Subject, i.Person, i.Email, micros(i.Created))
}

func (t *sqlTx) PersonIdentity(ctx context.Context, provider, subject string) (*PersonIdentity, error) {
	return one(ctx, t, scanPersonIdentity, `SELECT `+identityColumns+` FROM people_identities WHERE provider = ? AND subject = ?`, provider, subject)
}

func (t *sqlTx) PersonIdentities(ctx context.Context, person string) ([]*PersonIdentity, error) {
	return many(ctx, t, scanPersonIdentity, `SELECT `+identityColumns+` FROM people_identities WHERE person = ? ORDER BY provider, subject`, person)
}
