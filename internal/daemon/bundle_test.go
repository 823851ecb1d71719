package daemon

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBundle plants secrets where a bundle looks and wants none of them in it.
func TestBundle(t *testing.T) {
	dir := t.TempDir()
	const secret = "s3cret-8f1d"
	for name, text := range map[string]string{"node.key": "-----BEGIN PRIVATE KEY-----\n" + secret + "\n-----END PRIVATE KEY-----\n", "config.json": `{"password":"` + secret + `"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	checks := []Check{
		{"a", Fail, "token swe1." + secret + " was refused", "password=" + secret},
		{"b", Warn, "Authorization: Bearer " + secret, `{"secret": "` + secret + `", "relay": "fra-1"}`},
		{"c", Warn, "proxy http://user:" + secret + "@proxy.example:3128", "eyJhbGciOi." + secret + ".x"},
		{"d", Warn, "-----BEGIN EC PRIVATE KEY-----\n" + secret + "\n-----END EC PRIVATE KEY-----", "relay fra-1 answers"},
	}
	path := filepath.Join(t.TempDir(), "bundle.tar.gz")
	if err := writeBundle(t.Context(), path, Spec{Name: "gatewayd"}, dir, checks, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := writeBundle(t.Context(), path, Spec{Name: "gatewayd"}, dir, checks, time.Now()); err == nil {
		t.Error("a file that is there was replaced")
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = string(content)
		if strings.Contains(string(content), secret) {
			t.Errorf("%s holds a secret:\n%s", h.Name, content)
		}
	}
	for name, part := range map[string]string{
		"sallyway/doctor.json": "relay fra-1 answers", "sallyway/state.txt": "node.key", "sallyway/version.json": "version", "sallyway/status.txt": "not running",
	} {
		if !strings.Contains(found[name], part) {
			t.Errorf("%s lacks %q: %q", name, part, found[name])
		}
	}
	if !strings.Contains(found["sallyway/doctor.json"], "fra-1") || !strings.Contains(found["sallyway/doctor.json"], "proxy.example") {
		t.Error("too much is masked")
	}
}
