package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/internal/lab"
)

// benchOf runs `sallyway bench` beside the laptop's client and decodes its JSON strictly: the document is what scripts read.
func benchOf(t *testing.T, s *lab.Site, args ...string) *client.BenchReport {
	t.Helper()
	bin := must(s.Bin("sallyway"))(t)
	r, err := s.Client.Run(within(t, time.Minute), append([]string{bin, "bench", "--state", s.Laptop.State, "--json"}, args...)...)
	if err != nil {
		t.Fatalf("bench %v: %v", args, err)
	}
	var rep client.BenchReport
	dec := json.NewDecoder(bytes.NewReader([]byte(r.Stdout)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rep); err != nil {
		t.Fatalf("bench %v: %v\n%s", args, err, r.Stdout)
	}
	return &rep
}

// TestBench measures the path of a running client with the real programs: every figure is there, and what may not measure does not.
func TestBench(t *testing.T) {
	s := newSite(t, lab.Config{}, lab.SiteConfig{NoBranch: true})
	p := servePrivate(t, s)
	reach(t, s.Client, p.echo.Addr, resume)
	ctx := within(t, 3*time.Minute)
	bin := must(s.Bin("sallyway"))(t)
	t.Run("a resource", func(t *testing.T) {
		r := benchOf(t, s, "web", "--time", "1s")
		if r.Resource != "web" || r.Gateway.Name != lab.Office || !strings.HasPrefix(r.Relay, "relay-") || r.Transport != "udp" || r.Path != r.Relay+" udp" {
			t.Errorf("%+v", r)
		}
		var hops []string
		for _, h := range r.Hops {
			hops = append(hops, h.From+" → "+h.To)
			if h.RTT <= 0 || h.RTT > 5*time.Second || h.Method == "" || h.Note != "" {
				t.Errorf("%+v", h)
			}
		}
		want := "client → relay " + r.Relay + ", gateway office → relay " + r.Relay + ", client → gateway office, gateway office → web (10.20.0.10:80)"
		if got := strings.Join(hops, ", "); got != want {
			t.Errorf("hops %s\nwant %s", got, want)
		}
		if r.Idle.Samples == 0 || r.Idle.P50 <= 0 || r.Idle.P99 < r.Idle.P50 {
			t.Errorf("idle %+v", r.Idle)
		}
		for name, l := range map[string]*client.BenchLoad{"up": r.Up, "down": r.Down} {
			if l == nil || l.BitsPerSecond <= 0 || l.Bytes == 0 || l.Took <= 0 || l.Took > 25*time.Second || l.Packets == 0 || l.Window == 0 || l.RTT <= 0 || l.Latency.Samples == 0 || l.Client.Cores == 0 || l.Client.Process <= 0 || l.Gateway.Process <= 0 {
				t.Errorf("%s: %+v", name, l)
			}
		}
		if u := r.UDP; u == nil || u.Sent == 0 || u.AtGateway == 0 || u.Returned == 0 || u.AtGateway > u.Sent || u.Returned > u.AtGateway {
			t.Errorf("%+v", r.UDP)
		}
	})
	t.Run("a gateway, one direction, text", func(t *testing.T) {
		r, err := s.Client.Run(ctx, bin, "bench", "--state", s.Laptop.State, lab.Office, "--time", "500ms", "--flows", "32", "--down", "--udp", "off")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("\n%s", r.Stdout)
		for _, want := range []string{"gateway office", "over relay-", "STUN Binding", "path probes", "down", "32 flows", "small messages meanwhile", "congestion window"} {
			if !strings.Contains(r.Stdout, want) {
				t.Errorf("the text lacks %q", want)
			}
		}
		for _, not := range []string{"\nup ", "\nudp "} {
			if strings.Contains(r.Stdout, not) {
				t.Errorf("the text has %q, which was not asked for", not)
			}
		}
	})
	t.Run("the gateway logs and counts it", func(t *testing.T) {
		if _, err := s.GatewayA.Log.Wait(within(t, 10*time.Second), 0, `bench over.*received=[1-9]`); err != nil {
			t.Error(err)
		}
	})
	t.Run("what is wrong is said", func(t *testing.T) {
		for _, c := range []struct {
			args []string
			code int
			says string
		}{
			{[]string{"--state", s.Laptop.State, "nothing"}, 2, "there are: gateway:office, web"},
			{[]string{"--state", s.Laptop.State, "web", "--flows", "1000"}, 2, "want 1 to"},
			{[]string{"--state", s.Client.Path("no-such-state"), "web"}, 1, "start `sudo sallyway connect`"},
			{nil, 2, "the resource or gateway is missing"},
		} {
			r, err := s.Client.Run(ctx, append([]string{bin, "bench"}, c.args...)...)
			if err == nil || r.Code != c.code || !strings.Contains(r.Stderr, c.says) {
				t.Errorf("%v: exit code %d, %v\n%s", c.args, r.Code, err, r.Stderr)
			}
		}
	})
	t.Run("revocation ends it", func(t *testing.T) {
		mark := s.GatewayA.Log.Mark()
		run := make(chan error, 1)
		rctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			r, err := s.Client.Run(rctx, bin, "bench", "--state", s.Laptop.State, "web", "--time", "40s")
			t.Logf("bench said: %s", strings.TrimSpace(r.Stderr))
			run <- err
		}()
		if _, err := s.GatewayA.Log.Wait(within(t, 20*time.Second), mark, "bench began"); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		must(s.Sallyway(ctx, "client", "revoke", lab.Laptop))(t)
		if _, err := s.GatewayA.Log.Wait(within(t, 5*time.Second), mark, "bench over"); err != nil {
			t.Error(err)
		}
		t.Logf("the gateway ended the run %v after the order", time.Since(began).Round(time.Millisecond))
		if err := <-run; err == nil {
			t.Error("bench ends well beside a revocation")
		}
	})
}
