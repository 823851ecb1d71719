//go:build measure

package flowlog

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// TestMeasureFlows says how many flows a second are written down on SQLite: batches of eight gateways, as they come.
//
//	go test -tags measure -run TestMeasureFlows -v ./platform/flowlog
func TestMeasureFlows(t *testing.T) {
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	defer st.Close()
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	reg := &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now}
	_, err = reg.Bootstrap(t.Context())
	must(t, err)
	s := New(Config{Registry: reg, Log: reg.Log, Metrics: prometheus.NewRegistry()})
	const gateways, batches = 8, 50
	began := time.Now()
	var wg sync.WaitGroup
	for g := range gateways {
		wg.Go(func() {
			gw := identity.Node{Org: registry.DefaultOrg, Kind: identity.Gateway, ID: fmt.Sprintf("g-%d", g)}
			for b := range batches {
				fs := make([]control.FlowReport, control.MaxFlows)
				for i := range fs {
					fs[i] = control.FlowReport{
						ID: fmt.Sprintf("%d-%d", b, i), Peer: identity.Node{Org: gw.Org, Kind: identity.Client, ID: fmt.Sprintf("c-%d", i%100)}, Resource: fmt.Sprintf("r-%d", i%20),
						Rule: "rule", Protocol: "tcp", Destination: "db.corp.example:5432", Address: "10.0.3.7:5432", Relay: "fra-1", Path: "udp", Started: began.Add(time.Duration(i) * time.Millisecond),
						Seen: began.Add(time.Second), Sent: 1000, Received: 2000, Reason: "closed",
					}
				}
				if err := s.Put(t.Context(), gw, control.FlowBatch{Flows: fs}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	n := gateways * batches * control.MaxFlows
	t.Logf("%d flows in %v: %.0f a second", n, took, float64(n)/took.Seconds())
	began = time.Now()
	l, err := s.List(t.Context(), registry.DefaultOrg, Filter{Client: "c-7", Resource: "r-7", Limit: 100})
	must(t, err)
	t.Logf("a page of %d by client and resource in %v", len(l.Items), time.Since(began))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
