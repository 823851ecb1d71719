package update

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Manifest says what an image is. It is what is signed.
type Manifest struct {
	Version Version `json:"version"`
	Arch    string  `json:"arch"` // as Go names it: amd64, arm64
	// File is the image's name, beside the manifest. It has no slashes.
	File   string `json:"file"`
	Size   int64  `json:"size"`   // bytes
	SHA256 string `json:"sha256"` // hexadecimal
}

// A signed manifest is text: the manifest as JSON in one line, then one line for each key that signed it, its identifier and the signature
// in base64. Signed are signedFor and the first line without its end.
//
//	{"version":"1.5.0","arch":"amd64","file":"sallyway_1.5.0_amd64.efi","size":17891328,"sha256":"…"}
//	1f2e3d4c5b6a7988 MEUCIQD…

// signedFor keeps a signature from meaning anything else.
const signedFor = "sallyway appliance image\n"

const (
	maxManifest   = 16 << 10  // bytes of a signed manifest
	maxImage      = 256 << 20 // bytes of an image: ten times what it has
	maxSignatures = 8
)

// ErrUnsigned means that no pinned key has signed a manifest.
var ErrUnsigned = errors.New("no key that this appliance trusts has signed it")

// keyID names a key in a signed manifest, to find it by.
func keyID(k ed25519.PublicKey) string {
	sum := sha256.Sum256(k)
	return hex.EncodeToString(sum[:8])
}

// Describe makes the manifest of an image file.
func Describe(path string, v Version, arch string) (Manifest, error) {
	f, err := os.Open(path)
	if err != nil {
		return Manifest{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return Manifest{}, err
	}
	m := Manifest{Version: v, Arch: arch, File: filepath.Base(path), Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}
	return m, m.validate()
}

func (m Manifest) validate() error {
	if _, err := ParseVersion(string(m.Version)); err != nil || strings.HasPrefix(string(m.Version), "v") {
		return fmt.Errorf("manifest: version %.60q is none", string(m.Version))
	}
	sum, err := hex.DecodeString(m.SHA256)
	switch {
	case m.Arch == "" || len(m.Arch) > 16 || strings.Trim(m.Arch, "abcdefghijklmnopqrstuvwxyz0123456789") != "":
		return fmt.Errorf("manifest: arch %.20q is none", m.Arch)
	case m.File == "" || len(m.File) > 200 || m.File[0] == '.' || strings.ContainsAny(m.File, "/\\%?#: \x00"):
		return fmt.Errorf("manifest: file %.60q is no plain name", m.File)
	case m.Size <= 0 || m.Size > maxImage:
		return fmt.Errorf("manifest: size %d is not between 1 and %d", m.Size, maxImage)
	case err != nil || len(sum) != sha256.Size || m.SHA256 != strings.ToLower(m.SHA256):
		return fmt.Errorf("manifest: sha256 %.70q is none", m.SHA256)
	}
	return nil
}

// Sign returns the signed manifest, ready to be written beside the image. With several keys any one of them is enough for an appliance,
// so that keys can be replaced.
func Sign(m Manifest, keys ...ed25519.PrivateKey) ([]byte, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	if len(keys) == 0 || len(keys) > maxSignatures {
		return nil, fmt.Errorf("sign with one to %d keys", maxSignatures)
	}
	line, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.Write(line)
	b.WriteByte('\n')
	for _, k := range keys {
		sig := ed25519.Sign(k, append([]byte(signedFor), line...))
		fmt.Fprintf(&b, "%s %s\n", keyID(k.Public().(ed25519.PublicKey)), base64.StdEncoding.EncodeToString(sig))
	}
	return b.Bytes(), nil
}

// Open checks a signed manifest and reads it. Nothing of it is looked at before a signature is found right; without one it is ErrUnsigned.
func Open(b []byte, keys []ed25519.PublicKey) (Manifest, error) {
	if len(b) > maxManifest {
		return Manifest{}, fmt.Errorf("manifest: more than %d bytes", maxManifest)
	}
	line, rest, _ := bytes.Cut(b, []byte("\n"))
	signed := append([]byte(signedFor), line...)
	if !signedBy(signed, rest, keys) {
		return Manifest{}, fmt.Errorf("manifest: %w", ErrUnsigned)
	}
	var m Manifest
	// Keys that we do not know are left for later versions to add.
	if err := json.Unmarshal(line, &m); err != nil {
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	return m, m.validate()
}

func signedBy(signed, lines []byte, keys []ed25519.PublicKey) bool {
	n := 0
	for sc := bufio.NewScanner(bytes.NewReader(lines)); sc.Scan() && n < maxSignatures; n++ {
		id, text, _ := strings.Cut(sc.Text(), " ")
		sig, err := base64.StdEncoding.Strict().DecodeString(text)
		if err != nil || len(sig) != ed25519.SignatureSize {
			continue
		}
		for _, k := range keys {
			if keyID(k) == id && ed25519.Verify(k, signed, sig) {
				return true
			}
		}
	}
	return false
}

// Pinned are the public keys that images have to be signed by, compiled in by the linker, in base64 with commas between them:
//
//	-X sallyway/internal/appliance/update.Pinned=KEY,KEY
//
// Where it is empty, only keys of the configuration count.
var Pinned string

// PinnedKeys returns the keys of Pinned.
func PinnedKeys() ([]ed25519.PublicKey, error) {
	if Pinned == "" {
		return nil, nil
	}
	return ParsePublicKeys(strings.Split(Pinned, ","))
}

// ParsePublicKeys reads public keys in base64.
func ParsePublicKeys(texts []string) ([]ed25519.PublicKey, error) {
	var keys []ed25519.PublicKey
	for _, s := range texts {
		b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s))
		if err != nil || len(b) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("key %.60q: public keys are 44 characters of base64, as `mkimage key` printed it", s)
		}
		keys = append(keys, b)
	}
	return keys, nil
}

// NewKey makes a key for signing images and returns both halves as text. The private half belongs into a file that nobody else can read.
func NewKey() (private, public string, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", "", err
	}
	return base64.StdEncoding.EncodeToString(priv.Seed()), base64.StdEncoding.EncodeToString(pub), nil
}

// ReadKey reads a private key's file, which must be its owner's alone.
func ReadKey(path string) (ed25519.PrivateKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others: chmod 600 it, or make a new key if it has been", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	seed, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s holds no key for signing images", path)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}
