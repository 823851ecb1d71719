package daemon

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// didYouMean returns ` (did you mean "x"?)` for the name nearest to got, or "" where none is near.
func didYouMean(got string, names []string) string {
	if best := nearest(got, names); best != "" {
		return fmt.Sprintf(" (did you mean %q?)", best)
	}
	return ""
}

// nearest returns the one of names, in lower case, that is nearest to got, or "" where none is near. It sorts names.
func nearest(got string, names []string) string {
	best, distance := "", 3 // more than two edits is another word
	slices.Sort(names)
	for _, n := range names {
		d := edits(strings.ToLower(got), n)
		if d < distance && d < len(n) {
			best, distance = n, d
		}
	}
	if best == "" {
		for _, n := range names {
			if len(got) >= 3 && strings.HasPrefix(n, got) {
				best = n
				break
			}
		}
	}
	return best
}

// edits is the Levenshtein distance of two short names, in bytes.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func keysOf(m map[string]bool) []string { return slices.Collect(maps.Keys(m)) }

// unknownField is what yaml says about a field that the target type lacks.
var unknownField = regexp.MustCompile(`^line \d+: field (\S+) not found in type \S+$`)

// explainFields rewords yaml's complaints about unknown fields, which name Go types.
func explainFields(te *yaml.TypeError, target any) error {
	names := make(map[string]bool)
	fieldNames(reflect.TypeOf(target), names, 0)
	var errs []error
	for _, e := range te.Errors {
		if m := unknownField.FindStringSubmatch(e); m != nil {
			e = fmt.Sprintf("unknown key %q%s", m[1], didYouMean(m[1], keysOf(names)))
		}
		errs = append(errs, errors.New(e))
	}
	return errors.Join(errs...)
}

// fieldNames collects the YAML names of t's fields and of the types inside it. depth ends recursive types.
func fieldNames(t reflect.Type, into map[string]bool, depth int) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || depth > 8 {
		return
	}
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "" {
			name = strings.ToLower(f.Name)
		}
		if name != "-" {
			into[name] = true
		}
		fieldNames(f.Type, into, depth+1)
	}
}
