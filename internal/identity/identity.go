// Package identity names the parts of an organization and proves the names: node identities as SPIFFE URIs, their keys,
// and the checks both ends of a connection make on each other's certificates.
//
// A node is named by organization, kind and id and is written as a URI SAN in its certificate:
//
//	spiffe://<org>.sallyway/<kind>/<id>        spiffe://default.sallyway/gateway/g-7k3m9x2p
//
// A certificate proves a name when its chain ends in a root of the organization, the issuing CA's key is pinned, the extended
// key usage fits the role in the handshake, and its own key is not on the deny list. The common name is never looked at.
package identity

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// Kind says what a certificate may be used for.
type Kind string

// The kinds of identity. A gateway that dials another gateway shows a leaf of kind site; policy signs snapshots and grants.
const (
	Relay    Kind = "relay"
	Gateway  Kind = "gateway"
	Client   Kind = "client"
	Site     Kind = "site"
	Platform Kind = "platform"
	Policy   Kind = "policy"
)

// Kinds lists every kind, in the order in which they are documented.
var Kinds = []Kind{Relay, Gateway, Client, Site, Platform, Policy}

// Valid reports whether k is a known kind.
func (k Kind) Valid() bool {
	for _, known := range Kinds {
		if k == known {
			return true
		}
	}
	return false
}

// SharedOrg is the name under which relays that belong to the platform (not to one organization) are known. It can not be an
// organization's name because it has a dot.
const SharedOrg = "platform.shared"

// Node is an identity: comparable, and usable as a map key. The zero Node is nobody.
type Node struct {
	Org  string `json:"org"`
	Kind Kind   `json:"kind"`
	ID   string `json:"id"`
}

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidLabel reports whether s can be an organization's or a node's name or id: a DNS label in lower case (RFC 1123 §2.1).
func ValidLabel(s string) bool { return label.MatchString(s) }

// Validate says what is wrong with n, or nil.
func (n Node) Validate() error {
	switch {
	case n.Org != SharedOrg && !ValidLabel(n.Org):
		return fmt.Errorf("organization %q is not a DNS label in lower case", clip(n.Org))
	case !n.Kind.Valid():
		return fmt.Errorf("node kind %q is unknown", clip(string(n.Kind)))
	case !ValidLabel(n.ID):
		return fmt.Errorf("node id %q is not a DNS label in lower case", clip(n.ID))
	}
	return nil
}

// IsZero reports whether n is nobody.
func (n Node) IsZero() bool { return n == Node{} }

// String is org/kind/id, the form used in logs and in TURN attributes.
func (n Node) String() string { return n.Org + "/" + string(n.Kind) + "/" + n.ID }

// URI is the SPIFFE URI of n (SPIFFE-ID §2).
func (n Node) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: n.Org + ".sallyway", Path: "/" + string(n.Kind) + "/" + n.ID}
}

// ServerName is the TLS server name of n: <id>.<org>.sallyway. It only routes; identity is proved by the URI SAN.
func (n Node) ServerName() string { return n.ID + "." + n.Org + ".sallyway" }

// ParseNode reads the org/kind/id form.
func ParseNode(s string) (Node, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return Node{}, fmt.Errorf("node %q is not of the form org/kind/id", clip(s))
	}
	n := Node{Org: parts[0], Kind: Kind(parts[1]), ID: parts[2]}
	return n, n.Validate()
}

// ParseURI reads a SPIFFE URI of ours. A node has one spelling: no percent-encoding, no query, not even an empty one (SPIFFE-ID §2).
func ParseURI(u *url.URL) (Node, error) {
	org, ours := strings.CutSuffix(u.Host, ".sallyway")
	if !ours || !strings.HasPrefix(u.Path, "/") {
		return Node{}, fmt.Errorf("%q is not a SPIFFE URI of Sallyway", clip(u.String()))
	}
	n, err := ParseNode(org + u.Path)
	if err != nil {
		return Node{}, err
	}
	if *u != *n.URI() {
		return Node{}, fmt.Errorf("%q is not how %v is written", clip(u.String()), n)
	}
	return n, nil
}

// NewID returns a fresh random id with a one-letter prefix that tells the kind, such as g-7k3m9x2pq4ra: 60 random bits.
func NewID(k Kind) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	s := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
	return string(k[0]) + "-" + s[:12]
}

// clip bounds what an error repeats of foreign input.
func clip(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
