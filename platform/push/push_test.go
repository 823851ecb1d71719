package push

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/relay/wire"
)

// bench is a hub on a real database, in virtual time.
type bench struct {
	t   *testing.T
	reg *registry.Registry
	hub *Hub
}

func newBench(t *testing.T, cfg Config) *bench {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	log := slog.New(slog.DiscardHandler)
	b := &bench{t: t, reg: &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: log, Now: time.Now, URL: "https://platform.example"}}
	_, err = b.reg.Bootstrap(t.Context())
	must(t, err)
	cfg.Registry, cfg.Log = b.reg, log
	b.hub = New(cfg, prometheus.NewRegistry())
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eachEvent has f called with what a stream is sent.
func eachEvent(f func(control.Event) error) func([]byte) error {
	return func(line []byte) error {
		var ev control.Event
		if err := json.Unmarshal(line, &ev); err != nil {
			return err
		}
		return f(ev)
	}
}

// join makes and enrols a node.
func (b *bench) join(kind identity.Kind, name string) (*registry.Session, crypto.Signer, *control.EnrolResponse) {
	b.t.Helper()
	req := control.CreateNode{Name: name}
	if kind == identity.Relay {
		req.Host = "relay.example"
	}
	made, err := b.reg.CreateNode(b.t.Context(), "default", kind, req)
	must(b.t, err)
	tok, err := control.ParseToken(made.Token)
	must(b.t, err)
	key, err := identity.NewKey()
	must(b.t, err)
	csr, err := identity.Request(key, tok.Node)
	must(b.t, err)
	resp, err := b.reg.Enrol(b.t.Context(), "test", control.EnrolRequest{Secret: tok.Secret, Node: tok.Node, CSR: string(csr)})
	must(b.t, err)
	return &registry.Session{Node: tok.Node, Key: identity.HashKey(key.Public())}, key, resp
}

// TestPingAndRefresh: a ping every interval; after an hour credentials and documents anew, with the same version.
func TestPingAndRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Config{})
		who, _, resp := b.join(identity.Gateway, "gw")
		b.join(identity.Gateway, "other")
		ctx, cancel := context.WithCancel(t.Context())
		var pings int
		var configs []*control.Config
		done := make(chan error, 1)
		last, longest := time.Now(), time.Duration(0)
		go func() {
			done <- b.hub.Serve(ctx, who, eachEvent(func(ev control.Event) error {
				longest, last = max(longest, time.Since(last)), time.Now()
				if ev.Type == control.EventPing {
					pings++
				} else {
					configs = append(configs, ev.Config)
				}
				return nil
			}))
		}()
		const hours = 13
		time.Sleep(hours*time.Hour + time.Minute)
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if longest > control.PingInterval {
			t.Errorf("silent for %v", longest)
		}
		if pings < hours*3600/10-10 {
			t.Errorf("%d pings", pings)
		}
		if n := len(configs); n < hours+1 || n > hours+4 {
			t.Errorf("%d configurations in %d hours", n, hours)
		}
		trust, err := resp.Trust.For(identity.Policy)
		must(t, err)
		var until time.Time
		for i, c := range configs {
			s, err := policy.OpenSnapshot(c.Gateway.Snapshot, trust, who.Node)
			must(t, err)
			if s.NotAfter.Sub(s.Issued) != 24*time.Hour || !s.NotAfter.After(until) || s.Version != configs[0].Version || c.Version != configs[0].Version {
				t.Errorf("snapshot %d: version %d, from %v until %v", i, s.Version, s.Issued, s.NotAfter)
			}
			until = s.NotAfter
			if len(c.Dialling.Gateways) != 1 {
				t.Fatalf("%d gateways to dial", len(c.Dialling.Gateways))
			}
			g, err := policy.OpenGrant(c.Dialling.Gateways[0].Grant, trust, identity.Node{Org: who.Node.Org, Kind: identity.Site, ID: who.Node.ID})
			must(t, err)
			if !g.Issued.Equal(s.Issued) {
				t.Errorf("the grant beside snapshot %d is from %v", i, g.Issued)
			}
		}
	})
}

// TestShortDocuments: documents are made anew at half of their life when that is less than an hour.
func TestShortDocuments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Config{DocumentLife: 10 * time.Minute})
		who, _, _ := b.join(identity.Gateway, "gw")
		ctx, cancel := context.WithCancel(t.Context())
		n, done := 0, make(chan error, 1)
		go func() {
			done <- b.hub.Serve(ctx, who, eachEvent(func(ev control.Event) error {
				if ev.Type == control.EventConfig {
					n++
				}
				return nil
			}))
		}()
		time.Sleep(time.Hour)
		synctest.Wait()
		cancel()
		<-done
		if n < 12 || n > 15 {
			t.Errorf("%d configurations in an hour, want one every 5 minutes", n)
		}
	})
}

// TestShortCredentials: credentials for relays that are to live shorter than the leaf are renewed at half of that, and good until the leaf's end
// where they can not be; a change in between pushes none that is older.
func TestShortCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life = 10 * time.Minute
		b := newBench(t, Config{CredentialLife: life})
		relay, _, _ := b.join(identity.Relay, "relay")
		b.hub.Heartbeat(relay.Node.ID, control.Heartbeat{State: "ready"})
		who, _, resp := b.join(identity.Gateway, "gw")
		ctx, cancel := context.WithCancel(t.Context())
		chain, err := identity.DecodeCertificates([]byte(resp.Certificates.Leaf))
		must(t, err)
		var seen []time.Time
		var expiry time.Time
		done := make(chan error, 2)
		go func() { done <- b.hub.Run(ctx) }()
		go func() {
			done <- b.hub.Serve(ctx, who, eachEvent(func(ev control.Event) error {
				if ev.Type != control.EventConfig || len(ev.Config.Gateway.Relays) == 0 || ev.Config.Gateway.Relays[0].Username == "" {
					return nil
				}
				u, err := wire.ParseUsername(ev.Config.Gateway.Relays[0].Username)
				if err != nil {
					return err
				}
				now := time.Now()
				if left := u.Expiry.Sub(now); left > life || left < life/2 || u.Expiry.Before(expiry) || u.Outage.Unix() != chain[0].NotAfter.Unix() {
					t.Errorf("at %v a credential until %v, in an outage %v; the leaf ends %v", now, u.Expiry, u.Outage, chain[0].NotAfter)
				}
				if expiry != u.Expiry {
					seen = append(seen, now)
				}
				expiry = u.Expiry
				return nil
			}))
		}()
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		cancel()
		<-done
		<-done
		if n := len(seen); n < 4 || n > 6 {
			t.Errorf("%d credentials in 20 minutes, want one every 5 minutes", n)
		}
	})
}

// TestKeysRotateAndDenialsEnd runs the hub for days.
func TestKeysRotateAndDenialsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Config{KeyRotation: 6 * time.Hour})
		relay, _, _ := b.join(identity.Relay, "relay")
		victim, _, _ := b.join(identity.Client, "victim")
		ctx, cancel := context.WithCancel(t.Context())
		var now *control.Config
		ids := make(map[string]bool)
		done := make(chan error, 2)
		go func() { done <- b.hub.Run(ctx) }()
		go func() {
			done <- b.hub.Serve(ctx, relay, eachEvent(func(ev control.Event) error {
				if ev.Type == control.EventConfig {
					now = ev.Config
					for _, k := range now.Relay.Keys {
						ids[k.ID] = true
					}
				}
				return nil
			}))
		}()
		time.Sleep(time.Second)
		must(t, b.reg.DeleteNode(t.Context(), "default", identity.Client, "victim"))
		time.Sleep(time.Second)
		synctest.Wait()
		if len(now.Relay.Denied) != 1 || len(now.Trust.Denied) != 1 || now.Trust.Denied[0] != victim.Key {
			t.Errorf("denied %v %v", now.Relay.Denied, now.Trust.Denied)
		}
		time.Sleep(23 * time.Hour)
		synctest.Wait()
		if len(now.Relay.Denied) != 1 || len(now.Trust.Denied) != 1 {
			t.Error("the denial ended before the leaf")
		}
		if len(now.Relay.Keys) != 2 || len(ids) != 4 {
			t.Errorf("%d keys live, %d seen in 23 hours", len(now.Relay.Keys), len(ids))
		}
		time.Sleep(8 * time.Hour)
		synctest.Wait()
		if len(now.Relay.Denied) != 0 || len(now.Trust.Denied) != 0 {
			t.Errorf("still denied after the leaf's end: %v %v", now.Relay.Denied, now.Trust.Denied)
		}
		cancel()
		for range 2 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
}
