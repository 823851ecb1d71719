package platform

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control/agent"
	"sallyway/internal/identity"
)

// inMemory is a folder on a file system that does not wait for a disk, where there is one: enrolling a thousand nodes is not what is tested.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sallyway-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestEverybodyComesBack: a platform with many nodes is away for a while. Everybody is back within 30 s of its return, spread out: a
// second of it sees no more than a fraction of them, and nobody hammers.
func TestEverybodyComesBack(t *testing.T) {
	if testing.Short() {
		t.Skip("a thousand nodes take their time")
	}
	l := start(t, func(c *Config) { c.Data = inMemory(t) })
	const away = 12 * time.Second // so that waits have grown: their bound doubles from 1 s to 20 s
	var dials atomic.Int64
	var mu sync.Mutex
	var times []time.Time // of connections that were opened since the platform is back
	counting := false
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		var d net.Dialer
		dials.Add(1)
		c, err := d.DialContext(ctx, network, addr)
		if err == nil {
			mu.Lock()
			if counting {
				times = append(times, time.Now())
			}
			mu.Unlock()
		}
		return c, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	agents := make([]*agent.Agent, crowd)
	for i := range agents {
		n := l.create(identity.Client, fmt.Sprintf("c%d", i))
		a, err := agent.Open(ctx, agent.Config{StateDir: t.TempDir(), Kind: identity.Client, Token: n.token.String(), DialContext: dial})
		must(t, err)
		agents[i] = a
	}
	for _, a := range agents {
		running.Go(func() { _ = a.Run(ctx) }) // nil at its end
	}
	missing := func() int {
		n := 0
		for _, a := range agents {
			if !a.Status().Connected {
				n++
			}
		}
		return n
	}
	until := func(what string, d time.Duration, done func() bool) time.Duration {
		t.Helper()
		began := time.Now()
		for !done() {
			if time.Since(began) > d {
				t.Fatalf("%s: not within %v, %d nodes are missing", what, d, missing())
			}
			time.Sleep(20 * time.Millisecond)
		}
		return time.Since(began)
	}
	until("everybody is connected", time.Minute, func() bool { return missing() == 0 })
	l.stop()
	until("everybody has noticed", 10*time.Second, func() bool { return missing() == crowd })
	before := dials.Load()
	time.Sleep(away) // the outage itself
	tries := float64(dials.Load()-before) / crowd
	mu.Lock()
	counting = true
	mu.Unlock()
	l.run()
	back := until("everybody is back", 40*time.Second, func() bool { return missing() == 0 })
	mu.Lock()
	defer mu.Unlock()
	slices.SortFunc(times, time.Time.Compare)
	peak := 0
	for i, j := 0, 0; i < len(times); i++ {
		for times[i].Sub(times[j]) > time.Second {
			j++
		}
		peak = max(peak, i-j+1)
	}
	t.Logf("%d nodes: all back after %v, at most %d connections in a second, %.1f tries a node in %v of outage", crowd, back.Round(time.Millisecond), peak, tries, away)
	if back > 30*time.Second {
		t.Errorf("all back after %v, want 30 s", back)
	}
	if peak > crowd/3 {
		t.Errorf("%d connections in one second by %d nodes: they come at once", peak, crowd)
	}
	if tries > 8 {
		t.Errorf("%.1f tries a node in %v of outage", tries, away)
	}
}
