package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// benchServices are what a gateway answers, on loopback, as far as a client sees them.
func benchServices(t testing.TB, h *harness, connect func(trial.Request) trial.Answer) {
	t.Helper()
	var received, datagrams atomic.Uint64
	h.gateway.bench = map[uint16]uint16{
		trial.PortRun: tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
			defer c.Close()
			l := trial.NewLines(c, c)
			for {
				var req trial.Request
				if l.Read(&req) != nil {
					return
				}
				a := trial.Answer{Stats: &trial.Stats{
					Received: received.Load(), Datagrams: datagrams.Load(), RelayRTT: time.Millisecond, CPU: trial.ReadCPU(),
					Sender: trial.Sender{Packets: received.Load(), Window: 1000, RTT: time.Millisecond},
				}}
				if req.Op == trial.OpConnect {
					a = connect(req)
				}
				if l.Write(a) != nil {
					return
				}
			}
		}),
		trial.PortEcho: tcpServer(t, "127.0.0.1", echoTCP),
		trial.PortDiscard: tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
			defer c.Close()
			began := time.Now()
			n, _ := io.Copy(io.Discard, c)
			received.Add(uint64(n))
			_ = trial.NewLines(nil, c).Write(trial.Received{Bytes: uint64(n), Took: time.Since(began)})
		}),
		trial.PortSource: tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
			defer c.Close()
			for buf := make([]byte, 64<<10); ; {
				if _, err := c.Write(buf); err != nil {
					return
				}
			}
		}),
	}
}

// TestBench measures over a real session and finds every figure; what was not asked for is not there.
func TestBench(t *testing.T) {
	h := newHarness(t)
	var asked []trial.Request
	benchServices(t, h, func(r trial.Request) trial.Answer {
		asked = append(asked, r)
		return trial.Answer{Connect: &trial.Connect{Took: time.Duration(len(asked)) * time.Millisecond, Refused: true}}
	})
	c := &Client{sessions: h.Sessions}
	var steps []string
	r, err := c.Bench(t.Context(), BenchConfig{Target: "db:5432", Time: 300 * time.Millisecond, Flows: 2, UDP: -1}, func(s string) { steps = append(steps, s) })
	if err != nil {
		t.Fatal(err)
	}
	want := trial.Request{Op: trial.OpConnect, Host: "db.corp.example", Port: 5432}
	if len(asked) != connects || asked[0] != want {
		t.Errorf("the gateway was asked for %+v, want %+v", asked, want)
	}
	if len(steps) < 4 || r.Target != "db:5432" || r.Resource != "db" || r.Gateway.Name != "office" || r.Gateway.Node != gateway1 || r.Path != "memory" || r.Flows != 2 || r.UDP != nil {
		t.Errorf("%+v, %q", r, steps)
	}
	last := r.Hops[len(r.Hops)-1]
	if last.To != "db (db.corp.example:5432)" || last.RTT != 2*time.Millisecond || last.Min != time.Millisecond || last.Samples != 3 || last.Note == "" {
		t.Errorf("%+v", last)
	}
	if r.Idle.Samples < 10 || r.Idle.P50 <= 0 || r.Idle.Max < r.Idle.P99 {
		t.Errorf("%+v", r.Idle)
	}
	for name, l := range map[string]*BenchLoad{"up": r.Up, "down": r.Down} {
		if l == nil || l.Bytes == 0 || l.BitsPerSecond <= 0 || l.Took <= 0 || l.Flows != 2 || l.Latency.Samples == 0 || l.Client.Cores == 0 {
			t.Errorf("%s: %+v", name, l)
		}
	}
	if r.Up.Packets == 0 || r.Up.Window == 0 || r.Up.RTT == 0 {
		t.Errorf("up, from this end's QUIC: %+v", r.Up)
	}
	r, err = c.Bench(t.Context(), BenchConfig{Target: "office", Time: 100 * time.Millisecond, Down: true, UDP: -1}, nil)
	if err != nil || r.Up != nil || r.Down == nil || r.Resource != "" || r.Hops[len(r.Hops)-1].Method == "TCP connect" {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestBenchDatagrams counts what is lost on each way.
func TestBenchDatagrams(t *testing.T) {
	h := newHarness(t)
	benchServices(t, h, nil)
	// This gateway sees each datagram and sends all but each fourth back; it says that it saw 36 of the 40.
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 2*pacedSize)
		for i := 0; ; i++ {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			if i%4 == 0 {
				continue
			}
			_, _ = pc.WriteTo(buf[:n], from)
			if i == 1 {
				_, _ = pc.WriteTo(buf[:n], from)   // twice counts once
				_, _ = pc.WriteTo(buf[:n/2], from) // and these are not ours
				_, _ = pc.WriteTo(bytes.Repeat([]byte{0xff}, pacedSize), from)
			}
		}
	}()
	h.gateway.bench[trial.PortRun] = tcpServer(t, "127.0.0.1", func(c *net.TCPConn) {
		defer c.Close()
		l := trial.NewLines(c, c)
		for seen := uint64(0); ; seen = 36 {
			var req trial.Request
			if l.Read(&req) != nil {
				return
			}
			_ = l.Write(trial.Answer{Stats: &trial.Stats{Datagrams: seen}})
		}
	})
	str, err := h.session.DialTCP(t.Context(), trial.Host, trial.PortRun)
	if err != nil {
		t.Fatal(err)
	}
	defer str.Reset()
	h.gateway.bench[trial.PortEcho] = uint16(pc.LocalAddr().(*net.UDPAddr).Port)
	b := &benchRun{cfg: BenchConfig{Time: time.Second, UDP: 40 * 8 * pacedSize}, session: h.session, run: str, lines: trial.NewLines(str, str), step: func(string) {}}
	u, err := b.paced(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if u.Sent != 40 || u.AtGateway != 36 || u.Returned != 30 || math.Abs(u.LossUp-0.1) > 1e-9 || math.Abs(u.LossDown-1.0/6) > 1e-9 || u.Latency.Samples != 30 {
		t.Errorf("%+v", u)
	}
}

// TestBenchEndsEarly: a gateway's refusal is told as it is; a run that breaks, a caller that gives up and a session that ends end the bench.
func TestBenchEndsEarly(t *testing.T) {
	h := newHarness(t)
	if _, err := h.Bench(t.Context(), BenchConfig{Target: "office"}, nil); !errors.Is(err, tunnel.ErrDenied) || !strings.Contains(err.Error(), "may not measure") {
		t.Errorf("%v, want the refusal", err)
	}
	benchServices(t, h, nil)
	run := func(ctx context.Context, step func(string)) error {
		t.Helper()
		began := time.Now()
		_, err := h.Bench(ctx, BenchConfig{Target: "office", Time: 30 * time.Second}, step)
		if err == nil || time.Since(began) > 20*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		return err
	}
	gone := errors.New("had enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	if err := run(ctx, func(s string) {
		if strings.HasPrefix(s, "load") {
			cancel(gone)
		}
	}); !errors.Is(err, gone) {
		t.Errorf("%v, want %v", err, gone)
	}
	services := h.gateway.bench
	h.gateway.bench = map[uint16]uint16{trial.PortRun: tcpServer(t, "127.0.0.1", func(c *net.TCPConn) { c.Close() }), trial.PortEcho: services[trial.PortEcho]}
	if err := run(t.Context(), nil); !strings.Contains(err.Error(), "ended the run") {
		t.Errorf("%v, want that the gateway ended it", err)
	}
	h.gateway.bench = services
	if err := run(t.Context(), func(s string) {
		if strings.HasPrefix(s, "load") {
			_ = h.session.Close("test")
		}
	}); !errors.Is(err, tunnel.ErrNoSession) {
		t.Errorf("%v, want that the session ended", err)
	}
}

func TestBenchTargets(t *testing.T) {
	all := []policy.PortRange{policy.AllPorts}
	by := []control.ServingGateway{{Node: gateway1}}
	res := func(name, address string, tcp []policy.PortRange) control.ReachableResource {
		return control.ReachableResource{Resource: policy.Resource{ID: name, Name: name, Address: address, TCP: tcp}, FQDN: name + ".acme.sallyway.internal", Gateways: by}
	}
	d := &control.Dialling{
		Gateways: []control.GatewayRef{{Node: gateway1, Name: "office", FQDN: "office.acme.sallyway.internal"}},
		Resources: []control.ReachableResource{
			res("db", "10.0.3.7", []policy.PortRange{{First: 5432, Last: 5433}}), res("web", "web.corp.example", []policy.PortRange{policy.AllPorts, {First: 80, Last: 80}}),
			res("lan", "10.0.4.0/24", []policy.PortRange{{First: 22, Last: 22}}), res("names", "*.corp.test", all), res("any", "10.0.3.8", all), res("udp", "10.0.3.9", nil),
			res("office", "10.0.3.10", all),
		},
	}
	s := NewSessions(SessionsConfig{Logger: slog.New(slog.DiscardHandler)})
	s.table.Store(newTable(d))
	for _, c := range []struct {
		target, resource, host string
		port                   uint16
		note                   string
	}{
		{"db", "db", "10.0.3.7", 5432, ""},
		{"db:5433", "db", "10.0.3.7", 5433, ""},
		{"DB.acme.sallyway.internal.", "db", "10.0.3.7", 5432, ""},
		{"10.0.3.7", "db", "10.0.3.7", 5432, ""},
		{"resource:db", "db", "10.0.3.7", 5432, ""},
		{"web", "web", "web.corp.example", 80, ""},
		{"lan", "lan", "", 22, "many hosts"},
		{"10.0.4.9", "lan", "10.0.4.9", 22, ""},
		{"10.0.4.9:2222", "lan", "10.0.4.9", 2222, ""},
		{"names", "names", "", 0, "many hosts"},
		{"a.corp.test:443", "names", "a.corp.test", 443, ""},
		{"any", "any", "", 0, "every port"},
		{"any:443", "any", "10.0.3.8", 443, ""},
		{"udp", "udp", "", 0, "no TCP port"},
		{"office", "office", "", 0, "every port"},
		{"gateway:office", "", "", 0, ""},
		{"office.acme.sallyway.internal", "office", "", 0, "every port"},
	} {
		got, err := s.benchTarget(c.target)
		if err != nil || got.resource != c.resource || got.host != c.host || (c.host != "" && got.port != c.port) || !strings.Contains(got.note, c.note) || !slices.Equal(got.gateways, []identity.Node{gateway1}) {
			t.Errorf("%s: %+v, %v", c.target, got, err)
		}
	}
	for _, bad := range []string{"nothing", "10.9.9.9", "gateway:db", "resource:nothing", "db:port", "a:b:c", ":", "gateway:", "db:0", "fd00::1", "[fd00::1]:80", strings.Repeat("x", 3000)} {
		if got, err := s.benchTarget(bad); err == nil || len(err.Error()) > 500 {
			t.Errorf("%.40q: %+v, %v", bad, got, err)
		}
	}
}

func TestBenchConfigs(t *testing.T) {
	good := BenchConfig{Target: "db"}
	if err := good.validate(); err != nil || good.Time != DefaultBenchTime || good.Flows != 1 || !good.Up || !good.Down {
		t.Errorf("%+v, %v", good, err)
	}
	for _, bad := range []BenchConfig{
		{},
		{Target: "db", Time: time.Millisecond},
		{Target: "db", Time: -time.Second},
		{Target: "db", Time: trial.MaxTime + 1},
		{Target: "db", Flows: -1},
		{Target: "db", Flows: trial.MaxFlows + 1},
		{Target: "db", UDP: maxPaced + 1},
	} {
		if err := bad.validate(); err == nil {
			t.Errorf("%+v passes", bad)
		}
	}
	for s, want := range map[string]float64{"": 0, "auto": 0, "off": -1, "64k": 64e3, "20M": 20e6, "0.1G": 1e8, "5000": 5000} {
		if got, err := parsePaced(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, bad := range []string{"0", "-1", "1", "x", "M", "NaN", "Inf", "1e99", "201M", "20 M", "20Mb"} {
		if got, err := parsePaced(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

// TestBenchLimit: a limit is named when the figures show it, and only then.
func TestBenchLimit(t *testing.T) {
	free := trial.Load{Process: 0.5, Cores: 4, Host: 0.3}
	// 100 Mbit/s is 1 MB per 80 ms.
	base := BenchLoad{BitsPerSecond: 98e6, Packets: 100_000, Window: 1e6, RTT: 80 * time.Millisecond, Client: free, Gateway: free}
	for _, c := range []struct {
		name   string
		change func(*BenchLoad)
		idle   time.Duration
		by     string
		says   string
	}{
		{"window", func(*BenchLoad) {}, 79 * time.Millisecond, "window", "1.0 MB"},
		{"loss", func(l *BenchLoad) { l.Lost, l.LossShare = 500, 0.005 }, 79 * time.Millisecond, "loss", "0.50 %"},
		{"a stray loss explains nothing", func(l *BenchLoad) { l.Lost, l.LossShare = 2, 0.00002 }, 79 * time.Millisecond, "window", ""},
		{"queue", func(*BenchLoad) {}, 20 * time.Millisecond, "link", "60.0 ms"},
		{"queue, of a long path", func(l *BenchLoad) { l.RTT, l.Window = 120*time.Millisecond, 15e5 }, 80 * time.Millisecond, "link", "40.0 ms"},
		{"queue, maybe for processors", func(l *BenchLoad) { l.Gateway.Host = 0.85 }, 20 * time.Millisecond, "link", "85 % busy"},
		{"queue that overflows", func(l *BenchLoad) { l.Lost, l.LossShare = 500, 0.005 }, 20 * time.Millisecond, "link", "dropped 0.50 %"},
		{"a queue too short to matter", func(l *BenchLoad) { l.RTT, l.Window = 3*time.Millisecond, 37500 }, time.Millisecond, "window", ""},
		{"far from the window", func(l *BenchLoad) { l.BitsPerSecond = 50e6 }, 79 * time.Millisecond, "", ""},
		{"loss, and far from the window", func(l *BenchLoad) { l.BitsPerSecond, l.Lost, l.LossShare = 50e6, 500, 0.005 }, 79 * time.Millisecond, "", ""},
		{"this host", func(l *BenchLoad) { l.Client.Host, l.Client.Process = 0.97, 0.7 }, 79 * time.Millisecond, "cpu", "this host was 97 % busy, 0.7 of"},
		{"the gateway's host", func(l *BenchLoad) { l.Gateway.Host, l.Gateway.Process = 0.99, 2 }, 79 * time.Millisecond, "cpu", "the gateway's host"},
		{"this host, by others, and the window", func(l *BenchLoad) { l.Client.Host = 0.97 }, 79 * time.Millisecond, "window", "this host was 97 % busy, mostly with other programs"},
		{"the gateway's host, by others, and loss", func(l *BenchLoad) { l.Gateway.Host, l.Lost, l.LossShare = 0.97, 500, 0.005 }, 79 * time.Millisecond, "loss", "the gateway's host was 97 %"},
		{"this host, by others, and nothing else", func(l *BenchLoad) { l.Client.Host, l.BitsPerSecond = 0.97, 50e6 }, 79 * time.Millisecond, "cpu", "mostly with other programs"},
		{"somewhat busy, and nothing else", func(l *BenchLoad) { l.Client.Host, l.BitsPerSecond = 0.85, 50e6 }, 79 * time.Millisecond, "", ""},
		{"a process that may use one core", func(l *BenchLoad) { l.Client = trial.Load{Process: 0.95, Cores: 1, Host: 0.2} }, 79 * time.Millisecond, "cpu", "the process on this host used 0.9"},
		{"processors unknown", func(l *BenchLoad) { l.Client, l.Gateway = trial.Load{Host: -1}, trial.Load{Host: -1} }, 79 * time.Millisecond, "window", ""},
		{"nothing known", func(l *BenchLoad) { l.Window, l.RTT = 0, 0 }, 0, "", ""},
	} {
		l := base
		c.change(&l)
		if got := limitOf(&l, c.idle); got.By != c.by || !strings.Contains(got.Why, c.says) || (got.By == "") != (got.Why == "") {
			t.Errorf("%s: %+v, want %q that says %q", c.name, got, c.by, c.says)
		}
	}
}

func TestBenchSummaries(t *testing.T) {
	var s []time.Duration
	for i := range 200 {
		s = append(s, time.Duration(200-i)*time.Millisecond)
	}
	l := summarize(s)
	if l != (BenchLatency{200, time.Millisecond, 100 * time.Millisecond, 198 * time.Millisecond, 200 * time.Millisecond}) || s[0] != 200*time.Millisecond {
		t.Errorf("%+v", l)
	}
	if one := summarize(s[:1]); one.P50 != s[0] || one.P99 != s[0] || one.Min != s[0] {
		t.Errorf("%+v", one)
	}
	if summarize(nil) != (BenchLatency{}) || jitter(nil) != 0 || jitter(s[:1]) != 0 || jitter(s) != time.Millisecond {
		t.Error("none, or jitter")
	}
	if got := l.String(); got != "p50 100 ms, p99 198 ms (200 samples)" {
		t.Error(got)
	}
	if got := summarize(s[150:]).String(); got != "p50 25.0 ms, max 50.0 ms (50 samples)" {
		t.Error(got)
	}
	for got, want := range map[string]string{
		bitRate(2.34e9): "2.34 Gbit/s", bitRate(94.26e6): "94.3 Mbit/s", bitRate(64e3): "64 kbit/s", bitRate(8): "8 bit/s", byteCount(12): "12 B", byteCount(1.5e9): "1.50 GB",
		millis(12 * time.Microsecond): "0.012 ms", millis(0): "0.00 ms", percent(0): "0.00 %", percent(0.00001): "under 0.01 %", percent(0.5): "50.00 %",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// filled is a report that leaves nothing out.
func filled() *BenchReport {
	lat := BenchLatency{200, 1, 2, 3, 4}
	load := &BenchLoad{
		Flows: 1, BitsPerSecond: 98e6, Bytes: 61e6, Took: 5 * time.Second, Intervals: []float64{90e6, 99e6}, Packets: 1000, Lost: 5, LossShare: 0.005, Window: 1e6,
		RTT: 80 * time.Millisecond, Latency: lat, Client: trial.Load{Process: 0.5, Cores: 2, Host: 0.5}, Gateway: trial.Load{Cores: 2, Host: -1}, SecondsPerGB: 2, Limit: BenchLimit{"loss", "loss: some"},
	}
	return &BenchReport{
		Target: "db", Resource: "db", Gateway: BenchNode{gateway1, "office"}, Relay: "fra-1", Transport: "udp", Path: "fra-1 udp", Standby: "ams-2 udp", Moves: 1,
		Started: time.Unix(1, 0), Time: time.Second, Flows: 1, Idle: lat, Up: load, Down: load,
		Hops: []BenchHop{{From: "client", To: "relay fra-1", RTT: time.Millisecond, Min: 1, Samples: 5, Method: "STUN Binding", Note: "noted"}, {From: "gateway office", To: "db", Note: "not measured: it has no TCP port"}},
		UDP:  &BenchUDP{Asked: 1e6, BitsPerSecond: 1e6, Size: 1000, Sent: 100, AtGateway: 99, Returned: 98, LossUp: 0.01, LossDown: 0.0101, Jitter: 1, Latency: lat},
	}
}

// TestBenchJSON holds the document that scripts read: its keys stay.
func TestBenchJSON(t *testing.T) {
	b, err := json.Marshal(filled())
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	keys := func(v any) string {
		if l, ok := v.([]any); ok {
			v = l[0]
		}
		m, ok := v.(map[string]any)
		if !ok {
			t.Fatalf("%v is no object", v)
		}
		var out []string
		for k := range m {
			out = append(out, k)
		}
		slices.Sort(out)
		return strings.Join(out, " ")
	}
	up := doc["up"].(map[string]any)
	latency := "max_ns min_ns p50_ns p99_ns samples"
	for _, c := range []struct {
		what string
		v    any
		want string
	}{
		{"report", doc, "down flows gateway hops latency_idle moves path relay resource standby started target time_ns transport udp up"},
		{"gateway", doc["gateway"], "name node"},
		{"hops", doc["hops"], "from method min_ns note rtt_ns samples to"},
		{"latency_idle", doc["latency_idle"], latency},
		{"up", up, "bits_per_second bytes client_cpu client_cpu_seconds_per_gb congestion_window_bytes flows gateway_cpu intervals_bits_per_second latency limit loss_share packets packets_lost rtt_ns took_ns"},
		{"down", doc["down"], keys(up)},
		{"up.latency", up["latency"], latency},
		{"up.client_cpu", up["client_cpu"], "cores host_share process_cores"},
		{"up.limit", up["limit"], "by why"},
		{"udp", doc["udp"], "asked_bits_per_second at_gateway bits_per_second datagram_bytes jitter_ns latency loss_share_down loss_share_up returned sent"},
	} {
		if got := keys(c.v); got != c.want {
			t.Errorf("%s has %s\nwant %s", c.what, got, c.want)
		}
	}
	none, err := json.Marshal(&BenchReport{})
	if err != nil || !strings.Contains(string(none), `"up":null,"down":null,"udp":null`) {
		t.Errorf("what was not asked for is not null: %s, %v", none, err)
	}
}

// TestBenchText: people get every figure, and no claim about a limit that does not show.
func TestBenchText(t *testing.T) {
	var b strings.Builder
	r := filled()
	r.Text(&b)
	for _, want := range []string{
		"db by gateway office", "over fra-1 udp, standby ams-2 udp", "path changed during the run (1)", "client → relay fra-1", "STUN Binding, noted", "it has no TCP port", "up         98.0 Mbit/s",
		"lost 5 of 1000 packets (0.50 %)", "limited by loss: some", "by second: 90.0 Mbit/s to 99.0 Mbit/s", "lost 1 up (1.00 %), 1 down (1.01 %)", "its host 50 % busy", "2.0 s/GB",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	b.Reset()
	r.Up.Limit, r.Down, r.UDP = BenchLimit{}, nil, nil
	r.Text(&b)
	if s := b.String(); strings.Contains(s, "limited by") || !strings.Contains(s, "does not show") || strings.Contains(s, "down ") || strings.Contains(s, "udp  ") {
		t.Error(s)
	}
}

// TestBenchHandler: the control socket takes what it knows, one at a time, and a caller that hangs up ends its run.
func TestBenchHandler(t *testing.T) {
	h := newHarness(t)
	benchServices(t, h, nil)
	addr := serve(t, func(ctx context.Context, l net.Listener) error {
		srv := &http.Server{Handler: benchHandler(h.Sessions, h.log)}
		defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
		return srv.Serve(l)
	})
	ask := func(query string) (*http.Response, net.Conn, *bufio.Reader) {
		t.Helper()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "GET /bench?run=%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", url.QueryEscape(query), benchUpgrade)
		r := bufio.NewReader(c)
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return res, c, r
	}
	for _, bad := range []string{"", "{", `{"target":"office","colour":1}`, `{"target":"nothing"}`, `{"target":"office","flows":1000}`, `{"target":"office","time_ns":"1s"}`, `{"target":""}`} {
		if res, _, _ := ask(bad); res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", bad, res.Status)
		}
	}
	events := func(r io.Reader) (last benchEvent) {
		for dec := json.NewDecoder(r); last.Report == nil && last.Error == ""; {
			last = benchEvent{}
			if err := dec.Decode(&last); err != nil {
				t.Fatal(err)
			}
		}
		return last
	}
	res, c, r := ask(`{"target":"office","time_ns":30000000000,"udp":-1}`)
	if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Upgrade") != benchUpgrade {
		t.Fatal(res.Status)
	}
	if _, err := r.ReadBytes('\n'); err != nil {
		t.Fatal(err)
	}
	if res, _, _ := ask(`{"target":"office"}`); res.StatusCode != http.StatusConflict {
		t.Errorf("a second one: %s", res.Status)
	}
	c.Close()
	// It is over soon, and the next one runs to its end.
	for deadline := time.Now().Add(20 * time.Second); ; {
		res, _, r := ask(`{"target":"office","time_ns":100000000,"udp":-1,"up":true}`)
		if res.StatusCode == http.StatusSwitchingProtocols {
			if e := events(r); e.Report == nil || e.Report.Up == nil || e.Report.Down != nil {
				t.Errorf("%+v", e)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the run of a caller that hung up goes on: %s", res.Status)
		}
		<-time.After(10 * time.Millisecond)
	}
	h.gateway.bench = nil
	if _, _, r := ask(`{"target":"office"}`); r != nil {
		if e := events(r); !strings.Contains(e.Error, "may not measure") {
			t.Errorf("%+v", e)
		}
	}
}

// TestBenchCommand: wrong use is told before anybody is asked, and help teaches.
func TestBenchCommand(t *testing.T) {
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		root := &cobra.Command{Use: "sallyway", SilenceErrors: true, SilenceUsage: true}
		root.AddCommand(BenchCommand())
		root.SetArgs(append([]string{"bench"}, append(args, "--state", t.TempDir())...))
		root.SetOut(&out)
		root.SetErr(&out)
		err := root.ExecuteContext(t.Context())
		return out.String(), err
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{nil, "resource or gateway is missing"},
		{[]string{"a", "b"}, "too much"},
		{[]string{"db", "--flows", "0"}, "more than 0"},
		{[]string{"db", "--time", "-1s"}, "more than 0"},
		{[]string{"db", "--time", "2m"}, "for each direction"},
		{[]string{"db", "--flows", "33"}, "want 1 to 32"},
		{[]string{"db", "--udp", "fast"}, "--udp"},
		{[]string{"db"}, "start `sudo sallyway connect`"},
	} {
		if _, err := run(c.args...); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v, want %q", c.args, err, c.says)
		}
	}
	out, err := run("--help")
	for _, want := range []string{"sallyway bench db", "How to read it", "--bench off", "nothing is sent to the resource"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("help lacks %q: %v", want, err)
		}
	}
}
