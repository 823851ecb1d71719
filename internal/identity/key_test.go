package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "node.key")
	k, err := LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v, want 0600", st.Mode(), err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("temporary files stay: %v, %v", names, err)
	}
	again, err := LoadOrCreateKey(path)
	if err != nil || HashKey(again.Public()) != HashKey(k.Public()) {
		t.Fatalf("the second start has another key: %v", err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o666, 0o611} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOrCreateKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path) {
			t.Errorf("mode %#o: %v, want a refusal that says what to do", mode, err)
		}
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKey(path); err != nil {
		t.Errorf("mode 0400: %v", err)
	}
}

// A crash between the first byte and the rename leaves a temporary file and no key; the next start makes one. A key that is there is
// never overwritten, however broken.
func TestKeyFileAfterACrash(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "node.key")
	if err := os.WriteFile(filepath.Join(dir, ".key-123"), []byte("-----BEGIN PRIV"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKey(path); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"empty": {}, "cut": whole[:len(whole)/2], "other": []byte("secret-material\n")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadOrCreateKey(path)
		if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "secret-material") {
			t.Errorf("%s key file: %v", name, err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, b) {
			t.Errorf("%s key file was written over", name)
		}
	}
	if _, err := LoadOrCreateKey(filepath.Join(dir, "absent", "node.key")); err == nil {
		t.Error("a key without a folder")
	}
	if _, err := LoadOrCreateKey(dir); err == nil {
		t.Error("a folder is a key")
	}
}

func TestCheckKey(t *testing.T) {
	p256 := mustKey(t)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []any{p256.Public(), ed.Public()} {
		if err := CheckKey(k); err != nil {
			t.Errorf("%T: %v", k, err)
		}
	}
	for _, k := range []any{p384.Public(), rsaKey.Public(), nil, "key"} {
		if err := CheckKey(k); err == nil {
			t.Errorf("%T is taken", k)
		}
	}
	for _, k := range []crypto.Signer{p256, ed} {
		b, err := EncodeKey(k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeKey(b); err != nil {
			t.Errorf("%T does not survive its file: %v", k, err)
		}
	}
	der, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeKey(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err == nil || !strings.Contains(err.Error(), "P-256") {
		t.Errorf("RSA key file: %v", err)
	}
}

func FuzzDecodeKey(f *testing.F) {
	b, err := EncodeKey(mustKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := DecodeKey(b)
		if err != nil {
			return
		}
		if CheckKey(k.Public()) != nil {
			t.Fatalf("a key of type %T is taken", k.Public())
		}
	})
}

func TestKeyHash(t *testing.T) {
	k := mustKey(t)
	h := HashKey(k.Public())
	ca := newTestCA(t, "acme")
	if c := ca.issue(Node{"acme", Client, "c-1"}, k.Public(), x509.ExtKeyUsageClientAuth, nil); CertificateKeyHash(c) != h {
		t.Error("the hash of a key and of its certificate's key differ")
	}
	b, err := json.Marshal(h)
	if err != nil || string(b) != `"`+h.String()+`"` {
		t.Fatalf("%s, %v", b, err)
	}
	var back KeyHash
	if err := json.Unmarshal(b, &back); err != nil || back != h {
		t.Errorf("%v, %v", back, err)
	}
	for _, bad := range []string{`""`, `"ab"`, `"` + strings.Repeat("z", 64) + `"`, `"` + strings.Repeat("a", 63) + `"`, `"` + strings.Repeat("a", 65) + `"`, `"` + strings.Repeat("a", 66) + `"`} {
		if err := json.Unmarshal([]byte(bad), &back); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func TestRequest(t *testing.T) {
	k, n := mustKey(t), Node{"acme", Gateway, "g-1"}
	b, err := Request(k, n)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		t.Fatalf("not one PEM block: %q", b)
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.CheckSignature(); err != nil {
		t.Errorf("no proof of possession: %v", err)
	}
	if HashKey(r.PublicKey) != HashKey(k.Public()) || len(r.URIs) != 1 || r.URIs[0].String() != n.URI().String() {
		t.Errorf("request for %v with key %v", r.URIs, HashKey(r.PublicKey))
	}
	block.Bytes[len(block.Bytes)-1] ^= 1
	if r, err := x509.ParseCertificateRequest(block.Bytes); err == nil && r.CheckSignature() == nil {
		t.Error("a request with another signature passes")
	}
}
