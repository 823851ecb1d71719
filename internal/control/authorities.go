package control

import (
	"time"

	"sallyway/internal/identity"
)

// AuthorityState is what a CA is for now.
type AuthorityState string

// States of a CA, in the order in which it has them.
const (
	AuthorityRequested AuthorityState = "requested" // the owner of the offline root is to sign its certificate
	AuthorityNext      AuthorityState = "next"      // nodes accept it; it issues nothing yet
	AuthorityCurrent   AuthorityState = "current"   // issues
	AuthorityRetiring  AuthorityState = "retiring"  // nodes still accept what it issued
	AuthorityGone      AuthorityState = "gone"      // its key is erased
)

// Kinds of CAs besides the kinds of leaves.
const (
	AuthorityRoot = "root"
	AuthoritySSH  = "ssh"
)

// AuthorityRecord is a CA of an organization.
type AuthorityRecord struct {
	Kind       string         `json:"kind" doc:"root, ssh, or the kind of leaf that it issues"`
	Generation int            `json:"generation"`
	State      AuthorityState `json:"state"`
	Key        string         `json:"key,omitempty" doc:"hash of its key, which nodes pin"`
	Issuer     string         `json:"issuer,omitempty" doc:"hash of the key of the root that signed it"`
	Offline    bool           `json:"offline,omitempty" doc:"its key is not here"`
	Created    time.Time      `json:"created"`
	NotAfter   time.Time      `json:"not_after,omitzero"`
	Since      time.Time      `json:"since,omitzero" doc:"of the state"`
	// Until is when the state ends at the latest.
	Until time.Time `json:"until,omitzero"`
	// Certificate is PEM, Request what the owner of an offline root is to sign.
	Certificate string `json:"certificate,omitempty"`
	Request     string `json:"request,omitempty"`
}

// Actions of RotateAuthority.
const (
	RotationStart  = "start"
	RotationFinish = "finish"
	RotationAbort  = "abort"
)

// RotateAuthority has a CA followed by a new one.
type RotateAuthority struct {
	Kind   string `json:"kind" enum:"root,gateway,client,relay,site,policy,platform,ssh"`
	Action string `json:"action,omitempty" enum:"start,finish,abort" doc:"start (default); finish takes the next step now, without waiting; abort takes back a next one that issues nothing yet"`
	Plan   bool   `json:"plan,omitempty" doc:"only say what would happen"`
	// Root is the certificate (PEM) of an offline root that is to follow, signed by the current one.
	Root string `json:"root,omitempty"`
}

// RotationPlan says what a rotation does and when.
type RotationPlan struct {
	Kind  string         `json:"kind"`
	Steps []RotationStep `json:"steps"`
	// Unheard are nodes that do not accept the next CA yet.
	Unheard []Unheard `json:"unheard"`
}

// RotationStep is a step of a rotation.
type RotationStep struct {
	What string `json:"what"`
	// Latest is when it happens at the latest; zero is that it waits for somebody.
	Latest time.Time `json:"latest,omitzero"`
	Done   bool      `json:"done,omitempty"`
}

// Unheard is a node that has not heard of a CA yet.
type Unheard struct {
	Node     identity.Node `json:"node"`
	Name     string        `json:"name"`
	LastSeen time.Time     `json:"last_seen,omitzero"`
	// Until is when it is not waited for any more: its certificate has ended by then.
	Until time.Time `json:"until"`
}

// SignedAuthorities are certificates by an offline root (PEM), for CAs that were requested.
type SignedAuthorities struct {
	Certificates []string `json:"certificates"`
}
