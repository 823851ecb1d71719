package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// TestSQLite holds SQLite to the suite that every Store passes.
func TestSQLite(t *testing.T) {
	suite(t, func(t *testing.T) Store {
		s, err := OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		return s
	})
}

// TestPostgres holds PostgreSQL to the same suite, on a real server.
func TestPostgres(t *testing.T) {
	pg := backing.StartPostgres(t, false)
	suite(t, func(t *testing.T) Store { return openPostgres(t, pg.Database(t)) })
	t.Run("three programs", func(t *testing.T) { testThree(t, pg) })
	t.Run("refusals", func(t *testing.T) { testRefusals(t, pg) })
	t.Run("move", func(t *testing.T) { testMove(t, pg) })
	t.Run("away", func(t *testing.T) { testAway(t, pg) })
}

func openPostgres(t *testing.T, url string) *DB {
	t.Helper()
	s, err := OpenPostgres(t.Context(), PostgresConfig{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

var at = time.Date(2026, 1, 2, 3, 4, 5, 678_000, time.UTC)

// suite is what the platform relies on in any Store.
func suite(t *testing.T, open func(t *testing.T) Store) {
	for name, test := range map[string]func(*testing.T, Store){
		"organizations": testOrgs, "nodes": testNodes, "keys": testKeys, "tokens": testTokens, "access": testAccess, "relays": testRelays,
		"API tokens": testAPITokens, "audit": testAudit, "transactions": testTransactions, "concurrency": testConcurrency, "backup": testBackup,
		"deletion": testDeletion, "a token is spent once": testSpendOnce, "updates together": testTogether, "replicas": testReplicas, "people": testPeople, "licences": testLicences,
		"trail": testTrail, "webhooks": testWebhooks, "flows": testFlows, "answers": testAnswers, "places": testPlaces, "platform keys": testPlatformKeys,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func update(t *testing.T, s Store, fn func(ctx context.Context, tx Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatal(err)
	}
}

func org(name string) *Org {
	return &Org{Name: name, Range4: netip.MustParsePrefix("100.112.0.0/12"), Range6: netip.MustParsePrefix("fd00::/48"), Created: at, Version: 7, NextAddress: 16}
}

func node(id, org, name string, kind identity.Kind) *Node {
	return &Node{ID: id, Org: org, Name: name, Kind: kind, Status: Active, Created: at}
}

// equal compares what was read with what is wanted; both are JSON-free structs of values.
func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %+v, want %+v", what, got, want)
	}
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func testOrgs(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		for _, n := range []string{"b", "a", "c"} {
			if err := tx.InsertOrg(ctx, org(n)); err != nil {
				return err
			}
		}
		got, err := tx.Org(ctx, "a")
		equal(t, "organization", got, org("a"))
		if err != nil {
			return err
		}
		_, err = tx.Org(ctx, "x")
		is(t, "unknown", err, ErrNotFound)
		is(t, "twice", tx.InsertOrg(ctx, org("a")), ErrExists)
		page, err := tx.Orgs(ctx, Page{After: "a", Limit: 1})
		if err != nil {
			return err
		}
		if len(page) != 1 || page[0].Name != "b" {
			t.Errorf("page %+v", page)
		}
		for _, v := range []struct{ floor, want uint64 }{{0, 8}, {100, 100}, {50, 101}} {
			got, err := tx.BumpVersion(ctx, "a", v.floor)
			if err != nil || got != v.want {
				t.Errorf("version %d %v, want %d", got, err, v.want)
			}
		}
		_, err = tx.BumpVersion(ctx, "x", 0)
		is(t, "unknown", err, ErrNotFound)
		o := org("a")
		o.NextAddress, o.Direct, o.DirectPrivate = 99, true, true
		if err := tx.UpdateOrg(ctx, o); err != nil {
			return err
		}
		if got, err := tx.Org(ctx, "a"); err != nil || got.NextAddress != 99 || !got.Direct || !got.DirectPrivate || got.Version != 101 {
			t.Errorf("%+v %v", got, err)
		}
		a := &Authority{Org: "a", Kind: "root", Generation: 1, Certificate: []byte{1}, Key: []byte{2}, Created: at}
		newer := *a
		newer.Generation = 2
		if err := errors.Join(tx.InsertAuthority(ctx, a), tx.InsertAuthority(ctx, &newer)); err != nil {
			return err
		}
		as, err := tx.Authorities(ctx, "a")
		equal(t, "authorities", as, []*Authority{&newer, a})
		_, missing := tx.Meta(ctx, "k")
		is(t, "unknown key", missing, ErrNotFound)
		if err := errors.Join(tx.PutMeta(ctx, "k", []byte("1")), tx.PutMeta(ctx, "k", []byte("2"))); err != nil {
			return err
		}
		if v, err := tx.Meta(ctx, "k"); err != nil || string(v) != "2" {
			t.Errorf("meta %q %v", v, err)
		}
		return err
	})
}

func testNodes(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertOrg(ctx, org("b"))); err != nil {
			return err
		}
		n := node("r-1", "a", "fra", identity.Relay)
		n.Host, n.Port, n.Peers = "relay.example", 5349, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:9")}
		n.Draining, n.Address, n.Enrolment, n.Version = true, 17, 2, "1.0"
		n.Enrolled, n.LastSeen = at.Add(time.Minute), at.Add(time.Hour)
		if err := errors.Join(
			tx.InsertNode(ctx, n), tx.InsertNode(ctx, node("g-1", "a", "fra", identity.Gateway)), tx.InsertNode(ctx, node("r-2", "b", "fra", identity.Relay)),
			tx.InsertNode(ctx, node("c-1", "a", "alice", identity.Client)),
		); err != nil {
			return err
		}
		for _, by := range []string{"fra", "r-1"} {
			got, err := tx.FindNode(ctx, "a", identity.Relay, by)
			if err != nil {
				return err
			}
			equal(t, "node by "+by, got, n)
		}
		_, err := tx.FindNode(ctx, "a", identity.Relay, "r-2")
		is(t, "another organization's", err, ErrNotFound)
		_, err = tx.FindNode(ctx, "a", identity.Client, "r-1")
		is(t, "another kind", err, ErrNotFound)
		is(t, "name taken", tx.InsertNode(ctx, node("r-3", "a", "fra", identity.Relay)), ErrExists)
		if all, err := tx.Nodes(ctx, "a", "", Page{}); err != nil || len(all) != 3 || all[0].Name != "alice" {
			t.Errorf("%d nodes %v", len(all), err)
		}
		n.Name, n.Status, n.Deleted = "old", Revoked, at
		if err := tx.UpdateNode(ctx, n); err != nil {
			return err
		}
		if relays, err := tx.Nodes(ctx, "a", identity.Relay, Page{}); err != nil || len(relays) != 0 {
			t.Errorf("deleted one is listed: %v %v", relays, err)
		}
		if gone, err := tx.DeletedNodes(ctx, "a"); err != nil || len(gone) != 1 {
			t.Errorf("deleted ones: %v %v", gone, err)
		}
		if err := tx.InsertNode(ctx, node("r-4", "a", "old", identity.Relay)); err != nil {
			t.Errorf("the name of a deleted node is not free: %v", err)
		}
		if got, err := tx.Node(ctx, "r-1"); err != nil || got.Deleted != at {
			t.Errorf("%+v %v", got, err)
		}
		if err := tx.TouchNodes(ctx, append(make([]Seen, touchedAtOnce), Seen{"c-1", at.Add(time.Second), "2.0"})); err != nil {
			return err
		}
		if got, err := tx.Node(ctx, "c-1"); err != nil || got.LastSeen != at.Add(time.Second) || got.Version != "2.0" {
			t.Errorf("%+v %v", got, err)
		}
		is(t, "update of nobody", tx.UpdateNode(ctx, node("x", "a", "x", identity.Client)), ErrNotFound)
		if err := tx.PurgeNode(ctx, "r-1"); err != nil {
			return err
		}
		_, err = tx.Node(ctx, "r-1")
		is(t, "purged", err, ErrNotFound)
		return nil
	})
}

func testKeys(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertNode(ctx, node("c-1", "a", "alice", identity.Client))); err != nil {
			return err
		}
		k := &Key{Hash: identity.KeyHash{1}, Node: "c-1", Public: []byte{9}, Enrolment: 1, Created: at, NotAfter: at.Add(time.Hour)}
		newer := &Key{Hash: identity.KeyHash{2}, Node: "c-1", Public: []byte{8}, Enrolment: 2, Created: at.Add(time.Second), NotAfter: at.Add(2 * time.Hour)}
		if err := errors.Join(tx.PutKey(ctx, k), tx.PutKey(ctx, newer)); err != nil {
			return err
		}
		k.Denied = true
		if err := tx.PutKey(ctx, k); err != nil {
			return err
		}
		got, err := tx.Keys(ctx, "c-1")
		equal(t, "keys", got, []*Key{newer, k})
		all, err2 := tx.OrgKeys(ctx, "a")
		equal(t, "keys of the organization", all, []*Key{newer, k})
		_, err3 := tx.Key(ctx, identity.KeyHash{3})
		is(t, "unknown", err3, ErrNotFound)
		denied, err4 := tx.DeniedKeys(ctx, "a", at)
		equal(t, "denied keys", denied, []identity.KeyHash{{1}})
		ended, err5 := tx.DeniedKeys(ctx, "a", at.Add(time.Hour))
		equal(t, "denied keys whose leaf lives", ended, []identity.KeyHash{})
		elsewhere, err6 := tx.DeniedKeys(ctx, "b", at)
		equal(t, "denied keys of another organization", elsewhere, []identity.KeyHash{})
		return errors.Join(err, err2, err4, err5, err6)
	})
	for what, change := range map[string]func(*Node){"disabled": func(n *Node) { n.Status = Disabled }, "deleted": func(n *Node) { n.Deleted = at }} {
		update(t, s, func(ctx context.Context, tx Tx) error {
			n := node("c-1", "a", "alice", identity.Client)
			change(n)
			err := tx.UpdateNode(ctx, n)
			denied, err2 := tx.DeniedKeys(ctx, "a", at)
			equal(t, "denied keys of a node that is "+what, denied, []identity.KeyHash{{1}, {2}})
			return errors.Join(err, err2)
		})
	}
}

func testTokens(t *testing.T, s Store) {
	n := identity.Node{Org: "a", Kind: identity.Client, ID: "c-1"}
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertNode(ctx, node("c-1", "a", "alice", identity.Client))); err != nil {
			return err
		}
		tok := &EnrolmentToken{Hash: [32]byte{1}, Node: "c-1", Org: "a", Kind: identity.Client, Created: at, Expires: at.Add(time.Hour)}
		if err := tx.InsertEnrolmentToken(ctx, tok); err != nil {
			return err
		}
		for what, try := range map[string]struct {
			hash [32]byte
			node identity.Node
			now  time.Time
		}{
			"unknown":              {[32]byte{2}, n, at},
			"another organization": {tok.Hash, identity.Node{Org: "b", Kind: n.Kind, ID: n.ID}, at},
			"another kind":         {tok.Hash, identity.Node{Org: "a", Kind: identity.Gateway, ID: n.ID}, at},
			"another node":         {tok.Hash, identity.Node{Org: "a", Kind: n.Kind, ID: "c-2"}, at},
			"expired":              {tok.Hash, n, tok.Expires},
		} {
			_, err := tx.SpendEnrolmentToken(ctx, try.hash, try.node, try.now)
			is(t, what, err, ErrNotFound)
		}
		got, err := tx.SpendEnrolmentToken(ctx, tok.Hash, n, at.Add(time.Minute))
		tok.Used = at.Add(time.Minute)
		equal(t, "spent token", got, tok)
		if err != nil {
			return err
		}
		_, err = tx.SpendEnrolmentToken(ctx, tok.Hash, n, at.Add(time.Minute))
		is(t, "spent twice", err, ErrNotFound)
		if err := tx.DropEnrolmentTokens(ctx, "c-1"); err != nil {
			return err
		}
		if _, err := tx.EnrolmentToken(ctx, tok.Hash); err != nil {
			t.Errorf("a used token was dropped: %v", err)
		}
		if err := tx.InsertAssertion(ctx, [32]byte{1}, at); err != nil {
			return err
		}
		is(t, "jti twice", tx.InsertAssertion(ctx, [32]byte{1}, at), ErrExists)
		if err := tx.Purge(ctx, at.Add(time.Second), at.Add(2*time.Hour)); err != nil {
			return err
		}
		if err := tx.InsertAssertion(ctx, [32]byte{1}, at); err != nil {
			t.Errorf("jti after its time: %v", err)
		}
		_, err = tx.EnrolmentToken(ctx, tok.Hash)
		is(t, "purged token", err, ErrNotFound)
		return nil
	})
}

func testAccess(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertNode(ctx, node("g-1", "a", "g1", identity.Gateway)),
			tx.InsertNode(ctx, node("g-2", "a", "g2", identity.Gateway)), tx.InsertNode(ctx, node("c-1", "a", "alice", identity.Client))); err != nil {
			return err
		}
		v := &Resource{
			ID: "r-1", Org: "a", Name: "db", Target: "10.0.0.1", TCP: []policy.PortRange{{First: 1, Last: 2}}, UDP: []policy.PortRange{policy.AllPorts}, ICMP: true,
			Domains: []string{"corp"}, Address: 20, Disabled: true, Created: at,
			Health: policy.Health{Kind: policy.HealthHTTP, Port: 80, Path: "/ok"}, Gateways: []ServingGateway{{"g-2", 0, 3}, {"g-1", 0, 1}},
		}
		if err := tx.InsertResource(ctx, v); err != nil {
			return err
		}
		for _, by := range []string{"db", "r-1"} {
			got, err := tx.FindResource(ctx, "a", by)
			if err != nil {
				return err
			}
			equal(t, "resource by "+by, got, v)
		}
		is(t, "name taken", tx.InsertResource(ctx, &Resource{ID: "r-2", Org: "a", Name: "db", Created: at}), ErrExists)
		v.Gateways, v.Health, v.Disabled = []ServingGateway{{"g-1", 4, 1}}, policy.Health{Kind: policy.HealthOff}, false
		if err := tx.UpdateResource(ctx, v); err != nil {
			return err
		}
		if all, err := tx.Resources(ctx, "a", Page{}); err != nil || len(all) != 1 || !reflect.DeepEqual(all[0], v) {
			t.Errorf("%+v %v", all, err)
		}
		g := &Group{ID: "u-1", Org: "a", Name: "staff", Created: at, Members: []string{"c-1", "g-1"}}
		if err := tx.InsertGroup(ctx, g); err != nil {
			return err
		}
		got, err := tx.FindGroup(ctx, "a", "staff")
		equal(t, "group", got, g)
		if err != nil {
			return err
		}
		g.Members = []string{"c-1"}
		if err := tx.UpdateGroup(ctx, g); err != nil {
			return err
		}
		if all, err := tx.Groups(ctx, "a", Page{}); err != nil || len(all) != 1 || !slices.Equal(all[0].Members, g.Members) {
			t.Errorf("%+v %v", all, err)
		}
		p := &Policy{ID: "p-1", Org: "a", Name: "one", SubjectKind: "group", Subject: "u-1", Resource: "r-1", Created: at}
		if err := tx.InsertPolicy(ctx, p); err != nil {
			return err
		}
		p.Disabled = true
		if err := tx.UpdatePolicy(ctx, p); err != nil {
			return err
		}
		gotP, err := tx.FindPolicy(ctx, "a", "p-1")
		equal(t, "policy", gotP, p)
		if err != nil {
			return err
		}
		if err := tx.PutSessionEnd(ctx, &SessionEnd{Org: "a", Node: "c-1", Before: at}); err != nil {
			return err
		}
		if err := tx.PutSessionEnd(ctx, &SessionEnd{Org: "a", Node: "c-1", Before: at.Add(1 * time.Second)}); err != nil {
			return err
		}
		ends, err := tx.SessionEnds(ctx, "a")
		equal(t, "ends", ends, []*SessionEnd{{Org: "a", Node: "c-1", Before: at.Add(time.Second)}})
		if err != nil {
			return err
		}
		if err := tx.DeleteResource(ctx, "r-1"); err != nil {
			return err
		}
		if ps, err := tx.Policies(ctx, "a", Page{}); err != nil || len(ps) != 0 {
			t.Errorf("policies outlive their resource: %v %v", ps, err)
		}
		is(t, "delete twice", tx.DeleteResource(ctx, "r-1"), ErrNotFound)
		is(t, "delete nobody", tx.DeletePolicy(ctx, "p-1"), ErrNotFound)
		return tx.DeleteGroup(ctx, "u-1")
	})
}

func testRelays(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertNode(ctx, node("g-1", "a", "g", identity.Gateway)),
			tx.InsertNode(ctx, node("r-1", "a", "r1", identity.Relay)), tx.InsertNode(ctx, node("r-2", "a", "r2", identity.Relay))); err != nil {
			return err
		}
		if err := errors.Join(tx.PutAssignment(ctx, "g-1", []string{"r-1", "r-2"}), tx.PutAssignment(ctx, "g-1", []string{"r-2", "r-1"})); err != nil {
			return err
		}
		got, err := tx.Assignments(ctx, "a")
		equal(t, "assignments", got, map[string][]string{"g-1": {"r-2", "r-1"}})
		if err != nil {
			return err
		}
		k := &RelayKey{Relay: "r-1", ID: "k-1", Secret: []byte{1}, Created: at}
		newer := &RelayKey{Relay: "r-1", ID: "k-2", Secret: []byte{2}, Created: at.Add(time.Second)}
		if err := errors.Join(tx.InsertRelayKey(ctx, k), tx.InsertRelayKey(ctx, newer)); err != nil {
			return err
		}
		keys, err := tx.RelayKeys(ctx, "r-1")
		equal(t, "keys", keys, []*RelayKey{newer, k})
		return errors.Join(err, tx.DeleteRelayKey(ctx, "r-1", "k-1"))
	})
}

func testAPITokens(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := tx.InsertOrg(ctx, org("a")); err != nil {
			return err
		}
		whole := &APIToken{ID: "t-1", Hash: [32]byte{1}, Name: "x", Scope: ScopeAdmin, Created: at}
		one := &APIToken{ID: "t-2", Hash: [32]byte{2}, Name: "y", Org: "a", Scope: ScopeReadOnly, Created: at, Expires: at.Add(time.Hour)}
		if err := errors.Join(tx.InsertAPIToken(ctx, whole), tx.InsertAPIToken(ctx, one)); err != nil {
			return err
		}
		for _, want := range []*APIToken{whole, one} {
			got, err := tx.APIToken(ctx, want.Hash)
			if err != nil {
				return err
			}
			equal(t, "token", got, want)
			list, err := tx.APITokens(ctx, want.Org)
			if err != nil {
				return err
			}
			equal(t, "tokens", list, []*APIToken{want})
		}
		if err := tx.RevokeAPIToken(ctx, "t-1", at); err != nil {
			return err
		}
		is(t, "revoked twice", tx.RevokeAPIToken(ctx, "t-1", at), ErrNotFound)
		_, err := tx.APIToken(ctx, [32]byte{3})
		is(t, "unknown", err, ErrNotFound)
		return nil
	})
}

func testAudit(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		for i := range 5 {
			if err := tx.AppendAudit(ctx, "a", &AuditEntry{Seq: int64(i + 1), At: at, Actor: "x", Action: "y", Object: "z", Result: "ok", Detail: []byte(`{"a":1}`), Hash: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		seq, hash, err := tx.AuditHead(ctx, "a")
		if err != nil || seq != 5 || hash != "4" {
			t.Errorf("head %d %q %v", seq, hash, err)
		}
		page, err := tx.Audit(ctx, "a", 2, 2)
		if err != nil || len(page) != 2 || page[0].Seq != 3 || string(page[0].Detail) != `{"a":1}` || page[0].At != at {
			t.Errorf("%+v %v", page, err)
		}
		if seq, hash, err := tx.AuditHead(ctx, "b"); err != nil || seq != 0 || hash != "" {
			t.Errorf("no head: %d %q %v", seq, hash, err)
		}
		return nil
	})
}

func testTransactions(t *testing.T, s Store) {
	boom := errors.New("boom")
	err := s.Update(t.Context(), func(tx Tx) error {
		if err := tx.InsertOrg(t.Context(), org("a")); err != nil {
			return err
		}
		return boom
	})
	is(t, "its own error", err, boom)
	err = s.View(t.Context(), func(tx Tx) error {
		_, err := tx.Org(t.Context(), "a")
		return err
	})
	is(t, "rolled back", err, ErrNotFound)
	// A view sees one state, whatever is written meanwhile.
	update(t, s, func(ctx context.Context, tx Tx) error { return tx.InsertOrg(ctx, org("a")) })
	err = s.View(t.Context(), func(tx Tx) error {
		before, err := tx.Org(t.Context(), "a")
		if err != nil {
			return err
		}
		update(t, s, func(ctx context.Context, tx Tx) error { _, err := tx.BumpVersion(ctx, "a", 1000); return err })
		after, err := tx.Org(t.Context(), "a")
		equal(t, "seen in a view", after.Version, before.Version)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Writable(t.Context()); err != nil {
		t.Error(err)
	}
}

func testConcurrency(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error { return tx.InsertOrg(ctx, org("a")) })
	const writers = 16
	seen := make([]uint64, writers)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := s.Update(t.Context(), func(tx Tx) (err error) {
				seen[i], err = tx.BumpVersion(t.Context(), "a", 0)
				return err
			}); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	slices.Sort(seen)
	if len(slices.Compact(seen)) != writers {
		t.Errorf("versions %v", seen)
	}
}

func testBackup(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error { return tx.InsertOrg(ctx, org("a")) })
	path := filepath.Join(t.TempDir(), "copy")
	if err := s.Backup(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() == 0 || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st, err)
	}
	if err := s.Backup(t.Context(), path); err == nil {
		t.Error("a backup was overwritten")
	}
}

func testDeletion(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		if err := errors.Join(
			tx.InsertOrg(ctx, org("a")), tx.InsertOrg(ctx, org("b")), tx.InsertNode(ctx, node("c-1", "a", "x", identity.Client)), tx.InsertNode(ctx, node("c-2", "b", "x", identity.Client)),
			tx.PutKey(ctx, &Key{Hash: identity.KeyHash{1}, Node: "c-1", Created: at, NotAfter: at, Public: []byte{1}}),
			tx.InsertAPIToken(ctx, &APIToken{ID: "t", Hash: [32]byte{1}, Org: "a", Scope: ScopeAdmin, Created: at}),
			tx.AppendAudit(ctx, "a", &AuditEntry{Seq: 1, At: at, Detail: []byte("{}"), Hash: "h"}),
			tx.DeleteOrg(ctx, "a"),
		); err != nil {
			return err
		}
		_, err := tx.Key(ctx, identity.KeyHash{1})
		is(t, "key of a deleted organization", err, ErrNotFound)
		_, err = tx.APIToken(ctx, [32]byte{1})
		is(t, "API token of a deleted organization", err, ErrNotFound)
		if _, err := tx.Node(ctx, "c-2"); err != nil {
			t.Errorf("another organization's node: %v", err)
		}
		if es, err := tx.Audit(ctx, "a", 0, 10); err != nil || len(es) != 1 {
			t.Errorf("the audit chain of a deleted organization: %v %v", es, err)
		}
		return nil
	})
}

func TestDamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bad.db")
	if err := os.WriteFile(path, bytes.Repeat([]byte("junk"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := OpenSQLite(t.Context(), path)
	is(t, "junk", err, ErrUnavailable)
}

func TestNewerSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.db")
	s, err := OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := s.SchemaVersion(t.Context()); err != nil || v < 1 {
		t.Errorf("schema %d %v", v, err)
	}
	if err := s.Update(t.Context(), func(tx Tx) error {
		return tx.(*sqlTx).exec(t.Context(), true, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, 1)`)
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSQLite(t.Context(), path); err == nil {
		t.Error("opened a database of a newer program")
	}
}
