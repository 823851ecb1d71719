package api

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/prometheus/client_golang/prometheus"
)

var update = flag.Bool("update", false, "write openapi.json anew, and the table of codes in docs/api.md")

// storedRevision is info.version of the document in the repository: a build has its own.
const storedRevision = "0"

// TestEveryRouteIsDescribed holds what the mux serves against the document.
func TestEveryRouteIsDescribed(t *testing.T) {
	s := routes(Config{Metrics: prometheus.NewRegistry()})
	if len(s.mux.patterns) < 110 {
		t.Errorf("%d routes: the test looks in the wrong place", len(s.mux.patterns))
	}
	if err := s.check(); err != nil {
		t.Error(err)
	}
	ids := make(map[string]string)
	for path, item := range s.api.OpenAPI().Paths {
		for method, op := range words(item) {
			if other := ids[op.OperationID]; other != "" {
				t.Errorf("%s %s and %s have one id, %s", method, path, other, op.OperationID)
			}
			ids[op.OperationID] = method + " " + path
			if by(op) != byAPI {
				continue
			}
			has := func(header string) bool {
				return slices.ContainsFunc(op.Parameters, func(p *huma.Param) bool { return p.Ref == "#/components/parameters/"+header })
			}
			if got, want := has(keyHeader), keyed(op); got != want {
				t.Errorf("%s %s: %s is described: %v", method, path, keyHeader, got)
			}
			if got, want := has("If-Match"), guarded(op) && s.shows[op.Path] != nil; got != want {
				t.Errorf("%s %s: If-Match is described: %v", method, path, got)
			}
			problem := func(status string) *huma.Response {
				if r := op.Responses[status]; r != nil {
					return s.api.OpenAPI().Components.Responses[strings.TrimPrefix(r.Ref, "#/components/responses/")]
				}
				return nil
			}
			if r := problem("401"); r == nil || !strings.Contains(r.Description, "`token_unknown`") {
				t.Errorf("%s %s: problems are not described: %+v", method, path, r)
			}
			if r := problem("429"); r == nil || r.Headers["Retry-After"] == nil {
				t.Errorf("%s %s: what to do about too many requests is not described", method, path)
			}
			if r := problem("409"); keyed(op) && (r == nil || !strings.Contains(r.Description, CodeInProgress)) {
				t.Errorf("%s %s: the problems of keys are not described: %+v", method, path, r)
			}
		}
	}
}

// TestCheckSaysNo shows that a route that nobody described is found.
func TestCheckSaysNo(t *testing.T) {
	s := routes(Config{Metrics: prometheus.NewRegistry()})
	s.mux.HandleFunc("GET /api/v1/hidden", func(http.ResponseWriter, *http.Request) {})
	if err := s.check(); err == nil || !strings.Contains(err.Error(), "/api/v1/hidden") {
		t.Errorf("a hidden route: %v", err)
	}
}

// TestDocument has the document, and its examples, judged by a validator of OpenAPI 3.1 and held against what lies in the repository.
func TestDocument(t *testing.T) {
	b, err := Document(storedRevision)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(b)
	if err != nil {
		t.Fatal(err)
	}
	if doc.OpenAPI != "3.1.0" {
		t.Errorf("OpenAPI %s", doc.OpenAPI)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Error(err)
	}
	judged := 0
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			var bodies []openapi3.Content
			if op.RequestBody != nil {
				bodies = append(bodies, op.RequestBody.Value.Content)
			}
			for _, r := range op.Responses.Map() {
				bodies = append(bodies, r.Value.Content)
			}
			for _, c := range bodies {
				for _, m := range c {
					if m.Example == nil {
						continue
					}
					judged++
					if err := m.Schema.Value.VisitJSON(m.Example, openapi3.EnableJSONSchema2020()); err != nil {
						t.Errorf("%s %s: example: %v", method, path, err)
					}
				}
			}
		}
	}
	if judged < 30 {
		t.Errorf("%d examples", judged)
	}
	same(t, "openapi.json", b)
}

// TestCodes holds the table of codes against the sources and the manual.
func TestCodes(t *testing.T) {
	var known []string
	table := new(bytes.Buffer)
	fmt.Fprintln(table, "| code | status | answers | means |\n|---|---|---|---|")
	for _, c := range Codes {
		if slices.Contains(known, c.Code) {
			t.Errorf("%s is there twice", c.Code)
		}
		known = append(known, c.Code)
		var status []string
		for _, n := range c.Status {
			status = append(status, strconv.Itoa(n))
		}
		fmt.Fprintf(table, "| `%s` | %s | %s | %s |\n", c.Code, strings.Join(status, ", "), strings.ReplaceAll(c.By, " ", ", "), c.About)
	}
	found := 0
	for _, root := range []string{"../../internal/control", ".."} {
		for code, where := range sourceCodes(t, root) {
			found++
			if !slices.Contains(known, code) {
				t.Errorf("%s: code %q is not in api.Codes", where, code)
			}
		}
	}
	if found < 40 {
		t.Errorf("%d codes found in the sources: the test looks in the wrong place", found)
	}
	const manual, begin, end = "../../docs/api.md", "<!-- codes -->\n", "<!-- /codes -->"
	b, err := os.ReadFile(manual)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table of codes", manual)
	}
	same(t, manual, []byte(head+begin+table.String()+end+tail))
}

// sourceCodes are the constants of a folder that begin with Code and are strings, and where they are.
func sourceCodes(t *testing.T, root string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			v, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			for i, name := range v.Names {
				if !strings.HasPrefix(name.Name, "Code") || i >= len(v.Values) {
					continue
				}
				if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					code, _ := strconv.Unquote(lit.Value) // it was parsed
					out[code] = fset.Position(name.Pos()).String()
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// same holds a file against what it has to be; with -update it is written.
func same(t *testing.T, file string, want []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not current: run go generate ./platform/api ./internal/platformapi", file)
	}
}

// words are the methods of an item of the document.
func words(item *huma.PathItem) map[string]*huma.Operation {
	all := map[string]*huma.Operation{"GET": item.Get, "PUT": item.Put, "POST": item.Post, "PATCH": item.Patch, "DELETE": item.Delete}
	maps.DeleteFunc(all, func(_ string, op *huma.Operation) bool { return op == nil })
	return all
}

// check holds the document against what is served: every route is described.
func (s *server) check() error {
	for _, pattern := range s.mux.patterns {
		method, path, ok := strings.Cut(pattern, " ")
		if !ok {
			continue // the answer to what there is not
		}
		if path != "/api/v1/openapi.json" && documents[path].render != nil {
			continue // the same in another form
		}
		item := s.api.OpenAPI().Paths[path]
		if item == nil || words(item)[method] == nil {
			return fmt.Errorf("%s is served and not described: add it with route, or describe it", pattern)
		}
		op := words(item)[method]
		if op.Summary == "" || op.OperationID == "" || len(op.Tags) == 0 || len(op.Responses) < 2 && documents[path].render == nil {
			return fmt.Errorf("%s is described without summary, id, tag or problems", pattern)
		}
	}
	return nil
}
