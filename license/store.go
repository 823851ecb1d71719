package license

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"sallyway/internal/database"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Schema is the service's.
func Schema() database.Schema {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		panic(err) // it is embedded above
	}
	return database.Schema{Migrations: files, Program: "sallyway-license"}
}

// Customer is who gets licences.
type Customer struct {
	Name string `json:"name"`
	// Contact is whom the customer asks for more; it stands in every licence.
	Contact string    `json:"contact,omitempty"`
	Created time.Time `json:"created"`
}

// LicenceKey is a credential by which a customer's platforms fetch. The key itself is known when it is made, and never again.
type LicenceKey struct {
	ID       string     `json:"id"`
	Customer string     `json:"customer"`
	Name     string     `json:"name"`
	Created  time.Time  `json:"created"`
	Revoked  *time.Time `json:"revoked,omitempty"`
	Used     *time.Time `json:"used,omitempty"`
	Key      string     `json:"key,omitempty"`
}

// States of entitlements.
const (
	Current  = "current"
	Revoked  = "revoked"
	Replaced = "replaced"
)

// States of signing keys.
const (
	KeyCurrent = "current" // signs
	KeyNext    = "next"    // will sign after the next rotation: platforms trust it already
	KeyOld     = "old"     // has signed
)

// SigningKey is the public half of a key of the service.
type SigningKey struct {
	ID      string    `json:"id"`
	Public  string    `json:"public"`
	State   string    `json:"state"`
	Created time.Time `json:"created"`
}

// issued is a document as the database has it.
type issued struct {
	ID           string
	Serial       int64
	Customer     string
	Platform     string
	Organization string
	Document     string
	Signer       string
	Issued       time.Time
	State        string
}

// Entry is what was done.
type Entry struct {
	Seq    int64           `json:"seq"`
	At     time.Time       `json:"at"`
	Actor  string          `json:"actor"`
	Action string          `json:"action"`
	Object string          `json:"object"`
	Detail json.RawMessage `json:"detail"`
	Hash   string          `json:"hash"`
}

func hashText(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func scanCustomer(r database.Row) (*Customer, error) {
	var c Customer
	return &c, r.Scan(&c.Name, &c.Contact, database.Stamp(&c.Created))
}

func customer(ctx context.Context, tx *database.Tx, name string) (*Customer, error) {
	return database.One(ctx, tx, scanCustomer, `SELECT name, contact, created FROM customers WHERE name = ?`, name)
}

func scanKey(r database.Row) (*LicenceKey, error) {
	var k LicenceKey
	var revoked, used time.Time
	err := r.Scan(&k.ID, &k.Customer, &k.Name, database.Stamp(&k.Created), database.Stamp(&revoked), database.Stamp(&used))
	k.Revoked, k.Used = optional(revoked), optional(used)
	return &k, err
}

const keyColumns = `id, customer, name, created, revoked, used`

func scanSigningKey(r database.Row) (*SigningKey, error) {
	var k SigningKey
	return &k, r.Scan(&k.ID, &k.Public, &k.State, database.Stamp(&k.Created))
}

// signingKeys are those of the service, the current one first, then the next one.
func signingKeys(ctx context.Context, tx *database.Tx) ([]*SigningKey, error) {
	return database.Many(ctx, tx, scanSigningKey, `SELECT id, public, state, created FROM signing_keys
		ORDER BY CASE state WHEN 'current' THEN 0 WHEN 'next' THEN 1 ELSE 2 END, created DESC, id`)
}

const issuedColumns = `id, serial, customer, platform, organization, document, signer, issued, state`

func scanIssued(r database.Row) (*issued, error) {
	var e issued
	return &e, r.Scan(&e.ID, &e.Serial, &e.Customer, &e.Platform, &e.Organization, &e.Document, &e.Signer, database.Stamp(&e.Issued), &e.State)
}

func insertIssued(ctx context.Context, tx *database.Tx, e *issued) error {
	if err := tx.Exec(ctx, false, `UPDATE entitlements SET state = 'replaced' WHERE customer = ? AND organization = ? AND platform = ?`, e.Customer, e.Organization, e.Platform); err != nil {
		return err
	}
	return tx.Insert(ctx, `INSERT INTO entitlements (`+issuedColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		e.ID, e.Serial, e.Customer, e.Platform, e.Organization, e.Document, e.Signer, database.Micros(e.Issued), e.State)
}

// nextSerial is one more than any document has: transactions run one after the other.
func nextSerial(ctx context.Context, tx *database.Tx) (n int64, err error) {
	err = tx.Row(ctx, `SELECT COALESCE(MAX(serial), 0) + 1 FROM entitlements`).Scan(&n)
	return n, err
}

func scanEntry(r database.Row) (*Entry, error) {
	var e Entry
	var detail string
	err := r.Scan(&e.Seq, database.Stamp(&e.At), &e.Actor, &e.Action, &e.Object, &detail, &e.Hash)
	e.Detail = json.RawMessage(detail)
	return &e, err
}

const entryColumns = `seq, at, actor, action, object, detail, hash`

// sum is the hash of an entry after one with the hash before.
func (e *Entry) sum(before string) string {
	return hashText(fmt.Sprintf("%s\n%d\n%d\n%q\n%q\n%q\n%s", before, e.Seq, e.At.UnixMicro(), e.Actor, e.Action, e.Object, e.Detail))
}

// record adds to the audit log in the same transaction.
func record(ctx context.Context, tx *database.Tx, at time.Time, actor, action, object string, detail map[string]any) error {
	b, err := json.Marshal(detail)
	if err != nil {
		return err
	}
	e := Entry{At: at, Actor: actor, Action: action, Object: object, Detail: b}
	last, err := database.One(ctx, tx, scanEntry, `SELECT `+entryColumns+` FROM audit ORDER BY seq DESC LIMIT 1`)
	before := ""
	switch {
	case err == nil:
		e.Seq, before = last.Seq, last.Hash
	case !errors.Is(err, database.ErrNotFound):
		return err
	}
	e.Seq++
	e.Hash = e.sum(before)
	return tx.Insert(ctx, `INSERT INTO audit (`+entryColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)`, e.Seq, database.Micros(e.At), e.Actor, e.Action, e.Object, string(e.Detail), e.Hash)
}
