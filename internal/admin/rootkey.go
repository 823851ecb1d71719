package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
)

// rootKey is the root of an organization whose owner keeps its key. In a file it is the key and the certificate, PEM, mode 0600.
type rootKey struct{ *pki.Authority }

func (k *rootKey) certificate() string {
	return string(identity.EncodeCertificates(k.Certificate))
}

// write puts the root in a file that does not exist yet.
func (k *rootKey) write(path string) error {
	b, err := identity.EncodeKey(k.Key)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return daemon.Usagef("write the root's key: %w\nname another file; one that exists is not written over", err)
	}
	_, err = f.Write(append(b, k.certificate()...))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return daemon.Failf("write the root's key: %w", err)
	}
	return nil
}

// unusedKey removes the file of a new root that the platform refused. Where nobody knows whether it took the root, because its answer was lost, the
// file stays: without the key nothing could be signed under that root.
func unusedKey(path string, err error) error {
	p, ok := errors.AsType[*link.Problem](err)
	if ok && !p.Temporary() && (p.Status != http.StatusConflict || p.Code == control.CodeConflict) {
		_ = os.Remove(path) // it has signed nothing
		return err
	}
	why, remedy := err.Error(), link.Remedy(err)
	return daemon.Failf("%s%s\nwhether the platform took the root is not known, so its key stays in %s: see `sallyway ca list`, and remove the file only when that root is not there",
		why, below(remedy), path)
}

func loadRootKey(path string) (*rootKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, daemon.Usagef("read the root's key: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, daemon.Usagef("%s has mode %#o: others can read the root's key\nchmod 600 %[1]s", path, st.Mode().Perm())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, daemon.Usagef("read the root's key: %w", err)
	}
	key, err := identity.DecodeKey(b)
	if err != nil {
		return nil, daemon.Usagef("%s: %w\nwant the file that `organization create --offline-root` wrote", path, err)
	}
	_, rest, _ := strings.Cut(string(b), "-----END PRIVATE KEY-----\n")
	certs, err := identity.DecodeCertificates([]byte(rest))
	if err != nil || len(certs) != 1 || identity.CertificateKeyHash(certs[0]) != identity.HashKey(key.Public()) {
		return nil, daemon.Usagef("%s has no certificate of its key\nwant the file that `organization create --offline-root` wrote", path)
	}
	return &rootKey{&pki.Authority{Certificate: certs[0], Key: key}}, nil
}

// sign signs what the organization's platform asks for, hands it over, and returns it as the platform has it then.
func (k *rootKey) sign(ctx context.Context, c *Client, life time.Duration) ([]control.AuthorityRecord, error) {
	if life < 24*time.Hour {
		return nil, daemon.Usagef("--life %v is less than a day", life)
	}
	cas, err := items(authorities(c).list(ctx))
	if err != nil {
		return nil, err
	}
	own := identity.CertificateKeyHash(k.Certificate).String()
	newest := ""
	for _, r := range cas { // newest generation first
		if r.Kind == control.AuthorityRoot && newest == "" && (r.State == control.AuthorityNext || r.State == control.AuthorityCurrent) {
			newest = r.Key
		}
	}
	if newest != own {
		return nil, daemon.Failf("the key is that of the root %.16s, and the platform says that the root of organization %s is %.16s\nuse the key of the newest root; if there is no other, somebody has changed the platform", own, c.org, newest)
	}
	var signed control.SignedAuthorities
	asked := map[string]bool{}
	for _, r := range cas {
		if r.State != control.AuthorityRequested {
			continue
		}
		kind := identity.Kind(r.Kind)
		if !kind.Valid() || asked[r.Kind] {
			return nil, daemon.Failf("the platform asks for a CA of kind %.40q, which is none or was asked for before: sign nothing, and look at the platform", r.Kind)
		}
		asked[r.Kind] = true
		pub, err := pki.ParseIntermediateRequest([]byte(r.Request), c.org, kind, r.Generation)
		if err != nil {
			return nil, daemon.Failf("what the platform asks for as %s CA is not that: %w", r.Kind, err)
		}
		cert, err := k.SignIntermediate(c.org, kind, r.Generation, pub, time.Now(), life)
		if err != nil {
			return nil, err
		}
		signed.Certificates = append(signed.Certificates, string(identity.EncodeCertificates(cert)))
	}
	if len(signed.Certificates) == 0 {
		return nil, nil
	}
	after, err := c.SignAuthorities(ctx, c.org, signed)
	if err != nil {
		return nil, err
	}
	var out []control.AuthorityRecord
	for _, r := range after.Items {
		if asked[r.Kind] && (r.State == control.AuthorityNext || (r.State == control.AuthorityCurrent && r.Issuer == own)) {
			out = append(out, r)
		}
	}
	return out, nil
}

// nextRoot makes the root that follows the one in a file, and writes it to another.
func nextRoot(ctx context.Context, c *Client, file, newFile string) (*rootKey, error) {
	root, err := loadRootKey(file)
	if err != nil {
		return nil, err
	}
	cas, err := items(authorities(c).list(ctx))
	if err != nil {
		return nil, err
	}
	generation := 0
	for _, r := range cas {
		if r.Kind == control.AuthorityRoot {
			generation = max(generation, r.Generation)
		}
	}
	next, err := root.NextRoot(c.org, generation+1, time.Now())
	if err != nil {
		return nil, err
	}
	k := &rootKey{next}
	return k, k.write(newFile)
}

// rootsFile holds the hashes of the roots of organizations that were made from here, by platform and organization.
const rootsFile = "roots.json"

func rootsPath() (string, error) {
	p, err := credentialPath()
	return filepath.Join(filepath.Dir(p), rootsFile), err
}

// knownRoots are the hashes by "URL organization". A file that is not there is empty.
func knownRoots() (map[string]string, error) {
	path, err := rootsPath()
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		return nil, daemon.Failf("the roots in %s can not be read: %w\nput it back: tokens that are made without it do not hold the platform to the root of their organization", path, err)
	}
	return out, nil
}

func rememberRoot(c *Client, root identity.KeyHash) error {
	roots, err := knownRoots()
	if err != nil {
		return err
	}
	path, err := rootsPath()
	if err != nil {
		return err
	}
	roots[c.URL()+" "+c.org] = root.String()
	b, err := json.MarshalIndent(roots, "", "  ")
	if err != nil {
		return err
	}
	if err := daemon.WriteFile(path, append(b, '\n'), 0o600); err != nil {
		return daemon.Failf("remember the root: %w", err)
	}
	return nil
}

// holdToRoot puts the root of the organization, where it was made from here, into an enrolment token: the platform that made the token has
// no say in it, and the node holds the platform to it.
func holdToRoot(c *Client, n *control.CreatedNode) error {
	if n.Token == "" {
		return nil
	}
	roots, err := knownRoots()
	if err != nil {
		return err
	}
	root := roots[c.URL()+" "+c.org]
	if root == "" {
		return nil
	}
	t, err := control.ParseToken(n.Token)
	if err != nil {
		return fmt.Errorf("token of the platform: %w", err)
	}
	t.Root = root
	with := t.String()
	n.Command, n.Foreground = strings.ReplaceAll(n.Command, n.Token, with), strings.ReplaceAll(n.Foreground, n.Token, with)
	n.Token = with
	return nil
}
