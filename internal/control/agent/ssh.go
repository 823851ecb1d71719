package agent

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sallyway/internal/identity"
)

// sshKeyFile holds the key of the last rung, enrollingSSHKeyFile that of an enrolment that has not been confirmed.
const (
	sshKeyFile          = "ssh.key"
	enrollingSSHKeyFile = "enrolling.ssh.key"
)

// sshRequest makes the certificate request for the node's SSH key in a file of the state folder; "" for kinds that have none.
func (a *Agent) sshRequest(n identity.Node, file string) (string, error) {
	if n.Kind != identity.Gateway && n.Kind != identity.Relay {
		return "", nil
	}
	key, err := loadOrCreateSSHKey(filepath.Join(a.cfg.StateDir, file))
	if err != nil {
		return "", err
	}
	b, err := identity.Request(key, n)
	return string(b), err
}

// loadOrCreateSSHKey reads the Ed25519 key at path, or makes one there with mode 0600. A key file that others can read is refused.
func loadOrCreateSSHKey(path string) (crypto.Signer, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		b, err := identity.EncodeKey(key)
		if err != nil {
			return nil, err
		}
		if err := replaceFile(path, b); err != nil {
			return nil, fmt.Errorf("write SSH key: %w", err)
		}
		return key, nil
	case err != nil:
		return nil, err
	case st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("key file %s has mode %#o: others can read it; run chmod 600 %s", path, st.Mode().Perm(), path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := identity.DecodeKey(b)
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	if _, ok := key.(ed25519.PrivateKey); !ok {
		return nil, fmt.Errorf("key file %s holds a %T, want Ed25519: remove it, and a new one is made", path, key)
	}
	return key, nil
}

// SSH is the node's SSH key and the certificate for it, a line of an authorized_keys file, for the last rung. Both are zero for a node
// that has none yet: of a kind without, or with a platform that has not issued one.
func (a *Agent) SSH() (key crypto.Signer, certificate string) {
	a.mu.Lock()
	certificate = a.state.Certificates.SSH
	a.mu.Unlock()
	if certificate == "" {
		return nil, ""
	}
	key, err := loadOrCreateSSHKey(filepath.Join(a.cfg.StateDir, sshKeyFile))
	if err != nil {
		a.log.Error("the SSH key is unusable: the last rung is not there", "err", err)
		return nil, ""
	}
	return key, certificate
}
