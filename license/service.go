// Package license is the licence service: it knows customers, signs what they may have (package entitlement), and hands that to their platforms. It is
// small, has a database and signing keys of its own, and platforms go on without it: they verify offline what they were given.
//
//	s, err := license.Open(ctx, license.Config{Data: dir, Listen: ":4000", Log: log})
//	err = s.Run(ctx) // until ctx ends
//
// Everything it keeps lies in one folder:
//
//	license.db    customers, entitlements, hashes of licence keys and tokens, the audit log (or all of this in a PostgreSQL)
//	signing.key   the key that signs, and the one that will next, 0600: back it up apart from the database
//	tls.key       the authority of its own certificate, 0600, where none is given
//	admin.token   credential of its administrator, made at the first start, 0600
package license

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/database"
	"sallyway/internal/entitlement"
	"sallyway/internal/identity"
)

// Prefixes of credentials, so that a person sees what one is.
const (
	adminPrefix   = "sla_"
	licencePrefix = "slk_"
)

// defaultLife is how long a licence is valid that says nothing else.
const defaultLife = 365 * 24 * time.Hour

// Service does what is asked; the API is around it. Methods may be called concurrently.
type Service struct {
	db     *database.DB
	dir    string
	issuer string
	clock  func() time.Time
	log    *slog.Logger
}

func (s *Service) now() time.Time { return s.clock().UTC().Truncate(time.Microsecond) }

// refusal is what a caller is told.
type refusal struct{ control.Problem }

// Error implements error.
func (r *refusal) Error() string { return r.Detail }

func refuse(status int, code, remedy, format string, args ...any) *refusal {
	return &refusal{control.Problem{Status: status, Code: code, Title: http.StatusText(status), Detail: fmt.Sprintf(format, args...), Remedy: remedy}}
}

func invalid(location, remedy, format string, args ...any) *refusal {
	e := refuse(http.StatusUnprocessableEntity, control.CodeInvalid, remedy, format, args...)
	e.Errors = []control.ProblemPart{{Message: e.Detail, Location: location}}
	return e
}

// secret makes a credential of 256 bits.
func secret(prefix string) string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return prefix + base64.RawURLEncoding.EncodeToString(b)
}

// nameForm is what customers are called: something that goes into a path.
var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// CreateCustomer makes a customer.
func (s *Service) CreateCustomer(ctx context.Context, actor string, req Customer) (*Customer, error) {
	if !nameForm.MatchString(req.Name) {
		return nil, invalid("body.name", "use lower-case letters, digits, dots and hyphens, such as acme", "customer name %.80q is none", req.Name)
	}
	if len(req.Contact) > entitlement.MaxText {
		return nil, invalid("body.contact", "an address is enough", "contact of %d bytes, limit %d", len(req.Contact), entitlement.MaxText)
	}
	var out *Customer
	err := s.db.Update(ctx, func(tx *database.Tx) error {
		out = &Customer{Name: req.Name, Contact: req.Contact, Created: s.now()}
		err := tx.Insert(ctx, `INSERT INTO customers (name, contact, created) VALUES (?, ?, ?)`, out.Name, out.Contact, database.Micros(out.Created))
		if errors.Is(err, database.ErrExists) {
			return refuse(http.StatusConflict, control.CodeConflict, "choose another name", "there already is a customer %q", req.Name)
		}
		if err != nil {
			return err
		}
		return record(ctx, tx, out.Created, actor, "customer.create", out.Name, map[string]any{"contact": out.Contact})
	})
	return out, err
}

// Customers lists all customers by name.
func (s *Service) Customers(ctx context.Context) (out []*Customer, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) (err error) {
		out, err = database.Many(ctx, tx, scanCustomer, `SELECT name, contact, created FROM customers ORDER BY name`)
		return err
	})
	return out, err
}

func findCustomer(ctx context.Context, tx *database.Tx, name string) (*Customer, error) {
	c, err := customer(ctx, tx, name)
	if errors.Is(err, database.ErrNotFound) {
		return nil, refuse(http.StatusNotFound, control.CodeNotFound, "see `sallyway-license customer list`", "there is no customer %.80q", name)
	}
	return c, err
}

// CreateKey makes a licence key of a customer. The answer has it, and nothing ever again.
func (s *Service) CreateKey(ctx context.Context, actor, customer, name string) (*LicenceKey, error) {
	if len(name) > entitlement.MaxText {
		return nil, invalid("body.name", "say where it is used", "name of %d bytes, limit %d", len(name), entitlement.MaxText)
	}
	var out *LicenceKey
	err := s.db.Update(ctx, func(tx *database.Tx) error {
		if _, err := findCustomer(ctx, tx, customer); err != nil {
			return err
		}
		out = &LicenceKey{ID: identity.NewID("key"), Customer: customer, Name: name, Created: s.now(), Key: secret(licencePrefix)}
		if err := tx.Insert(ctx, `INSERT INTO licence_keys (id, customer, hash, name, created) VALUES (?, ?, ?, ?, ?)`,
			out.ID, customer, hashText(out.Key), name, database.Micros(out.Created)); err != nil {
			return err
		}
		return record(ctx, tx, out.Created, actor, "licence_key.create", out.ID, map[string]any{"customer": customer, "name": name})
	})
	return out, err
}

// Keys lists the licence keys of a customer, without the keys themselves.
func (s *Service) Keys(ctx context.Context, customer string) (out []*LicenceKey, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) error {
		if _, err := findCustomer(ctx, tx, customer); err != nil {
			return err
		}
		out, err = database.Many(ctx, tx, scanKey, `SELECT `+keyColumns+` FROM licence_keys WHERE customer = ? ORDER BY created, id`, customer)
		return err
	})
	return out, err
}

// RevokeKey ends a licence key.
func (s *Service) RevokeKey(ctx context.Context, actor, customer, id string) error {
	return s.db.Update(ctx, func(tx *database.Tx) error {
		now := s.now()
		err := tx.Exec(ctx, true, `UPDATE licence_keys SET revoked = ? WHERE customer = ? AND id = ? AND revoked IS NULL`, database.Micros(now), customer, id)
		if errors.Is(err, database.ErrNotFound) {
			return refuse(http.StatusNotFound, control.CodeNotFound, "see `sallyway-license key list`", "customer %.80q has no licence key %.80q that works", customer, id)
		}
		if err != nil {
			return err
		}
		return record(ctx, tx, now, actor, "licence_key.revoke", id, map[string]any{"customer": customer})
	})
}

// IssueRequest asks for an entitlement.
type IssueRequest struct {
	Organization string             `json:"organization"`
	Platform     string             `json:"platform,omitempty"`
	Limits       entitlement.Limits `json:"limits"`
	Features     []string           `json:"features,omitempty"`
	NotBefore    *time.Time         `json:"not_before,omitempty"` // absent: now
	Expires      *time.Time         `json:"expires,omitempty"`    // absent: in a year
}

// Issued is an entitlement with its signed form.
type Issued struct {
	*entitlement.Entitlement
	State   string `json:"state"`
	Signer  string `json:"signer"`
	Licence string `json:"licence"` // signed, in one line
}

// Issue signs an entitlement. It takes the place of the one for the same organization of the same platform.
func (s *Service) Issue(ctx context.Context, actor, customer string, req IssueRequest) (*Issued, error) {
	var out *Issued
	err := s.db.Update(ctx, func(tx *database.Tx) error {
		c, err := findCustomer(ctx, tx, customer)
		if err != nil {
			return err
		}
		now := s.now()
		e := &entitlement.Entitlement{
			Customer: customer, Platform: req.Platform, Organization: req.Organization, Limits: req.Limits, Features: req.Features, NotBefore: now, Expires: now.Add(defaultLife), Contact: c.Contact,
		}
		if req.NotBefore != nil {
			e.NotBefore = *req.NotBefore
		}
		if req.Expires != nil {
			e.Expires = *req.Expires
		}
		if !e.Expires.After(e.NotBefore) || !e.Expires.After(now) {
			return invalid("body.expires", "name a time that is ahead", "the licence would end at %s", e.Expires.Format(time.RFC3339))
		}
		var others int
		if err := tx.Row(ctx, `SELECT COUNT(*) FROM entitlements WHERE customer = ? AND organization = ? AND state = 'current' AND platform <> ? AND (platform = '' OR ? = '')`,
			customer, e.Organization, e.Platform, e.Platform).Scan(&others); err != nil {
			return err
		}
		if others > 0 {
			return refuse(http.StatusConflict, control.CodeConflict, "revoke it first, so that it is plain which one counts",
				"customer %s already has a licence for organization %s that is or is not bound to one platform, other than this", customer, e.Organization)
		}
		out, err = s.sign(ctx, tx, e, Current, now)
		if err != nil {
			return err
		}
		return record(ctx, tx, now, actor, "entitlement.issue", e.ID, detail(e))
	})
	s.told("licence issued", out, err)
	return out, err
}

func detail(e *entitlement.Entitlement) map[string]any {
	return map[string]any{
		"customer": e.Customer, "organization": e.Organization, "platform": e.Platform, "serial": e.Serial, "limits": e.Limits, "expires": e.Expires.UTC().Format(time.RFC3339),
	}
}

// sign gives e an id and a serial, signs it by the current key, and keeps it.
func (s *Service) sign(ctx context.Context, tx *database.Tx, e *entitlement.Entitlement, state string, now time.Time) (*Issued, error) {
	known, err := signingKeys(ctx, tx)
	if err != nil {
		return nil, err
	}
	key, err := s.signer(known)
	if err != nil {
		return nil, err
	}
	if e.Serial, err = nextSerial(ctx, tx); err != nil {
		return nil, err
	}
	e.ID, e.Issuer, e.Issued = identity.NewID("entitlement"), s.issuer, now
	for _, t := range []*time.Time{&e.Issued, &e.NotBefore, &e.Expires} {
		*t = t.UTC().Truncate(time.Second)
	}
	if err := e.Check(); err != nil {
		return nil, invalid("body", "correct it", "%v", err)
	}
	jws, err := key.Sign(e)
	if err != nil {
		return nil, err
	}
	if err := insertIssued(ctx, tx, &issued{
		ID: e.ID, Serial: e.Serial, Customer: e.Customer, Platform: e.Platform, Organization: e.Organization, Document: jws, Signer: key.Public().ID(), Issued: now, State: state,
	}); err != nil {
		return nil, err
	}
	return &Issued{e, state, key.Public().ID(), jws}, nil
}

// open reads a document of the database. All keys that the service ever had are believed: it has signed it itself.
func (s *Service) open(ctx context.Context, tx *database.Tx, rows ...*issued) ([]*Issued, error) {
	known, err := signingKeys(ctx, tx)
	if err != nil {
		return nil, err
	}
	var trust entitlement.Trust
	for _, k := range known {
		p, err := entitlement.ParsePublic(k.Public)
		if err != nil {
			return nil, err
		}
		trust = append(trust, p)
	}
	out := make([]*Issued, len(rows))
	for i, r := range rows {
		e, err := trust.Open(r.Document)
		if err != nil {
			return nil, fmt.Errorf("entitlement %s in the database: %w", r.ID, err)
		}
		out[i] = &Issued{e, r.State, r.Signer, r.Document}
	}
	return out, nil
}

func (s *Service) find(ctx context.Context, tx *database.Tx, id string) (*Issued, error) {
	r, err := database.One(ctx, tx, scanIssued, `SELECT `+issuedColumns+` FROM entitlements WHERE id = ?`, id)
	if errors.Is(err, database.ErrNotFound) {
		return nil, refuse(http.StatusNotFound, control.CodeNotFound, "see `sallyway-license entitlement list`", "there is no entitlement %.80q", id)
	}
	if err != nil {
		return nil, err
	}
	all, err := s.open(ctx, tx, r)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// Entitlement shows one.
func (s *Service) Entitlement(ctx context.Context, id string) (out *Issued, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) error {
		out, err = s.find(ctx, tx, id)
		return err
	})
	return out, err
}

// Entitlements lists those of a customer, the newest of each place; with history, all.
func (s *Service) Entitlements(ctx context.Context, customer string, history bool) (out []*Issued, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) error {
		if _, err := findCustomer(ctx, tx, customer); err != nil {
			return err
		}
		rows, err := database.Many(ctx, tx, scanIssued, `SELECT `+issuedColumns+` FROM entitlements WHERE customer = ? AND (? OR state <> 'replaced') ORDER BY serial`, customer, history)
		if err != nil {
			return err
		}
		out, err = s.open(ctx, tx, rows...)
		return err
	})
	return out, err
}

// change issues the next document for the place of one.
func (s *Service) change(ctx context.Context, actor, action, id, state string, fn func(e *entitlement.Entitlement, now time.Time) error) (*Issued, error) {
	var out *Issued
	err := s.db.Update(ctx, func(tx *database.Tx) error {
		old, err := s.find(ctx, tx, id)
		if err != nil {
			return err
		}
		if old.State == Replaced {
			return refuse(http.StatusConflict, control.CodeConflict, "see `sallyway-license entitlement list` for the newest one", "entitlement %s was replaced by another", id)
		}
		now := s.now()
		e := *old.Entitlement
		if err := fn(&e, now); err != nil {
			return err
		}
		if out, err = s.sign(ctx, tx, &e, state, now); err != nil {
			return err
		}
		d := detail(&e)
		d["replaces"] = id
		if e.Reason != "" {
			d["reason"] = e.Reason
		}
		return record(ctx, tx, now, actor, action, e.ID, d)
	})
	if state == Revoked {
		s.told("licence taken back", out, err)
	} else {
		s.told("licence renewed", out, err)
	}
	return out, err
}

// told logs what was issued.
func (s *Service) told(what string, e *Issued, err error) {
	if err == nil {
		s.log.Info(what, "licence", e.ID, "serial", e.Serial, "customer", e.Customer, "org", e.Organization, "expires", e.Expires)
	}
}

// Renew issues the same again until expires; zero is a year from the end of the old one, or from now when it is over.
func (s *Service) Renew(ctx context.Context, actor, id string, expires time.Time) (*Issued, error) {
	return s.change(ctx, actor, "entitlement.renew", id, Current, func(e *entitlement.Entitlement, now time.Time) error {
		if e.Reason != "" {
			return refuse(http.StatusConflict, control.CodeConflict, "issue a new one", "entitlement %s was taken back", id)
		}
		if expires.IsZero() {
			expires = e.Expires
			if expires.Before(now) {
				expires = now
			}
			expires = expires.Add(defaultLife)
		}
		if !expires.After(now) {
			return invalid("body.expires", "name a time that is ahead", "the licence would end at %s", expires.Format(time.RFC3339))
		}
		if now.After(e.NotBefore) {
			e.NotBefore = now
		}
		e.Expires = expires
		return nil
	})
}

// Revoke issues a document that ends at once in the place of one: platforms that fetch add nothing more. What they run goes on.
func (s *Service) Revoke(ctx context.Context, actor, id, reason string) (*Issued, error) {
	if reason == "" {
		reason = "the issuer took it back"
	}
	return s.change(ctx, actor, "entitlement.revoke", id, Revoked, func(e *entitlement.Entitlement, now time.Time) error {
		if e.Reason != "" {
			return refuse(http.StatusConflict, control.CodeConflict, "", "entitlement %s was taken back already", id)
		}
		e.NotBefore, e.Expires, e.Reason = now, now, reason
		return nil
	})
}

// Fetch are the signed documents that a customer's platform gets: the newest of each organization that are for it.
func (s *Service) Fetch(ctx context.Context, customer, platform string) ([]string, error) {
	out := []string{}
	err := s.db.View(ctx, func(tx *database.Tx) error {
		rows, err := database.Many(ctx, tx, scanIssued, `SELECT `+issuedColumns+` FROM entitlements
			WHERE customer = ? AND state <> 'replaced' AND (platform = '' OR platform = ?) ORDER BY serial`, customer, platform)
		out = out[:0]
		for _, r := range rows {
			out = append(out, r.Document)
		}
		return err
	})
	return out, err
}

// Audit lists what was done after an entry, the oldest first.
func (s *Service) Audit(ctx context.Context, after int64, limit int) (out []*Entry, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) (err error) {
		out, err = database.Many(ctx, tx, scanEntry, `SELECT `+entryColumns+` FROM audit WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
		return err
	})
	return out, err
}

// auditPage is how many entries are verified at a time.
const auditPage = 1000

// VerifyAudit recomputes the chain of the audit log. It returns how many entries it has.
func (s *Service) VerifyAudit(ctx context.Context) (int64, error) {
	var n int64
	hash := ""
	for {
		es, err := s.Audit(ctx, n, auditPage)
		if err != nil || len(es) == 0 {
			return n, err
		}
		for _, e := range es {
			if e.Seq != n+1 || e.sum(hash) != e.Hash {
				return n, fmt.Errorf("the audit log was changed at entry %d", n+1)
			}
			n, hash = e.Seq, e.Hash
		}
	}
}

// AdminToken makes a token of the administrator. A life of zero has no end; revokeOthers ends all that exist.
func (s *Service) AdminToken(ctx context.Context, name string, life time.Duration, revokeOthers bool) (string, error) {
	token := secret(adminPrefix)
	return token, s.db.Update(ctx, func(tx *database.Tx) error {
		now := s.now()
		if revokeOthers {
			if err := tx.Exec(ctx, false, `UPDATE admin_tokens SET revoked = ? WHERE revoked IS NULL`, database.Micros(now)); err != nil {
				return err
			}
		}
		var end time.Time
		if life > 0 {
			end = now.Add(life)
		}
		id := identity.NewID("token")
		if err := tx.Insert(ctx, `INSERT INTO admin_tokens (id, hash, name, created, expires) VALUES (?, ?, ?, ?, ?)`,
			id, hashText(token), name, database.Micros(now), database.Micros(end)); err != nil {
			return err
		}
		return record(ctx, tx, now, "host", "admin_token.create", id, map[string]any{"name": name, "others_revoked": revokeOthers})
	})
}

// admin is the name of the administrator's token, ErrNotFound when it is none that works.
func (s *Service) admin(ctx context.Context, token string) (name string, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) error {
		return tx.Row(ctx, `SELECT name FROM admin_tokens WHERE hash = ? AND revoked IS NULL AND (expires IS NULL OR expires > ?)`,
			hashText(token), database.Micros(s.now())).Scan(&name)
	})
	return name, err
}

// fetcher is the licence key of a platform, ErrNotFound when it is none that works. It notes the use.
func (s *Service) fetcher(ctx context.Context, token string) (k *LicenceKey, err error) {
	find := func(tx *database.Tx) (err error) {
		k, err = database.One(ctx, tx, scanKey, `SELECT `+keyColumns+` FROM licence_keys WHERE hash = ? AND revoked IS NULL`, hashText(token))
		return err
	}
	if err := s.db.View(ctx, find); err != nil { // strangers do not get to write
		return nil, err
	}
	err = s.db.Update(ctx, func(tx *database.Tx) error {
		if err := find(tx); err != nil {
			return err
		}
		return tx.Exec(ctx, true, `UPDATE licence_keys SET used = ? WHERE id = ?`, database.Micros(s.now()), k.ID)
	})
	return k, err
}
