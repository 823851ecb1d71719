// Package otlptest is a collector of metrics and traces for tests: a real HTTP server that takes OTLP in protobuf and decodes it.
//
//	c := otlptest.Start(t)
//	… a program that sends to c.URL …
//	spans := c.Wait(t, 2, func(s otlptest.Span) bool { return s.Service == "gatewayd" })
package otlptest

import (
	"compress/gzip"
	"encoding/hex"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// patience is how long Wait waits: CI is loaded.
const patience = 30 * time.Second

// Span is one that arrived. Ids are hexadecimal; Parent is empty at the root of a trace.
type Span struct {
	Service, Name             string
	Trace, ID, Parent, Failed string
	Kind                      tracepb.Span_SpanKind
	Attributes                map[string]string
}

// Collector keeps what it is sent. Its methods may be called concurrently.
type Collector struct {
	URL string

	mu       sync.Mutex
	spans    []Span                       // guarded by mu
	metrics  map[string]*metricspb.Metric // the latest of each name; guarded by mu
	resource map[string]string            // of the latest metrics; guarded by mu
	headers  http.Header                  // of the latest request; guarded by mu
	answers  []int                        // statuses that the next requests get; guarded by mu
	requests int                          // guarded by mu
}

// Start starts one on loopback, which ends with the test.
func Start(t testing.TB) *Collector {
	t.Helper()
	c := &Collector{metrics: make(map[string]*metricspb.Metric)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, r *http.Request) { c.take(t, w, r, new(tracepb.TracesData)) })
	mux.HandleFunc("POST /v1/metrics", func(w http.ResponseWriter, r *http.Request) { c.take(t, w, r, new(metricspb.MetricsData)) })
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	c.URL = srv.URL
	return c
}

// Answer has the next requests answered with these statuses, and those after them with 200.
func (c *Collector) Answer(statuses ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers = statuses
}

func (c *Collector) take(t testing.TB, w http.ResponseWriter, r *http.Request, m proto.Message) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			t.Errorf("OTLP: %v", err)
			return
		}
		body = z
	}
	b, err := io.ReadAll(body)
	if err != nil {
		return // the sender gave up
	}
	if ct := r.Header.Get("Content-Type"); ct != "application/x-protobuf" {
		t.Errorf("OTLP: content type %q", ct)
	}
	if err := proto.Unmarshal(b, m); err != nil {
		t.Errorf("OTLP: %v", err)
		return
	}
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		t.Error("OTLP: a field that the protocol does not know")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	c.headers = r.Header.Clone()
	if len(c.answers) > 0 {
		status := c.answers[0]
		c.answers = c.answers[1:]
		w.WriteHeader(status)
		return
	}
	switch m := m.(type) {
	case *tracepb.TracesData:
		for _, rs := range m.ResourceSpans {
			service := about(rs.Resource)["service.name"]
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					c.spans = append(c.spans, span(service, s))
				}
			}
		}
	case *metricspb.MetricsData:
		for _, rm := range m.ResourceMetrics {
			c.resource = about(rm.Resource)
			for _, sm := range rm.ScopeMetrics {
				for _, one := range sm.Metrics {
					c.metrics[one.Name] = one
				}
			}
		}
	}
}

func about(r *resourcepb.Resource) map[string]string { return pairs(r.GetAttributes()) }

func span(service string, s *tracepb.Span) Span {
	out := Span{
		Service: service, Name: s.Name, Trace: hex.EncodeToString(s.TraceId), ID: hex.EncodeToString(s.SpanId), Parent: hex.EncodeToString(s.ParentSpanId),
		Kind: s.Kind, Attributes: pairs(s.Attributes),
	}
	if s.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
		out.Failed = s.Status.Message
	}
	return out
}

func pairs(kvs []*commonpb.KeyValue) map[string]string {
	out := make(map[string]string)
	for _, kv := range kvs {
		switch v := kv.Value.GetValue().(type) {
		case *commonpb.AnyValue_StringValue:
			out[kv.Key] = v.StringValue
		default:
			out[kv.Key] = kv.Value.String()
		}
	}
	return out
}

// Spans are all that arrived.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Span(nil), c.spans...)
}

// Metrics are the latest by name.
func (c *Collector) Metrics() map[string]*metricspb.Metric {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.metrics)
}

// Resource describes the program that sent metrics last.
func (c *Collector) Resource() map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.resource)
}

// Header is a header of the latest request.
func (c *Collector) Header(name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.headers.Get(name)
}

// Requests is how many there were.
func (c *Collector) Requests() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requests
}

// Wait returns the spans that are as asked when there are n, and fails the test when there are not in time.
func (c *Collector) Wait(t testing.TB, n int, is func(Span) bool) []Span {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		var found []Span
		for _, s := range c.Spans() {
			if is(s) {
				found = append(found, s)
			}
		}
		if len(found) >= n {
			return found
		}
		if time.Now().After(end) {
			t.Fatalf("%d spans as wanted, want %d; there are %+v", len(found), n, c.Spans())
		}
	}
}
