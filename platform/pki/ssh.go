package pki

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"sallyway/internal/identity"
	"sallyway/relay/reverse"
)

// KindSSH is the kind of an organization's SSH CA, and of the platform's for relays that organizations share.
const KindSSH = "ssh"

// SSHAuthority is an SSH CA: an Ed25519 key that signs certificates of gateways (user certificates) and relays (host certificates). An SSH
// CA has no certificate: it is its public key.
type SSHAuthority struct {
	Key    crypto.Signer
	signer ssh.Signer
}

// NewSSHAuthority makes a CA.
func NewSSHAuthority() (*SSHAuthority, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return OpenSSHAuthority(key)
}

// OpenSSHAuthority takes up a CA that was made before.
func OpenSSHAuthority(key crypto.Signer) (*SSHAuthority, error) {
	if _, ok := key.(ed25519.PrivateKey); !ok {
		return nil, fmt.Errorf("key of an SSH CA is a %T, want Ed25519", key)
	}
	s, err := ssh.NewSignerFromSigner(key)
	if err != nil {
		return nil, err
	}
	return &SSHAuthority{Key: key, signer: s}, nil
}

// PublicKey is what certificates are checked with: a line of an authorized_keys file.
func (a *SSHAuthority) PublicKey() string { return line(a.signer.PublicKey()) }

// SSHPublicKey writes a public key that way.
func SSHPublicKey(pub crypto.PublicKey) (string, error) {
	k, err := ssh.NewPublicKey(pub)
	if err != nil {
		return "", err
	}
	return line(k), nil
}

func line(k ssh.PublicKey) string { return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k))) }

// Issue signs a certificate for a gateway or relay, whose one principal is the node: a gateway by its identity, a relay by its server name.
// key is the hash of the key in the node's X.509 leaf: whoever denies that key denies this certificate.
func (a *SSHAuthority) Issue(n identity.Node, pub crypto.PublicKey, key identity.KeyHash, now time.Time, life time.Duration) (string, error) {
	if err := n.Validate(); err != nil {
		return "", err
	}
	if _, ok := pub.(ed25519.PublicKey); !ok {
		return "", errors.New("the SSH key of a node is an Ed25519 key")
	}
	k, err := ssh.NewPublicKey(pub)
	if err != nil {
		return "", err
	}
	var sn [8]byte
	if _, err := rand.Read(sn[:]); err != nil {
		return "", err
	}
	c := &ssh.Certificate{
		Key: k, Serial: binary.BigEndian.Uint64(sn[:]), KeyId: n.String(),
		ValidAfter: uint64(now.Add(-Backdate).Unix()), ValidBefore: uint64(now.Add(life).Unix()),
	}
	switch n.Kind {
	case identity.Gateway:
		c.CertType, c.ValidPrincipals = ssh.UserCert, []string{n.String()}
		c.Extensions = map[string]string{reverse.KeyExtension: key.String()}
	case identity.Relay:
		c.CertType, c.ValidPrincipals = ssh.HostCert, []string{n.ServerName()}
	default:
		return "", fmt.Errorf("no SSH certificate for a %s", n.Kind)
	}
	if err := c.SignCert(rand.Reader, a.signer); err != nil {
		return "", fmt.Errorf("sign SSH certificate for %v: %w", n, err)
	}
	return line(c), nil
}
