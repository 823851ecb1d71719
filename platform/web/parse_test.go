package web

import (
	"io/fs"
	"testing"
)

// TestTemplates parses every page.
func TestTemplates(t *testing.T) {
	dir, err := fs.Sub(files, "templates")
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsePages(dir, func(s string) string { return s })
	if err != nil {
		t.Fatal(err)
	}
	for name, tm := range p {
		if tm.Lookup("main") == nil {
			t.Errorf("page %s has no main", name)
		}
	}
}
