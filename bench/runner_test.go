package bench

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
)

// TestEach: a hiccup is measured again, a peer that fails twice leaves, and Sallyway that fails twice ends the scenario.
func TestEach(t *testing.T) {
	r := &runner{out: io.Discard, o: &Outcome{}, ways: []way{{name: Raw}, {name: Sallyway}, {name: Nebula}, {name: OpenSSH}}}
	calls := make(map[string]int)
	broken := errors.New("broken")
	measure := func(failures map[string]int) error {
		clear(calls)
		return r.each(context.Background(), func(w way) error {
			calls[w.name]++
			if calls[w.name] <= failures[w.name] {
				return broken
			}
			return nil
		})
	}
	if err := measure(map[string]int{Sallyway: 1, Nebula: 2}); err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, w := range r.ways {
		left = append(left, w.name)
	}
	if want := []string{Raw, Sallyway, OpenSSH}; !slices.Equal(left, want) || calls[OpenSSH] != 1 || calls[Nebula] != 2 {
		t.Errorf("left are %q, want %q; calls %v", left, want, calls)
	}
	if len(r.o.Missing) != 1 || r.o.Missing[0].Peer != Nebula || len(r.o.Again) != 2 {
		t.Errorf("missing %v, again %v", r.o.Missing, r.o.Again)
	}
	if err := measure(map[string]int{Sallyway: 2}); !errors.Is(err, broken) || calls[OpenSSH] != 0 {
		t.Errorf("Sallyway fails: %v, calls %v", err, calls)
	}
}
