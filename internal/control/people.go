package control

import "time"

// People, service accounts and tokens of the admin API, under /api/v1.
//
//	GET|PATCH           /me                                             Me; PATCH UpdateMe
//	GET                 /me/sessions                                    List[WebSession]; DELETE /me/sessions/{id}
//	GET|POST            /me/tokens                                      List[APIToken]; POST CreateAPIToken → CreatedAPIToken; DELETE /me/tokens/{id}
//	GET|POST            /orgs/{org}/my/clients                          own client nodes: List[NodeRecord]; POST CreateNode → CreatedNode; DELETE …/{name}, POST …/{name}/token
//	GET                 /orgs/{org}/my/resources                        List[MyResource]: what the own clients reach
//	GET|POST            /people, /orgs/{org}/people                     PersonRecord; POST CreatePerson → InvitedPerson
//	GET|PATCH|DELETE    /people/{name}, /orgs/{org}/people/{name}       PATCH UpdatePerson
//	POST                …/people/{name}/invite                          a link for a new password → Invitation
//	POST                …/people/{name}/forget-factor                   takes the second factor away → PersonRecord
//	GET|POST            /service-accounts, /orgs/{org}/service-accounts ServiceAccountRecord; POST CreateServiceAccount; GET, PATCH, DELETE …/{name}
//	GET|POST            …/service-accounts/{name}/tokens                List[APIToken]; POST CreateAPIToken → CreatedAPIToken; DELETE …/{id}
//	GET|POST            /tokens, /orgs/{org}/tokens                     API tokens of their own: List[APIToken]; POST CreateAPIToken; DELETE …/{id}
//	GET|POST            /providers, /orgs/{org}/providers               single sign-on: ProviderRecord; POST CreateProvider; GET, PATCH, DELETE …/{name}
//	POST                /auth/device, /auth/token                       login of programs (RFC 8628, RFC 8252), without credential

// PersonRole is what a person is in an organization; the organization platform.shared is the platform: the role holds in all of them.
type PersonRole struct {
	Org  string `json:"org"`
	Role string `json:"role" enum:"owner,admin,auditor,member"`
}

// PersonRecord is a person.
type PersonRecord struct {
	ID    string `json:"id"`
	Login string `json:"login"`
	Name  string `json:"name,omitempty"`
	Email string `json:"email,omitempty"`
	// Home is the organization whose owners manage the account; empty is the platform.
	Home string `json:"home,omitempty"`
	// Role is the person's in the organization that was asked about.
	Role      string       `json:"role,omitempty"`
	Roles     []PersonRole `json:"roles,omitempty"` // all, where the caller may see all
	Disabled  bool         `json:"disabled,omitempty"`
	Password  bool         `json:"password"`      // has one
	TOTP      bool         `json:"second_factor"` // has one
	Providers []string     `json:"providers,omitempty"`
	Clients   []string     `json:"clients,omitempty"` // names of the client nodes in the organization that was asked about
	Created   time.Time    `json:"created"`
	LastLogin *time.Time   `json:"last_login,omitempty"`
}

// CreatePerson makes a person, or gives one that the platform knows by that login a role. Without a password the answer has a link with
// which the person chooses one.
type CreatePerson struct {
	Login    string `json:"login" doc:"lower case, such as ada or ada@example.com" maxLength:"254"`
	Name     string `json:"name,omitempty" maxLength:"100"`
	Email    string `json:"email,omitempty" maxLength:"254"`
	Role     string `json:"role" enum:"owner,admin,auditor,member"`
	Password string `json:"password,omitempty" maxLength:"256" doc:"leave out for a link with which the person chooses one"`
}

// Invitation is shown once: with the link a person chooses a password.
type Invitation struct {
	URL     string    `json:"url"`
	Expires time.Time `json:"expires"`
}

// InvitedPerson is a person and their invitation, if one was needed.
type InvitedPerson struct {
	PersonRecord
	Invitation *Invitation `json:"invitation,omitempty"`
}

// UpdatePerson changes what is not nil.
type UpdatePerson struct {
	Name     *string `json:"name,omitempty" maxLength:"100"`
	Email    *string `json:"email,omitempty" maxLength:"254"`
	Role     *string `json:"role,omitempty" enum:"owner,admin,auditor,member"`
	Disabled *bool   `json:"disabled,omitempty" doc:"a disabled person is logged out everywhere; their client nodes are revoked"`
}

// Me is who calls.
type Me struct {
	Kind   string        `json:"kind" enum:"person,service-account,token"`
	ID     string        `json:"id,omitempty"`
	Name   string        `json:"name"`
	Person *PersonRecord `json:"person,omitempty"`
	// Organizations are those that the caller sees, with the role or scopes there; All says that it is every one.
	Organizations []MyOrganization `json:"organizations"`
	All           bool             `json:"all,omitempty"`
}

// MyOrganization is an organization of the caller.
type MyOrganization struct {
	Org    string   `json:"org"`
	Role   string   `json:"role,omitempty"`
	Scopes []string `json:"scopes"`
}

// UpdateMe changes what is not nil.
type UpdateMe struct {
	Name  *string `json:"name,omitempty" maxLength:"100"`
	Email *string `json:"email,omitempty" maxLength:"254"`
}

// WebSession is a browser's login.
type WebSession struct {
	ID       string    `json:"id"`
	Created  time.Time `json:"created"`
	LastSeen time.Time `json:"last_seen"`
	Expires  time.Time `json:"expires"`
	Source   string    `json:"source,omitempty"`
	Agent    string    `json:"agent,omitempty"`
	Provider string    `json:"provider,omitempty"`
	Current  bool      `json:"current,omitempty"`
}

// APIToken is an API token without its secret.
type APIToken struct {
	ID       string     `json:"id"`
	Name     string     `json:"name"`
	Scopes   []string   `json:"scopes" doc:"OBJECT:VERB; none is all that its owner may do"`
	Created  time.Time  `json:"created"`
	Expires  *time.Time `json:"expires,omitempty"`
	Revoked  *time.Time `json:"revoked,omitempty"`
	LastUsed *time.Time `json:"last_used,omitempty"`
	Source   string     `json:"source,omitempty" doc:"where it was used from last"`
}

// CreateAPIToken makes an API token.
type CreateAPIToken struct {
	Name   string   `json:"name" maxLength:"64"`
	Scopes []string `json:"scopes,omitempty" maxItems:"64" doc:"such as relays:read, gateways:write, audit:read, *:read, *; none is all that its owner may do"`
	Life   int      `json:"life,omitempty" minimum:"0" doc:"seconds; 0 is for ever"`
}

// CreatedAPIToken is shown once: the token is a secret that the platform keeps only as a hash.
type CreatedAPIToken struct {
	APIToken
	Token string `json:"token"`
}

// ServiceAccountRecord is a program that uses the API.
type ServiceAccountRecord struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Scopes   []string  `json:"scopes"`
	Disabled bool      `json:"disabled,omitempty"`
	Created  time.Time `json:"created"`
	Creator  string    `json:"creator,omitempty"`
}

// CreateServiceAccount makes a service account.
type CreateServiceAccount struct {
	Name   string   `json:"name" maxLength:"63"`
	Scopes []string `json:"scopes" minItems:"1" maxItems:"64"`
}

// UpdateServiceAccount changes what is not nil.
type UpdateServiceAccount struct {
	Scopes   *[]string `json:"scopes,omitempty" maxItems:"64"`
	Disabled *bool     `json:"disabled,omitempty"`
}

// ProviderRecord is an OpenID Connect provider without its secret.
type ProviderRecord struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Issuer   string    `json:"issuer"`
	ClientID string    `json:"client_id"`
	Redirect string    `json:"redirect_uri" doc:"to be registered at the provider, exactly"`
	Disabled bool      `json:"disabled,omitempty"`
	Created  time.Time `json:"created"`
	ProviderRules
}

// ProviderRules say who of a provider's users may come in, and as what. Nothing follows from an e-mail address by itself.
type ProviderRules struct {
	Scopes []string `json:"scopes,omitempty" maxItems:"16" doc:"asked for besides openid; default profile and email"`
	// Groups is the claim that Mapping looks into; default groups.
	Groups  string        `json:"groups_claim,omitempty" maxLength:"100"`
	Mapping []GroupToRole `json:"mapping,omitempty" maxItems:"100" doc:"the first that fits gives the role, at every login"`
	// Create says that whoever fits the mapping gets an account at the first login. Otherwise only invited people come in.
	Create bool `json:"create,omitempty"`
	// LinkByEmail says that at the first login an existing account of this organization with the same e-mail address is taken, where the
	// provider says that the address is verified.
	LinkByEmail bool `json:"link_by_email,omitempty"`
}

// GroupToRole gives the users of a provider's group a role.
type GroupToRole struct {
	Group string `json:"group" maxLength:"200" doc:"value of the claim; * is everybody of the provider"`
	Role  string `json:"role" enum:"owner,admin,auditor,member"`
	Org   string `json:"org,omitempty" maxLength:"63" doc:"for a provider of the platform: in which organization; none is the platform, whose roles hold in all"`
}

// CreateProvider adds single sign-on.
type CreateProvider struct {
	Name     string `json:"name" maxLength:"63"`
	Issuer   string `json:"issuer" maxLength:"500" doc:"https URL, as the provider's discovery document has it"`
	ClientID string `json:"client_id" maxLength:"500"`
	Secret   string `json:"client_secret,omitempty" maxLength:"1000"`
	ProviderRules
}

// UpdateProvider changes what is not nil; Rules replaces all rules.
type UpdateProvider struct {
	ClientID *string        `json:"client_id,omitempty" maxLength:"500"`
	Secret   *string        `json:"client_secret,omitempty" maxLength:"1000"`
	Disabled *bool          `json:"disabled,omitempty"`
	Rules    *ProviderRules `json:"rules,omitempty"`
}

// MyResource is a resource that own clients reach.
type MyResource struct {
	Name    string   `json:"name"`
	Address string   `json:"address,omitempty"`
	DNS     string   `json:"dns"`
	Clients []string `json:"clients"`
}

// StartDevice begins a login of a program without browser (RFC 8628 §3.1).
type StartDevice struct {
	Client string `json:"client" maxLength:"100" doc:"what the program is and where it runs, shown to who approves"`
}

// DeviceStarted tells the program what to show and how to go on (RFC 8628 §3.2).
type DeviceStarted struct {
	DeviceCode string `json:"device_code"`
	UserCode   string `json:"user_code"`
	URL        string `json:"verification_uri"`
	URLWhole   string `json:"verification_uri_complete"`
	Life       int    `json:"expires_in"`
	Interval   int    `json:"interval"`
}

// Grant types of TakeToken.
const (
	GrantDevice = "urn:ietf:params:oauth:grant-type:device_code" // RFC 8628 §3.4
	GrantCode   = "authorization_code"                           // RFC 6749 §4.1.3, with PKCE
)

// TakeToken asks for a login's token: of a device code, or of the code that a browser brought to the program's loopback address.
type TakeToken struct {
	Grant      string `json:"grant_type" maxLength:"100"`
	DeviceCode string `json:"device_code,omitempty" maxLength:"200"`
	Code       string `json:"code,omitempty" maxLength:"200"`
	Verifier   string `json:"code_verifier,omitempty" maxLength:"128"`
	Redirect   string `json:"redirect_uri,omitempty" maxLength:"200"`
}

// TokenTaken is the token of a person.
type TokenTaken struct {
	Token   string    `json:"access_token"`
	Type    string    `json:"token_type"` // Bearer
	Expires time.Time `json:"expires"`
	Login   string    `json:"login"`
}

// Codes of logins that are not done (RFC 8628 §3.5).
const (
	CodePending  = "authorization_pending"
	CodeSlowDown = "slow_down"
	CodeDenied   = "access_denied"
	CodeExpired  = "expired_token"
	CodeBadGrant = "invalid_grant"
)
