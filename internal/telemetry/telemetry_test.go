package telemetry_test

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"

	"sallyway/internal/telemetry"
	"sallyway/internal/telemetry/otlptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run sends until stop, which waits for the flush.
func run(t *testing.T, cfg telemetry.Config) (tele *telemetry.Telemetry, stop func()) {
	t.Helper()
	tele, err := telemetry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tele.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return tele, stop
}

// TestOff wants nothing to be dialled, and nothing to be allocated where a request goes through.
func TestOff(t *testing.T) {
	for name, set := range map[string]telemetry.Settings{
		"nothing named": {}, "disabled": {Endpoint: "http://127.0.0.1:1", Disabled: true}, "both signals off": {Endpoint: "http://127.0.0.1:1", NoTraces: true, NoMetrics: true},
	} {
		tele, err := telemetry.New(telemetry.Config{Settings: set, Gatherer: prometheus.NewRegistry()})
		if tele != nil || err != nil {
			t.Fatalf("%s: %v, %v", name, tele, err)
		}
		if err := tele.Run(t.Context()); err != nil || tele.Tracer() != nil {
			t.Fatalf("%s: off runs: %v", name, err)
		}
	}
	ctx, h := t.Context(), http.Header{}
	var tracer *telemetry.Tracer
	if n := testing.AllocsPerRun(100, func() {
		ctx, span := tracer.Start(telemetry.Extract(ctx, h), "flow", telemetry.Server)
		_, child := telemetry.Child(ctx, "dial")
		child.Fail("no")
		child.End()
		span.String("k", "v")
		telemetry.Inject(ctx, h)
		span.End()
	}); n != 0 {
		t.Errorf("%v allocations where tracing is off", n)
	}
	if len(h) != 0 {
		t.Errorf("headers without a trace: %v", h)
	}
}

// TestTraces follows a request from one program to another.
func TestTraces(t *testing.T) {
	t.Parallel()
	c := otlptest.Start(t)
	set := telemetry.Settings{Endpoint: c.URL, Headers: map[string]string{"x-key": "k1"}, Gzip: true, Attributes: map[string]string{"deployment.environment": "test"}}
	a, stopA := run(t, telemetry.Config{Settings: set, Service: "asker", Version: "v1"})
	b, stopB := run(t, telemetry.Config{Settings: set, Service: "answerer"})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		ctx, span := b.Tracer().Start(telemetry.Extract(r.Context(), r.Header), "answer", telemetry.Server)
		defer span.End()
		_, child := telemetry.Child(ctx, "look up")
		child.Fail("nothing there")
		child.End()
	}))
	defer srv.Close()
	ctx, span := a.Tracer().Start(t.Context(), "ask", telemetry.Client)
	span.Int("tries", 1)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	telemetry.Inject(ctx, req.Header)
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	span.End()
	srv.Close()
	stopA()
	stopB()
	by := make(map[string]otlptest.Span)
	for _, s := range c.Spans() { // a stop has sent all
		by[s.Name] = s
	}
	ask, answer, look := by["ask"], by["answer"], by["look up"]
	if len(by) != 3 || ask.Trace == "" || answer.Trace != ask.Trace || look.Trace != ask.Trace || ask.Parent != "" || answer.Parent != ask.ID || look.Parent != answer.ID {
		t.Fatalf("spans %+v", by)
	}
	if ask.Service != "asker" || answer.Service != "answerer" || look.Failed != "nothing there" || answer.Failed != "" || ask.Attributes["tries"] == "" || ask.Trace != span.TraceID() {
		t.Errorf("spans %+v", by)
	}
	if c.Header("X-Key") != "k1" || c.Header("Content-Encoding") != "gzip" {
		t.Error("headers and compression are not as configured")
	}
}

// TestSampling samples what begins here by the ratio, and what began elsewhere as it was decided there.
func TestSampling(t *testing.T) {
	t.Parallel()
	c := otlptest.Start(t)
	none := 0.0
	tele, stop := run(t, telemetry.Config{Settings: telemetry.Settings{Endpoint: c.URL, Ratio: &none}})
	for parent, name := range map[string]string{
		"": "root", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01": "sampled", "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00": "not sampled",
		"00-zz": "damaged", strings.Repeat("0", 1<<16): "long",
	} {
		ctx := t.Context()
		if parent != "" {
			ctx = telemetry.WithParent(ctx, parent)
		}
		ctx, span := tele.Tracer().Start(ctx, name, telemetry.Server)
		h := http.Header{}
		telemetry.Inject(ctx, h)
		if want := map[bool]string{true: "-01", false: "-00"}[name == "sampled"]; !strings.HasSuffix(h.Get("Traceparent"), want) {
			t.Errorf("%s: %q goes on", name, h.Get("Traceparent"))
		}
		span.End()
	}
	stop()
	if s := c.Spans(); len(s) != 1 || s[0].Name != "sampled" || s[0].Parent != "b7ad6b7169203331" {
		t.Errorf("sent %+v", s)
	}
}

// TestMetrics sends every type of metric, with the names and labels that Prometheus sees.
func TestMetrics(t *testing.T) {
	t.Parallel()
	c := otlptest.Start(t)
	r := prometheus.NewRegistry()
	counter := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyway_things_total", Help: "Things."}, []string{"kind"})
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyway_level"})
	hist := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sallyway_took_seconds", Buckets: []float64{1, 2, 4}})
	sum := prometheus.NewSummary(prometheus.SummaryOpts{Name: "sallyway_size_bytes", Objectives: map[float64]float64{0.5: 0.05}})
	empty := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyway_nothing_total"}, []string{"kind"})
	r.MustRegister(counter, gauge, hist, sum, empty)
	counter.WithLabelValues("a").Add(3)
	gauge.Set(-1.5)
	for _, v := range []float64{0.5, 1.5, 3, 3, 100} {
		hist.Observe(v)
		sum.Observe(v)
	}
	began := time.Now()
	_, stop := run(t, telemetry.Config{Settings: telemetry.Settings{Endpoint: c.URL, NoTraces: true, Interval: time.Hour}, Gatherer: r, Metrics: r, Service: "gatewayd", Version: "v1.2.3"})
	stop() // which sends once
	m := c.Metrics()
	p := m["sallyway_things_total"].GetSum()
	if p == nil || !p.IsMonotonic || len(p.DataPoints) != 1 || p.DataPoints[0].GetAsDouble() != 3 || p.DataPoints[0].Attributes[0].Key != "kind" || p.DataPoints[0].Attributes[0].Value.GetStringValue() != "a" {
		t.Errorf("counter %v", m["sallyway_things_total"])
	}
	if at := time.Unix(0, int64(p.GetDataPoints()[0].GetStartTimeUnixNano())); at.After(time.Now()) || began.Sub(at) > time.Minute {
		t.Errorf("counter begins at %v", at)
	}
	if g := m["sallyway_level"].GetGauge(); g == nil || g.DataPoints[0].GetAsDouble() != -1.5 {
		t.Errorf("gauge %v", g)
	}
	h := m["sallyway_took_seconds"].GetHistogram()
	if h == nil {
		t.Fatal("no histogram")
	}
	dp := h.DataPoints[0]
	if dp.Count != 5 || dp.GetSum() != 108 || len(dp.ExplicitBounds) != 3 || len(dp.BucketCounts) != 4 {
		t.Fatalf("histogram %v", dp)
	}
	for i, want := range []uint64{1, 1, 2, 1} {
		if dp.BucketCounts[i] != want {
			t.Errorf("bucket %d has %d, want %d", i, dp.BucketCounts[i], want)
		}
	}
	if s := m["sallyway_size_bytes"].GetSummary(); s == nil || s.DataPoints[0].Count != 5 || s.DataPoints[0].QuantileValues[0].Quantile != 0.5 {
		t.Errorf("summary %v", s)
	}
	if m["sallyway_nothing_total"] != nil {
		t.Error("a metric without values is sent")
	}
	about := c.Resource()
	if about["service.name"] != "gatewayd" || about["service.version"] != "v1.2.3" || about["service.instance.id"] == "" {
		t.Errorf("resource %v", about)
	}
}

// value is a counter's in a registry.
func value(t *testing.T, r prometheus.Gatherer, name string, labels map[string]string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && maps.Equal(asMap(m.GetLabel()), labels) {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func asMap(ls []*dto.LabelPair) map[string]string {
	out := make(map[string]string)
	for _, l := range ls {
		out[l.GetName()] = l.GetValue()
	}
	return out
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestCollectorAway ends more spans than the queue holds while the collector takes connections and never answers: nobody waits, what is too much
// is dropped and counted, the log has a line and not thousands, and the stop does not wait for it.
func TestCollectorAway(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, log := prometheus.NewRegistry(), &lockedBuffer{}
	tele, stop := run(t, telemetry.Config{
		Settings: telemetry.Settings{Endpoint: "http://" + l.Addr().String(), Headers: map[string]string{"api-key": "s3cret"}}, Gatherer: r, Metrics: r, Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	const spans = 20_000
	for range spans {
		_, s := tele.Tracer().Start(t.Context(), "x", telemetry.Internal)
		s.End()
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > telemetry.FlushTimeout+10*time.Second {
		t.Errorf("the stop took %v", took)
	}
	const name = "sallyway_telemetry_spans_total"
	dropped, failed := value(t, r, name, map[string]string{"result": "dropped"}), value(t, r, name, map[string]string{"result": "failed"})
	if dropped == 0 || failed == 0 || dropped+failed != spans {
		t.Errorf("%v dropped and %v failed of %d", dropped, failed, spans)
	}
	text := log.String()
	if n := strings.Count(text, "level=WARN"); n == 0 || n > 6 {
		t.Errorf("%d lines of failures:\n%s", n, text)
	}
	if strings.Contains(text, "s3cret") {
		t.Errorf("the log has a header's value:\n%s", text)
	}
}

// TestRetry sends again what the collector asks for again, and nothing else.
func TestRetry(t *testing.T) {
	t.Parallel()
	for status, requests := range map[int]int{http.StatusServiceUnavailable: 2, http.StatusTooManyRequests: 2, http.StatusBadRequest: 1, http.StatusFound: 1} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			t.Parallel()
			c := otlptest.Start(t)
			c.Answer(status)
			r := prometheus.NewRegistry()
			tele, stop := run(t, telemetry.Config{Settings: telemetry.Settings{Endpoint: c.URL, NoMetrics: true}, Metrics: r})
			_, s := tele.Tracer().Start(t.Context(), "x", telemetry.Internal)
			s.End()
			if requests == 2 {
				c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == "x" })
			}
			stop()
			if n := c.Requests(); n != requests {
				t.Errorf("%d: %d requests, want %d", status, n, requests)
			}
			result := map[int]string{1: "failed", 2: "sent"}[requests]
			if v := value(t, r, "sallyway_telemetry_spans_total", map[string]string{"result": result}); v != 1 {
				t.Errorf("%d: %v spans %s", status, v, result)
			}
		})
	}
}
