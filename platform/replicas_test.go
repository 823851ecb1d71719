package platform

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/replica"
)

// at is the URL under which this platform of several is reached itself.
func (l *lab) at() string {
	if l.srv.https == nil {
		return l.srv.URL()
	}
	return "https://" + l.srv.https.Addr().String()
}

// replicas starts platforms on one database that are told to tell nodes one URL.
func replicas(t *testing.T, n int, database, redis string) []*lab {
	t.Helper()
	key := filepath.Join(t.TempDir(), "master.key")
	var out []*lab
	for i := range n {
		change := func(c *Config) {
			c.Database, c.Redis, c.AdvertiseURL, c.MasterKey = database, redis, "https://platform.example", key
			if i > 0 {
				// The first one issued the administrator's credential; start reads a copy.
				b, err := os.ReadFile(out[0].srv.AdminFile())
				must(t, err)
				must(t, os.WriteFile(filepath.Join(c.Data, adminFile), b, 0o600))
			}
		}
		out = append(out, start(t, change))
	}
	return out
}

// on is the node, talking to another platform.
func (n *node) on(l *lab) *node {
	m := *n
	m.l = l
	return &m
}

// TestReplicas holds two platforms on one PostgreSQL to acting as one, with Redis, while it is away, when it is back, and without one.
func TestReplicas(t *testing.T) {
	t.Parallel()
	pg, rd := backing.StartPostgres(t, false), backing.StartRedis(t)
	t.Run("with Redis", func(t *testing.T) {
		ls := replicas(t, 2, pg.Database(t), rd.URL())
		redis := func(state string) {
			t.Helper()
			eventually(t, "Redis is "+state, func() bool {
				return !slices.ContainsFunc(ls, func(l *lab) bool { return l.srv.group.Status().Redis != state })
			})
		}
		redis(replica.Connected)
		actAsOne(t, ls[0], ls[1], "one")
		rd.Stop(t)
		redis(replica.Away)
		actAsOne(t, ls[0], ls[1], "two")
		rd.Start(t)
		redis(replica.Connected)
		actAsOne(t, ls[0], ls[1], "three")
		for _, l := range ls {
			if n := strings.Count(l.logs.String(), "Redis is away"); n != 1 {
				t.Errorf("Redis was away once, the log says so %d times", n)
			}
		}
		if err := ls[0].cfg.Home().RenewDataKey(t.Context()); err == nil || !strings.Contains(err.Error(), "stop all platforms") {
			t.Errorf("a new data key while platforms run: %v", err)
		}
		sharedLimits(t, ls[0], ls[1])
		// One leads, and when it stops the other does.
		leads := func(l *lab) bool { return l.srv.group.Leads() }
		eventually(t, "one leads", func() bool { return leads(ls[0]) != leads(ls[1]) })
		if leads(ls[1]) {
			ls[0], ls[1] = ls[1], ls[0]
		}
		ls[0].stop()
		eventually(t, "the other leads", func() bool { return leads(ls[1]) })
		eventually(t, "the one that stopped is gone", func() bool { return len(ls[1].srv.group.Status().Replicas) == 1 })
	})
	t.Run("without Redis", func(t *testing.T) {
		ls := replicas(t, 2, pg.Database(t), "")
		actAsOne(t, ls[0], ls[1], "one")
	})
}

// actAsOne changes things at one platform and looks at the other.
func actAsOne(t *testing.T, a, b *lab, name string) {
	t.Helper()
	eventually(t, "they know each other", func() bool {
		return !slices.ContainsFunc([]*lab{a, b}, func(l *lab) bool { return len(l.srv.group.Status().Replicas) != 2 })
	})
	gateway := a.create(identity.Gateway, "gw-"+name).join()
	client := a.create(identity.Client, "alice-"+name).on(b).join()
	a.api("POST", "/resources", control.CreateResource{Name: "db-" + name, Address: "10.0.0.1", TCP: []policy.PortRange{{First: 5432, Last: 5432}}, Gateways: []string{"gw-" + name}}, nil)
	f := gateway.on(b).stream() // a gateway that holds its stream at b
	defer f.close()
	g := client.stream() // at b, too
	defer g.close()
	// What is changed at a is told by b.
	a.api("POST", "/policies", control.CreatePolicy{Name: "p-" + name, Subject: "client:alice-" + name, Resource: "db-" + name}, nil)
	g.wait("the resource that a allowed", func(c *control.Config) bool {
		return slices.ContainsFunc(c.Dialling.Resources, func(r control.ReachableResource) bool { return r.Resource.Name == "db-"+name })
	})
	// A heartbeat at b shows at a, and a session that a ends is ended by b.
	gateway.on(b).beat(control.Heartbeat{Sessions: []control.SessionReport{{Peer: client.id, Since: time.Now()}}})
	eventually(t, "the session is listed by the other platform", func() bool {
		var list control.List[control.SessionRecord]
		a.api("GET", "/sessions", nil, &list)
		return slices.ContainsFunc(list.Items, func(s control.SessionRecord) bool { return s.Gateway == "gw-"+name })
	})
	var rec control.NodeRecord
	a.api("GET", "/gateways/gw-"+name, nil, &rec)
	if rec.State != control.StateHealthy {
		t.Errorf("the gateway is %s to the other platform", rec.State)
	}
	a.api("DELETE", "/sessions/alice-"+name, nil, nil)
	f.wait("the end of the session", func(c *control.Config) bool {
		return slices.ContainsFunc(c.Gateway.EndSessions, func(e control.EndSession) bool { return e.Node == client.id })
	})
	// A node that a revokes is cut off at b.
	a.api("POST", "/clients/alice-"+name+"/revoke", nil, nil)
	g.ended()
}

// sharedLimits has one platform refuse a source until the other does, too.
func sharedLimits(t *testing.T, a, b *lab) {
	t.Helper()
	refused := func(l *lab) int {
		status, _ := l.do("swt1.none", "GET", "/api/v1/orgs", nil, nil)
		return status
	}
	for range 2 * 20 { // more than a burst
		refused(a)
	}
	eventually(t, "the other platform refuses, too", func() bool { return refused(b) == http.StatusTooManyRequests })
}

// TestTokenAtReplicas spends one enrolment token at three platforms at once, a hundred times.
func TestTokenAtReplicas(t *testing.T) {
	t.Parallel()
	pg := backing.StartPostgres(t, false)
	ls := replicas(t, 3, pg.Database(t), "")
	n := ls[0].create(identity.Client, "alice")
	const callers = 100
	var mu sync.Mutex
	outcomes := make(map[string]int)
	var wg sync.WaitGroup
	for i := range callers {
		l := ls[i%len(ls)]
		req := ls[0].fromTokenOf(n).request() // each caller has a key of its own
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := l.srv.Registry().Enrol(t.Context(), fmt.Sprint("192.0.2.", i), req)
			outcome := "spent"
			if err != nil {
				outcome = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			outcomes[outcome]++
		}()
	}
	wg.Wait()
	if outcomes["spent"] != 1 {
		t.Errorf("%+v", outcomes)
	}
	for o, n := range outcomes {
		if o != "spent" && !strings.Contains(o, "was used already") {
			t.Errorf("%d times: %s", n, o)
		}
	}
}

// fromTokenOf is a node with the same token and another key.
func (l *lab) fromTokenOf(n *node) *node {
	l.t.Helper()
	key, err := identity.NewKey()
	must(l.t, err)
	m := *n
	m.key = key
	return &m
}

// TestRedisRefuses holds what makes no sense to saying so.
func TestRedisRefuses(t *testing.T) {
	t.Parallel()
	for url, says := range map[string]string{"redis://h": "alone on SQLite"} {
		if _, err := Open(t.Context(), Config{Data: t.TempDir(), Listen: "127.0.0.1:0", Redis: url}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", url, err)
		}
	}
	if err := replica.CheckURL("redis://:sesame@h:port"); err == nil || strings.Contains(err.Error(), "sesame") {
		t.Errorf("%v", err)
	}
}
