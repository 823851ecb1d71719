package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/identity"
)

// testSpendOnce has many spend one token at once.
func testSpendOnce(t *testing.T, s Store) {
	spendOnce(t, s)
}

// spendOnce spends fresh tokens by 100 callers of the stores, which are one database.
func spendOnce(t *testing.T, stores ...Store) {
	t.Helper()
	n := identity.Node{Org: "a", Kind: identity.Client, ID: "c-1"}
	update(t, stores[0], func(ctx context.Context, tx Tx) error {
		return errors.Join(tx.InsertOrg(ctx, org("a")), tx.InsertNode(ctx, node("c-1", "a", "alice", identity.Client)))
	})
	const callers = 100
	for round := range 3 {
		hash := [32]byte{byte(round)}
		update(t, stores[0], func(ctx context.Context, tx Tx) error {
			return tx.InsertEnrolmentToken(ctx, &EnrolmentToken{Hash: hash, Node: n.ID, Org: n.Org, Kind: n.Kind, Created: at, Expires: at.Add(time.Hour)})
		})
		var spent atomic.Int32
		var wg sync.WaitGroup
		for i := range callers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				won := false
				err := stores[i%len(stores)].Update(t.Context(), func(tx Tx) error {
					won = false
					// As enrolment does: read, spend, write more.
					if _, err := tx.EnrolmentToken(t.Context(), hash); err != nil {
						return err
					}
					_, err := tx.SpendEnrolmentToken(t.Context(), hash, n, at.Add(time.Minute))
					if errors.Is(err, ErrNotFound) {
						return nil
					}
					if err != nil {
						return err
					}
					won = true
					seq, _, err := tx.AuditHead(t.Context(), "a")
					if err != nil {
						return err
					}
					return tx.AppendAudit(t.Context(), "a", &AuditEntry{Seq: seq + 1, At: at, Actor: fmt.Sprint(i), Detail: []byte("{}"), Hash: fmt.Sprint(i)})
				})
				if err != nil {
					t.Error(err)
				}
				if err == nil && won {
					spent.Add(1)
				}
			}()
		}
		wg.Wait()
		if n := spent.Load(); n != 1 {
			t.Errorf("round %d: a token was spent %d times", round, n)
		}
		if err := stores[0].View(t.Context(), func(tx Tx) error {
			if seq, _, err := tx.AuditHead(t.Context(), "a"); err != nil || seq != int64(round+1) {
				t.Errorf("round %d: %d entries in the chain, %v", round, seq, err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// testTogether has updates share transactions: each has its own outcome.
func testTogether(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error { return tx.InsertOrg(ctx, org("base")) })
	boom := errors.New("boom")
	// While this one runs, the others gather.
	started, release := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		first <- s.Update(t.Context(), func(tx Tx) error {
			select {
			case <-started:
			default:
				close(started)
			}
			<-release
			return tx.InsertOrg(t.Context(), org("first"))
		})
	}()
	<-started
	const each = 10
	gone, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	run := func(want error, fn func(i int) error) {
		for i := range each {
			wg.Add(1)
			go func() {
				defer wg.Done()
				is(t, fmt.Sprint("update ", i), fn(i), want)
			}()
		}
	}
	insert := func(name string) func(tx Tx) error {
		return func(tx Tx) error { return tx.InsertOrg(t.Context(), org(name)) }
	}
	run(nil, func(i int) error { return s.Update(t.Context(), insert(fmt.Sprint("good-", i))) })
	run(boom, func(i int) error {
		return s.Update(t.Context(), func(tx Tx) error { return errors.Join(tx.InsertOrg(t.Context(), org(fmt.Sprint("bad-", i))), boom) })
	})
	// A statement that fails inside of a shared transaction harms nobody else.
	run(ErrExists, func(i int) error {
		return s.Update(t.Context(), func(tx Tx) error {
			id := fmt.Sprint("p-", i)
			a, b := node(id+"a", "base", id+"a", identity.Client), node(id+"b", "base", id+"b", identity.Client)
			if err := errors.Join(tx.InsertNode(t.Context(), a), tx.InsertNode(t.Context(), b)); err != nil {
				return err
			}
			b.Name = a.Name
			return tx.UpdateNode(t.Context(), b)
		})
	})
	run(context.Canceled, func(int) error { return s.Update(gone, insert("gone")) })
	run(boom, func(int) (err error) {
		defer func() { err, _ = recover().(error) }()
		return s.Update(t.Context(), func(tx Tx) error {
			_ = tx.InsertOrg(t.Context(), org("panicked"))
			panic(boom)
		})
	})
	cancel()
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	wg.Wait()
	if err := s.View(t.Context(), func(tx Tx) error {
		os, err := tx.Orgs(t.Context(), Page{})
		if err != nil {
			return err
		}
		for _, o := range os {
			if o.Name != "base" && o.Name != "first" && !strings.HasPrefix(o.Name, "good-") {
				t.Errorf("%s was kept", o.Name)
			}
		}
		if len(os) != each+2 {
			t.Errorf("%d organizations, want %d", len(os), each+2)
		}
		nodes, err := tx.Nodes(t.Context(), "base", "", Page{})
		if len(nodes) != 0 {
			t.Errorf("nodes of failed updates: %d", len(nodes))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func testReplicas(t *testing.T, s Store) {
	update(t, s, func(ctx context.Context, tx Tx) error {
		a, b := &Replica{ID: "a", Address: "x:1", Started: at, Seen: at}, &Replica{ID: "b", Address: "y:1", Started: at.Add(time.Second), Seen: at.Add(time.Hour)}
		if err := errors.Join(tx.PutReplica(ctx, b), tx.PutReplica(ctx, a)); err != nil {
			return err
		}
		a.Streams, a.Seen = 7, at.Add(time.Second)
		if err := tx.PutReplica(ctx, a); err != nil {
			return err
		}
		got, err := tx.Replicas(ctx)
		equal(t, "replicas", got, []*Replica{a, b})
		if err != nil {
			return err
		}
		var beats []*Beat
		for i := range 2*beatsAtOnce + 1 {
			beats = append(beats, &Beat{Node: fmt.Sprint("n-", i), Replica: "a", At: at.Add(time.Duration(i) * time.Second), Beat: []byte("{}")})
		}
		if err := errors.Join(tx.PutBeats(ctx, nil), tx.PutBeats(ctx, beats), tx.PutBeats(ctx, beats[:3])); err != nil {
			return err
		}
		bs, err := tx.Beats(ctx, at.Add(2*beatsAtOnce*time.Second), "b")
		equal(t, "beats", bs, beats[2*beatsAtOnce:])
		if err != nil {
			return err
		}
		if bs, err := tx.Beats(ctx, at, "a"); err != nil || len(bs) != 0 {
			t.Errorf("one's own beats: %v %v", bs, err)
		}
		for _, try := range []struct {
			holder    string
			now, life time.Duration
			want      bool
		}{{"a", 0, 10, true}, {"b", 5, 10, false}, {"a", 5, 10, true}, {"b", 14, 10, false}, {"b", 15, 10, true}, {"a", 16, 10, false}} {
			ok, err := tx.TakeLease(ctx, "jobs", try.holder, at.Add(try.now*time.Second), at.Add((try.now+try.life)*time.Second))
			if err != nil || ok != try.want {
				t.Errorf("lease %+v: %v %v", try, ok, err)
			}
		}
		if err := errors.Join(tx.DropLease(ctx, "jobs", "a"), tx.DropLease(ctx, "jobs", "b"), tx.PurgeReplicas(ctx, at.Add(time.Minute))); err != nil {
			return err
		}
		if ok, err := tx.TakeLease(ctx, "jobs", "a", at, at.Add(time.Second)); err != nil || !ok {
			t.Errorf("a lease that was given back: %v %v", ok, err)
		}
		got, err = tx.Replicas(ctx)
		equal(t, "replicas that are left", got, []*Replica{b})
		return errors.Join(err, tx.DropReplica(ctx, "b"), tx.DropReplica(ctx, "b"))
	})
}

// testThree has three programs on one PostgreSQL.
func testThree(t *testing.T, pg *backing.Postgres) {
	url := pg.Database(t)
	stores := make([]Store, 3)
	var wg sync.WaitGroup
	for i := range stores { // all migrate at once
		wg.Add(1)
		go func() {
			defer wg.Done()
			s, err := OpenPostgres(t.Context(), PostgresConfig{URL: url})
			if err != nil {
				t.Error(err)
				return
			}
			stores[i] = s
		}()
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	defer func() {
		for _, s := range stores {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	spendOnce(t, stores...)
	// One after the other, although each reads what the others write: nobody takes a place twice.
	const callers = 90
	seen := make(map[uint32]bool)
	var mu sync.Mutex
	for i := range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var mine uint32
			if err := stores[i%3].Update(t.Context(), func(tx Tx) error {
				o, err := tx.Org(t.Context(), "a")
				if err != nil {
					return err
				}
				mine = o.NextAddress
				o.NextAddress++
				return tx.UpdateOrg(t.Context(), o)
			}); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if seen[mine] {
				t.Errorf("address %d was given twice", mine)
			}
			seen[mine] = true
		}()
	}
	wg.Wait()
}

// testAway takes the server away: the error says so, and it works again when the server is back.
func testAway(t *testing.T, pg *backing.Postgres) {
	s := openPostgres(t, pg.Database(t))
	read := func() error {
		return s.View(t.Context(), func(tx Tx) error {
			_, err := tx.Orgs(t.Context(), Page{})
			return err
		})
	}
	for range 2 {
		if err := errors.Join(s.Writable(t.Context()), read()); err != nil {
			t.Fatal(err)
		}
		// In the middle of a transaction, too: it is run again when it can be.
		count := 0
		err := s.Update(t.Context(), func(tx Tx) error {
			if count++; count == 1 {
				pg.Stop(t)
			}
			return tx.PutMeta(t.Context(), "k", []byte("1"))
		})
		is(t, "an update that the server left", err, ErrUnavailable)
		is(t, "write", s.Writable(t.Context()), ErrUnavailable)
		is(t, "read", read(), ErrUnavailable)
		pg.Start(t)
		if err := errors.Join(s.Writable(t.Context()), read()); err != nil {
			t.Errorf("after the server came back: %v", err)
		}
		// A restart between two transactions is not noticed.
		pg.Stop(t)
		pg.Start(t)
	}
}

// testRefusals holds errors to what a user needs, and to keeping the password.
func testRefusals(t *testing.T, pg *backing.Postgres) {
	pg.SQL(t, "postgres", "CREATE ROLE reader LOGIN")
	database := pg.Database(t)
	for what, try := range map[string]struct{ url, say string }{
		"no database":   {strings.Replace(pg.URL("none"), "postgres@", "postgres:sesame@", 1), "createdb"},
		"no rights":     {strings.Replace(database, "postgres@", "reader:sesame@", 1), "owner"},
		"no server":     {"postgres://postgres:sesame@127.0.0.1:1/x?connect_timeout=1", "see that the server runs"},
		"no URL":        {"postgres://postgres:sesame@h:port/x", "of the form"},
		"no such param": {database + "&password=sesame&sallyway=1", "sallyway"},
	} {
		_, err := OpenPostgres(t.Context(), PostgresConfig{URL: try.url})
		if err == nil || !strings.Contains(err.Error(), try.say) || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// testMove restores a backup of either database to either.
func testMove(t *testing.T, pg *backing.Postgres) {
	dir := t.TempDir()
	first, err := OpenSQLite(t.Context(), filepath.Join(dir, "first"))
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	populate(t, first)
	want := counts(t, first)
	one := filepath.Join(dir, "one.backup")
	if err := first.Backup(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	url := pg.Database(t)
	if err := RestorePostgres(t.Context(), one, PostgresConfig{URL: url}); err != nil {
		t.Fatal(err)
	}
	is(t, "restored over something", RestorePostgres(t.Context(), one, PostgresConfig{URL: url}), ErrNotEmpty)
	second := openPostgres(t, url)
	compare(t, "in PostgreSQL", counts(t, second), want)
	two := filepath.Join(dir, "two.backup")
	if err := second.Backup(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(two + "-wal"); err == nil {
		t.Error("a backup is one file")
	}
	path := filepath.Join(dir, "third")
	if _, err := RestoreSQLite(t.Context(), two, path); err != nil {
		t.Fatal(err)
	}
	third, err := OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	compare(t, "back in SQLite", counts(t, third), want)
	for _, s := range []*DB{second, third} {
		if err := s.View(t.Context(), func(tx Tx) error {
			o, err := tx.Org(t.Context(), "a")
			if err != nil {
				return err
			}
			wantOrg := org("a")
			wantOrg.Direct = true
			equal(t, "organization", o, wantOrg)
			n, err := tx.Node(t.Context(), "r-1")
			if err == nil && (!n.Draining || n.Created != at || !n.Enrolled.IsZero()) {
				t.Errorf("node %+v", n)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
}

func compare(t *testing.T, where string, got, want map[string]int) {
	t.Helper()
	for table, n := range want {
		if got[table] != n {
			t.Errorf("%s: %d rows in %s, want %d", where, got[table], table, n)
		}
	}
}

// counts are the rows of every table that a backup holds.
func counts(t *testing.T, s *DB) map[string]int {
	t.Helper()
	like, err := OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "schema"))
	if err != nil {
		t.Fatal(err)
	}
	defer like.Close()
	scanName := func(r row) (*string, error) {
		n := new(string)
		return n, r.Scan(n)
	}
	var names []*string
	if err := like.View(t.Context(), func(tx Tx) (err error) {
		names, err = many(t.Context(), tx.(*sqlTx), scanName, `SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'`)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(names) < 20 {
		t.Fatalf("%d tables", len(names))
	}
	out := make(map[string]int)
	if err := s.View(t.Context(), func(tx Tx) error {
		for _, n := range names {
			var count int
			if err := tx.(*sqlTx).row(t.Context(), `SELECT COUNT(*) FROM `+*n).Scan(&count); err != nil {
				return err
			}
			if !slices.Contains(fleeting, *n) {
				out[*n] = count
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// populate puts something into many tables, those that refer to others among them.
func populate(t *testing.T, s Store) {
	t.Helper()
	update(t, s, func(ctx context.Context, tx Tx) error {
		o, r := org("a"), node("r-1", "a", "fra", identity.Relay)
		o.Direct, r.Draining = true, true
		return errors.Join(
			tx.PutMeta(ctx, "k", []byte{0, 255}), tx.InsertOrg(ctx, o),
			tx.InsertAuthority(ctx, &Authority{Org: "a", Kind: "root", Generation: 1, Certificate: []byte{1}, Key: []byte{2}, Created: at}),
			tx.InsertNode(ctx, r), tx.InsertNode(ctx, node("g-1", "a", "g", identity.Gateway)), tx.InsertNode(ctx, node("c-1", "a", "c", identity.Client)),
			tx.PutKey(ctx, &Key{Hash: identity.KeyHash{1}, Node: "c-1", Created: at, NotAfter: at, Public: []byte{1}}),
			tx.InsertEnrolmentToken(ctx, &EnrolmentToken{Hash: [32]byte{1}, Node: "c-1", Org: "a", Kind: identity.Client, Created: at, Expires: at}),
			tx.InsertAssertion(ctx, [32]byte{1}, at),
			tx.InsertResource(ctx, &Resource{ID: "v-1", Org: "a", Name: "db", Target: "10.0.0.1", ICMP: true, Created: at, Gateways: []ServingGateway{{"g-1", 0, 1}}}),
			tx.InsertGroup(ctx, &Group{ID: "u-1", Org: "a", Name: "staff", Created: at, Members: []string{"c-1"}}),
			tx.InsertPolicy(ctx, &Policy{ID: "p-1", Org: "a", Name: "one", SubjectKind: "group", Subject: "u-1", Resource: "v-1", Created: at}),
			tx.PutAssignment(ctx, "g-1", []string{"r-1"}), tx.InsertRelayKey(ctx, &RelayKey{Relay: "r-1", ID: "k", Secret: []byte{1}, Created: at}),
			tx.PutRelayRungs(ctx, &RelayRungs{Relay: "r-1", SSHPort: 2222}), tx.PutSessionEnd(ctx, &SessionEnd{Org: "a", Node: "c-1", Before: at}),
			tx.InsertAPIToken(ctx, &APIToken{ID: "t", Hash: [32]byte{1}, Scope: ScopeAdmin, Created: at}),
			tx.AppendAudit(ctx, "a", &AuditEntry{Seq: 1, At: at, Detail: []byte("{}"), Hash: "h"}),
		)
	})
}
