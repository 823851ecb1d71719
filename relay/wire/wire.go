// Package wire is what a relay and a node's leg say to each other beyond TURN (RFC 8656): the credential's form, the rendezvous
// method, and two indications. All are STUN messages (RFC 8489) on the control connection of an allocation.
//
//	Rendezvous request      node → relay    NODE, CHANNEL-NUMBER?         "connect me to NODE", authenticated like any TURN request
//	Rendezvous success      relay → node    XOR-PEER-ADDRESS, NODE        NODE's relayed address on this relay
//	Rendezvous error        relay → node    403, 404, 437, 486            no such pair allowed, not here now, …
//	Rendezvous indication   relay → NODE    NODE, XOR-PEER-ADDRESS, XOR-MAPPED-ADDRESS   who asked, its relayed address, from where
//	Unknown indication      relay → source  (no attributes, no integrity) ChannelData or control for an allocation the relay does not know
//	Drain indication        relay → node    LIFETIME                      move within LIFETIME seconds, no new allocations here
//	Refused indication      relay → node    ERROR-CODE                    this allocation was ended: 401 credential, 403 revoked, 486 quota
//
// After a rendezvous both nodes send ChannelBind for the other's relayed address; data flows when both have.
//
// Control of our own nodes runs inside DTLS or TLS. ChannelData of a UDP leg whose user name has the flag FlagPlainData runs
// beside DTLS on the same 5-tuple; the first byte tells them apart (RFC 7983 §7): 20–63 DTLS, 64–79 ChannelData, 0–3 STUN.
package wire

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/internal/identity"
)

// Port is where a relay serves STUN and TURN, as UDP, DTLS, TCP and TLS alike.
const Port = 5349

// Methods of ours, in the range that RFC 8489 §18.2 leaves to expert review.
const (
	MethodRendezvous stun.Method = 0x0F1
	MethodUnknown    stun.Method = 0x0F2
	MethodDrain      stun.Method = 0x0F3
	MethodRefused    stun.Method = 0x0F4
)

// AttrNode carries a node in its org/kind/id form, UTF-8, at most MaxNode bytes. It is comprehension-optional (RFC 8489 §14) so that
// foreign software skips it.
const AttrNode stun.AttrType = 0xC0F1

// MaxNode bounds AttrNode: two labels, the longest kind, two slashes.
const MaxNode = 63 + 1 + 8 + 1 + 63

// Realm is the STUN realm of every relay.
const Realm = "sallyway"

// Flags say in a user name how its owner talks to the relay.
type Flags string

// FlagPlainData allows ChannelData outside of DTLS on the 5-tuple of the DTLS control connection.
const FlagPlainData Flags = "d"

// Has reports whether every letter of want is set.
func (f Flags) Has(want Flags) bool {
	for _, c := range want {
		if !strings.ContainsRune(string(f), c) {
			return false
		}
	}
	return true
}

// Username is a TURN user name: expiry:org:kind:node:flags, expiry in Unix seconds. Where it has an Outage the first part is expiry-outage.
// The owner of an allocation is Node, never the expiry, so that a renewed credential refreshes the same allocation.
type Username struct {
	Expiry time.Time
	// Outage is until when the credential counts at a relay that does not reach its platform, where none can be renewed; zero, or not
	// later, is Expiry.
	Outage time.Time
	Node   identity.Node
	Flags  Flags
}

// End is when the credential counts no more, at a relay that reaches its platform or at one that does not.
func (u Username) End(outage bool) time.Time {
	if outage && u.Outage.After(u.Expiry) {
		return u.Outage
	}
	return u.Expiry
}

// String is the form on the wire.
func (u Username) String() string {
	times := strconv.FormatInt(u.Expiry.Unix(), 10)
	if u.Outage.Unix() > u.Expiry.Unix() {
		times += "-" + strconv.FormatInt(u.Outage.Unix(), 10)
	}
	return strings.Join([]string{times, u.Node.Org, string(u.Node.Kind), u.Node.ID, string(u.Flags)}, ":")
}

// ParseUsername reads a user name. It says nothing about whether the password was right or the expiry has passed.
func ParseUsername(s string) (Username, error) {
	parts := strings.Split(s, ":")
	if len(s) > 256 || len(parts) != 5 {
		return Username{}, fmt.Errorf("user name is not expiry:org:kind:node:flags")
	}
	expiry, outage, both := strings.Cut(parts[0], "-")
	u := Username{
		Node:  identity.Node{Org: parts[1], Kind: identity.Kind(parts[2]), ID: parts[3]},
		Flags: Flags(parts[4]),
	}
	var ok bool
	if u.Expiry, ok = parseTime(expiry); !ok {
		return Username{}, fmt.Errorf("user name has a malformed expiry")
	}
	if both {
		if u.Outage, ok = parseTime(outage); !ok || !u.Outage.After(u.Expiry) {
			return Username{}, fmt.Errorf("user name has a malformed time for outages")
		}
	}
	if strings.Trim(parts[4], string(FlagPlainData)) != "" {
		return Username{}, fmt.Errorf("user name has unknown flags")
	}
	return u, u.Node.Validate()
}

// parseTime reads Unix seconds in the one way that they are written.
func parseTime(s string) (time.Time, bool) {
	sec, err := strconv.ParseInt(s, 10, 64)
	if err != nil || sec < 0 || s != strconv.FormatInt(sec, 10) {
		return time.Time{}, false
	}
	return time.Unix(sec, 0), true
}

// Password is the TURN password of a user name under a relay's key: unpadded base64url of HMAC-SHA256.
func Password(key []byte, username string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(username))
	return base64.RawURLEncoding.EncodeToString(m.Sum(nil))
}

// Node is the STUN attribute NODE.
type Node identity.Node

// AddTo appends the attribute (stun.Setter).
func (n Node) AddTo(m *stun.Message) error {
	m.Add(AttrNode, []byte(identity.Node(n).String()))
	return nil
}

// GetFrom reads the attribute (stun.Getter).
func (n *Node) GetFrom(m *stun.Message) error {
	v, err := m.Get(AttrNode)
	if err != nil {
		return err
	}
	if len(v) > MaxNode {
		return fmt.Errorf("NODE of %d bytes, limit %d", len(v), MaxNode)
	}
	p, err := identity.ParseNode(string(v))
	*n = Node(p)
	return err
}

var (
	_ stun.Setter = Node{}
	_ stun.Getter = (*Node)(nil)
)

// MayConnect reports whether the pair may talk through a relay: client to gateway, site to gateway, platform to gateway, in one
// organization, whichever of the two asks. A gateway that dials another has a second allocation for that, of kind site.
func MayConnect(a, b identity.Node) bool {
	if a.Org != b.Org || a == b {
		return false
	}
	if a.Kind != identity.Gateway {
		a, b = b, a
	}
	if a.Kind != identity.Gateway {
		return false
	}
	switch b.Kind {
	case identity.Client, identity.Site, identity.Platform:
		return true
	}
	return false
}
