package store

import (
	"context"
	"time"
)

// Replica is a platform that shares the database with others.
type Replica struct {
	ID, Address   string
	Started, Seen time.Time
	Streams       int // nodes that it holds a control stream of
}

// Beat is a node's newest heartbeat, as the replica that got it wrote it down.
type Beat struct {
	Node, Replica string
	At            time.Time
	Beat          []byte // JSON
}

// ReplicaTx is what replicas tell each other by the database.
type ReplicaTx interface {
	PutReplica(ctx context.Context, r *Replica) error // inserts or replaces
	Replicas(ctx context.Context) ([]*Replica, error) // oldest first
	DropReplica(ctx context.Context, id string) error // no error when there is none

	PutBeats(ctx context.Context, bs []*Beat) error // inserts or replaces
	// Beats returns those that are not older than since and not of a replica.
	Beats(ctx context.Context, since time.Time, except string) ([]*Beat, error)

	// TakeLease takes or keeps a lease until a time, unless another holds it at now.
	TakeLease(ctx context.Context, name, holder string, now, until time.Time) (bool, error)
	DropLease(ctx context.Context, name, holder string) error // no error when it holds none

	// PurgeReplicas removes replicas and beats that were not heard since.
	PurgeReplicas(ctx context.Context, since time.Time) error
}
