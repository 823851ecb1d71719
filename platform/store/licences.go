package store

import (
	"context"
	"time"

	"sallyway/internal/identity"
)

// Licence is the signed document by which an organization's limits are known, and what this platform noted about it. ID, Issuer, Serial, Bandwidth and
// Expires are the document's.
type Licence struct {
	Org, Document, ID, Issuer string
	Serial                    int64
	Bandwidth                 int64 // bytes per second; 0 is no limit
	Expires                   time.Time
	Source                    string // where it came from, for people
	Installed                 time.Time
	Warned                    int // days before the end for which a warning was written last
}

// Counted is how many nodes of a kind there are.
type Counted struct{ All, Enrolled int64 }

// LicenceTx is what a transaction knows of licences.
type LicenceTx interface {
	// PutLicence inserts or replaces the licence of its organization, and notes its serial.
	PutLicence(ctx context.Context, l *Licence) error
	Licence(ctx context.Context, org string) (*Licence, error)
	Licences(ctx context.Context) ([]*Licence, error)
	DeleteLicence(ctx context.Context, org string) error
	// LicenceSerial is the highest serial that an organization of this name ever had of an issuer; 0 is none.
	LicenceSerial(ctx context.Context, org, issuer string) (int64, error)
	// CountNodes counts the nodes of an organization that are not deleted, by kind.
	CountNodes(ctx context.Context, org string) (map[identity.Kind]Counted, error)
}
