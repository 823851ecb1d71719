package notices

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The test's own binary stands for a program: it has Go's licence alone, since this package uses nothing else.
func TestOf(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := Of(t.Context(), "go", exe)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(b), "==== The Go distribution, go1.") || !strings.Contains(string(b), "Redistributions in binary form") {
		t.Errorf("%.300s", b)
	}
	if _, err := Of(t.Context(), "go", os.Args[0]+".none"); err == nil {
		t.Error("a program that is not there has licences")
	}
}

func TestAddWantsALicence(t *testing.T) {
	dir := filepath.Join(t.TempDir(), escape("example.org/Some/Module")+"@v1.0.0")
	if want := "/example.org/!some/!module@v1.0.0"; !strings.HasSuffix(dir, "/!module@v1.0.0") || !strings.Contains(dir, want) {
		t.Fatalf("%s, want %s", dir, want)
	}
	for _, sub := range []string{"LICENSES", "LICENSE.d"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := book{known: make(map[[sha256.Size]byte]string)}
	if err := b.add("m v1", dir); err == nil || !strings.Contains(err.Error(), "no licence of m v1") {
		t.Fatalf("a module without a licence: %v", err)
	}
	for name, text := range map[string]string{"LICENSE.md": "the licence", "LICENSES/MIT.txt": "another", "NOTICE": "a notice", "README": "no licence"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.add("m v1", dir); err != nil {
		t.Fatal(err)
	}
	want := "==== m v1, LICENSE.md\n\nthe licence\n\n==== m v1, NOTICE\n\na notice\n\n==== m v1, MIT.txt\n\nanother\n\n"
	if b.text.String() != want {
		t.Errorf("%q, want %q", b.text.String(), want)
	}
	b.text.Reset()
	if err := b.add("m v2", dir); err != nil {
		t.Fatal(err)
	}
	if got := b.text.String(); !strings.HasPrefix(got, "==== m v2, LICENSE.md\n\nThe same text as above: m v1, LICENSE.md\n\n") {
		t.Errorf("a text that is known: %q", got)
	}
}

// Every module of a program has to have its licence.
func TestFrom(t *testing.T) {
	exe := filepath.Join(t.TempDir(), "program")
	if out, err := exec.Command("go", "build", "-o", exe, "../../cmd/relayd").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	info, err := buildinfo.ReadFile(exe)
	if err != nil || len(info.Deps) == 0 {
		t.Fatalf("%v, %d modules", err, len(info.Deps))
	}
	cache, goRoot := t.TempDir(), t.TempDir()
	licence := func(dir, text string) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "LICENSE.txt"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	licence(goRoot, "Go's licence")
	if _, err := From(exe, goRoot, cache); err == nil || !strings.Contains(err.Error(), info.Deps[0].Path) {
		t.Errorf("without the first module's licence: %v", err)
	}
	for i, m := range info.Deps {
		licence(Folder(cache, m.Path, m.Version), fmt.Sprintf("licence number %d.", i))
	}
	text, err := From(exe, goRoot, cache)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range info.Deps {
		if !bytes.Contains(text, fmt.Appendf(nil, "==== %s %s, LICENSE.txt\n\nlicence number %d.\n", m.Path, m.Version, i)) {
			t.Errorf("the licence of %s is missing", m.Path)
		}
	}
}
