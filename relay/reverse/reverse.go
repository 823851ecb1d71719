// Package reverse is a node's end of the last rung, for networks that let neither UDP nor TLS through on 5349: a gateway dials its relay by
// SSH and the relay opens channels back to it; a client dials the relay by TLS, names the gateway in SNI, and the relay joins the two. Either
// end is a datagram.Link that carries the same QUIC session as every other rung.
//
//	gateway ── SSH 2222, up to Slots connections ──► relay ◄── TLS 8443, one connection for a gateway ── client
//	           one channel on each for a link
//
// What flows are frames, and on SSH chunks of them:
//
//	frame     length (2 bytes, big endian, 1 to MaxPayload)  payload
//	control   0 0  kind (1 byte: see Control)                only on TLS; SSH has its own
//	chunk     number (4)  size (2)  whole frames of that size, no control
//
// An SSH channel of this implementation has a window of 2 MiB, so a link has a channel on each of the gateway's connections. Chunks are
// numbered for each direction and handed on in that order, whichever channel brought them, so that striping reorders nothing. A link ends
// as a whole with the first of its channels that does.
//
//	t := reverse.NewTunnel(reverse.TunnelConfig{…, OnLink: func(peer identity.Node, l *reverse.Link) { merged.Add(l, info) }})
//	go t.Run(ctx)                                  // a gateway's
//	l, err := reverse.DialTLS(ctx, reverse.TLSConfig{…, Gateway: g})   // a client's
package reverse

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"sallyway/internal/identity"
)

// Ports of a relay where nothing else is configured.
const (
	SSHPort = 2222
	TLSPort = 8443
)

// What both ends of the SSH connection know.
const (
	// ChannelType is that of the channels which the relay opens; there is no other.
	ChannelType = "link@sallyway"
	// KeepaliveRequest is the one global request that either side answers.
	KeepaliveRequest = "keepalive@openssh.com"
	// DrainingRequest is the relay's word that it drains.
	DrainingRequest = "draining@sallyway"
	// KeyExtension names the extension of a gateway's certificate that holds the hash of the key in its X.509 leaf, so that whoever denies
	// that key denies the certificate, too.
	KeyExtension = "key-hash@sallyway"
	// Slots is how many connections a gateway may have with a relay. The first one stays, the others are there while links are.
	Slots = 4
)

// Times of both ends.
const (
	// KeepaliveInterval is between keepalives on a connection; one that has no answer after KeepaliveTimeout is dead.
	KeepaliveInterval = 5 * time.Second
	KeepaliveTimeout  = 10 * time.Second
	// SSHGrace and TLSGrace bound a handshake with authentication.
	SSHGrace = 10 * time.Second
	TLSGrace = 5 * time.Second
)

// The least algorithms: all of them have authenticated encryption, and StrictConn refuses a peer without strict key exchange.
var (
	KeyExchanges = []string{"mlkem768x25519-sha256", "curve25519-sha256"}
	Ciphers      = []string{"aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"}
	MACs         = []string{"hmac-sha2-256-etm@openssh.com"} // none of the ciphers uses one; SSH wants a list
)

const versionPrefix = "SSH-2.0-sallyway_"

// ServerVersion is a relay's SSH version string.
const ServerVersion = versionPrefix + "relay"

// ClientVersion is the SSH version string of a gateway's connection in a slot.
func ClientVersion(slot int) string { return fmt.Sprintf("%sslot%d", versionPrefix, slot) }

// Slot reads a ClientVersion. Other software is in the first slot.
func Slot(version string) int {
	rest, ours := strings.CutPrefix(version, versionPrefix+"slot")
	if !ours || len(rest) != 1 || rest[0] < '0' || rest[0] >= '0'+Slots {
		return 0
	}
	return int(rest[0] - '0')
}

// Open is what the relay says when it opens a channel: JSON in the channel's extra data.
type Open struct {
	// Link tells the links of one relay process apart; channels with the same one belong together.
	Link uint64 `json:"link"`
	// Peer is whom the relay has authenticated at the other end. The session's TLS proves it.
	Peer identity.Node `json:"peer"`
}

// maxOpen bounds an encoded Open, in bytes.
const maxOpen = 1 << 10

// Marshal encodes o.
func (o Open) Marshal() []byte {
	b, _ := json.Marshal(o) // numbers and strings always encode
	return b
}

// ParseOpen reads what Marshal wrote and holds the peer to the kinds that may dial a gateway.
func ParseOpen(b []byte) (Open, error) {
	var o Open
	if len(b) > maxOpen {
		return o, fmt.Errorf("%d bytes with a channel, limit %d", len(b), maxOpen)
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return o, errors.New("malformed data with a channel")
	}
	if err := o.Peer.Validate(); err != nil {
		return o, err
	}
	if !Dials(o.Peer.Kind) {
		return o, fmt.Errorf("a %s does not dial gateways", o.Peer.Kind)
	}
	return o, nil
}

// Dials reports whether nodes of a kind may dial a gateway.
func Dials(k identity.Kind) bool {
	return k == identity.Client || k == identity.Site || k == identity.Platform
}
