package audit

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"sallyway/internal/auditfile"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// The heads of the chains are signed by a key of each organization: Ed25519, with a certificate of kind policy under the organization's root, so
// that who knows the root's pin can check an export without asking anybody. Nodes take no document by such a key: snapshots and grants are ES256.

// Sign signs the head of the chain of org in the transaction tx, unless it is signed already.
func Sign(ctx context.Context, tx store.Tx, org, keyID string, key ed25519.PrivateKey, at time.Time) error {
	seq, head, err := tx.AuditHead(ctx, org)
	if err != nil || seq == 0 {
		return err
	}
	c := auditfile.Checkpoint{Seq: seq, Hash: head, At: at.UTC().Truncate(time.Microsecond), Key: keyID}
	auditfile.Sign(key, org, &c)
	err = tx.InsertCheckpoint(ctx, &store.Checkpoint{Org: org, Seq: c.Seq, Hash: c.Hash, At: c.At, Key: c.Key, Signature: c.Signature})
	if errors.Is(err, store.ErrExists) {
		return nil
	}
	return err
}

// signatures are the checkpoints of a chain, to hold its entries against.
type signatures struct {
	org  string
	at   []*store.Checkpoint // that are still to come
	all  int
	end  *store.Checkpoint
	keys map[string]ed25519.PublicKey
}

func newSignatures(ctx context.Context, tx store.Tx, org string) (*signatures, error) {
	s := &signatures{org: org, keys: make(map[string]ed25519.PublicKey)}
	var err error
	if s.at, err = tx.Checkpoints(ctx, org, 0, 0); err != nil {
		return nil, err
	}
	if s.all = len(s.at); s.all > 0 {
		s.end = s.at[s.all-1]
	}
	ks, err := tx.AuditKeys(ctx, org)
	if err != nil {
		return nil, err
	}
	for _, k := range ks {
		certs, err := identity.DecodeCertificates(k.Chain)
		if err != nil || len(certs) == 0 {
			continue // its signatures are found to be bad
		}
		if p, ok := certs[0].PublicKey.(ed25519.PublicKey); ok && identity.HashKey(p).String() == k.ID {
			s.keys[k.ID] = p
		}
	}
	return s, nil
}

// last is the newest checkpoint's entry and time.
func (s *signatures) last() (int64, time.Time) {
	if s.end == nil {
		return 0, time.Time{}
	}
	return s.end.Seq, s.end.At
}

// check holds the next entry against its checkpoint, if it has one, and says what is wrong.
func (s *signatures) check(e *store.AuditEntry) string {
	if len(s.at) == 0 || s.at[0].Seq != e.Seq {
		return ""
	}
	c := s.at[0]
	s.at = s.at[1:]
	public := s.keys[c.Key]
	file := checkpoint(c)
	switch {
	case c.Hash != e.Hash:
		return fmt.Sprintf("entry %d is not the one that was signed at %s: the chain was rewritten", e.Seq, c.At.Format(time.RFC3339))
	case public == nil, !ed25519.Verify(public, auditfile.Message(s.org, file), c.Signature):
		return fmt.Sprintf("the signature at entry %d is not good", e.Seq)
	}
	return ""
}

func checkpoint(c *store.Checkpoint) *auditfile.Checkpoint {
	return &auditfile.Checkpoint{Type: auditfile.TypeCheckpoint, Seq: c.Seq, Hash: c.Hash, At: c.At.UTC(), Key: c.Key, Signature: c.Signature}
}

// exportBatch is how many entries Export holds at once.
const exportBatch = 1000

// Export writes the chain of org as package auditfile describes it, up to the head that it has when Export begins. It reads in pieces, so that
// a long export holds up nobody; alive is called before each, for deadlines, and may be nil.
func Export(ctx context.Context, st store.Store, org string, now time.Time, w io.Writer, alive func()) error {
	x := &export{org: org, enc: json.NewEncoder(w), known: make(map[string]bool)}
	head, err := x.begin(ctx, st, now)
	if err != nil {
		return err
	}
	for seq := int64(0); seq < head; {
		if alive != nil {
			alive()
		}
		var rows []*store.AuditEntry
		var signed []*store.Checkpoint
		if err := st.View(ctx, func(tx store.Tx) (err error) {
			if rows, err = tx.Audit(ctx, org, seq, int(min(exportBatch, head-seq))); err != nil || len(rows) == 0 {
				return err
			}
			if signed, err = tx.Checkpoints(ctx, org, seq, exportBatch); err != nil {
				return err
			}
			x.keys, err = tx.AuditKeys(ctx, org)
			return err
		}); err != nil {
			return err
		}
		if len(rows) == 0 {
			break // entries are missing: whoever verifies the file sees it
		}
		if err := x.write(rows, signed); err != nil {
			return err
		}
		seq = rows[len(rows)-1].Seq
	}
	return nil
}

type export struct {
	org   string
	enc   *json.Encoder
	keys  []*store.AuditKey
	known map[string]bool // keys that were written
}

// begin writes the first line: the roots are those of the organization, and those that its keys were certified under.
func (x *export) begin(ctx context.Context, st store.Store, now time.Time) (head int64, err error) {
	var roots []byte
	have := make(map[identity.KeyHash]bool)
	err = st.View(ctx, func(tx store.Tx) error {
		roots = nil
		clear(have)
		if head, _, err = tx.AuditHead(ctx, x.org); err != nil {
			return err
		}
		as, err := tx.Authorities(ctx, x.org)
		if err != nil {
			return err
		}
		add := func(c *x509.Certificate) {
			if hash := identity.CertificateKeyHash(c); !have[hash] {
				have[hash] = true
				roots = append(roots, identity.EncodeCertificates(c)...)
			}
		}
		for _, a := range as {
			if a.Kind != pki.KindRoot {
				continue
			}
			c, err := x509.ParseCertificate(a.Certificate)
			if err != nil {
				return fmt.Errorf("root of %s: %w", x.org, err)
			}
			add(c)
		}
		ks, err := tx.AuditKeys(ctx, x.org)
		if err != nil {
			return err
		}
		for _, k := range ks {
			certs, err := identity.DecodeCertificates(k.Chain)
			if err != nil || len(certs) == 0 {
				return fmt.Errorf("certificates of audit key %s: %w", k.ID, err)
			}
			add(certs[len(certs)-1])
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return head, x.enc.Encode(auditfile.Chain{Type: auditfile.TypeChain, Format: auditfile.Format, Org: x.org, Exported: now.UTC(), Roots: string(roots)})
}

func (x *export) write(rows []*store.AuditEntry, signed []*store.Checkpoint) error {
	for _, e := range rows {
		if err := x.enc.Encode(line(e)); err != nil {
			return err
		}
		for len(signed) > 0 && signed[0].Seq <= e.Seq {
			c := signed[0]
			signed = signed[1:]
			for _, k := range x.keys {
				if k.ID == c.Key && !x.known[k.ID] {
					x.known[k.ID] = true
					if err := x.enc.Encode(auditfile.Key{Type: auditfile.TypeKey, ID: k.ID, Certificates: string(k.Chain)}); err != nil {
						return err
					}
				}
			}
			if err := x.enc.Encode(checkpoint(c)); err != nil {
				return err
			}
		}
	}
	return nil
}
