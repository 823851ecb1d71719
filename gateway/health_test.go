package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyway/client"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

func TestReach(t *testing.T) {
	down := errors.New("refused")
	at := time.Unix(1_800_000_000, 0)
	for _, c := range []struct {
		name  string
		given string // what probes find: + reached, - not
		want  string // after each: ? nothing known, y, n; upper case where it changed
	}{
		{"up at once", "+++", "Yyy"},
		{"down after three", "----", "??Nn"},
		{"one failure is none", "+-+-+", "Yyyyy"},
		{"two are none", "+--+--+", "Yyyyyyy"},
		{"down and up", "+---+-++", "YyyNnnnY"},
	} {
		var r reach
		got := ""
		for i, p := range c.given {
			var err error
			if p == '-' {
				err = down
			}
			changed := r.observe(err, at.Add(time.Duration(i)*time.Second))
			s := "?"
			switch {
			case r.known && r.ok:
				s = "y"
			case r.known:
				s = "n"
			}
			if changed {
				s = map[string]string{"y": "Y", "n": "N", "?": "!"}[s]
				if r.since != at.Add(time.Duration(i)*time.Second) {
					t.Errorf("%s: since %v", c.name, r.since)
				}
			}
			got += s
		}
		if got != c.want {
			t.Errorf("%s: %s gives %s, want %s", c.name, c.given, got, c.want)
		}
	}
}

// TestHealthFollows has resources come, go, fail and recover, in virtual time.
func TestHealthFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		failing := map[string]error{}
		asked := map[string]int{}
		snapshot := &policy.Snapshot{
			Resource: []policy.Resource{
				{ID: "r1", Name: "db", Address: "10.0.3.7", TCP: []policy.PortRange{{First: 5432, Last: 5432}}},
				{ID: "r2", Name: "lan", Address: "10.0.0.0/8", TCP: []policy.PortRange{policy.AllPorts}},
			},
			Rules: []policy.Rule{{Resource: "r1", Subjects: []identity.Node{client1}}},
		}
		changes := 0
		h := newHealth(slog.New(slog.DiscardHandler), func() (*policy.Snapshot, error) {
			mu.Lock()
			defer mu.Unlock()
			c := *snapshot
			return &c, nil
		}, func(_ context.Context, host string, _ policy.Health) error {
			mu.Lock()
			defer mu.Unlock()
			asked[host]++
			return failing[host]
		}, func() {
			mu.Lock()
			defer mu.Unlock()
			changes++
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- h.run(ctx) }()
		lost := func() client.Unreached {
			s, _ := h.snapshot()
			u := client.Unreached{}
			if err := json.Unmarshal(h.notice(s, client1).Data, &u); err != nil {
				t.Fatal(err)
			}
			return u
		}
		time.Sleep(5 * time.Second)
		if r := h.report(); len(r) != 1 || !r[0].OK || r[0].Name != "db" || len(lost()) != 0 {
			t.Errorf("report %+v", r)
		}
		mu.Lock()
		failing["10.0.3.7"] = errors.New("refused")
		mu.Unlock()
		time.Sleep(healthInterval*11/10 + 4*healthRetry)
		if r := h.report(); len(r) != 1 || r[0].OK || r[0].Reason != "refused" || lost()["r1"] != "db: refused" {
			t.Errorf("report %+v, lost %v", r, lost())
		}
		other, _ := h.snapshot()
		if n := h.notice(other, identity.Node{Org: "acme", Kind: identity.Client, ID: "c-other"}); string(n.Data) != "{}" {
			t.Errorf("a peer without a rule is told of it: %s", n.Data)
		}
		mu.Lock()
		delete(failing, "10.0.3.7")
		mu.Unlock()
		time.Sleep(healthInterval*11/10 + 3*healthRetry)
		if r := h.report(); len(r) != 1 || !r[0].OK {
			t.Errorf("report %+v", r)
		}
		mu.Lock()
		if changes != 3 {
			t.Errorf("%d changes, want up, down, up", changes)
		}
		snapshot.Resource = snapshot.Resource[1:]
		before := asked["10.0.3.7"]
		mu.Unlock()
		h.follow()
		time.Sleep(time.Minute)
		mu.Lock()
		if asked["10.0.3.7"] != before {
			t.Error("a resource that is gone is still probed")
		}
		mu.Unlock()
		if r := h.report(); len(r) != 0 {
			t.Errorf("report %+v", r)
		}
		cancel()
		<-done
	})
}

// TestProber probes real servers.
func TestProber(t *testing.T) {
	allow, err := ParseAllow([]string{"127.0.0.0/8"})
	if err != nil {
		t.Fatal(err)
	}
	p := &prober{&enforcer{allow: allow, resolver: net.DefaultResolver}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ok", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("GET /moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
	})
	mux.HandleFunc("GET /bad", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	plain, sealed := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	defer plain.Close()
	defer sealed.Close()
	portOf := func(s *httptest.Server) uint16 { return netip.MustParseAddrPort(s.Listener.Addr().String()).Port() }
	shut, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := netip.MustParseAddrPort(shut.Addr().String()).Port()
	shut.Close()
	for _, c := range []struct {
		host string
		h    policy.Health
		ok   bool
	}{
		{"127.0.0.1", policy.Health{Kind: policy.HealthTCP, Port: portOf(plain)}, true},
		{"localhost", policy.Health{Kind: policy.HealthTCP, Port: portOf(plain)}, true},
		{"127.0.0.1", policy.Health{Kind: policy.HealthTCP, Port: closed}, false},
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTP, Port: portOf(plain), Path: "/ok"}, true},
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTP, Port: portOf(plain)}, true}, // 404 is an answer
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTP, Port: portOf(plain), Path: "/moved"}, true},
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTP, Port: portOf(plain), Path: "/bad"}, false},
		{"127.0.0.1", policy.Health{Kind: policy.HealthTLS, Port: portOf(sealed)}, true},
		{"127.0.0.1", policy.Health{Kind: policy.HealthTLS, Port: portOf(plain)}, false},
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTPS, Port: portOf(sealed), Path: "/ok"}, true},
		{"127.0.0.1", policy.Health{Kind: policy.HealthHTTPS, Port: portOf(sealed), Path: "/bad"}, false},
		{"::1", policy.Health{Kind: policy.HealthTCP, Port: portOf(plain)}, false}, // barred by the allow list
	} {
		ctx, cancel := context.WithTimeout(t.Context(), healthTimeout)
		if err := p.probe(ctx, c.host, c.h); (err == nil) != c.ok {
			t.Errorf("%s %v: %v, want ok %v", c.host, c.h, err, c.ok)
		}
		cancel()
	}
}

// TestHealthCheckNamesAll: the doctor's row names every resource that is not reached.
func TestHealthCheckNamesAll(t *testing.T) {
	h := newHealth(slog.New(slog.DiscardHandler), nil, nil, nil)
	for id, name := range map[string]string{"r1": "db", "r2": "web"} {
		h.probes[id] = &probed{name: name, reach: reach{known: true, reason: "refused by " + name}}
	}
	h.probes["r3"] = &probed{name: "ldap", reach: reach{known: true, ok: true}}
	row := h.check()
	for _, want := range []string{"1 reached", "db since", "refused by db", "web since", "refused by web"} {
		if !strings.Contains(row.Detail, want) {
			t.Errorf("row lacks %q: %s", want, row.Detail)
		}
	}
	if row.Result != daemon.Warn || row.Remedy == "" {
		t.Errorf("%+v", row)
	}
}
