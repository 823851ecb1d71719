// Package notices gathers the licences of what is linked into a program, as most of them ask of whoever hands the program on.
//
//	text, err := notices.Of(ctx, "go", "bin/relayd")
package notices

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
)

// patterns are how modules name what has to go with them, in letters of either case.
var patterns = []string{"[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "[Cc][Oo][Pp][Yy][Ii][Nn][Gg]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "PATENTS", "LICENSES/*"}

// Of returns the licences of the Go distribution and of every module in a program, which the module cache of goCommand has, since the program
// was built by it. A module without a licence is an error.
func Of(ctx context.Context, goCommand, program string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, goCommand, "env", "-json", "GOROOT", "GOMODCACHE").Output()
	if err != nil {
		return nil, fmt.Errorf("%s env: %w", goCommand, err)
	}
	var env struct{ GOROOT, GOMODCACHE string }
	if err := json.Unmarshal(out, &env); err != nil {
		return nil, err
	}
	return From(program, env.GOROOT, env.GOMODCACHE)
}

// From is Of with the folders of the Go distribution and of the module cache.
func From(program, goRoot, modCache string) ([]byte, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	b := book{known: make(map[[sha256.Size]byte]string)}
	if err := b.add("The Go distribution, "+info.GoVersion, goRoot); err != nil {
		return nil, err
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		if err := b.add(m.Path+" "+m.Version, Folder(modCache, m.Path, m.Version)); err != nil {
			return nil, err
		}
	}
	return b.text.Bytes(), nil
}

// book is what was gathered. A text that stands in it already is named and not repeated: many modules have the same.
type book struct {
	text  bytes.Buffer
	known map[[sha256.Size]byte]string // where a text stands, by its hash
}

// add appends what dir has.
func (b *book) add(name, dir string) error {
	n := b.text.Len()
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		slices.Sort(found)
		for _, path := range found {
			if fi, err := os.Stat(path); err != nil || !fi.Mode().IsRegular() {
				continue // a folder of that name: its files are found by a pattern of their own
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = bytes.TrimSpace(text)
			what, sum := name+", "+filepath.Base(path), sha256.Sum256(text)
			if at, again := b.known[sum]; again {
				text = []byte("The same text as above: " + at)
			} else {
				b.known[sum] = what
			}
			fmt.Fprintf(&b.text, "==== %s\n\n%s\n\n", what, text)
		}
	}
	if b.text.Len() == n {
		return fmt.Errorf("no licence of %s in %s", name, dir)
	}
	return nil
}

// Folder is where a module cache has a module.
func Folder(modCache, path, version string) string {
	return filepath.Join(modCache, escape(path)+"@"+version)
}

// escape is how the module cache writes a path: an upper-case letter as ! and its lower case.
func escape(path string) string {
	var b strings.Builder
	for _, r := range path {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}
