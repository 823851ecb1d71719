package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
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

// Sealer encrypts what must not lie in the database in clear: AES-256-GCM under the master key, a fresh nonce for each value, and
// the value's label as additional data, so that no sealed value can take the place of another.
type Sealer struct{ aead cipher.AEAD }

// LoadOrCreateSealer reads the master key at path. When there is none and create is set it makes one (0600, hexadecimal).
func LoadOrCreateSealer(path string, create bool) (*Sealer, error) {
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("master key %s has mode %#o: others can read it; run chmod 600 %s", path, st.Mode().Perm(), path)
		}
	case errors.Is(err, fs.ErrNotExist) && create:
		key := make([]byte, masterSize)
		if _, err := rand.Read(key); err != nil {
			return nil, err
		}
		b = []byte(hex.EncodeToString(key) + "\n")
		if err := writeNew(path, b); err != nil {
			return nil, fmt.Errorf("write master key: %w", err)
		}
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("master key %s is missing, and without it the CA keys in the database can not be read: put it back from your backup", path)
	default:
		return nil, err
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(key) != masterSize {
		return nil, fmt.Errorf("master key %s is damaged: want %d hexadecimal digits", path, hex.EncodedLen(masterSize))
	}
	return NewSealer(key)
}

// NewSealer returns a sealer for a key of 32 bytes.
func NewSealer(key []byte) (*Sealer, error) {
	if len(key) != masterSize {
		return nil, fmt.Errorf("master key of %d bytes, want %d", len(key), masterSize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &Sealer{aead: aead}, nil
}

// Seal encrypts b for label.
func (s *Sealer) Seal(label string, b []byte) []byte {
	nonce := make([]byte, s.aead.NonceSize(), s.aead.NonceSize()+len(b)+s.aead.Overhead())
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	return s.aead.Seal(nonce, nonce, b, []byte(label))
}

// Open decrypts what Seal made for the same label.
func (s *Sealer) Open(label string, b []byte) ([]byte, error) {
	n := s.aead.NonceSize()
	if len(b) < n {
		return nil, fmt.Errorf("sealed value %s is too short", label)
	}
	out, err := s.aead.Open(nil, b[:n], b[n:], []byte(label))
	if err != nil {
		return nil, fmt.Errorf("sealed value %s does not open: the master key is another one, or the database was changed", label)
	}
	return out, nil
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
