// Command generate writes the calls of package platformapi from the platform's OpenAPI document.
//
//	go run ./platform/api/generate platform/api/openapi.json internal/platformapi/calls.go
//
// Types of requests and answers are not generated: schemas are named after the Go types of package control, which the document was made from.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"go/format"
	"os"
	"reflect"
	"slices"
	"strings"
	"text/template"

	"sallyway/platform/api"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("want the document and the file to write, got %q", args)
	}
	b, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	source, err := Calls(b, api.GoTypes())
	if err != nil {
		return err
	}
	return os.WriteFile(args[1], source, 0o644) //nolint:gosec // source code
}

// document is what the calls are made from.
type document struct {
	Paths map[string]map[string]struct {
		ID         string      `json:"operationId"`
		Summary    string      `json:"summary"`
		Parameters []parameter `json:"parameters"`
		Security   []map[string][]string
		Tags       []string
		Body       struct {
			Content content `json:"content"`
		} `json:"requestBody"`
		Responses map[string]struct {
			Content content `json:"content"`
		} `json:"responses"`
	} `json:"paths"`
}

type parameter struct {
	Name, In, Description string
	Schema                struct{ Type, Format string }
}

type content map[string]struct {
	Schema struct {
		Ref string `json:"$ref"`
	} `json:"schema"`
}

// operation is one call.
type operation struct {
	Name, Summary, Method string
	Path                  string // as a Go expression
	Args                  string // of the path, as in a list of parameters
	Names                 string // the same, as in a call
	In, Out, Item         string // Go types; In and Out may be empty, Item is that of a list
	Paged, Open, Stream   bool
	Query                 []field // besides those of Page
}

// field is a parameter of a query.
type field struct{ Go, Name, Type, About string }

// has says whether the call has a query of its own.
func (o operation) has() bool { return len(o.Query) > 0 }

// Select is the type of the query, "" for none.
func (o operation) Select() string {
	switch {
	case o.has():
		return o.Name + "Query"
	case o.Paged:
		return "Page"
	}
	return ""
}

// Calls are the sources of package platformapi for a document; types are those of its schemas.
func Calls(doc []byte, types map[string]reflect.Type) ([]byte, error) {
	var d document
	if err := json.Unmarshal(doc, &d); err != nil {
		return nil, err
	}
	var ops []operation
	for path, item := range d.Paths {
		for method, o := range item {
			if slices.Contains(o.Tags, "Nodes") || path == "/api/v1/openapi.json" {
				continue // what nodes call is package agent's
			}
			op := operation{Name: goName(o.ID), Summary: o.Summary, Method: goName(strings.ToLower(method))}
			op.Path, op.Args, op.Names = goPath(path)
			op.Open = len(o.Security) == 0
			for _, p := range o.Parameters {
				switch {
				case p.In == "query" && (p.Name == "limit" || p.Name == "cursor"):
					op.Paged = true
				case p.In == "query":
					t := map[string]string{"string": "string", "integer": "int", "boolean": "bool", "date-time": "time.Time"}[cmp.Or(p.Schema.Format, p.Schema.Type)]
					if t == "" {
						t = map[string]string{"string": "string", "integer": "int", "boolean": "bool"}[p.Schema.Type]
					}
					if t == "" {
						return nil, fmt.Errorf("%s %s: the generator knows no parameter of type %q", method, path, p.Schema.Type)
					}
					op.Query = append(op.Query, field{goName(strings.ReplaceAll(p.Name, "_", "-")), p.Name, t, p.Description})
				}
			}
			var err error
			if op.In, _, err = goType(o.Body.Content, types); err != nil {
				return nil, fmt.Errorf("%s %s: %w", method, path, err)
			}
			for status, r := range o.Responses {
				if status[0] != '2' {
					continue
				}
				if _, op.Stream = r.Content["application/x-ndjson"]; op.Stream {
					continue
				}
				if op.Out, op.Item, err = goType(r.Content, types); err != nil {
					return nil, fmt.Errorf("%s %s: %w", method, path, err)
				}
			}
			ops = append(ops, op)
		}
	}
	slices.SortFunc(ops, func(a, b operation) int { return cmp.Compare(a.Name, b.Name) })
	var out bytes.Buffer
	if err := source.Execute(&out, ops); err != nil {
		return nil, err
	}
	return format.Source(out.Bytes())
}

// goName makes an exported name of an operation's id.
func goName(id string) string {
	var b strings.Builder
	for _, w := range strings.Split(id, "-") {
		switch w {
		case "api", "aws", "turn", "id":
			b.WriteString(strings.ToUpper(w))
		default:
			b.WriteString(strings.ToUpper(w[:1]) + w[1:])
		}
	}
	return b.String()
}

// goPath makes an expression of a path, and the parameters that it needs.
func goPath(path string) (expression, args, names string) {
	var parts, vars []string
	rest := path
	for {
		before, after, ok := strings.Cut(rest, "{")
		if before != "" {
			parts = append(parts, fmt.Sprintf("%q", before))
		}
		if !ok {
			break
		}
		name, tail, _ := strings.Cut(after, "}")
		parts, vars, rest = append(parts, "segment("+name+")"), append(vars, name), tail
	}
	if len(vars) > 0 {
		names = ", " + strings.Join(vars, ", ")
		args = names + " string"
	}
	return strings.Join(parts, "+"), args, names
}

// goType is the type of a body, and that of the items where it is a list.
func goType(c content, types map[string]reflect.Type) (name, item string, err error) {
	m, ok := c["application/json"]
	if !ok {
		if len(c) > 0 {
			return "", "", errors.New("a body that is not JSON")
		}
		return "", "", nil
	}
	t := types[strings.TrimPrefix(m.Schema.Ref, "#/components/schemas/")]
	if t == nil {
		return "", "", fmt.Errorf("schema %q has no Go type", m.Schema.Ref)
	}
	name = t.String()
	if inner, ok := strings.CutPrefix(name, "control.List["); ok {
		inner = strings.TrimSuffix(inner, "]")
		item = inner[strings.LastIndex(inner, "/")+1:]
		return "control.List[" + item + "]", item, nil
	}
	if !strings.HasPrefix(name, "control.") {
		return "", "", fmt.Errorf("%s is not a type of package control", name)
	}
	return name, "", nil
}

var source = template.Must(template.New("calls").Funcs(template.FuncMap{
	"lower": func(s string) string {
		if len(s) > 1 && s[1] >= 'A' && s[1] <= 'Z' {
			return s // an abbreviation
		}
		return strings.ToLower(s[:1]) + s[1:]
	},
	"all": func(s string) string { return "All" + strings.TrimPrefix(s, "List") },
}).Parse(`// Code generated by platform/api/generate from platform/api/openapi.json. DO NOT EDIT.

package platformapi

import (
	"context"
	"io"
	"iter"
	"net/http"
	"time"

	"sallyway/internal/control"
)
{{range .}}{{$op := .}}{{if .Query}}
// {{.Name}}Query chooses what {{.Name}} answers; zero values choose nothing.
type {{.Name}}Query struct {
	{{- if .Paged}}
	Page
	{{- end}}
	{{- range .Query}}
	{{.Go}} {{.Type}}{{with .About}} // {{.}}{{end}}
	{{- end}}
}

func (q {{.Name}}Query) query() string {
	v := {{if .Paged}}q.Page.values(){{else}}Page{}.values(){{end}}
	{{- range .Query}}
	put(v, "{{.Name}}", q.{{.Go}})
	{{- end}}
	return encoded(v)
}
{{end}}
// {{.Name}}: {{lower .Summary}}.
{{- if .Stream}} The caller closes what is answered.
func (c *Client) {{.Name}}(ctx context.Context{{.Args}}{{with .Select}}, q {{.}}{{end}}, opts ...Option) (io.ReadCloser, error) {
	return stream(ctx, c, {{.Path}}{{if .Select}}+q.query(){{end}}, opts)
}
{{else}}
func (c *Client) {{.Name}}(ctx context.Context{{.Args}}{{with .Select}}, q {{.}}{{end}}{{with .In}}, in {{.}}{{end}}, opts ...Option) {{if .Out}}({{.Out}}, error){{else}}error{{end}} {
	{{if .Out}}return {{else}}_, err := {{end -}}
	do[{{or .Out "none"}}](ctx, c, http.Method{{.Method}}, {{.Path}}{{if .Select}}+q.query(){{end}}, {{if .In}}in{{else}}none{}{{end}}, {{if .Open}}append(opts, unrepeated){{else}}opts{{end}})
	{{- if not .Out}}
	return err
	{{- end}}
}
{{if and .Item .Paged}}
// {{all .Name}} walks over all pages of {{.Name}}.
func (c *Client) {{all .Name}}(ctx context.Context{{.Args}}{{if .Query}}, q {{.Select}}{{end}}, opts ...Option) iter.Seq2[{{.Item}}, error] {
	return each(ctx, func(ctx context.Context, p Page) ({{.Out}}, error) {
		{{- if .Query}}
		q.Page = p
		return c.{{.Name}}(ctx{{.Names}}, q, opts...)
		{{- else}}
		return c.{{.Name}}(ctx{{.Names}}, p, opts...)
		{{- end}}
	})
}
{{end}}{{end}}{{end}}`))
