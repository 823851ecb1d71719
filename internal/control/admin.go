package control

import (
	"net/netip"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// The admin API, under /api/v1/orgs/{org}: Bearer with an API token, JSON, problem+json errors.
//
//	GET|POST            /api/v1/orgs                                    Organization; POST CreateOrganization
//	GET|PATCH|DELETE    /api/v1/orgs/{org}                              PATCH UpdateOrganization
//	GET|POST            /api/v1/orgs/{org}/{nodes}                      nodes: relays, gateways, clients; List[NodeRecord]; POST CreateNode → CreatedNode
//	GET|PATCH|DELETE    /api/v1/orgs/{org}/{nodes}/{name}               NodeRecord; PATCH UpdateNode. {name} is a name or an id, everywhere
//	POST                /api/v1/orgs/{org}/{nodes}/{name}/token         re-issue → CreatedNode
//	POST                /api/v1/orgs/{org}/{nodes}/{name}/disable|enable|revoke|drain → NodeRecord
//	POST                /api/v1/orgs/{org}/relays/{name}/credential     TURN credential for standard software: CreateTURNCredential → TURNCredential
//	GET|POST            /api/v1/orgs/{org}/resources[/{name}]           ResourceRecord, CreateResource, UpdateResource; PATCH, DELETE
//	GET|POST            /api/v1/orgs/{org}/policies[/{name}]            PolicyRecord, CreatePolicy; PATCH UpdatePolicy, DELETE
//	POST                /api/v1/orgs/{org}/policies:explain             ExplainRequest → Explanation
//	GET|POST            /api/v1/orgs/{org}/groups[/{name}]              GroupRecord, CreateGroup; PATCH, DELETE
//	GET                 /api/v1/orgs/{org}/sessions                     List[SessionRecord]
//	DELETE              /api/v1/orgs/{org}/sessions/{peer-id}           ends the sessions of a node (its key stays good)
//	GET                 /api/v1/orgs/{org}/audit                        List[AuditEntry]
//	GET                 /api/v1/orgs/{org}/audit:verify                 AuditVerification: recomputes the hash chain
//	GET                 /api/v1/orgs/{org}/status                       OrgStatus
//
// Lists take ?limit= and ?cursor= and answer List.

// List is one page.
type List[T any] struct {
	Items      []T    `json:"items"`
	NextCursor string `json:"next_cursor,omitempty"`
}

// Organization is a tenant.
type Organization struct {
	Name    string         `json:"name"`
	Range   []netip.Prefix `json:"range"` // virtual addresses: IPv4 and IPv6
	Created time.Time      `json:"created"`
	Direct  Direct         `json:"direct"`
	// Region is that of the deployment that the organization belongs to, empty where that has no name. RelayRegions are the regions whose shared
	// relays its nodes use; empty is all.
	Region       string   `json:"region,omitempty"`
	RelayRegions []string `json:"relay_regions,omitempty"`
	// PlatformDial says whether the platform may dial gateways, for tests and webhooks, where a policy allows it.
	PlatformDial bool `json:"platform_dial"`
}

// UpdateOrganization changes what is not nil.
type UpdateOrganization struct {
	Range         []netip.Prefix `json:"range,omitempty" doc:"virtual IPv4 and IPv6 prefix; only while the organization is empty"`
	Direct        *bool          `json:"direct,omitempty" doc:"whether sessions may leave the relay for a direct path"`
	DirectPrivate *bool          `json:"direct_private,omitempty" doc:"whether nodes tell each other private addresses for direct paths"`
	RelayRegions  *[]string      `json:"relay_regions,omitempty" doc:"regions whose shared relays its nodes may use; an empty list is all"`
	PlatformDial  *bool          `json:"platform_dial,omitempty" doc:"whether the platform may dial gateways, for tests and webhooks, where a policy allows it"`
}

// CreateOrganization makes a tenant with its own PKI.
type CreateOrganization struct {
	Name  string         `json:"name"`
	Range []netip.Prefix `json:"range,omitempty"`
	// Root is the certificate (PEM) of a root whose key its owner keeps; "" has the platform make one.
	Root string `json:"root,omitempty" doc:"certificate (PEM) of a root that is kept offline"`
}

// NodeState is what the platform knows of a node's life.
type NodeState string

// Node states as shown to people.
const (
	StatePending     NodeState = "pending"     // created, never enrolled
	StateHealthy     NodeState = "healthy"     // heartbeats arrive
	StateDegraded    NodeState = "degraded"    // heartbeats arrive and name problems
	StateDraining    NodeState = "draining"    // a relay that takes no new allocations
	StateUnreachable NodeState = "unreachable" // enrolled, no heartbeat for three intervals
	StateDisabled    NodeState = "disabled"
	StateRevoked     NodeState = "revoked"
)

// NodeRecord is a relay, gateway or client.
type NodeRecord struct {
	ID       string        `json:"id"`
	Name     string        `json:"name"`
	Kind     identity.Kind `json:"kind"`
	State    NodeState     `json:"state"`
	Created  time.Time     `json:"created"`
	Enrolled *time.Time    `json:"enrolled,omitempty"`
	LastSeen *time.Time    `json:"last_seen,omitempty"`
	Version  string        `json:"version,omitempty"`
	// Outdated says that the node's software is of an older release than the platform's, or of one that is not known.
	Outdated bool              `json:"outdated,omitempty"`
	Key      *identity.KeyHash `json:"key,omitempty"`
	NotAfter *time.Time        `json:"not_after,omitempty"` // of its newest leaf
	Virtual  []netip.Addr      `json:"virtual,omitempty"`
	Problems []string          `json:"problems,omitempty"`
	Places
	// For relays.
	Host string `json:"host,omitempty"`
	Port uint16 `json:"port,omitempty"`
	// RTT is how far away a relay is: the median of what gateways measured, or else what the platform did, in nanoseconds; 0 is not known.
	RTT time.Duration `json:"rtt,omitempty"`
	// Outside is what the platform found when it tried the relay as nodes reach it; nil is not tried yet, or not lately.
	Outside *Outside `json:"outside,omitempty"`
	// SSHPort and TLSPort are those of the last rung; 0 is none, or software that has none.
	SSHPort uint16 `json:"ssh_port,omitempty"`
	TLSPort uint16 `json:"tls_port,omitempty"`
	// NextHost is what Host will be from NextFrom on, so that firewalls can list both until then.
	NextHost string             `json:"next_host,omitempty"`
	NextFrom *time.Time         `json:"next_from,omitempty"`
	Peers    []netip.AddrPort   `json:"peers,omitempty"` // configured peers of the organization at this relay
	Load     map[string]float64 `json:"load,omitempty"`
	// Person is the login of whose client it is, empty for nobody's.
	Person string `json:"person,omitempty"`
	// For gateways.
	Relays []string `json:"relays,omitempty"` // names of the relays assigned, active first
	// RelayReasons says of each of Relays why it is assigned, or why there is none; nothing where this platform did not decide, or has just started.
	RelayReasons []string `json:"relay_reasons,omitempty"`
	// Authentication is how the node shows at enrolment who it is: AuthToken or AuthAWS, then AWS says who may.
	Authentication string   `json:"authentication,omitempty"`
	AWS            *AWSRule `json:"aws,omitempty"`
}

// CreateNode makes a node and its first enrolment token. Host and Port are for relays.
type CreateNode struct {
	Name  string           `json:"name"`
	Host  string           `json:"host,omitempty"`
	Port  uint16           `json:"port,omitempty"`
	Peers []netip.AddrPort `json:"peers,omitempty"`
	Places
	// Authentication is AuthToken (also "") or, for relays and gateways, AuthAWS with AWS.
	Authentication string   `json:"authentication,omitempty"`
	AWS            *AWSRule `json:"aws,omitempty"`
}

// CreatedNode is shown once: the token is a secret that the platform keeps only as a hash. A node that enrols by AWS has none, and its
// commands hold no secret and do not expire.
type CreatedNode struct {
	NodeRecord
	Token      string    `json:"token"`
	Command    string    `json:"command"`    // one line for production
	Foreground string    `json:"foreground"` // one line to try
	Expires    time.Time `json:"expires"`
}

// UpdateNode changes what is not nil.
type UpdateNode struct {
	Name *string `json:"name,omitempty"`
	Host *string `json:"host,omitempty"`
	UpdatePlaces
	// From is when Host changes: not before, so that firewalls can follow. Nil is at once. Host as it is now takes an announced change back.
	From  *time.Time        `json:"from,omitempty"`
	Port  *uint16           `json:"port,omitempty"`
	Peers *[]netip.AddrPort `json:"peers,omitempty"`
	// SSHPort and TLSPort are those of a relay's last rung that nodes are told to dial; 0 is none.
	SSHPort *uint16 `json:"ssh_port,omitempty"`
	TLSPort *uint16 `json:"tls_port,omitempty"`
	// Authentication changes how the node enrols from now on: AuthToken, or AuthAWS with AWS. AWS alone changes who may.
	Authentication *string  `json:"authentication,omitempty"`
	AWS            *AWSRule `json:"aws,omitempty"`
}

// CreateTURNCredential asks for a credential that standard TURN software can use at a relay, as a client node of the organization.
type CreateTURNCredential struct {
	Client string `json:"client"` // a client's name or id
	TTL    int    `json:"ttl"`    // seconds, at most 24 h; zero is one hour
}

// TURNCredential is a secret.
type TURNCredential struct {
	Username string    `json:"username"`
	Password string    `json:"password"`
	Realm    string    `json:"realm"`
	URIs     []string  `json:"uris"` // RFC 7065
	Expires  time.Time `json:"expires"`
}

// ResourceRecord is a resource as the platform keeps it.
type ResourceRecord struct {
	policy.Resource
	FQDN     string           `json:"fqdn"`
	Gateways []ServingGateway `json:"gateways"`
	Names    []string         `json:"gateway_names"`
	// Reached is what gateways that are there found when they probed it.
	Reached  []Reached `json:"reached,omitempty"`
	Disabled bool      `json:"disabled"`
	Created  time.Time `json:"created"`
}

// Reached is what a gateway found when it probed a resource.
type Reached struct {
	Gateway string `json:"gateway"` // name
	ResourceHealth
}

// CreateResource makes a resource. Gateways are NAME[:PRIORITY[:WEIGHT]], by name or id, most preferred first: without a priority it is the
// place in the list; of those with the lowest priority that serve, flows are spread by weight.
type CreateResource struct {
	Name     string             `json:"name"`
	Gateways []string           `json:"gateways"`
	Address  string             `json:"address"`
	TCP      []policy.PortRange `json:"tcp,omitempty"`
	UDP      []policy.PortRange `json:"udp,omitempty"`
	ICMP     bool               `json:"icmp,omitempty"`
	Domains  []string           `json:"domains,omitempty"`
	Health   policy.Health      `json:"health,omitzero"`
}

// UpdateResource changes what is not nil.
type UpdateResource struct {
	Name     *string             `json:"name,omitempty"`
	Gateways *[]string           `json:"gateways,omitempty"`
	Address  *string             `json:"address,omitempty"`
	TCP      *[]policy.PortRange `json:"tcp,omitempty"`
	UDP      *[]policy.PortRange `json:"udp,omitempty"`
	ICMP     *bool               `json:"icmp,omitempty"`
	Domains  *[]string           `json:"domains,omitempty"`
	Health   *policy.Health      `json:"health,omitempty"`
	Disabled *bool               `json:"disabled,omitempty"`
}

// PolicyRecord allows a subject a resource. Subject is client:NAME, gateway:NAME or group:NAME.
type PolicyRecord struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Subject  string    `json:"subject"`
	Resource string    `json:"resource"` // name
	Disabled bool      `json:"disabled"`
	Created  time.Time `json:"created"`
}

// CreatePolicy makes a policy; an empty name is made from subject and resource.
type CreatePolicy struct {
	Name     string `json:"name,omitempty"`
	Subject  string `json:"subject"`
	Resource string `json:"resource"`
}

// UpdatePolicy changes what is not nil.
type UpdatePolicy struct {
	Disabled *bool `json:"disabled,omitempty"`
}

// ExplainRequest asks whether a subject would reach a resource; an empty port asks for any.
type ExplainRequest struct {
	Subject  string       `json:"subject"`
	Resource string       `json:"resource"`
	Proto    policy.Proto `json:"proto,omitempty"`
	Port     uint16       `json:"port,omitempty"`
}

// Explanation is yes or no with the reason and what to do.
type Explanation struct {
	Allowed  bool     `json:"allowed"`
	Rule     string   `json:"rule"`
	Reason   string   `json:"reason"`
	Remedy   string   `json:"remedy,omitempty"`
	Gateways []string `json:"gateways,omitempty"`
}

// GroupRecord is a named set of clients and gateways.
type GroupRecord struct {
	Name    string    `json:"name"`
	Members []string  `json:"members"` // client:NAME, gateway:NAME
	Created time.Time `json:"created"`
}

// CreateGroup makes a group.
type CreateGroup struct {
	Name    string   `json:"name"`
	Members []string `json:"members,omitempty"`
}

// UpdateGroup replaces the members.
type UpdateGroup struct {
	Members *[]string `json:"members,omitempty"`
}

// SessionRecord is a live session as a gateway reported it.
type SessionRecord struct {
	Gateway string `json:"gateway"`
	Peer    string `json:"peer"`
	SessionReport
}

// AuditEntry is one line of an organization's audit chain: Hash covers the entry and the hash before it.
type AuditEntry struct {
	Seq    int64          `json:"seq"`
	At     time.Time      `json:"at"`
	Actor  string         `json:"actor"`
	Action string         `json:"action"` // such as node.enrol
	Object string         `json:"object"`
	Result string         `json:"result"` // ok or refused
	Detail map[string]any `json:"detail,omitempty"`
	Hash   string         `json:"hash"`
}

// AuditVerification says whether the chain is whole.
type AuditVerification struct {
	OK      bool   `json:"ok"`
	Entries int64  `json:"entries"`
	Problem string `json:"problem,omitempty"`
	// Signed is the newest entry that a signature covers, SignedAt its time; none yet is 0.
	Signed   int64     `json:"signed"`
	SignedAt time.Time `json:"signed_at,omitzero"`
}

// OrgStatus is an overview.
type OrgStatus struct {
	Organization string       `json:"organization"`
	Version      string       `json:"version"`
	Relays       []NodeRecord `json:"relays"`
	Gateways     []NodeRecord `json:"gateways"`
	Clients      []NodeRecord `json:"clients"`
	Resources    int          `json:"resources"`
	Policies     int          `json:"policies"`
	Sessions     int          `json:"sessions"`
}
