package control

import (
	"time"

	"sallyway/internal/identity"
)

// AuditCheckpoint is a signed head of an audit chain (see package auditfile for what the signature covers). Certificates (PEM) are those of its
// key, the key's own first.
type AuditCheckpoint struct {
	Seq          int64     `json:"seq"`
	Hash         string    `json:"hash"`
	At           time.Time `json:"at"`
	Key          string    `json:"key"` // hash
	Signature    []byte    `json:"signature"`
	Certificates string    `json:"certificates"`
}

// Webhook is a subscription to an organization's audit entries: each that fits is delivered, in order, at least once.
type Webhook struct {
	ID     string   `json:"id"`
	Name   string   `json:"name"`
	URL    string   `json:"url"`
	Events []string `json:"events"` // patterns of actions, such as relay.* ; empty is all
	// ThroughGateways has it dialled by the organization's gateways: the only way to a private address.
	ThroughGateways bool      `json:"through_gateways"`
	Created         time.Time `json:"created"`
	// State is idle (nothing to deliver), delivering, failing, or disabled.
	State       string     `json:"state"`
	Reason      string     `json:"reason,omitempty"`       // why it is disabled, or what failed last
	LastSuccess *time.Time `json:"last_success,omitempty"` // nil is never
	FailedSince *time.Time `json:"failed_since,omitempty"` // nil: the newest delivery went well
	NextTry     *time.Time `json:"next_try,omitempty"`     // of one that fails
	// Backlog is how many entries of the chain it has not come to yet, those that do not fit included.
	Backlog int64 `json:"backlog"`
	// Secret is in the answer to its creation or change alone.
	Secret string `json:"secret,omitempty"`
}

// The states of a webhook.
const (
	WebhookIdle       = "idle"
	WebhookDelivering = "delivering"
	WebhookFailing    = "failing"
	WebhookDisabled   = "disabled"
)

// CreateWebhook makes one. An empty secret has the platform make it.
type CreateWebhook struct {
	Name            string   `json:"name" maxLength:"63"`
	URL             string   `json:"url" maxLength:"2048"`
	Events          []string `json:"events,omitempty" maxItems:"50"`
	Secret          string   `json:"secret,omitempty" maxLength:"512"`
	ThroughGateways bool     `json:"through_gateways,omitempty"`
}

// UpdateWebhook changes what is set. Disabled false has one that was disabled, by somebody or by the receiver's answer, go on where it was.
type UpdateWebhook struct {
	URL             *string   `json:"url,omitempty" maxLength:"2048"`
	Events          *[]string `json:"events,omitempty" maxItems:"50"`
	Secret          *string   `json:"secret,omitempty" maxLength:"512" doc:"empty: a new one is made"`
	ThroughGateways *bool     `json:"through_gateways,omitempty"`
	Disabled        *bool     `json:"disabled,omitempty"`
	// Skip leaves out what waits: it goes on with what comes.
	Skip bool `json:"skip,omitempty"`
}

// WebhookTest is how a delivery that was asked for went.
type WebhookTest struct {
	OK      bool   `json:"ok"`
	Status  int    `json:"status,omitempty"` // of HTTP
	Problem string `json:"problem,omitempty"`
	Millis  int64  `json:"milliseconds"`
}

// FlowReport is what a gateway tells of a connection, when it ends and every few minutes before.
type FlowReport struct {
	ID          string        `json:"id"` // unique at the gateway
	Peer        identity.Node `json:"peer"`
	Resource    string        `json:"resource"` // id
	Rule        string        `json:"rule"`
	Protocol    string        `json:"protocol"`    // tcp or udp
	Destination string        `json:"destination"` // as the peer named it
	Address     string        `json:"address"`     // that was dialled
	Relay       string        `json:"relay,omitempty"`
	Path        string        `json:"path,omitempty"` // kind: direct, udp, tls, …
	Started     time.Time     `json:"started"`
	Seen        time.Time     `json:"seen"` // its end, or now while it is open
	Open        bool          `json:"open,omitempty"`
	Sent        uint64        `json:"sent"`     // bytes to the resource
	Received    uint64        `json:"received"` // bytes from the resource
	Reason      string        `json:"reason,omitempty"`
}

// FlowBatch is the body of POST /api/v1/node/flows. Dropped are flows that the gateway had no room for since the batch before.
type FlowBatch struct {
	Flows   []FlowReport `json:"flows" maxItems:"500"`
	Dropped uint64       `json:"dropped,omitempty"`
}

// MaxFlows is how many flows a batch has at most.
const MaxFlows = 500

// FlowRecord is a connection in the flow log. Names are those of then.
type FlowRecord struct {
	ID          string    `json:"id"`
	Client      string    `json:"client"`
	ClientID    string    `json:"client_id"`
	Person      string    `json:"person,omitempty"` // login of whose client it was
	Resource    string    `json:"resource"`
	ResourceID  string    `json:"resource_id"`
	Gateway     string    `json:"gateway"`
	Relay       string    `json:"relay,omitempty"`
	Path        string    `json:"path,omitempty"`
	Rule        string    `json:"rule"`
	Protocol    string    `json:"protocol"`
	Destination string    `json:"destination"`
	Address     string    `json:"address"`
	Started     time.Time `json:"started"`
	Ended       time.Time `json:"ended,omitzero"` // zero is open, as far as was told
	Seconds     float64   `json:"seconds"`
	Sent        int64     `json:"sent"`     // bytes to the resource
	Received    int64     `json:"received"` // bytes from the resource
	Reason      string    `json:"reason,omitempty"`
}

// FlowLog says whether an organization keeps a flow log.
type FlowLog struct {
	On bool `json:"on"`
}
