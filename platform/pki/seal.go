package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// masterSize is the size of a master key in bytes: AES-256.
const masterSize = 32

// Sealer encrypts what must not lie in the database in clear: AES-256-GCM under a data key, a fresh nonce for each value, and the
// value's label as additional data, so that no sealed value can take the place of another. Data keys lie in the database themselves, sealed under
// the master key, which does not (package keyring).
type Sealer struct{ aeads []cipher.AEAD } // the first seals; all open

// Master is the key that data keys are sealed under.
type Master struct {
	key []byte
	id  string
}

// ID tells master keys apart, and says nothing about the key.
func (m *Master) ID() string { return m.id }

// Sealer seals under the master key itself.
func (m *Master) Sealer() *Sealer {
	s, err := NewSealer(m.key)
	if err != nil {
		panic(err) // its size was checked
	}
	return s
}

// NewMaster makes a random master key.
func NewMaster() *Master {
	key := make([]byte, masterSize)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	return newMaster(key)
}

func newMaster(key []byte) *Master {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("sallyway master key id"))
	return &Master{key: key, id: hex.EncodeToString(mac.Sum(nil)[:8])}
}

// ParseMaster reads a master key: 64 hexadecimal digits. source stands in errors.
func ParseMaster(b []byte, source string) (*Master, error) {
	key, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(key) != masterSize {
		return nil, fmt.Errorf("master key from %s is damaged: want %d hexadecimal digits", source, hex.EncodedLen(masterSize))
	}
	return newMaster(key), nil
}

// WriteNew writes the key to a file that does not exist yet (0600, hexadecimal).
func (m *Master) WriteNew(path string) error {
	if err := writeNew(path, []byte(hex.EncodeToString(m.key)+"\n")); err != nil {
		return fmt.Errorf("write master key: %w", err)
	}
	return nil
}

// LoadMaster reads the master key at path. When there is none and create is set it makes one.
func LoadMaster(path string, create bool) (*Master, error) {
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("master key %s has mode %#o: others can read it; run chmod 600 %s", path, st.Mode().Perm(), path)
		}
	case errors.Is(err, fs.ErrNotExist) && create:
		m := NewMaster()
		return m, m.WriteNew(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("master key %s is missing, and without it the CA keys in the database can not be read: put it back from your backup (%w)", path, fs.ErrNotExist)
	default:
		return nil, err
	}
	return ParseMaster(b, path)
}

// NewSealer returns a sealer under the first of some keys of 32 bytes, which opens what any of them sealed.
func NewSealer(keys ...[]byte) (*Sealer, error) {
	s := new(Sealer)
	for _, key := range keys {
		if len(key) != masterSize {
			return nil, fmt.Errorf("key of %d bytes, want %d", len(key), masterSize)
		}
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, err
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return nil, err
		}
		s.aeads = append(s.aeads, aead)
	}
	if len(s.aeads) == 0 {
		return nil, errors.New("no key to seal under")
	}
	return s, nil
}

// Seal encrypts b for label.
func (s *Sealer) Seal(label string, b []byte) []byte {
	aead := s.aeads[0]
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(b)+aead.Overhead())
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	return aead.Seal(nonce, nonce, b, []byte(label))
}

// Open decrypts what Seal made for the same label.
func (s *Sealer) Open(label string, b []byte) ([]byte, error) {
	for _, aead := range s.aeads {
		n := aead.NonceSize()
		if len(b) < n {
			return nil, fmt.Errorf("sealed value %s is too short", label)
		}
		if out, err := aead.Open(nil, b[:n], b[n:], []byte(label)); err == nil {
			return out, nil
		}
	}
	return nil, fmt.Errorf("sealed value %s does not open: the master key is another one, or the database was changed", label)
}

func writeNew(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".master-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Link(f.Name(), path) // never over an existing one
}
