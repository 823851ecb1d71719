package agent

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

// FuzzEvents feeds the control stream's reader: whatever the platform sends, a node keeps a configuration of its own, and never one
// of a lower version.
func FuzzEvents(f *testing.F) {
	n := identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}
	good, err := json.Marshal(control.Event{Type: control.EventConfig, Config: &control.Config{Version: 5, Node: n}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("{\"type\":\"ping\"}\n"))
	f.Add(append(good, '\n'))
	f.Add([]byte("{\"type\":\"config\"}\n{\"type\":\"other\",\"config\":{}}\n\n"))
	f.Add([]byte("{\"type\":\"config\",\"config\":{\"version\":18446744073709551615}}"))
	f.Add([]byte("{"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		a := &Agent{
			cfg: Config{StateDir: dir, Now: time.Now}, log: slog.New(slog.DiscardHandler),
			changed: make(chan struct{}, 1), configured: make(chan struct{}),
		}
		a.state.Node = n
		a.cache.Highest = 3
		if err := a.events(bytes.NewReader(b)); err == nil {
			t.Fatal("a stream that ended is no error")
		}
		if c := a.Config(); c != nil && (c.Node != n || c.Version < 3) {
			t.Fatalf("took over %+v", c)
		}
	})
}

func TestEvents(t *testing.T) {
	for _, tt := range []struct{ stream, want string }{
		{"", "ended the control stream"},
		{"{\"type\":\"ping\"}\n\n{\"type\":\"news\",\"more\":{}}\n", "ended the control stream"},
		{"<html>\n", "not an event"},
		{strings.Repeat(" ", maxEvent+1), "broke"},
	} {
		a := &Agent{cfg: Config{Now: time.Now}, log: slog.New(slog.DiscardHandler)}
		if err := a.events(strings.NewReader(tt.stream)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.20q: %v, want %q", tt.stream, err, tt.want)
		}
	}
}
