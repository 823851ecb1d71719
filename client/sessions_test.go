package client

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
)

// A flow that waits for a gateway does not wait for one that a new configuration lacks, nor for sessions that have ended.
func TestWaitEndsWithTheGateway(t *testing.T) {
	for _, what := range []string{"removed", "stopped"} {
		k := legs.New(legs.Config{})
		s := NewSessions(SessionsConfig{Logger: slog.New(slog.DiscardHandler), Legs: k})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx) }()
		s.Update(anyDialling())
		g := s.link(ctx, gateway1)
		wait := make(chan error, 1)
		go func() {
			_, err := g.session(briefly(t))
			wait <- err
		}()
		eventually(t, "the gateway is asked for", g.wanted.Load)
		if what == "removed" {
			s.Update(nil)
		} else {
			cancel()
		}
		if err := <-wait; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
		if what == "stopped" {
			if _, err := s.DialTCP(briefly(t), "db.corp.example", 1); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a flow of ended sessions: %v", err)
			}
		}
		cancel()
		<-ran
	}
}

// briefly is shorter than any test may take and longer than what is tested.
func briefly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), connectTimeout)
	t.Cleanup(cancel)
	return ctx
}

// A gateway that leaves the configuration and comes back has two links for a moment: the one that ends takes no legs from the other.
func TestEndedLinkLeavesLegsToItsSuccessor(t *testing.T) {
	relay := identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}
	k := legs.New(legs.Config{})
	ref := &control.GatewayRef{Node: gateway1, Name: "office", Relays: []control.RelayRef{{Node: relay, Name: "near", Host: "127.0.0.1"}}}
	h := &harness{Sessions: NewSessions(SessionsConfig{Logger: slog.New(slog.DiscardHandler), Legs: k}), log: slog.New(slog.DiscardHandler)}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	wanted := func() bool {
		_, err := k.Leg(ended, relay)
		return !errors.Is(err, legs.ErrUnwanted)
	}
	former, successor := h.newLink(ref, nil), h.newLink(ref, nil)
	successor.wanted.Store(true)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { successor.run(ctx) })
	eventually(t, "the successor wants its leg", wanted)
	former.run(ended)
	if !wanted() {
		t.Error("the leg went with the former link")
	}
	stop()
	running.Wait()
	if wanted() {
		t.Error("a leg is kept for nobody")
	}
}
