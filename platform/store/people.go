package store

import (
	"context"
	"time"
)

// Person is a human being who may log in. Org is where the person is at home: whose owners manage the account. identity.SharedOrg is the
// platform itself. What a person may do stands in the roles.
type Person struct {
	ID, Org string
	Login   string // unique on the platform, lower case
	Name    string
	Email   string
	// Password is an encoded argon2id hash; empty is none, so that only single sign-on or an invitation lets the person in.
	Password        string
	PasswordChanged time.Time
	TOTP            []byte // sealed; nil is none
	TOTPStep        int64  // newest time step whose code was used
	Disabled        bool
	Created         time.Time
	LastLogin       time.Time // zero is never
}

// PersonRole is what a person is in an organization, or in identity.SharedOrg: in all of them.
type PersonRole struct {
	Person, Org, Role string
	Created           time.Time
}

// WebSession is a browser's login by the hash of its cookie.
type WebSession struct {
	ID            string
	Hash          [32]byte
	Person        string
	Created       time.Time
	Seen          time.Time
	Expires       time.Time
	Source, Agent string
	Provider      string // of single sign-on; empty is a password
}

// Ticket is something that may be done once until it expires, by the hash of its secret. Kind and Subject say what and for whom.
type Ticket struct {
	Hash             [32]byte
	Kind, Subject    string
	Data             []byte // JSON, sealed where it holds secrets
	Created, Expires time.Time
}

// ServiceAccount is a program that uses the API.
type ServiceAccount struct {
	ID, Org, Name string // Org is identity.SharedOrg for one of the platform
	Scopes        []string
	Disabled      bool
	Created       time.Time
	Creator       string // actor
}

// AccessToken is an API token of a person or a service account, by its hash.
type AccessToken struct {
	ID      string
	Hash    [32]byte
	Person  string // id, or empty
	Account string // id of the service account, or empty
	Name    string
	// Scopes narrow what the token's owner may do; none is all of that.
	Scopes   []string
	Created  time.Time
	Expires  time.Time // zero is never
	Revoked  time.Time // zero is not
	LastUsed time.Time // zero is never; written once in a while
	Source   string    // of the last use
}

// Provider is an OpenID Connect provider for the people of Org, or of every organization (identity.SharedOrg).
type Provider struct {
	ID, Org, Name    string
	Issuer, ClientID string
	Secret           []byte // sealed
	Settings         []byte // JSON: what package people makes of it
	Disabled         bool
	Created          time.Time
}

// PersonIdentity is how a provider knows a person.
type PersonIdentity struct {
	Provider, Subject, Person, Email string
	Created                          time.Time
}

// DeviceLogin is a login that waits for a person to approve it in a browser (RFC 8628).
type DeviceLogin struct {
	Hash     [32]byte // of the device code
	UserCode [32]byte // its hash
	State    string   // pending, approved, denied
	Person   string   // who decided
	Client   string   // what the program says of itself
	Source   string   // where it asked from
	Created  time.Time
	Expires  time.Time
	Polled   time.Time // zero is never
}

// PeopleTx is the part of a transaction that concerns people, their logins and tokens. The conventions are those of Tx.
type PeopleTx interface {
	InsertPerson(ctx context.Context, p *Person) error
	Person(ctx context.Context, id string) (*Person, error)
	FindPerson(ctx context.Context, login string) (*Person, error) // login or id
	// People lists who has a role in org or is at home there; an empty org lists everybody. Ordered by login.
	People(ctx context.Context, org string, p Page) ([]*Person, error)
	CountPeople(ctx context.Context) (int, error)
	UpdatePerson(ctx context.Context, p *Person) error // not the step
	DeletePerson(ctx context.Context, id string) error // with all that belongs to it
	// StepTOTP notes a code as used: ErrNotFound when it, or a later one, was used before.
	StepTOTP(ctx context.Context, person string, step int64) error

	PutPersonRole(ctx context.Context, r *PersonRole) error // inserts or replaces
	DeletePersonRole(ctx context.Context, person, org string) error
	PersonRoles(ctx context.Context, person string) ([]*PersonRole, error)
	OrgRoles(ctx context.Context, org string) ([]*PersonRole, error)

	PutRecoveryCodes(ctx context.Context, person string, hashes [][32]byte) error // replaces all
	RecoveryCodes(ctx context.Context, person string) (int, error)                // how many are left
	SpendRecoveryCode(ctx context.Context, person string, hash [32]byte) error    // ErrNotFound when it is unknown or spent

	InsertWebSession(ctx context.Context, s *WebSession) error
	WebSession(ctx context.Context, hash [32]byte) (*WebSession, error)
	WebSessions(ctx context.Context, person string) ([]*WebSession, error) // newest first
	TouchWebSession(ctx context.Context, id string, at time.Time) error
	DeleteWebSession(ctx context.Context, person, id string) error
	DeleteWebSessions(ctx context.Context, person, except string) error // all but the one with id except

	InsertTicket(ctx context.Context, t *Ticket) error
	Ticket(ctx context.Context, hash [32]byte, kind string, now time.Time) (*Ticket, error)
	// SpendTicket takes a ticket in one statement: ErrNotFound when it is unknown, spent, expired or of another kind.
	SpendTicket(ctx context.Context, hash [32]byte, kind string, now time.Time) (*Ticket, error)
	DeleteTickets(ctx context.Context, kind, subject string) error

	InsertServiceAccount(ctx context.Context, a *ServiceAccount) error
	ServiceAccount(ctx context.Context, id string) (*ServiceAccount, error)
	FindServiceAccount(ctx context.Context, org, name string) (*ServiceAccount, error) // name or id
	ServiceAccounts(ctx context.Context, org string, p Page) ([]*ServiceAccount, error)
	UpdateServiceAccount(ctx context.Context, a *ServiceAccount) error
	DeleteServiceAccount(ctx context.Context, id string) error

	InsertAccessToken(ctx context.Context, t *AccessToken) error
	AccessToken(ctx context.Context, hash [32]byte) (*AccessToken, error)
	PersonTokens(ctx context.Context, person string) ([]*AccessToken, error) // oldest first
	AccountTokens(ctx context.Context, account string) ([]*AccessToken, error)
	TouchAccessToken(ctx context.Context, id string, at time.Time, source string) error
	RevokeAccessToken(ctx context.Context, id string, at time.Time) error

	InsertProvider(ctx context.Context, p *Provider) error
	Provider(ctx context.Context, id string) (*Provider, error)
	FindProvider(ctx context.Context, org, name string) (*Provider, error)  // name or id
	Providers(ctx context.Context, org string, p Page) ([]*Provider, error) // an empty org is all
	UpdateProvider(ctx context.Context, p *Provider) error
	DeleteProvider(ctx context.Context, id string) error

	InsertPersonIdentity(ctx context.Context, i *PersonIdentity) error
	PersonIdentity(ctx context.Context, provider, subject string) (*PersonIdentity, error)
	PersonIdentities(ctx context.Context, person string) ([]*PersonIdentity, error)

	InsertDeviceLogin(ctx context.Context, d *DeviceLogin) error
	DeviceLogin(ctx context.Context, hash [32]byte) (*DeviceLogin, error)
	FindDeviceLogin(ctx context.Context, userCode [32]byte) (*DeviceLogin, error)
	// DecideDeviceLogin writes who decided what about a pending one: ErrNotFound when it is not pending or has expired.
	DecideDeviceLogin(ctx context.Context, userCode [32]byte, state, person string, now time.Time) error
	PollDeviceLogin(ctx context.Context, hash [32]byte, at time.Time) error
	// SpendDeviceLogin takes a decided one in one statement: ErrNotFound when it is pending, expired or taken.
	SpendDeviceLogin(ctx context.Context, hash [32]byte, now time.Time) (*DeviceLogin, error)
	CountDeviceLogins(ctx context.Context, source string, now time.Time) (int, error) // pending ones

	// BindNode says whose node it is, inserting or replacing.
	BindNode(ctx context.Context, node, person string) error
	NodePerson(ctx context.Context, node string) (string, error)              // ErrNotFound for nobody's
	NodePeople(ctx context.Context, org string) (map[string]string, error)    // person by live node
	PersonNodes(ctx context.Context, person string) ([]*Node, error)          // live
	PutGroupPeople(ctx context.Context, group string, people []string) error  // replaces all
	GroupPeople(ctx context.Context, org string) (map[string][]string, error) // people by group

	// PurgePeople removes sessions, tickets and device logins that have expired, sessions idle since before idle, and tokens that
	// expired or were revoked before old.
	PurgePeople(ctx context.Context, now, idle, old time.Time) error
}
