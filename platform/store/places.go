package store

import (
	"context"
	"time"
)

// Wishes are where a node is, and which relays a gateway or a client is to have. The zero Wishes are none.
type Wishes struct {
	Node string
	// Region is a label. Domain is what a relay may fail together with; other nodes have none.
	Region, Domain string
	// Pin, Exclude and Prefer are ids of relays, also of ones that are deleted. Relays have none.
	Pin, Exclude, Prefer []string
}

// Empty says whether nothing is wished.
func (w *Wishes) Empty() bool {
	return w.Region == "" && w.Domain == "" && len(w.Pin)+len(w.Exclude)+len(w.Prefer) == 0
}

// OrgRegion is where an organization belongs.
type OrgRegion struct {
	Org    string
	Region string   // of the deployment that it belongs to; "" is one without a name
	Relays []string // regions whose shared relays it uses; empty is all
}

// RelayProbe is what was found when a relay was last tried from outside; Found is JSON.
type RelayProbe struct {
	Relay string
	At    time.Time
	Found []byte
}

// PlacesTx is the part of Tx about where things are.
type PlacesTx interface {
	PutWishes(ctx context.Context, w *Wishes) error                     // inserts or replaces
	Wishes(ctx context.Context, org string) (map[string]*Wishes, error) // by node; those that wish something
	NodeWishes(ctx context.Context, node string) (*Wishes, error)       // never ErrNotFound

	PutOrgRegion(ctx context.Context, r *OrgRegion) error          // inserts or replaces
	OrgRegion(ctx context.Context, org string) (*OrgRegion, error) // never ErrNotFound
	OrgRegions(ctx context.Context) (map[string]OrgRegion, error)  // by organization; those that have a row

	PutRelayProbe(ctx context.Context, p *RelayProbe) error // inserts or replaces
	RelayProbes(ctx context.Context) ([]*RelayProbe, error) // of live relays
	DropRelayProbe(ctx context.Context, relay string) error // also when there is none
}
