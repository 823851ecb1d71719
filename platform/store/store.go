// Package store keeps what the platform knows. Store is the interface that the rest of the platform sees; DB implements it for SQLite and for
// PostgreSQL. design.md says how, and how to add a table.
//
// Every change happens in one transaction that also carries its audit entry:
//
//	err := st.Update(ctx, func(tx store.Tx) error {
//		n, err := tx.Node(ctx, id)
//		…
//		return tx.UpdateNode(ctx, n)
//	})
package store

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/database"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Errors that callers branch on.
var (
	// ErrNotFound says that a row does not exist.
	ErrNotFound = database.ErrNotFound
	// ErrExists says that a name or key is taken.
	ErrExists = database.ErrExists
	// ErrUnavailable says that the database can not be written or read: disk full, read-only, damaged. The wrapped text says which.
	ErrUnavailable = database.ErrUnavailable
)

// Store is a database. All methods may be called concurrently.
type Store interface {
	// Update runs fn in a transaction that may write, and commits when fn returns nil. Updates run one after the other. fn must not
	// keep tx and may be run again when the database asks for a retry.
	Update(ctx context.Context, fn func(tx Tx) error) error
	// View runs fn in a transaction that sees one state of the database.
	View(ctx context.Context, fn func(tx Tx) error) error
	// Writable says whether a write would work now: ErrUnavailable when not.
	Writable(ctx context.Context) error
	// Backup writes a consistent copy to a new file.
	Backup(ctx context.Context, path string) error
	// SchemaVersion is the number of the newest migration that the database has.
	SchemaVersion(ctx context.Context) (int64, error)
	Close() error
}

// Org is an organization, or the platform itself under the name identity.SharedOrg.
type Org struct {
	Name           string
	Range4, Range6 netip.Prefix
	Created        time.Time
	Version        uint64 // of the configuration
	NextAddress    uint32 // index of the next virtual address to hand out
	// Direct says whether sessions may leave the relay, DirectPrivate whether nodes tell each other private addresses for that.
	Direct, DirectPrivate bool
	// PlatformDial says whether the platform may dial gateways, where a policy allows it.
	PlatformDial bool
}

// Authority is a CA: of an organization, or the platform's own.
type Authority struct {
	Org         string
	Kind        string // root, tls, ssh, or the kind of leaf that it issues
	Generation  int    // counts from 1
	Certificate []byte // DER; empty while it is requested
	Key         []byte // sealed; empty when it is kept elsewhere, or erased
	Created     time.Time

	State AuthorityState
	Since time.Time // of State; zero is from the beginning
	Until time.Time // of one that retires: when the last certificate by it has ended
	// Announced are versions of configurations, by organization: nodes that have them or higher ones pin this CA.
	Announced map[string]uint64
}

// AuthorityState is what a CA is for now.
type AuthorityState string

// The states, in their order.
const (
	Requested AuthorityState = "requested" // the owner of the root is to sign its certificate
	Next      AuthorityState = "next"      // pinned by nodes, issues nothing yet
	Current   AuthorityState = "current"   // issues
	Retiring  AuthorityState = "retiring"  // pinned by nodes, issues nothing any more
	Gone      AuthorityState = "gone"      // its key is erased
)

// Pinned says whether nodes accept what it issued.
func (a *Authority) Pinned() bool {
	return a.State == Next || a.State == Current || a.State == Retiring
}

// ExpiryWarning is that the end of a certificate has been warned of.
type ExpiryWarning struct {
	Org, Subject string
	Ends         time.Time
	Days         int // the lowest threshold that was told
}

// Status is what an administrator decided about a node.
type Status string

// The statuses.
const (
	Active   Status = "active"
	Disabled Status = "disabled"
	Revoked  Status = "revoked"
)

// Node is a relay, gateway or client.
type Node struct {
	ID, Org, Name string
	Kind          identity.Kind
	Status        Status
	Host          string // of a relay
	Port          uint16
	Peers         []netip.AddrPort
	Draining      bool
	Address       uint32 // index into the organization's ranges, 0 is none
	Enrolment     int    // how often it has enrolled
	Version       string // of its software
	Created       time.Time
	Enrolled      time.Time // zero is never
	LastSeen      time.Time // zero is never; written once in a while
	Deleted       time.Time // zero is not
	NextHost      string    // what Host will be from NextFrom on; "" for no change
	NextFrom      time.Time
}

// Seen is when a node was last seen, and with which version of its software.
type Seen struct {
	Node    string // id
	At      time.Time
	Version string
}

// Identity is the node's name in certificates.
func (n *Node) Identity() identity.Node { return identity.Node{Org: n.Org, Kind: n.Kind, ID: n.ID} }

// Key is a key for which a node has got a certificate.
type Key struct {
	Hash      identity.KeyHash
	Node      string
	Public    []byte // SubjectPublicKeyInfo, DER
	Enrolment int    // the node's enrolment that it belongs to
	Created   time.Time
	NotAfter  time.Time // of the newest leaf
	Denied    bool
}

// PlatformKey is a key for which the platform has got a certificate to dial gateways of an organization.
type PlatformKey struct {
	Hash      identity.KeyHash
	Org, Node string
	NotAfter  time.Time // of the newest leaf
	Denied    bool
}

// EnrolmentToken is a token by its hash.
type EnrolmentToken struct {
	Hash             [32]byte
	Node, Org        string
	Kind             identity.Kind
	Created, Expires time.Time
	Used             time.Time // zero is not yet
}

// Resource is a resource.
type Resource struct {
	ID, Org, Name string
	Target        string
	TCP, UDP      []policy.PortRange
	ICMP          bool
	Domains       []string
	Address       uint32 // index into the organization's ranges, 0 is none
	Disabled      bool
	Created       time.Time
	Health        policy.Health
	Gateways      []ServingGateway // most preferred first
}

// ServedBy reports whether a gateway is one of the resource's.
func (r *Resource) ServedBy(id string) bool {
	return slices.ContainsFunc(r.Gateways, func(g ServingGateway) bool { return g.ID == id })
}

// ServingGateway is a gateway of a resource. Those of the lowest priority are used, spread by weight, while one of them serves.
type ServingGateway struct {
	ID       string
	Priority int // 0 at least
	Weight   int // 1 at least
}

// Group is a named set of nodes; Members are node ids.
type Group struct {
	ID, Org, Name string
	Created       time.Time
	Members       []string
}

// Policy allows a subject a resource.
type Policy struct {
	ID, Org, Name string
	SubjectKind   string // client, gateway, group
	Subject       string // id
	Resource      string // id
	Disabled      bool
	Created       time.Time
}

// RelayRungs are the ports of a relay's last rung that nodes are told to dial; 0 is none.
type RelayRungs struct {
	Relay            string
	SSHPort, TLSPort uint16
}

// NodeAWS says which AWS identities may enrol a node: one of the accounts, by one of the principals (ARNs with wildcards). An empty list is any.
type NodeAWS struct {
	Node                 string
	Accounts, Principals []string
}

// RelayKey is a key for TURN passwords; Secret is sealed.
type RelayKey struct {
	Relay, ID string
	Secret    []byte
	Created   time.Time
}

// SessionEnd tells gateways to end the sessions of a node that began before a time.
type SessionEnd struct {
	Org, Node string
	Before    time.Time
}

// Scope is what an API token may do.
type Scope string

// The scopes.
const (
	ScopeAdmin    Scope = "admin"
	ScopeReadOnly Scope = "read-only"
)

// APIToken is a token of the admin API by its hash.
type APIToken struct {
	ID      string
	Hash    [32]byte
	Name    string
	Org     string // empty is every organization
	Scope   Scope
	Created time.Time
	Expires time.Time // zero is never
	Revoked time.Time // zero is not
}

// AuditEntry is a line of an organization's audit chain. Detail is JSON exactly as it was hashed.
type AuditEntry struct {
	Seq                           int64
	At                            time.Time // microseconds
	Actor, Action, Object, Result string
	Detail                        []byte
	Hash                          string
}

// Page is a part of a list that is ordered by name: what comes after After (exclusive; empty is the start), at most Limit rows.
// A Limit of 0 is all.
type Page struct {
	After string
	Limit int
}

// Tx is a transaction. Insert methods answer ErrExists, Update and Delete methods ErrNotFound. References to nodes, resources
// and groups are ids, except in the methods that say "name or id".
type Tx interface {
	PeopleTx
	ReplicaTx
	LicenceTx
	TrailTx
	FlowTx
	PlacesTx

	Meta(ctx context.Context, key string) ([]byte, error)
	PutMeta(ctx context.Context, key string, value []byte) error

	InsertOrg(ctx context.Context, o *Org) error
	Org(ctx context.Context, name string) (*Org, error)
	Orgs(ctx context.Context, p Page) ([]*Org, error) // with identity.SharedOrg
	UpdateOrg(ctx context.Context, o *Org) error      // not the version
	DeleteOrg(ctx context.Context, name string) error // with all that belongs to it, except its audit chain
	// BumpVersion raises the organization's version to at least floor, and by at least one.
	BumpVersion(ctx context.Context, org string, floor uint64) (uint64, error)

	InsertAuthority(ctx context.Context, a *Authority) error
	Authorities(ctx context.Context, org string) ([]*Authority, error) // newest generation of a kind first
	UpdateAuthorityKey(ctx context.Context, a *Authority) error        // the sealed key alone
	UpdateAuthority(ctx context.Context, a *Authority) error           // all but Created
	MovingAuthorities(ctx context.Context) ([]*Authority, error)       // of all organizations, those that are next or retiring

	ExpiryWarnings(ctx context.Context, org string) ([]*ExpiryWarning, error)
	PutExpiryWarning(ctx context.Context, w *ExpiryWarning) error
	DeleteExpiryWarning(ctx context.Context, org, subject string) error

	InsertNode(ctx context.Context, n *Node) error
	Node(ctx context.Context, id string) (*Node, error) // a deleted one, too
	// FindNode finds a live node by name or id.
	FindNode(ctx context.Context, org string, kind identity.Kind, name string) (*Node, error)
	Nodes(ctx context.Context, org string, kind identity.Kind, p Page) ([]*Node, error) // live; an empty kind is all
	DeletedNodes(ctx context.Context, org string) ([]*Node, error)
	UpdateNode(ctx context.Context, n *Node) error
	PurgeNode(ctx context.Context, id string) error // with its keys
	// TouchNodes writes when nodes were last seen. Those that are unknown are left out.
	TouchNodes(ctx context.Context, seen []Seen) error

	PutKey(ctx context.Context, k *Key) error // inserts or replaces
	Key(ctx context.Context, h identity.KeyHash) (*Key, error)
	Keys(ctx context.Context, node string) ([]*Key, error)   // newest first
	OrgKeys(ctx context.Context, org string) ([]*Key, error) // of deleted nodes, too; newest first
	// DeniedKeys are the keys of org's nodes that are not good, with a leaf that ends after a time: denied ones, and those of nodes that were deleted
	// or are not active.
	DeniedKeys(ctx context.Context, org string, after time.Time) ([]identity.KeyHash, error)

	PutPlatformKey(ctx context.Context, k *PlatformKey) error             // inserts or replaces
	PlatformKeys(ctx context.Context, org string) ([]*PlatformKey, error) // newest first

	InsertEnrolmentToken(ctx context.Context, t *EnrolmentToken) error
	// SpendEnrolmentToken marks a token as used in one statement: ErrNotFound when it is unknown, expired, used, or not for node.
	SpendEnrolmentToken(ctx context.Context, hash [32]byte, node identity.Node, now time.Time) (*EnrolmentToken, error)
	EnrolmentToken(ctx context.Context, hash [32]byte) (*EnrolmentToken, error)
	DropEnrolmentTokens(ctx context.Context, node string) error // the unused ones

	// InsertAssertion remembers a jti until expires: ErrExists when it is known.
	InsertAssertion(ctx context.Context, jti [32]byte, expires time.Time) error

	InsertResource(ctx context.Context, r *Resource) error
	FindResource(ctx context.Context, org, name string) (*Resource, error) // name or id
	Resources(ctx context.Context, org string, p Page) ([]*Resource, error)
	UpdateResource(ctx context.Context, r *Resource) error
	DeleteResource(ctx context.Context, id string) error

	InsertGroup(ctx context.Context, g *Group) error
	FindGroup(ctx context.Context, org, name string) (*Group, error) // name or id
	Groups(ctx context.Context, org string, p Page) ([]*Group, error)
	UpdateGroup(ctx context.Context, g *Group) error
	DeleteGroup(ctx context.Context, id string) error

	InsertPolicy(ctx context.Context, p *Policy) error
	FindPolicy(ctx context.Context, org, name string) (*Policy, error) // name or id
	Policies(ctx context.Context, org string, p Page) ([]*Policy, error)
	UpdatePolicy(ctx context.Context, p *Policy) error
	DeletePolicy(ctx context.Context, id string) error

	// Assignments returns the relays of each gateway of an organization, active first.
	Assignments(ctx context.Context, org string) (map[string][]string, error)
	PutAssignment(ctx context.Context, gateway string, relays []string) error

	InsertRelayKey(ctx context.Context, k *RelayKey) error
	RelayKeys(ctx context.Context, relay string) ([]*RelayKey, error) // newest first
	DeleteRelayKey(ctx context.Context, relay, id string) error

	PutRelayRungs(ctx context.Context, r *RelayRungs) error                     // inserts or replaces
	RelayRungs(ctx context.Context, org string) (map[string]*RelayRungs, error) // by relay; those that have a last rung

	PutNodeAWS(ctx context.Context, v *NodeAWS) error           // inserts or replaces
	NodeAWS(ctx context.Context, node string) (*NodeAWS, error) // ErrNotFound: it enrols by token
	DropNodeAWS(ctx context.Context, node string) error         // also when there is none

	PutSessionEnd(ctx context.Context, e *SessionEnd) error
	SessionEnds(ctx context.Context, org string) ([]*SessionEnd, error)

	InsertAPIToken(ctx context.Context, t *APIToken) error
	APIToken(ctx context.Context, hash [32]byte) (*APIToken, error)
	APITokens(ctx context.Context, org string) ([]*APIToken, error) // empty is the platform's
	RevokeAPIToken(ctx context.Context, id string, at time.Time) error

	AuditHead(ctx context.Context, org string) (seq int64, hash string, err error) // 0 and "" when there is none
	AppendAudit(ctx context.Context, org string, e *AuditEntry) error              // moves the head
	Audit(ctx context.Context, org string, after int64, limit int) ([]*AuditEntry, error)

	// InsertAnswer remembers that a request with an idempotency key was carried out: ErrExists when it is known, and has not expired.
	InsertAnswer(ctx context.Context, a *Answer) error
	Answer(ctx context.Context, id [32]byte, now time.Time) (*Answer, error) // ErrNotFound also when it has expired
	FinishAnswer(ctx context.Context, id [32]byte, sealed []byte) error

	// Purge removes what is past its use at now: answers, assertions, spent and expired tokens, ends of sessions and keys of the platform from before old.
	Purge(ctx context.Context, now, old time.Time) error
}
