package push

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/relay/wire"
)

// TestSharedKeysRotate runs the hub for a while: shared relays get new TURN keys as others do, and after a revocation in any organization the
// revoked key's credentials are dead there, without one organization having the keys change all the time.
func TestSharedKeysRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Config{KeyRotation: 20 * time.Minute})
		_, err := b.reg.CreateOrg(t.Context(), control.CreateOrganization{Name: "acme"})
		must(t, err)
		made, err := b.reg.CreateNode(t.Context(), identity.SharedOrg, identity.Relay, control.CreateNode{Name: "eu-1", Host: "eu.example"})
		must(t, err)
		relay := b.enrol(made.Token)
		b.hub.Heartbeat(relay.Node.ID, control.Heartbeat{State: "ready"})
		gw, _, _ := b.join(identity.Gateway, "gw")
		ctx, cancel := context.WithCancel(t.Context())
		// mu is held while the test looks, and given up while time passes.
		var mu sync.Mutex
		mu.Lock()
		pass := func(d time.Duration) {
			mu.Unlock()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
		}
		var told *control.Config
		var keys []string // every one that was seen, oldest first
		held := make(map[string]bool)
		var last control.RelayRef
		done := make(chan error, 3)
		go func() { done <- b.hub.Run(ctx) }()
		go func() {
			done <- b.hub.Serve(ctx, relay, eachEvent(func(ev control.Event) error {
				mu.Lock()
				defer mu.Unlock()
				if ev.Type == control.EventConfig {
					told = ev.Config
					for _, k := range slices.Backward(told.Relay.Keys) {
						if !slices.Contains(keys, k.ID) {
							keys = append(keys, k.ID)
						}
					}
				}
				return nil
			}))
		}()
		go func() {
			done <- b.hub.Serve(ctx, gw, eachEvent(func(ev control.Event) error {
				mu.Lock()
				defer mu.Unlock()
				if ev.Type == control.EventConfig && len(ev.Config.Gateway.Relays) > 0 {
					last = ev.Config.Gateway.Relays[0]
					held[last.Password] = true
				}
				return nil
			}))
		}()
		alive := func(ref control.RelayRef) bool {
			return slices.ContainsFunc(told.Relay.Keys, func(k control.RelayKey) bool { return wire.Password(k.Secret, ref.Username) == ref.Password })
		}
		pass(76 * time.Minute)
		if len(keys) != 4 || len(told.Relay.Keys) != 2 || !alive(last) {
			t.Fatalf("%d keys in 76 minutes, %d live, the gateway's credential works: %v", len(keys), len(told.Relay.Keys), alive(last))
		}

		// A revocation in another organization: one change now, one when the node is there again.
		other, err := b.reg.CreateNode(t.Context(), "acme", identity.Client, control.CreateNode{Name: "laptop"})
		must(t, err)
		b.enrol(other.Token)
		stolen := last // as good as one of the client's: by the newest key
		before := len(keys)
		_, err = b.reg.RevokeNode(t.Context(), "acme", identity.Client, "laptop")
		must(t, err)
		pass(time.Second)
		if len(keys) != before+1 || !alive(stolen) || !alive(last) {
			t.Errorf("%d new keys after a revocation, want 1", len(keys)-before)
		}
		again, err := b.reg.ReissueToken(t.Context(), "acme", identity.Client, "laptop")
		must(t, err)
		b.enrol(again.Token) // within the minute: the second change waits
		pass(time.Second)
		if len(keys) != before+1 {
			t.Errorf("%d new keys within a second", len(keys)-before)
		}
		pass(2 * time.Minute)
		if len(keys) != before+2 || alive(stolen) || !alive(last) {
			t.Errorf("%d new keys, the revoked key's credential works: %v, the gateway's: %v", len(keys)-before, alive(stolen), alive(last))
		}

		// An organization that revokes all day long changes the keys once a minute at most.
		before = len(keys)
		for range 60 {
			_, err = b.reg.RevokeNode(t.Context(), "acme", identity.Client, "laptop")
			must(t, err)
			again, err = b.reg.ReissueToken(t.Context(), "acme", identity.Client, "laptop")
			must(t, err)
			b.enrol(again.Token)
			pass(5 * time.Second)
		}
		if n := len(keys) - before; n < 4 || n > 6 {
			t.Errorf("%d new keys in five minutes", n)
		}
		if !alive(last) {
			t.Error("the other organization's gateway holds a credential that is worth nothing")
		}
		cancel()
		mu.Unlock()
		for range 3 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
}

// enrol spends a token.
func (b *bench) enrol(token string) *registry.Session {
	b.t.Helper()
	tok, err := control.ParseToken(token)
	must(b.t, err)
	key, err := identity.NewKey()
	must(b.t, err)
	csr, err := identity.Request(key, tok.Node)
	must(b.t, err)
	_, err = b.reg.Enrol(b.t.Context(), "test", control.EnrolRequest{Secret: tok.Secret, Node: tok.Node, CSR: string(csr)})
	must(b.t, err)
	return &registry.Session{Node: tok.Node, Key: identity.HashKey(key.Public())}
}
