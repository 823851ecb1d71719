package config

import (
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"
	"filippo.io/age/armor"
)

// adminKey reads a public key of age (age-encryption.org): what `age-keygen` prints.
func adminKey(s string) (age.Recipient, error) {
	r, err := age.ParseX25519Recipient(s)
	if err != nil {
		return nil, errors.New("admin-key: is no public key of age: they begin with age1, and age-keygen prints them") // it could be the private one
	}
	return r, nil
}

// Seal encrypts a secret for who has the private half of AdminKey, as armoured text that may stand on a console.
func (c *Config) Seal(secret []byte) (string, error) {
	r, err := adminKey(c.AdminKey)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	a := armor.NewWriter(&out)
	w, err := age.Encrypt(a, r)
	if err != nil {
		return "", fmt.Errorf("encrypt for %s: %w", c.AdminKey, err)
	}
	if _, err := w.Write(secret); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	if err := a.Close(); err != nil {
		return "", err
	}
	return out.String(), nil
}
