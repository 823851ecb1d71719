// Package policy is who may reach what: the documents in which a platform says it (snapshot, grant), their signatures, and the
// one evaluation that gateways enforce and the platform explains.
//
// Documents are JWS in compact form (RFC 7515), ES256, with the signer's certificate chain in x5c: a leaf of kind policy under the
// organization's root. The typ header keeps one kind of document from passing as another.
package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/identity"
)

// Proto is what a flow speaks.
type Proto string

// The protocols a rule distinguishes. Other IP protocols are never allowed.
const (
	TCP  Proto = "tcp"
	UDP  Proto = "udp"
	ICMP Proto = "icmp"
	DNS  Proto = "dns" // resolving a name through the gateway
)

// PortRange is First to Last, both included. 1–65535 is written "all".
type PortRange struct{ First, Last uint16 }

// AllPorts is every port.
var AllPorts = PortRange{1, 65535}

// Contains reports whether p lies in r.
func (r PortRange) Contains(p uint16) bool { return r.First <= p && p <= r.Last }

// String writes 5432, 8000-8100 or all.
func (r PortRange) String() string {
	switch {
	case r == AllPorts:
		return "all"
	case r.First == r.Last:
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// MarshalText writes the form of String.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads the form of String.
func (r *PortRange) UnmarshalText(b []byte) error {
	s := string(b)
	if s == "all" {
		*r = AllPorts
		return nil
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	z, errZ := strconv.ParseUint(last, 10, 16)
	if errA != nil || errZ != nil || a == 0 || z < a {
		return fmt.Errorf("ports %.40q are not a port, a range such as 8000-8100, or all", s)
	}
	*r = PortRange{uint16(a), uint16(z)}
	return nil
}

// ParsePorts reads a comma-separated list of ports and ranges, or all. An empty string is an empty list.
func ParsePorts(s string) ([]PortRange, error) {
	var out []PortRange
	for f := range strings.SplitSeq(s, ",") {
		if f = strings.TrimSpace(f); f == "" {
			continue
		}
		var r PortRange
		if err := r.UnmarshalText([]byte(f)); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// Resource is something private that a gateway serves.
type Resource struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Address is an IP address, a CIDR, or a host name; a host name may start with "*." and then means every name below.
	Address string      `json:"address"`
	TCP     []PortRange `json:"tcp,omitempty"`
	UDP     []PortRange `json:"udp,omitempty"`
	ICMP    bool        `json:"icmp,omitempty"`
	// Domains are DNS suffixes that the gateway's network resolves, without a leading dot.
	Domains []string `json:"domains,omitempty"`
	// Virtual are the resource's addresses in the organization's virtual range: IPv4 and IPv6. For a CIDR they are absent.
	Virtual []netip.Addr `json:"virtual,omitempty"`
	// Health is how its gateways find out whether they reach it.
	Health Health `json:"health,omitzero"`
}

// Prefix returns the address as a prefix when it is an IP address or a CIDR.
func (r *Resource) Prefix() (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(r.Address); err == nil {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(r.Address)
	if err != nil {
		return netip.Prefix{}, false
	}
	return p.Masked(), true
}

// MatchesHost reports whether the resource's address names host, which is not an IP address. Case and a final dot do not count.
func (r *Resource) MatchesHost(host string) bool {
	host = canonical(host)
	if host == "" {
		return false
	}
	want := canonical(r.Address)
	if below, wild := strings.CutPrefix(want, "*."); wild {
		return strings.HasSuffix(host, "."+below)
	}
	return host == want
}

// MatchesDomain reports whether host is one of the names that the resource has the gateway's network resolve.
func (r *Resource) MatchesDomain(host string) bool {
	host = canonical(host)
	for _, d := range r.Domains {
		if d = canonical(d); d != "" && (host == d || strings.HasSuffix(host, "."+d)) {
			return true
		}
	}
	return false
}

func (r *Resource) allows(p Proto, port uint16) bool {
	ports := r.TCP
	switch p {
	case ICMP:
		return r.ICMP
	case UDP:
		ports = r.UDP
	case TCP:
	default:
		return false
	}
	for _, pr := range ports {
		if pr.Contains(port) {
			return true
		}
	}
	return false
}

// Rule allows a subject a resource. There are no rules that deny: what no rule allows is denied.
type Rule struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Resource string `json:"resource"`
	// Subjects are the nodes the rule is for, groups already resolved to their members.
	Subjects []identity.Node `json:"subjects"`
}

// Peer is a node that may open sessions to the snapshot's gateway.
type Peer struct {
	Node identity.Node `json:"node"`
	Name string        `json:"name"`
	// Virtual are the addresses of the node in the virtual range; packets inside of CONNECT-IP must come from one of them.
	Virtual []netip.Addr `json:"virtual"`
}

// Snapshot is everything a gateway needs to decide, platform up or down.
type Snapshot struct {
	Org      string             `json:"org"`
	Audience identity.Node      `json:"audience"`
	Version  uint64             `json:"version"`
	Issued   time.Time          `json:"issued"`
	NotAfter time.Time          `json:"not_after"`
	Peers    []Peer             `json:"peers"`
	Resource []Resource         `json:"resources"`
	Rules    []Rule             `json:"rules"`
	Denied   []identity.KeyHash `json:"denied"`
}

// Grant helps a node to connect to a gateway; the gateway's snapshot decides what it may reach there.
type Grant struct {
	Org      string             `json:"org"`
	Node     identity.Node      `json:"node"`
	Key      identity.KeyHash   `json:"key"`
	Gateway  identity.Node      `json:"gateway"`
	Relays   []identity.Node    `json:"relays"`
	Pins     []identity.KeyHash `json:"pins"`
	Issued   time.Time          `json:"issued"`
	NotAfter time.Time          `json:"not_after"`
}

// Target is where a flow wants to go. Host is what the peer named (an IP address or a host name), Addr what it is or resolved
// to; the zero Addr means that it is not known yet.
type Target struct {
	Proto Proto
	Host  string
	Addr  netip.Addr
	Port  uint16
}

// String is for errors and logs: tcp db.internal:5432.
func (t Target) String() string {
	host := t.Host
	if host == "" {
		host = t.Addr.String()
	}
	if t.Proto == TCP || t.Proto == UDP {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return fmt.Sprintf("%s %s:%d", t.Proto, host, t.Port)
	}
	return string(t.Proto) + " " + host
}

// Decision is an answer with its reason.
type Decision struct {
	Allowed  bool
	Rule     string // name of the rule that allowed, or "default deny"
	Resource *Resource
	Reason   string // one sentence for people
}

// DefaultDeny is the rule name in a refusal: nothing allowed it.
const DefaultDeny = "default deny"

// Evaluate decides whether node may reach t by s. It does not look at NotAfter (the gateway does, since running flows go on).
// When t.Host is a name and t.Addr is known, a resource matches by name or, if it is an address or CIDR, by address.
func (s *Snapshot) Evaluate(node identity.Node, t Target) Decision {
	known := false
	for i := range s.Peers {
		if samePeer(s.Peers[i].Node, node) {
			known = true
			break
		}
	}
	if !known {
		return Decision{Rule: DefaultDeny, Reason: fmt.Sprintf("%v is not among the nodes that may use this gateway: allow it with a policy", node)}
	}
	var near *Resource // matches the address, not the port or protocol
	var unruled *Resource
	for i := range s.Resource {
		r := &s.Resource[i]
		if !r.matches(t) {
			continue
		}
		if t.Proto != DNS && !r.allows(t.Proto, t.Port) {
			near = cmp.Or(near, r)
			continue
		}
		for j := range s.Rules {
			rule := &s.Rules[j]
			if rule.Resource != r.ID {
				continue
			}
			for _, subject := range rule.Subjects {
				if samePeer(subject, node) {
					return Decision{
						Allowed: true, Rule: cmp.Or(rule.Name, rule.ID), Resource: r,
						Reason: fmt.Sprintf("rule %q allows resource %q", cmp.Or(rule.Name, rule.ID), r.Name),
					}
				}
			}
		}
		unruled = cmp.Or(unruled, r)
	}
	switch {
	case unruled != nil:
		return Decision{Rule: DefaultDeny, Resource: unruled, Reason: fmt.Sprintf("no policy allows %v resource %q", node, unruled.Name)}
	case near != nil:
		return Decision{Rule: DefaultDeny, Resource: near, Reason: fmt.Sprintf("resource %q does not include %s", near.Name, portText(t))}
	}
	return Decision{Rule: DefaultDeny, Reason: fmt.Sprintf("no resource of this gateway covers %s", t)}
}

// Peer returns what the snapshot says of a node.
func (s *Snapshot) Peer(n identity.Node) (Peer, bool) {
	for _, p := range s.Peers {
		if samePeer(p.Node, n) {
			return p, true
		}
	}
	return Peer{}, false
}

// Platform is the subject of rules for the platform of an organization: whoever shows a certificate of kind platform.
func Platform(org string) identity.Node {
	return identity.Node{Org: org, Kind: identity.Platform, ID: string(identity.Platform)}
}

// samePeer compares subjects.
func samePeer(a, b identity.Node) bool { return subject(a) == subject(b) }

// subject is how rules name who showed a certificate: a gateway that dials is of kind site there and of kind gateway in policies, and every
// process of a platform has an id of its own.
func subject(n identity.Node) identity.Node {
	switch n.Kind {
	case identity.Site:
		n.Kind = identity.Gateway
	case identity.Platform:
		return Platform(n.Org)
	}
	return n
}

func (r *Resource) matches(t Target) bool {
	if t.Proto == DNS {
		return r.MatchesDomain(t.Host) || r.MatchesHost(t.Host)
	}
	if _, err := netip.ParseAddr(t.Host); t.Host != "" && err != nil && r.MatchesHost(t.Host) {
		return true
	}
	if p, ok := r.Prefix(); ok && t.Addr.IsValid() {
		return p.Contains(t.Addr.Unmap())
	}
	return false
}

func portText(t Target) string {
	if t.Proto == TCP || t.Proto == UDP {
		return fmt.Sprintf("%s port %d", t.Proto, t.Port)
	}
	return string(t.Proto)
}

// canonical lowers a DNS name and takes off its final dot.
func canonical(s string) string { return strings.TrimSuffix(strings.ToLower(s), ".") }
