package store

import (
	"context"
	"time"
)

// Flow is a connection as its gateway reported it. Names are those of then.
type Flow struct {
	Gateway, ID, Org       string // ID is the gateway's
	GatewayName            string
	Client, ClientName     string
	Person, Login          string // "" is nobody's client
	Resource, ResourceName string
	Rule                   string
	Protocol               string
	Destination            string // as the client named it
	Address                string // that was dialled
	Relay                  string // name, "" is none
	Path                   string
	Started                time.Time
	Seen                   time.Time // its end, or the newest report while it is open
	Open                   bool
	Sent, Received         int64 // bytes to and from the resource
	Reason                 string
}

// FlowFilter chooses flows. Its zero value is all.
type FlowFilter struct {
	Client, Person, Resource, Gateway string    // ids
	From, To                          time.Time // of their start: From on, before To
	// BeforeStarted and BeforeID are the last flow of the page before; BeforeID "" is none.
	BeforeStarted time.Time
	BeforeID      string
	Limit         int // 0 is all
}

// FlowTx is the part of a transaction that concerns the flow log. The conventions are those of Tx.
type FlowTx interface {
	// PutFlows inserts flows, and replaces those that are open.
	PutFlows(ctx context.Context, fs []*Flow) error
	Flows(ctx context.Context, org string, f FlowFilter) ([]*Flow, error) // newest first
	CountFlows(ctx context.Context, org string) (int64, error)
	// PurgeFlows removes at most limit flows that were last seen before a time and says how many.
	PurgeFlows(ctx context.Context, before time.Time, limit int) (int64, error)
	// TrimFlows removes at most limit of the oldest flows of org that are beyond keep, and says how many.
	TrimFlows(ctx context.Context, org string, keep, limit int) (int64, error)

	FlowLogOff(ctx context.Context, org string) (bool, error)
	SetFlowLogOff(ctx context.Context, org string, off bool) error
}
