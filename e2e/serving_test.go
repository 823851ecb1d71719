package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// Ports of the resource that two gateways serve, each on its own loopback.
const (
	pairWebPort  = 7443
	pairEchoPort = 7444
)

// noticed is how long a gateway may take to find out that it does not reach a resource, or that it does again.
const noticed = 25 * time.Second

// TestSeveralGateways: a resource has two gateways. New connections avoid the one that does not reach it, and the one that drains; an open
// connection lives through the drain.
func TestSeveralGateways(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{})
	page := func(name string, h *lab.Host) *http.Server {
		l := must(h.Listen(fmt.Sprintf("127.0.0.1:%d", pairWebPort)))(t)
		srv := &http.Server{ReadHeaderTimeout: resume, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = srv.Serve(l) // until it is closed
		}()
		t.Cleanup(func() {
			_ = srv.Close()
			<-done
		})
		return srv
	}
	var nodes []*lab.Node
	var webs []*http.Server
	hosts := []*lab.Host{s.Gateway, s.Gateway2}
	for i, name := range []string{"alpha", "beta"} {
		n, err := s.StartNode(within(t, time.Minute), lab.NodeSpec{
			Kind: identity.Gateway, Name: name, Host: hosts[i], Args: []string{"--tun", "off", "--metrics-listen", "", "--allow", "127.0.0.0/8"},
		})
		check(t, err)
		check(t, n.WaitReady(within(t, resume)))
		nodes = append(nodes, n)
		webs = append(webs, page(name, hosts[i]))
		must(hosts[i].Echo(fmt.Sprintf("127.0.0.1:%d", pairEchoPort)))(t)
	}
	check(t, s.AddResource(within(t, resume), lab.Resource{
		Name: "pair", Gateway: "alpha,beta", Address: "127.0.0.1", TCP: fmt.Sprintf("%d,%d", pairWebPort, pairEchoPort),
	}, "client:"+lab.Laptop))
	var r control.ResourceRecord
	check(t, s.SallywayJSON(within(t, resume), &r, "resource", "show", "pair"))
	virtual := r.Virtual[0]
	client := s.Client.HTTPClient()
	client.Transport.(*http.Transport).DisableKeepAlives = true
	get := func() (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+netip.AddrPortFrom(virtual, pairWebPort).String()+"/", nil)
		if err != nil {
			return "", err
		}
		res, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	// served waits until pages come from one gateway, and then wants no other and no failure.
	served := func(by string, d time.Duration) {
		t.Helper()
		start := time.Now()
		check(t, lab.Until(within(t, d), 50*time.Millisecond, func() error {
			if got, err := get(); err != nil || got != by {
				return fmt.Errorf("page %q of %s: %w", got, by, err)
			}
			return nil
		}))
		t.Logf("served by %s after %v", by, time.Since(start).Round(time.Millisecond))
		for i := range 20 {
			if got, err := get(); err != nil || got != by {
				t.Fatalf("page %d is %q, %v, want %s's", i, got, err, by)
			}
		}
	}
	served("alpha", 20*time.Second)
	check(t, webs[0].Close())
	served("beta", noticed)
	check(t, s.SallywayJSON(within(t, resume), &r, "resource", "show", "pair"))
	if len(r.Reached) != 2 || r.Reached[0].Gateway != "alpha" || r.Reached[0].OK || !r.Reached[1].OK {
		t.Errorf("the platform knows %+v", r.Reached)
	}
	webs[0] = page("alpha", hosts[0])
	served("alpha", noticed)

	pulse := must(s.Client.StartPulse(within(t, 10*time.Second), netip.AddrPortFrom(virtual, pairEchoPort), 10*time.Millisecond))(t)
	defer pulse.Stop()
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 20))
	res, err := hosts[0].Run(within(t, resume), must(s.Bin("gatewayd"))(t), "drain", "--state", nodes[0].State, "--deadline", "1m")
	if err != nil {
		t.Fatalf("drain: %v %s", err, res.Stderr)
	}
	served("beta", 5*time.Second)
	check(t, pulse.WaitBeats(within(t, 10*time.Second), 100)) // the open connection goes on
	select {
	case <-nodes[0].Done():
		t.Fatal("the gateway ended while a connection was open")
	default:
	}
	pulse.Stop()
	select {
	case <-nodes[0].Done():
	case <-time.After(10 * time.Second):
		t.Errorf("the gateway did not end after its last connection:\n%s", nodes[0].Log.Tail(10))
	}
	served("beta", 5*time.Second)
}

// TestPingFailsOver: a ping to a resource with two gateways goes on when the one that answers it is killed.
func TestPingFailsOver(t *testing.T) {
	ping := program(t, "ping")
	s := newSite(t, lab.Config{}, lab.SiteConfig{})
	var first *lab.Node
	for i, name := range []string{"alpha", "beta"} {
		n, err := s.StartNode(within(t, time.Minute), lab.NodeSpec{
			Kind: identity.Gateway, Name: name, Host: []*lab.Host{s.Gateway, s.Gateway2}[i],
			Args: []string{"--tun", "off", "--metrics-listen", "", "--allow", "127.0.0.0/8"},
		})
		check(t, err)
		check(t, n.WaitReady(within(t, resume)))
		if first == nil {
			first = n
		}
	}
	check(t, s.AddResource(within(t, resume), lab.Resource{Name: "both", Gateway: "alpha,beta", Address: "127.0.0.1", ICMP: true}, "client:"+lab.Laptop))
	var r control.ResourceRecord
	check(t, s.SallywayJSON(within(t, resume), &r, "resource", "show", "both"))
	to := r.Virtual[0].String()
	check(t, lab.Until(within(t, 20*time.Second), 200*time.Millisecond, func() error {
		_, err := s.Client.Run(t.Context(), ping, "-n", "-c", "1", "-W", "1", to)
		return err
	}))
	const pace = 100 * time.Millisecond
	done := make(chan struct{})
	var out lab.Result
	go func() {
		defer close(done)
		out, _ = s.Client.Run(t.Context(), ping, "-n", "-D", "-i", "0.1", "-c", "100", "-w", "15", to) // what it prints is looked at
	}()
	<-time.After(2 * time.Second) // some answers come before
	killed := time.Now()
	first.Kill()
	<-done
	var last time.Time
	var gap time.Duration
	before, after := 0, 0
	for line := range strings.Lines(out.Stdout) {
		var at float64
		if n, _ := fmt.Sscanf(line, "[%f] 64 bytes", &at); n != 1 {
			continue
		}
		when := time.UnixMicro(int64(at * 1e6))
		if when.Before(killed) {
			before++
		} else {
			after++
			gap = max(gap, when.Sub(last))
		}
		last = when
	}
	t.Logf("%d answers before the gateway was killed, %d after, longest gap %v", before, after, gap.Round(time.Millisecond))
	if before < 5 || after < 20 || gap > 4*time.Second || time.Since(last) > 2*time.Second+pace {
		t.Errorf("the last answer came %v ago:\n%s", time.Since(last), out.Stdout)
	}
}
