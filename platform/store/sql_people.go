package store

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"time"
)

// Hashes are hexadecimal and sealed values base64 in the tables of people, so that one statement serves every database.

// digest decodes and encodes a hash.
type digest struct{ h *[32]byte }

// Scan implements sql.Scanner.
func (d digest) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("hash of type %T", v)
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(d.h) {
		return fmt.Errorf("hash of %d digits", len(s))
	}
	copy(d.h[:], b)
	return nil
}

func digits(h [32]byte) string { return hex.EncodeToString(h[:]) }

// bytesText decodes a column of bytes in base64; "" is nil.
type bytesText struct{ b *[]byte }

// Scan implements sql.Scanner.
func (t bytesText) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("bytes of type %T", v)
	}
	*t.b = nil
	if s == "" {
		return nil
	}
	b, err := base64.StdEncoding.DecodeString(s)
	*t.b = b
	return err
}

func text(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// optional decodes a reference; NULL is "".
type optional struct{ s *string }

// Scan implements sql.Scanner.
func (o optional) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*o.s = ""
	case string:
		*o.s = v
	default:
		return fmt.Errorf("text of type %T", v)
	}
	return nil
}

func reference(s string) any {
	if s == "" {
		return nil
	}
	return s
}

const personColumns = `id, org, login, name, email, password, password_changed, totp, totp_step, disabled, created, last_login`

func scanPerson(r row) (*Person, error) {
	var p Person
	return &p, r.Scan(&p.ID, &p.Org, &p.Login, &p.Name, &p.Email, &p.Password, stamp{&p.PasswordChanged}, bytesText{&p.TOTP}, &p.TOTPStep, &p.Disabled,
		stamp{&p.Created}, stamp{&p.LastLogin})
}

func (t *sqlTx) InsertPerson(ctx context.Context, p *Person) error {
	return t.insert(ctx, `INSERT INTO people (`+personColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		p.ID, p.Org, p.Login, p.Name, p.Email, p.Password, micros(p.PasswordChanged), text(p.TOTP), p.TOTPStep, p.Disabled, micros(p.Created), micros(p.LastLogin))
}

func (t *sqlTx) Person(ctx context.Context, id string) (*Person, error) {
	return one(ctx, t, scanPerson, `SELECT `+personColumns+` FROM people WHERE id = ?`, id)
}

func (t *sqlTx) FindPerson(ctx context.Context, login string) (*Person, error) {
	return one(ctx, t, scanPerson, `SELECT `+personColumns+` FROM people WHERE login = ? OR id = ?`, login, login)
}

func (t *sqlTx) People(ctx context.Context, org string, p Page) ([]*Person, error) {
	return many(ctx, t, scanPerson, `SELECT `+personColumns+` FROM people
		WHERE (org = ? OR ? = '' OR EXISTS (SELECT 1 FROM people_roles r WHERE r.person = people.id AND r.org = ?)) AND login > ? ORDER BY login LIMIT ?`,
		org, org, org, p.After, p.limit())
}

func (t *sqlTx) CountPeople(ctx context.Context) (int, error) {
	return t.count(ctx, `SELECT COUNT(*) FROM people`)
}

func (t *sqlTx) count(ctx context.Context, q string, args ...any) (int, error) {
	n, err := one(ctx, t, func(r row) (*int, error) {
		var n int
		return &n, r.Scan(&n)
	}, q, args...)
	if err != nil {
		return 0, err
	}
	return *n, nil
}

func (t *sqlTx) UpdatePerson(ctx context.Context, p *Person) error {
	return t.exec(ctx, true, `UPDATE people SET org = ?, login = ?, name = ?, email = ?, password = ?, password_changed = ?, totp = ?, disabled = ?, last_login = ? WHERE id = ?`,
		p.Org, p.Login, p.Name, p.Email, p.Password, micros(p.PasswordChanged), text(p.TOTP), p.Disabled, micros(p.LastLogin), p.ID)
}

func (t *sqlTx) DeletePerson(ctx context.Context, id string) error {
	return t.exec(ctx, true, `DELETE FROM people WHERE id = ?`, id)
}

func (t *sqlTx) StepTOTP(ctx context.Context, person string, step int64) error {
	return t.exec(ctx, true, `UPDATE people SET totp_step = ? WHERE id = ? AND totp_step < ?`, step, person, step)
}

func scanPersonRole(r row) (*PersonRole, error) {
	var m PersonRole
	return &m, r.Scan(&m.Person, &m.Org, &m.Role, stamp{&m.Created})
}

func (t *sqlTx) PutPersonRole(ctx context.Context, r *PersonRole) error {
	return t.exec(ctx, true, `INSERT INTO people_roles (person, org, role, created) VALUES (?, ?, ?, ?) ON CONFLICT (person, org) DO UPDATE SET role = excluded.role`,
		r.Person, r.Org, r.Role, micros(r.Created))
}

func (t *sqlTx) DeletePersonRole(ctx context.Context, person, org string) error {
	return t.exec(ctx, true, `DELETE FROM people_roles WHERE person = ? AND org = ?`, person, org)
}

func (t *sqlTx) PersonRoles(ctx context.Context, person string) ([]*PersonRole, error) {
	return many(ctx, t, scanPersonRole, `SELECT person, org, role, created FROM people_roles WHERE person = ? ORDER BY org`, person)
}

func (t *sqlTx) OrgRoles(ctx context.Context, org string) ([]*PersonRole, error) {
	return many(ctx, t, scanPersonRole, `SELECT person, org, role, created FROM people_roles WHERE org = ? ORDER BY person`, org)
}

func (t *sqlTx) PutRecoveryCodes(ctx context.Context, person string, hashes [][32]byte) error {
	if err := t.exec(ctx, false, `DELETE FROM people_recovery WHERE person = ?`, person); err != nil {
		return err
	}
	for _, h := range hashes {
		if err := t.exec(ctx, true, `INSERT INTO people_recovery (person, hash) VALUES (?, ?)`, person, digits(h)); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) RecoveryCodes(ctx context.Context, person string) (int, error) {
	return t.count(ctx, `SELECT COUNT(*) FROM people_recovery WHERE person = ?`, person)
}

func (t *sqlTx) SpendRecoveryCode(ctx context.Context, person string, hash [32]byte) error {
	return t.exec(ctx, true, `DELETE FROM people_recovery WHERE person = ? AND hash = ?`, person, digits(hash))
}

const webSessionColumns = `id, hash, person, created, seen, expires, source, agent, provider`

func scanWebSession(r row) (*WebSession, error) {
	var s WebSession
	return &s, r.Scan(&s.ID, digest{&s.Hash}, &s.Person, stamp{&s.Created}, stamp{&s.Seen}, stamp{&s.Expires}, &s.Source, &s.Agent, &s.Provider)
}

func (t *sqlTx) InsertWebSession(ctx context.Context, s *WebSession) error {
	return t.insert(ctx, `INSERT INTO people_sessions (`+webSessionColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.ID, digits(s.Hash), s.Person, micros(s.Created), micros(s.Seen), micros(s.Expires), s.Source, s.Agent, s.Provider)
}

func (t *sqlTx) WebSession(ctx context.Context, hash [32]byte) (*WebSession, error) {
	return one(ctx, t, scanWebSession, `SELECT `+webSessionColumns+` FROM people_sessions WHERE hash = ?`, digits(hash))
}

func (t *sqlTx) WebSessions(ctx context.Context, person string) ([]*WebSession, error) {
	return many(ctx, t, scanWebSession, `SELECT `+webSessionColumns+` FROM people_sessions WHERE person = ? ORDER BY created DESC, id`, person)
}

func (t *sqlTx) TouchWebSession(ctx context.Context, id string, at time.Time) error {
	return t.exec(ctx, true, `UPDATE people_sessions SET seen = ? WHERE id = ?`, micros(at), id)
}

func (t *sqlTx) DeleteWebSession(ctx context.Context, person, id string) error {
	return t.exec(ctx, true, `DELETE FROM people_sessions WHERE person = ? AND id = ?`, person, id)
}

func (t *sqlTx) DeleteWebSessions(ctx context.Context, person, except string) error {
	return t.exec(ctx, false, `DELETE FROM people_sessions WHERE person = ? AND id <> ?`, person, except)
}

const ticketColumns = `hash, kind, subject, data, created, expires`

func scanTicket(r row) (*Ticket, error) {
	var k Ticket
	return &k, r.Scan(digest{&k.Hash}, &k.Kind, &k.Subject, bytesText{&k.Data}, stamp{&k.Created}, stamp{&k.Expires})
}

func (t *sqlTx) InsertTicket(ctx context.Context, k *Ticket) error {
	return t.insert(ctx, `INSERT INTO people_tickets (`+ticketColumns+`) VALUES (?, ?, ?, ?, ?, ?)`,
		digits(k.Hash), k.Kind, k.Subject, text(k.Data), micros(k.Created), micros(k.Expires))
}

func (t *sqlTx) Ticket(ctx context.Context, hash [32]byte, kind string, now time.Time) (*Ticket, error) {
	return one(ctx, t, scanTicket, `SELECT `+ticketColumns+` FROM people_tickets WHERE hash = ? AND kind = ? AND expires > ?`, digits(hash), kind, micros(now))
}

func (t *sqlTx) SpendTicket(ctx context.Context, hash [32]byte, kind string, now time.Time) (*Ticket, error) {
	return one(ctx, t, scanTicket, `DELETE FROM people_tickets WHERE hash = ? AND kind = ? AND expires > ? RETURNING `+ticketColumns, digits(hash), kind, micros(now))
}

func (t *sqlTx) DeleteTickets(ctx context.Context, kind, subject string) error {
	return t.exec(ctx, false, `DELETE FROM people_tickets WHERE kind = ? AND subject = ?`, kind, subject)
}

const deviceColumns = `hash, user_code, state, person, client, source, created, expires, polled`

func scanDeviceLogin(r row) (*DeviceLogin, error) {
	var d DeviceLogin
	return &d, r.Scan(digest{&d.Hash}, digest{&d.UserCode}, &d.State, optional{&d.Person}, &d.Client, &d.Source, stamp{&d.Created}, stamp{&d.Expires}, stamp{&d.Polled})
}

func (t *sqlTx) InsertDeviceLogin(ctx context.Context, d *DeviceLogin) error {
	return t.insert(ctx, `INSERT INTO people_devices (`+deviceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		digits(d.Hash), digits(d.UserCode), d.State, reference(d.Person), d.Client, d.Source, micros(d.Created), micros(d.Expires), micros(d.Polled))
}

func (t *sqlTx) DeviceLogin(ctx context.Context, hash [32]byte) (*DeviceLogin, error) {
	return one(ctx, t, scanDeviceLogin, `SELECT `+deviceColumns+` FROM people_devices WHERE hash = ?`, digits(hash))
}

func (t *sqlTx) FindDeviceLogin(ctx context.Context, userCode [32]byte) (*DeviceLogin, error) {
	return one(ctx, t, scanDeviceLogin, `SELECT `+deviceColumns+` FROM people_devices WHERE user_code = ?`, digits(userCode))
}

func (t *sqlTx) DecideDeviceLogin(ctx context.Context, userCode [32]byte, state, person string, now time.Time) error {
	return t.exec(ctx, true, `UPDATE people_devices SET state = ?, person = ? WHERE user_code = ? AND state = 'pending' AND expires > ?`,
		state, person, digits(userCode), micros(now))
}

func (t *sqlTx) PollDeviceLogin(ctx context.Context, hash [32]byte, at time.Time) error {
	return t.exec(ctx, true, `UPDATE people_devices SET polled = ? WHERE hash = ?`, micros(at), digits(hash))
}

func (t *sqlTx) SpendDeviceLogin(ctx context.Context, hash [32]byte, now time.Time) (*DeviceLogin, error) {
	return one(ctx, t, scanDeviceLogin, `DELETE FROM people_devices WHERE hash = ? AND state <> 'pending' AND expires > ? RETURNING `+deviceColumns, digits(hash), micros(now))
}

func (t *sqlTx) CountDeviceLogins(ctx context.Context, source string, now time.Time) (int, error) {
	return t.count(ctx, `SELECT COUNT(*) FROM people_devices WHERE source = ? AND state = 'pending' AND expires > ?`, source, micros(now))
}

func (t *sqlTx) BindNode(ctx context.Context, node, person string) error {
	return t.exec(ctx, true, `INSERT INTO node_people (node, person) VALUES (?, ?) ON CONFLICT (node) DO UPDATE SET person = excluded.person`, node, person)
}

func (t *sqlTx) NodePerson(ctx context.Context, node string) (string, error) {
	s, err := one(ctx, t, func(r row) (*string, error) {
		var s string
		return &s, r.Scan(&s)
	}, `SELECT person FROM node_people WHERE node = ?`, node)
	if err != nil {
		return "", err
	}
	return *s, nil
}

// pair is a row of two references.
type pair struct{ a, b string }

func scanPair(r row) (*pair, error) {
	var p pair
	return &p, r.Scan(&p.a, &p.b)
}

func (t *sqlTx) NodePeople(ctx context.Context, org string) (map[string]string, error) {
	ps, err := many(ctx, t, scanPair, `SELECT p.node, p.person FROM node_people p JOIN nodes n ON n.id = p.node WHERE n.org = ? AND n.deleted IS NULL`, org)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string, len(ps))
	for _, p := range ps {
		out[p.a] = p.b
	}
	return out, nil
}

func (t *sqlTx) PersonNodes(ctx context.Context, person string) ([]*Node, error) {
	return many(ctx, t, scanNode, `SELECT `+nodeColumns+` FROM nodes WHERE id IN (SELECT node FROM node_people WHERE person = ?) AND deleted IS NULL ORDER BY org, name`, person)
}

func (t *sqlTx) PutGroupPeople(ctx context.Context, group string, people []string) error {
	if err := t.exec(ctx, false, `DELETE FROM group_people WHERE group_id = ?`, group); err != nil {
		return err
	}
	for _, p := range people {
		if err := t.exec(ctx, true, `INSERT INTO group_people (group_id, person) VALUES (?, ?)`, group, p); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) GroupPeople(ctx context.Context, org string) (map[string][]string, error) {
	ps, err := many(ctx, t, scanPair, `SELECT m.group_id, m.person FROM group_people m JOIN groups g ON g.id = m.group_id WHERE g.org = ? ORDER BY m.group_id, m.person`, org)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]string)
	for _, p := range ps {
		out[p.a] = append(out[p.a], p.b)
	}
	return out, nil
}

func (t *sqlTx) PurgePeople(ctx context.Context, now, idle, old time.Time) error {
	for _, q := range []struct {
		text string
		args []any
	}{
		{`DELETE FROM people_sessions WHERE expires < ? OR seen < ?`, []any{micros(now), micros(idle)}},
		{`DELETE FROM people_tickets WHERE expires < ?`, []any{micros(now)}},
		{`DELETE FROM people_devices WHERE expires < ?`, []any{micros(now)}},
		{`DELETE FROM access_tokens WHERE expires < ? OR revoked < ?`, []any{micros(old), micros(old)}},
	} {
		if err := t.exec(ctx, false, q.text, q.args...); err != nil {
			return err
		}
	}
	return nil
}
