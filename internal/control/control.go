// Package control is what nodes and their platform say to each other: the enrolment token, the requests of a node, and the
// configuration that the platform pushes over one outbound streaming request. The platform's server and the nodes' agent
// (control/agent) both import it; neither imports the other.
//
//	POST /api/v1/enroll             EnrolRequest → EnrolResponse           authenticated by the token's secret
//	POST /api/v1/node/token         RFC 7523 assertion → access token      grant_type=urn:ietf:params:oauth:grant-type:jwt-bearer&assertion=…
//	GET  /api/v1/node/control       stream of Event, one JSON a line       Bearer; the platform sends an event at least every PingInterval
//	POST /api/v1/node/heartbeat     Heartbeat → {}                         Bearer, every HeartbeatInterval
//	POST /api/v1/node/renew         RenewRequest → RenewResponse           Bearer
//	POST /api/v1/node/flows         FlowBatch → {}                         Bearer, of gateways that were told to (Gateway.FlowLog)
//
// The assertion is a JWT signed with the node's key (ES256): iss and sub are the node (org/kind/id), aud is the platform's URL,
// exp is at most AssertionLife ahead, jti is random and accepted once. Errors are problem+json (RFC 9457) with a code member.
package control

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Intervals and lifetimes both sides rely on.
const (
	PingInterval      = 10 * time.Second // a silent control stream older than three of these is dead
	HeartbeatInterval = 10 * time.Second
	AssertionLife     = 2 * time.Minute
	AccessTokenLife   = 15 * time.Minute
	LeafLife          = 24 * time.Hour // leaves are renewed at half of it, with jitter
	TokenLife         = time.Hour      // of an enrolment token
)

const tokenPrefix = "swe1."

// Token is an enrolment token: one use, one hour, for one node. It is a secret as a whole.
type Token struct {
	URL string `json:"u"`
	// Pin is the key hash of the CA of the platform's own certificate; zero means that the system's roots vouch for it.
	Pin    string        `json:"p,omitempty"`
	Node   identity.Node `json:"n"`
	Name   string        `json:"m"`
	Secret []byte        `json:"s"` // 32 random bytes
	// Root is the key hash of the organization's root, put in by its owner: the node takes no other from the platform. Empty: it takes the
	// one that the platform names at the enrolment, and keeps to that.
	Root string `json:"r,omitempty"`
}

// String is what a user pastes. It is the secret itself: never log it.
func (t Token) String() string {
	b, _ := json.Marshal(t) // strings and bytes always encode
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

// ParseToken reads a token. Errors do not repeat it.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	body, ours := strings.CutPrefix(s, tokenPrefix)
	if !ours {
		return Token{}, fmt.Errorf("this is not an enrolment token (they start with %s): copy it whole from `sallyway gateway|relay|client create` or `… token NAME`", tokenPrefix)
	}
	b, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil || len(b) > 4096 {
		return Token{}, fmt.Errorf("the enrolment token is damaged: copy it whole, or make a new one with `sallyway … token NAME`")
	}
	var t Token
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&t); err != nil || len(t.Secret) != 32 {
		return Token{}, fmt.Errorf("the enrolment token is damaged: copy it whole, or make a new one with `sallyway … token NAME`")
	}
	if err := t.Node.Validate(); err != nil {
		return Token{}, fmt.Errorf("enrolment token: %w", err)
	}
	if u, err := url.Parse(t.URL); err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" {
		return Token{}, fmt.Errorf("enrolment token: platform URL %.80q is not a URL", t.URL)
	}
	return t, nil
}

// AdminCredential is the content of the platform's DATA/admin.token and of what `sallyway login` keeps.
type AdminCredential struct {
	URL   string `json:"url"`
	Pin   string `json:"pin,omitempty"`
	Token string `json:"token"`
}

// EnrolRequest spends a token. Requests are CSRs in PEM; a gateway sends a second one of kind site for the same key. Gateways and relays
// send one more for their SSH key, which is Ed25519: its certificate is an SSH one.
type EnrolRequest struct {
	Secret  []byte        `json:"secret"`
	Node    identity.Node `json:"node"`
	CSR     string        `json:"csr"`
	SiteCSR string        `json:"site_csr,omitempty"`
	SSHCSR  string        `json:"ssh_csr,omitempty"`
	Version string        `json:"version"`
}

// Certificates are a node's own certificates: chains in PEM, leaf first.
type Certificates struct {
	Leaf string `json:"leaf"`
	Site string `json:"site,omitempty"`
	// SSH is for the last rung, a line of an authorized_keys file; "" from a platform that has no SSH CA.
	SSH string `json:"ssh,omitempty"`
}

// EnrolResponse makes a node a member.
type EnrolResponse struct {
	Node         identity.Node `json:"node"`
	Name         string        `json:"name"`
	Certificates Certificates  `json:"certificates"`
	Trust        Trust         `json:"trust"`
}

// RenewRequest asks for fresh leaves, for the same key or a new one.
type RenewRequest struct {
	CSR     string `json:"csr"`
	SiteCSR string `json:"site_csr,omitempty"`
	SSHCSR  string `json:"ssh_csr,omitempty"`
}

// RenewResponse is the answer to RenewRequest.
type RenewResponse struct {
	Certificates Certificates `json:"certificates"`
}

// Trust is what a node knows of its organization's PKI.
type Trust struct {
	// Roots are the organization's root certificates (PEM): the current and, during a rotation, the one before or after. That of a root which
	// follows another is signed by it.
	Roots string `json:"roots"`
	// Lineage are roots of the past (PEM) that lead from one that a node may know to Roots, see identity.Succession. They are not trusted.
	Lineage string `json:"lineage,omitempty"`
	// Pins are the CA keys per kind of leaf: the current and, when there is one, the next.
	Pins   map[identity.Kind][]identity.KeyHash `json:"pins"`
	Denied []identity.KeyHash                   `json:"denied,omitempty"`
}

// For returns the trust in leaves of the given kinds.
func (t *Trust) For(kinds ...identity.Kind) (*identity.Trust, error) {
	roots, err := identity.DecodeCertificates([]byte(t.Roots))
	if err != nil {
		return nil, fmt.Errorf("roots of the organization: %w", err)
	}
	tr := &identity.Trust{Roots: roots, Denied: t.Denied}
	for _, k := range kinds {
		tr.Pins = append(tr.Pins, t.Pins[k]...)
	}
	return tr, nil
}

// EventType says what a line of the control stream is.
type EventType string

// The events. Every config replaces the one before as a whole.
const (
	EventPing   EventType = "ping"
	EventConfig EventType = "config"
)

// Event is one line of the control stream.
type Event struct {
	Type   EventType `json:"type"`
	Config *Config   `json:"config,omitempty"`
	// Version, in a ping, says up to which version nothing changed for the node since the last configuration; 0 says nothing.
	Version uint64 `json:"version,omitempty"`
}

// Config is everything a node is told. Nodes cache the newest in their state folder and start from it when the platform is down.
type Config struct {
	Version uint64        `json:"version"` // grows; a node refuses a lower one than it has seen
	Node    identity.Node `json:"node"`
	Name    string        `json:"name"`
	Trust   Trust         `json:"trust"`
	// Relay is for relays, Dialling for clients and gateways, Gateway for gateways.
	Relay    *Relay    `json:"relay,omitempty"`
	Gateway  *Gateway  `json:"gateway,omitempty"`
	Dialling *Dialling `json:"dialling,omitempty"`
}

// Relay is a relay's share of the configuration.
type Relay struct {
	Host     string          `json:"host"`
	Port     uint16          `json:"port"` // that nodes are told to dial
	Keys     []RelayKey      `json:"keys"` // newest first; at most two are live
	Orgs     []RelayOrg      `json:"orgs"`
	Denied   []identity.Node `json:"denied,omitempty"`
	Draining bool            `json:"draining,omitempty"`
	// SSHPort and TLSPort are those of the last rung that nodes are told to dial; 0 is none.
	SSHPort uint16 `json:"ssh_port,omitempty"`
	TLSPort uint16 `json:"tls_port,omitempty"`
}

// RelayKey is a key for TURN passwords: secret.
type RelayKey struct {
	ID     string `json:"id"`
	Secret []byte `json:"secret"`
}

// RelayOrg is an organization that a relay serves.
type RelayOrg struct {
	Org string `json:"org"`
	// Peers are configured peers, addr:port.
	Peers []netip.AddrPort `json:"peers,omitempty"`
	// MaxAllocations and BytesPerSecond are quotas of the whole organization here; zero means the relay's default.
	MaxAllocations int   `json:"max_allocations,omitempty"`
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"`
	// Trust and SSHCAs prove who comes by the last rung: nodes' X.509 certificates, and gateways' SSH certificates by these keys (lines of an
	// authorized_keys file). Without them the organization has no last rung here.
	Trust  *Trust   `json:"trust,omitempty"`
	SSHCAs []string `json:"ssh_cas,omitempty"`
}

// RelayRef is a relay as nodes dial it.
type RelayRef struct {
	Node identity.Node `json:"node"`
	Name string        `json:"name"`
	Host string        `json:"host"` // address or DNS name, without port
	Port uint16        `json:"port"` // 5349 unless configured otherwise
	// Roots and Pins prove the relay's certificate: the organization's, or the platform's relay CA for a shared relay.
	Roots    string             `json:"roots"`
	Pins     []identity.KeyHash `json:"pins"`
	Username string             `json:"username"` // TURN credential of the node that reads this, renewed hourly
	Password string             `json:"password"`
	// SSHPort and TLSPort are where the last rung is, for gateways and for those who dial them; 0 is none. SSHCAs prove the relay's SSH
	// certificate: lines of an authorized_keys file.
	SSHPort uint16   `json:"ssh_port,omitempty"`
	TLSPort uint16   `json:"tls_port,omitempty"`
	SSHCAs  []string `json:"ssh_cas,omitempty"`
}

// Gateway is a gateway's share of the configuration.
type Gateway struct {
	Snapshot string     `json:"snapshot"` // signed, see policy.OpenSnapshot
	Relays   []RelayRef `json:"relays"`   // where it holds legs: first is the active one
	// Probe are relays that it might be given, by which it tells its round-trip times to the platform (Heartbeat.RelayRTT).
	Probe []ProbeRelay `json:"probe,omitempty"`
	// EndSessions are sessions to end at once: those of a node that began before a time. The node's key stays good.
	EndSessions []EndSession `json:"end_sessions,omitempty"`
	// FlowLog has it tell the platform of the flows that peers had (POST /api/v1/node/flows).
	FlowLog bool `json:"flow_log,omitempty"`
}

// ProbeRelay is a relay that a gateway measures by plain STUN Binding requests.
type ProbeRelay struct {
	ID   string `json:"id"`
	Host string `json:"host"` // address or DNS name, without port
	Port uint16 `json:"port"`
}

// EndSession says which sessions a gateway ends.
type EndSession struct {
	Node   identity.Node `json:"node"`
	Before time.Time     `json:"before"`
}

// Dialling is what a node needs to reach resources behind gateways: clients, and gateways as sites.
type Dialling struct {
	// Virtual are the node's own addresses in the virtual range: one IPv4, one IPv6.
	Virtual []netip.Addr `json:"virtual"`
	// Range are the organization's virtual prefixes: IPv4 and IPv6.
	Range     []netip.Prefix      `json:"range"`
	Gateways  []GatewayRef        `json:"gateways"`
	Resources []ReachableResource `json:"resources"`
	Direct    Direct              `json:"direct,omitzero"`
}

// Direct says which paths without a relay the organization allows. The zero Direct, of an older platform, allows none.
type Direct struct {
	On bool `json:"on"`
	// Private allows nodes to tell each other their private addresses and those of their interfaces.
	Private bool `json:"private,omitempty"`
}

// GatewayRef is a gateway as nodes reach it.
type GatewayRef struct {
	Node    identity.Node `json:"node"`
	Name    string        `json:"name"`
	FQDN    string        `json:"fqdn"` // <name>.<org>.sallyway.internal
	Virtual []netip.Addr  `json:"virtual"`
	// Relays are where the gateway holds legs. In a gateway's own Dialling the user names are of kind site: what it dials with
	// is another allocation than the one it serves on.
	Relays []RelayRef `json:"relays"`
	Grant  string     `json:"grant"` // signed, see policy.OpenGrant
}

// ReachableResource is a resource that some policy allows the node.
type ReachableResource struct {
	policy.Resource
	FQDN     string           `json:"fqdn"` // <resource>.<org>.sallyway.internal
	Gateways []ServingGateway `json:"gateways"`
}

// ServingGateway says by which gateway a resource is reached: lowest priority first, then by weight.
type ServingGateway struct {
	Node     identity.Node `json:"node"`
	Priority int           `json:"priority"`
	Weight   int           `json:"weight"`
}

// Heartbeat is what a node tells of itself.
type Heartbeat struct {
	Version  string             `json:"version"`
	Started  time.Time          `json:"started"`
	State    string             `json:"state"`              // ready, degraded, draining
	Relays   []string           `json:"relays,omitempty"`   // ids of relays it holds legs on
	Sessions []SessionReport    `json:"sessions,omitempty"` // a gateway's live sessions
	Load     map[string]float64 `json:"load,omitempty"`     // a relay's allocations, bytes_per_second
	Problems []string           `json:"problems,omitempty"`
	// Resources are what a gateway's probes found, of the resources that it probes.
	Resources []ResourceHealth `json:"resources,omitempty"`
	// RelayRTT is a gateway's round-trip time to relays by id, the median of recent probes, in nanoseconds. One that did not answer is not in it.
	RelayRTT map[string]time.Duration `json:"relay_rtt,omitempty"`
	// ConfigVersion is that of the newest configuration which the node took over, or was told that nothing in it is new for the node
	// (Event.Version). A rotation of CAs waits for it.
	ConfigVersion uint64 `json:"config_version,omitempty"`
}

// ResourceHealth is whether a gateway reaches a resource.
type ResourceHealth struct {
	ID     string    `json:"id"`
	Name   string    `json:"name"`
	OK     bool      `json:"ok"`
	Reason string    `json:"reason,omitempty"` // why not
	Since  time.Time `json:"since"`            // when OK last changed
}

// SessionReport is a live session at a gateway.
type SessionReport struct {
	Peer      identity.Node    `json:"peer"`
	Key       identity.KeyHash `json:"key"`
	Relay     string           `json:"relay"`
	Since     time.Time        `json:"since"`
	Flows     int              `json:"flows"`
	SentBytes uint64           `json:"sent_bytes"`
	RecvBytes uint64           `json:"recv_bytes"`
	// RTT is the smoothed round-trip time of the session in nanoseconds; 0 is not measured, or a gateway that does not tell.
	RTT time.Duration `json:"rtt,omitempty"`
}

// StubAddr is the address in a virtual prefix under which nodes' stub resolvers answer on their own hosts: the last but one. A
// platform gives it to nobody.
func StubAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a.Prev()
}
