//go:build measure

package platform

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// TestMeasureGrants prints how long a client waits for its grants when 200 a second ask, each by an assertion for an access token (a write) and a
// fresh control stream, up to its first configuration. The clients run in the same process. Both databases wait for the disk at every commit.
//
//	go test -tags measure -run TestMeasureGrants -v ./platform
func TestMeasureGrants(t *testing.T) {
	pg := backing.StartPostgres(t, true)
	quiet := func(c *Config) { c.Log = slog.New(slog.DiscardHandler) }
	measureGrants(t, "SQLite", start(t, quiet))
	measureGrants(t, "PostgreSQL", start(t, quiet, func(c *Config) { c.Database = pg.Database(t) }))
}

func measureGrants(t *testing.T, what string, l *lab) {
	t.Helper()
	const (
		clients = 200
		rate    = 200 // a second
		length  = 10 * time.Second
	)
	for i := range 2 {
		l.create(identity.Gateway, fmt.Sprint("gw-", i)).join()
		l.create(identity.Relay, fmt.Sprint("relay-", i)).join()
	}
	var all []*node
	members := []string{}
	for i := range clients {
		name := fmt.Sprint("c-", i)
		all = append(all, l.create(identity.Client, name).join())
		members = append(members, "client:"+name)
	}
	l.api("POST", "/groups", control.CreateGroup{Name: "all", Members: members}, nil)
	for i := range 20 {
		name := fmt.Sprint("r-", i)
		l.api("POST", "/resources", control.CreateResource{Name: name, Address: "10.0.0.1", TCP: []policy.PortRange{policy.AllPorts}, Gateways: []string{fmt.Sprint("gw-", i%2)}}, nil)
		l.api("POST", "/policies", control.CreatePolicy{Name: name, Subject: "group:all", Resource: name}, nil)
	}
	// One connection for many, as a balancer's to a platform is: a handshake for each is not what is measured.
	l.http = pinned(l.srv.Pin())
	l.http.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	var mu sync.Mutex
	var waits []time.Duration
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range int(length.Seconds()) * rate {
		due := begin.Add(time.Duration(i) * time.Second / rate)
		time.Sleep(time.Until(due)) // an open loop: who is slow is not waited for
		n := all[i%clients]
		assertion := n.assertion(nil)
		wg.Add(1)
		go func() {
			defer wg.Done()
			start := time.Now()
			token, p := n.exchange(assertion)
			if token == "" {
				t.Errorf("%+v", p)
				return
			}
			if err := firstGrant(t, l, token); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			waits = append(waits, time.Since(start))
		}()
	}
	wg.Wait()
	slices.Sort(waits)
	at := func(q float64) time.Duration { return waits[int(q*float64(len(waits)-1))].Round(10 * time.Microsecond) }
	t.Logf("%s: %d grants at %d a second: median %v, p99 %v, longest %v (bar: p99 20 ms)", what, len(waits), rate, at(0.5), at(0.99), at(1))
}

// firstGrant opens a control stream and waits for the configuration.
func firstGrant(t *testing.T, l *lab, bearer string) error {
	req, err := http.NewRequestWithContext(t.Context(), "GET", l.at()+"/api/v1/node/control", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	resp, err := l.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	line, err := bufio.NewReader(resp.Body).ReadBytes('\n')
	if err != nil {
		return err
	}
	var ev control.Event
	if err := json.Unmarshal(line, &ev); err != nil {
		return err
	}
	if ev.Config == nil || ev.Config.Dialling == nil || len(ev.Config.Dialling.Gateways) != 2 || ev.Config.Dialling.Gateways[0].Grant == "" {
		return fmt.Errorf("%d, no grant: %.300s", resp.StatusCode, line)
	}
	return nil
}
