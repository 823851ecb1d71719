package sallyway_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strconv"
	"strings"
	"testing"
)

// TestDoctorsRowsAreExplained holds the names of the doctor's rows in the code against docs/troubleshooting.md: a person who sees a row finds it
// there.
func TestDoctorsRowsAreExplained(t *testing.T) {
	b, err := os.ReadFile("docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var explained []string
	for line := range strings.Lines(string(b)) {
		if cells := strings.Split(line, "|"); len(cells) > 3 {
			for row := range strings.SplitSeq(cells[1], ",") {
				explained = append(explained, strings.TrimSpace(row))
			}
		}
	}
	rows := doctorRows(t)
	if len(rows) < 20 {
		t.Fatalf("only %d rows found in the code: %q", len(rows), rows)
	}
	for row, where := range rows {
		found := false
		for _, e := range explained {
			found = found || e == row || (strings.HasSuffix(row, " ") && strings.HasPrefix(e, row))
		}
		if !found {
			t.Errorf("%s makes a row %q, which docs/troubleshooting.md does not explain", where, row)
		}
	}
}

// doctorRows are the rows' names that stand in composite literals of daemon.Check, and where; one with a name of something in it is cut off
// there, after a space.
func doctorRows(t *testing.T) map[string]string {
	t.Helper()
	rows := map[string]string{}
	for _, f := range sources(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, f.path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if file.Name.Name == "main" {
			continue
		}
		ast.Inspect(file, func(n ast.Node) bool {
			kv, ok := n.(*ast.KeyValueExpr)
			if !ok {
				return true
			}
			if key, ok := kv.Key.(*ast.Ident); !ok || key.Name != "Check" {
				return true
			}
			if text, ok := firstString(kv.Value); ok {
				text, _, _ = strings.Cut(text, "%")
				rows[text] = set.Position(kv.Pos()).String()
			}
			return true
		})
	}
	return rows
}

// firstString is the first string literal in an expression: the beginning of a concatenation or the format of a Sprintf.
func firstString(e ast.Expr) (text string, ok bool) {
	ast.Inspect(e, func(n ast.Node) bool {
		if lit, is := n.(*ast.BasicLit); is && !ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				text, ok = s, true
			}
		}
		return !ok
	})
	return text, ok
}
