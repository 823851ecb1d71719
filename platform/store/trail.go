package store

import (
	"context"
	"time"
)

// AuditKey is a key that signs the heads of an organization's audit chain.
type AuditKey struct {
	ID, Org  string
	Chain    []byte // certificates (PEM), the key's own first
	Sealed   []byte // private key; empty when it signs no more
	Created  time.Time
	NotAfter time.Time
}

// Checkpoint is a signed head of an audit chain.
type Checkpoint struct {
	Org       string
	Seq       int64
	Hash      string
	At        time.Time // microseconds
	Key       string    // id
	Signature []byte
}

// SinkState is how the delivery of audit entries to somewhere goes.
type SinkState struct {
	Success time.Time // of the newest delivery; zero is never
	Failed  time.Time // since when nothing is delivered; zero is not
	Problem string
}

// ChainHead is how long a chain is, and how far a sink has got in it.
type ChainHead struct {
	Org       string
	Seq, Done int64
}

// Webhook is a subscription to an organization's audit entries.
type Webhook struct {
	ID, Org, Name string
	URL           string
	Events        []string // patterns of actions; empty is every one
	Secret        []byte   // sealed
	Gateways      bool     // dialled through the organization's gateways
	Disabled      string   // why, "" is not
	Created       time.Time
	Cursor        int64 // of the last entry that is done
	SinkState
	Tries int // that failed in a row
	Next  time.Time
	Head  int64 // of the chain; only read
}

// TrailTx is the part of a transaction that concerns what is made of the audit chains. The conventions are those of Tx.
type TrailTx interface {
	InsertAuditKey(ctx context.Context, k *AuditKey) error
	AuditKeys(ctx context.Context, org string) ([]*AuditKey, error) // newest first
	// SealAuditKey replaces the sealed private key; an empty one retires it.
	SealAuditKey(ctx context.Context, id string, sealed []byte) error
	AuditOrgs(ctx context.Context) ([]string, error) // that have a key, deleted ones, too

	InsertCheckpoint(ctx context.Context, c *Checkpoint) error
	// Checkpoints returns those of a chain with a higher sequence number, oldest first; a limit of 0 is all.
	Checkpoints(ctx context.Context, org string, after int64, limit int) ([]*Checkpoint, error)
	// Unsigned lists chains with entries beyond their newest checkpoint.
	Unsigned(ctx context.Context) ([]ChainHead, error)

	// Behind lists chains with entries that a sink has not got.
	Behind(ctx context.Context, sink string) ([]ChainHead, error)
	PutCursor(ctx context.Context, sink, org string, seq int64) error
	PutSink(ctx context.Context, sink string, s *SinkState) error
	Sink(ctx context.Context, sink string) (*SinkState, error)

	InsertWebhook(ctx context.Context, w *Webhook) error
	FindWebhook(ctx context.Context, org, name string) (*Webhook, error) // name or id
	Webhooks(ctx context.Context, org string, p Page) ([]*Webhook, error)
	// DueWebhooks lists those of all organizations that have something to deliver and may try at now, the one that waited longest first.
	DueWebhooks(ctx context.Context, now time.Time, limit int) ([]*Webhook, error)
	UpdateWebhook(ctx context.Context, w *Webhook) error // what people set, and cursor and state
	// PutWebhookState writes cursor and state alone: ErrNotFound when it is gone, or disabled meanwhile.
	PutWebhookState(ctx context.Context, w *Webhook) error
	DeleteWebhook(ctx context.Context, id string) error
}
