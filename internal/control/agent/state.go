package agent

import (
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

// Files of the state folder.
const (
	keyFile          = "node.key"
	nodeFile         = "node.json"
	cacheFile        = "config.json"
	enrollingKeyFile = "enrolling.key"
	enrollingFile    = "enrolling.json"
)

// nodeState is node.json.
type nodeState struct {
	Node         identity.Node        `json:"node"`
	Name         string               `json:"name"`
	URL          string               `json:"url"`
	Pin          string               `json:"pin,omitempty"`
	Token        string               `json:"token_fingerprint"`                // of the token that was spent
	OldTokens    []string             `json:"old_token_fingerprints,omitempty"` // of those before it
	Key          identity.KeyHash     `json:"key"`
	Enrolled     time.Time            `json:"enrolled"`
	Certificates control.Certificates `json:"certificates"`
	Trust        control.Trust        `json:"trust"`
}

// cacheState is config.json. The highest versions are kept apart from the documents: a refused document must not lower them.
type cacheState struct {
	Highest         uint64          `json:"highest_version"`
	HighestSnapshot uint64          `json:"highest_snapshot_version,omitempty"`
	Snapshot        string          `json:"snapshot,omitempty"` // the last good one, signed
	Config          *control.Config `json:"config"`
}

// enrollingState is enrolling.json: an enrolment that was begun, so that a crash or a lost answer after the token was spent does
// not lose the node.
type enrollingState struct {
	Token string        `json:"token_fingerprint"`
	Node  identity.Node `json:"node"`
	URL   string        `json:"url"`
}

// fingerprint names a token without telling it; an enrolment by AWS has none.
func fingerprint(t control.Token) string {
	if len(t.Secret) == 0 {
		return "aws"
	}
	h := sha256.Sum256(append([]byte("sallyway enrolment token "), t.Secret...))
	return hex.EncodeToString(h[:8])
}

// load reads a JSON file of the state folder. A file that is not there leaves v and returns false.
func load(dir, name string, v any) (bool, error) {
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read state: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("state file %s is damaged: restore it, or remove %s and enrol anew with a fresh token", path, dir)
	}
	return true, nil
}

// save replaces a JSON file of the state folder.
func save(dir, name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	if err := replaceFile(filepath.Join(dir, name), append(b, '\n')); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// replaceFile writes a file with mode 0600 so that after a crash it holds the old content or the new one, whole.
func replaceFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return rename(f.Name(), path)
}

// rename moves a file within its folder, durably.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func remove(dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove state: %w", err)
	}
	return nil
}

// loadKey reads the key that node.json names: node.key, or enrolling.key after a crash between the two renames of an enrolment.
func loadKey(dir string, want identity.KeyHash) (crypto.Signer, error) {
	var found error
	for _, name := range []string{keyFile, enrollingKeyFile} {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			continue // LoadOrCreateKey would make one
		}
		key, err := identity.LoadOrCreateKey(path)
		if err != nil {
			found = errors.Join(found, err)
			continue
		}
		if identity.HashKey(key.Public()) != want {
			continue
		}
		if name == enrollingKeyFile {
			if err := rename(path, filepath.Join(dir, keyFile)); err != nil {
				return nil, fmt.Errorf("take over the key of the last enrolment: %w", err)
			}
		}
		return key, nil
	}
	if found != nil {
		return nil, found
	}
	return nil, fmt.Errorf("%s does not hold the key that %s names: restore it, or remove %s and enrol anew with a fresh token", filepath.Join(dir, keyFile), nodeFile, dir)
}

// ownCertificates reads a node's certificates and holds them to its key and identity.
func ownCertificates(c control.Certificates, key crypto.Signer, n identity.Node) (leaf, site *tls.Certificate, err error) {
	if leaf, err = ownCertificate(c.Leaf, key, n); err != nil {
		return nil, nil, err
	}
	if c.Site != "" {
		n.Kind = identity.Site
		if site, err = ownCertificate(c.Site, key, n); err != nil {
			return nil, nil, fmt.Errorf("site: %w", err)
		}
	}
	return leaf, site, nil
}

func ownCertificate(pem string, key crypto.Signer, n identity.Node) (*tls.Certificate, error) {
	chain, err := identity.DecodeCertificates([]byte(pem))
	if err != nil {
		return nil, err
	}
	who, err := identity.CertificateNode(chain[0])
	if err != nil {
		return nil, err
	}
	if who != n {
		return nil, fmt.Errorf("the certificate is for %v, this is %v", who, n)
	}
	return identity.TLSCertificate(chain, key)
}
