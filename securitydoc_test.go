package sallyway_test

import (
	"cmp"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The documents of security and of dependencies name tests and modules. These tests keep them from rotting.

// testsByPackage parses every test file and returns the names of test and fuzz functions by package folder.
func testsByPackage(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		folder := filepath.ToSlash(filepath.Dir(path))
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && (strings.HasPrefix(fn.Name.Name, "Test") || strings.HasPrefix(fn.Name.Name, "Fuzz")) {
				found[folder] = append(found[folder], fn.Name.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// named is a test in the form package.TestName, as documents write it in backquotes. The root package is written "sallyway".
var named = regexp.MustCompile("`([a-z0-9_/]+)\\.((?:Test|Fuzz)[A-Za-z0-9_]+)`")

// TestSecurityDocumentNamesRealTests holds every test that docs/security.md names against the tree, and every row of its tables against
// the rule that a line which is met has a test.
func TestSecurityDocumentNamesRealTests(t *testing.T) {
	const path = "docs/security.md"
	doc := read(t, path)
	tests := testsByPackage(t)
	count := 0
	for _, m := range named.FindAllStringSubmatch(doc, -1) {
		folder := m[1]
		if folder == "sallyway" {
			folder = "."
		}
		if !slices.Contains(tests[folder], m[2]) {
			t.Errorf("%s names %s.%s, which does not exist", path, m[1], m[2])
		}
		count++
	}
	if count < 150 {
		t.Errorf("%s names %d tests: the pattern does not fit the document any more", path, count)
	}
	_, lines, found := strings.Cut(doc, "\n## TURN and STUN")
	met, _, last := strings.Cut(lines, "\n## Not met yet")
	if !found || !last {
		t.Fatalf("%s lacks the section that the lines begin with, or the one of what is not met", path)
	}
	rows := 0
	for _, line := range strings.Split(met, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(line, "|---") || strings.TrimSpace(cells[3]) == "test" {
			continue
		}
		rows++
		if !named.MatchString(cells[3]) {
			t.Errorf("%s: a line without a test: %s", path, strings.TrimSpace(cells[1]))
		}
	}
	if rows < 80 {
		t.Errorf("%s has %d lines with tests", path, rows)
	}
}

// requirements are the direct requirements and the exclusions of go.mod, module to version, and the go line.
func requirements(t *testing.T) (direct, all map[string]string, excluded []string, goVersion string) {
	t.Helper()
	direct, all = map[string]string{}, map[string]string{}
	inBlock := false
	for _, line := range strings.Split(read(t, "go.mod"), "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "go":
			goVersion = f[1]
		case len(f) >= 3 && f[0] == "exclude":
			excluded = append(excluded, f[1]+" "+f[2])
		case len(f) == 2 && f[0] == "require" && f[1] == "(":
			inBlock = true
		case len(f) == 1 && f[0] == ")":
			inBlock = false
		case inBlock && len(f) >= 2:
			all[f[0]] = f[1]
			if !strings.Contains(line, "// indirect") {
				direct[f[0]] = f[1]
			}
		case len(f) >= 3 && f[0] == "require":
			all[f[1]], direct[f[1]] = f[2], f[2]
		}
	}
	return direct, all, excluded, goVersion
}

func TestEveryDependencyHasALine(t *testing.T) {
	const path = "docs/dependencies.md"
	doc := read(t, path)
	direct, _, excluded, _ := requirements(t)
	if len(direct) < 20 {
		t.Fatalf("only %d direct requirements found in go.mod", len(direct))
	}
	for m := range direct {
		if !strings.Contains(doc, "\n| "+m+" | ") {
			t.Errorf("%s has no line for %s", path, m)
		}
	}
	for _, x := range excluded {
		if !strings.Contains(doc, "\n| "+x+" | ") {
			t.Errorf("%s does not say why go.mod excludes %s", path, x)
		}
	}
	// No line without a module.
	table, _, _ := strings.Cut(doc, "\n## Least versions")
	for _, line := range strings.Split(table, "\n") {
		cells := strings.Split(line, " | ")
		m := strings.TrimPrefix(cells[0], "| ")
		if len(cells) == 4 && strings.Contains(m, "/") && direct[m] == "" {
			t.Errorf("%s has a line for %s, which go.mod does not require", path, m)
		}
	}
}

// TestLeastVersions holds go.mod against the table of least versions in docs/dependencies.md.
func TestLeastVersions(t *testing.T) {
	_, all, _, goVersion := requirements(t)
	all["go"] = goVersion
	_, table, _ := strings.Cut(read(t, "docs/dependencies.md"), "\n## Least versions")
	row := regexp.MustCompile(`(?m)^\| ([^ |]+) \| ([0-9]+(?:\.[0-9]+)+) \|`)
	rows := row.FindAllStringSubmatch(table, -1)
	if len(rows) < 7 {
		t.Fatalf("%d least versions found", len(rows))
	}
	for _, r := range rows {
		have, ok := all[r[1]]
		if ok && older(have, r[2]) {
			t.Errorf("go.mod has %s %s, least is %s", r[1], have, r[2])
		}
		if !ok && r[1] != "github.com/pion/stun/v3" { // which only others could bring in
			t.Errorf("%s is not in go.mod", r[1])
		}
	}
	for _, old := range []string{"github.com/pion/stun", "github.com/pion/stun/v2", "github.com/pion/turn", "github.com/pion/turn/v2", "github.com/pion/turn/v3"} {
		if v, ok := all[old]; ok {
			t.Errorf("go.mod has %s %s, an unmaintained major", old, v)
		}
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{{"v0.9.0", "0.65.0", true}, {"v0.65.0", "0.65.0", false}, {"v1.0.0", "0.65.0", false}, {"1.26", "1.26.8", true}, {"v3.1.15", "3.1.4", false}} {
		if older(c.a, c.b) != c.want {
			t.Errorf("older(%s, %s) is %v", c.a, c.b, !c.want)
		}
	}
}

// older compares versions of numbers and dots; a pre-release counts as its number.
func older(have, least string) bool {
	parse := func(s string) []int {
		s, _, _ = strings.Cut(strings.TrimPrefix(s, "v"), "-")
		var out []int
		for _, p := range strings.Split(s, ".") {
			n, err := strconv.Atoi(p)
			if err != nil {
				n = -1
			}
			out = append(out, n)
		}
		return out
	}
	return slices.CompareFunc(parse(have), parse(least), cmp.Compare[int]) < 0
}

// TestNoKeyLogAndNoTrace looks for what would write session keys or packet traces: none of it is in a program.
func TestNoKeyLogAndNoTrace(t *testing.T) {
	forbidden := regexp.MustCompile(`KeyLogWriter|qlogwriter|quic-go/qlog|DefaultConnectionTracer`)
	tracer := regexp.MustCompile(`\.Tracer\s*[:=]|Tracer:`) // of quic.Config; elsewhere it is who makes spans (internal/telemetry)
	skip := regexp.MustCompile(`^(docs|bench|e2e|internal/lab)/|_test\.go$`)
	files := 0
	for _, f := range sources(t) {
		if skip.MatchString(f.path) {
			continue
		}
		files++
		quic := slices.ContainsFunc(f.imports, func(imp string) bool { return below(imp, "github.com/quic-go/quic-go") })
		for i, line := range strings.Split(read(t, f.path), "\n") {
			code, _, _ := strings.Cut(line, "//")
			if forbidden.MatchString(code) || quic && tracer.MatchString(code) {
				t.Errorf("%s:%d: %s", f.path, i+1, strings.TrimSpace(line))
			}
		}
	}
	if files < 50 {
		t.Fatalf("only %d files looked at", files)
	}
}

// TestSkippedVerificationHasAVerifier finds every place where crypto/tls is told not to check the peer, and asks for one that checks.
func TestSkippedVerificationHasAVerifier(t *testing.T) {
	found := 0
	for _, f := range sources(t) {
		if strings.HasSuffix(f.path, "_test.go") || below(f.path, "internal/lab") || below(f.path, "bench") || below(f.path, "e2e") {
			continue
		}
		src := read(t, f.path)
		code := regexp.MustCompile(`(?m)//.*$`).ReplaceAllString(src, "")
		if !strings.Contains(code, "InsecureSkipVerify") {
			continue
		}
		found++
		if !strings.Contains(code, "VerifyConnection") {
			t.Errorf("%s skips the check of crypto/tls and has no VerifyConnection of its own (VerifyPeerCertificate does not run on resumption)", f.path)
		}
	}
	if found == 0 {
		t.Error("nothing found: the test looks for the wrong words")
	}
}
