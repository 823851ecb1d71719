package replica

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/store"
)

// ears are a process that writes down what it is told.
type ears struct {
	mu    sync.Mutex
	heard []string // guarded by mu
}

func (e *ears) note(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.heard = append(e.heard, s)
}

func (e *ears) has(s string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Contains(strings.Join(e.heard, "\n")+"\n", s+"\n")
}

func (e *ears) RemoteChanged(org string, _ uint64)      { e.note("changed " + org) }
func (e *ears) RemoteDropped(node string)               { e.note("dropped " + node) }
func (e *ears) RemoteOpened(node string)                { e.note("opened " + node) }
func (e *ears) RemoteBeat(node string, b presence.Beat) { e.note("beat " + node + " " + b.State) }
func (e *ears) RemoteRefused(source string)             { e.note("refused " + source) }
func (e *ears) Streams() int                            { return 0 }
func sealer(t *testing.T, key byte) *pki.Sealer {
	t.Helper()
	b := make([]byte, 32)
	b[0] = key
	s, err := pki.NewSealer(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// join starts a group; until the test ends it runs.
func join(t *testing.T, st store.Store, url string, seal *pki.Sealer) (*Group, *ears) {
	t.Helper()
	g, err := New(Config{Store: st, Seal: seal, Redis: url, Address: "x", Log: slog.New(slog.DiscardHandler), Now: time.Now, Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	e := new(ears)
	g.Join(e)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	until(t, "Redis is there", g.Connected)
	return g, e
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func open(t *testing.T) store.Store {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

// TestForeignMessages writes into Redis what does not belong there, and reads what does.
func TestForeignMessages(t *testing.T) {
	rd := backing.StartRedis(t)
	st := open(t)
	a, _ := join(t, st, rd.URL(), sealer(t, 1))
	_, heard := join(t, st, rd.URL(), sealer(t, 1))
	channel, beats := a.redis.prefix+"events", a.redis.prefix+"beats"
	c := a.redis.client.Get()
	defer c.Close()
	plain, err := json.Marshal(message{From: "somebody", Events: []event{{Kind: dropped, Name: "victim"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range [][]byte{plain, sealer(t, 2).Seal(sealLabel, plain), sealer(t, 1).Seal("another label", plain), nil, []byte("junk")} {
		if _, err := c.Do("PUBLISH", channel, m); err != nil {
			t.Fatal(err)
		}
	}
	// A heartbeat in the place of another node's.
	moved, err := json.Marshal(event{Kind: beat, Name: "n-1", At: time.Now().UnixMicro(), Beat: &control.Heartbeat{State: "forged"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Do("HSET", beats, "n-2", sealer(t, 1).Seal(sealLabel+" n-1", moved)); err != nil {
		t.Fatal(err)
	}
	a.Beat("n-3", presence.Beat{At: time.Now(), Heartbeat: control.Heartbeat{State: "secretly"}})
	a.Dropped("n-4") // in order: what came before was heard or dropped when this is heard
	until(t, "what another replica says is heard", func() bool { return heard.has("dropped n-4") && heard.has("beat n-3 secretly") })
	if heard.has("dropped victim") {
		t.Error("a message of somebody else was believed")
	}
	_, late := join(t, st, rd.URL(), sealer(t, 1))
	until(t, "who comes later knows the newest heartbeats", func() bool { return late.has("beat n-3 secretly") })
	if late.has("beat n-1 forged") || late.has("beat n-2 forged") {
		t.Error("a heartbeat in the place of another was believed")
	}
	all, err := redis.StringMap(c.Do("HGETALL", beats))
	if err != nil {
		t.Fatal(err)
	}
	for node, sealed := range all {
		if strings.Contains(sealed, "secretly") {
			t.Errorf("the heartbeat of %s lies in Redis in clear", node)
		}
	}
}

// TestOneLeads has three groups: one leads at any time, and another when it stops.
func TestOneLeads(t *testing.T) {
	rd := backing.StartRedis(t)
	st := open(t)
	var gs []*Group
	for range 3 {
		g, _ := join(t, st, rd.URL(), sealer(t, 1))
		gs = append(gs, g)
	}
	leaders := func() (n int) {
		for _, g := range gs {
			n += int(number(g.Leads()))
		}
		return n
	}
	until(t, "one leads", func() bool { return leaders() == 1 })
	rd.Stop(t)
	until(t, "Redis is away", func() bool { return !gs[0].Connected() && !gs[1].Connected() && !gs[2].Connected() })
	until(t, "one leads without Redis", func() bool { return leaders() == 1 })
}

func TestURL(t *testing.T) {
	for text, want := range map[string]string{
		"redis://db.example":                  "tcp db.example:6379",
		"redis://db.example:7000/3":           "tcp db.example:7000",
		"rediss://ada:sesame@[2001:db8::1]/0": "tcp [2001:db8::1]:6379",
		"redis://:sesame@db.example?db=2":     "tcp db.example:6379",
		"unix:///run/redis.sock?db=1":         "unix /run/redis.sock",
		"unix://:sesame@/run/redis.sock":      "unix /run/redis.sock",
		"memcached://db.example":              "",
		"redis://":                            "",
		"redis://:sesame@db.example:port":     "",
		"redis://db.example/sesame":           "",
		"redis://db.example/-1":               "",
		"redis://db.example?skip_verify=true": "",
		"redis:db.example":                    "",
		"unix://db.example/run/redis.sock":    "",
		"unix://":                             "",
		"redis://db.example/1#sesame":         "",
		"":                                    "",
	} {
		p, err := parseURL(text)
		got := ""
		if err == nil {
			got = p.network + " " + p.address
		} else if strings.Contains(err.Error(), "sesame") || !strings.Contains(err.Error(), "rediss://") {
			t.Errorf("%s: %v", text, err)
		}
		if got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
