// Package telemetry sends a program's metrics and traces to a collector by OTLP over HTTP (protobuf), and carries W3C trace context
// (https://www.w3.org/TR/trace-context/) from one program to the next. It is off unless an endpoint is named: then nothing is dialled and nothing
// runs, and what it leaves in the way of a request is a look at its context.
//
//	set, err := telemetry.Environment(os.LookupEnv)     // the standard variables OTEL_…
//	set.Endpoint = "http://collector.example:4318"      // perhaps by a flag
//	t, err := telemetry.New(telemetry.Config{Settings: set, Service: "gatewayd", Gatherer: registry, Log: log})
//	go t.Run(ctx)                                       // sends until ctx ends, then what is left, for FlushTimeout at most
//	ctx, span := t.Tracer().Start(ctx, "dial", telemetry.Server)
//	defer span.End()
//
// What is never in a span: tokens, headers, bodies, query strings. A name or an address of a resource is.
//
// The transport is this package's own: the exporter modules of OpenTelemetry bring gRPC into every program, also for HTTP.
package telemetry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/sync/errgroup"

	"sallyway/internal/tally"
)

// FlushTimeout is how long a stop may take to send what is left.
const FlushTimeout = 2 * time.Second

// scope names who made the spans and metrics.
const scope = "sallyway"

// Config is what New needs. Without an endpoint in Settings the rest does not matter.
type Config struct {
	Settings Settings
	// Service and Version are what the collector knows the program by: gatewayd, v1.2.3.
	Service, Version string
	// Gatherer has the metrics. Nil sends traces alone.
	Gatherer prometheus.Gatherer
	// Metrics is where this package's own are registered; nil is nowhere.
	Metrics prometheus.Registerer
	Log     *slog.Logger // nil discards
}

// Telemetry sends. Nil is off: every method may be called and does nothing.
type Telemetry struct {
	cfg      Config
	log      *slog.Logger
	began    time.Time
	resource *resource.Resource
	provider *sdktrace.TracerProvider
	tracer   *Tracer
	spans    *queue    // nil: no traces
	traces   *uploader // nil: no traces
	metrics  *uploader // nil: no metrics
	counts   counts
	often    tally.Log // what fails
}

// counts are the package's own metrics.
type counts struct {
	spans   *prometheus.CounterVec // by result
	exports *prometheus.CounterVec // by signal and result
}

func newCounts(r prometheus.Registerer) (counts, error) {
	c := counts{
		spans: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_telemetry_spans_total", Help: "Spans by what became of them: sent, failed, or dropped since the queue was full.",
		}, []string{"result"}),
		exports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_telemetry_exports_total", Help: "Requests to the OTLP collector, by signal (traces, metrics) and result (ok, failed).",
		}, []string{"signal", "result"}),
	}
	if r == nil {
		return c, nil
	}
	return c, errors.Join(r.Register(c.spans), r.Register(c.exports))
}

// New prepares what sends. It dials nothing and starts nothing. Where no endpoint is named it returns nil, which is off. Errors are for who
// wrote the settings.
func New(cfg Config) (*Telemetry, error) {
	if !cfg.Settings.On() {
		return nil, nil
	}
	if err := cfg.Settings.check(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	t := &Telemetry{cfg: cfg, log: cfg.Log, began: time.Now(), resource: describe(cfg)}
	var err error
	if t.counts, err = newCounts(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("metrics of telemetry: %w", err)
	}
	s := cfg.Settings
	if u := s.tracesURL(); u != "" {
		if t.traces, err = newUploader(s, "traces", u); err != nil {
			return nil, err
		}
		t.spans = newQueue(t.counts.spans.WithLabelValues("dropped"))
		// Parents decide; what has none is sampled by the ratio.
		sampler := sdktrace.ParentBased(sdktrace.TraceIDRatioBased(s.ratio()))
		t.provider = sdktrace.NewTracerProvider(sdktrace.WithResource(t.resource), sdktrace.WithSampler(sampler), sdktrace.WithSpanProcessor(t.spans))
		t.tracer = &Tracer{t.provider.Tracer(scope)}
	}
	if u := s.metricsURL(); u != "" && cfg.Gatherer != nil {
		if t.metrics, err = newUploader(s, "metrics", u); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// describe says which program this is. The standard variables win.
func describe(cfg Config) *resource.Resource {
	attrs := map[string]string{"service.namespace": scope, "service.instance.id": rand.Text(), "service.version": cfg.Version}
	if host, err := os.Hostname(); err == nil {
		attrs["host.name"] = host
	}
	for k, v := range cfg.Settings.Attributes {
		attrs[k] = v
	}
	if _, named := attrs["service.name"]; !named {
		attrs["service.name"] = cfg.Service
	}
	if cfg.Settings.Service != "" {
		attrs["service.name"] = cfg.Settings.Service
	}
	kv := make([]attribute.KeyValue, 0, len(attrs))
	for k, v := range attrs {
		kv = append(kv, attribute.String(k, v))
	}
	return resource.NewSchemaless(kv...)
}

// Tracer makes this program's spans; nil makes none.
func (t *Telemetry) Tracer() *Tracer {
	if t == nil {
		return nil
	}
	return t.tracer
}

// Run sends until ctx ends, and then what is left. It returns nil: a collector that is away is no reason to stop.
func (t *Telemetry) Run(ctx context.Context) error {
	if t == nil {
		return nil
	}
	t.log.Info("metrics and traces are sent by OTLP", "traces", t.traces.where(), "metrics", t.metrics.where())
	// Sending outlives ctx by the flush.
	sending, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(FlushTimeout, stop) })()
	var g errgroup.Group
	if t.spans != nil {
		g.Go(func() error { t.sendSpans(ctx, sending); return nil })
	}
	if t.metrics != nil {
		g.Go(func() error { t.sendMetrics(ctx, sending); return nil })
	}
	err := g.Wait()
	telling, told := context.WithCancel(context.Background())
	told()
	_ = t.often.Run(telling, t.log) // writes what is left to say
	t.traces.close()
	t.metrics.close()
	return err
}

// sendSpans sends batches until ctx ends, then the rest.
func (t *Telemetry) sendSpans(ctx, sending context.Context) {
	exporter := otlptrace.NewUnstarted(t.traces)
	send := func(batch []sdktrace.ReadOnlySpan) {
		if len(batch) == 0 {
			return
		}
		err := exporter.ExportSpans(sending, batch)
		result := "sent"
		if err != nil {
			result = "failed"
		}
		t.counts.spans.WithLabelValues(result).Add(float64(len(batch)))
		t.tell("traces", err)
	}
	tick := time.NewTicker(spanInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			for sending.Err() == nil {
				batch := t.spans.take()
				if len(batch) == 0 {
					break
				}
				send(batch)
			}
			if left := t.spans.close(); left > 0 {
				t.counts.spans.WithLabelValues("failed").Add(float64(left))
			}
			return
		case <-tick.C:
		case <-t.spans.full:
		}
		send(t.spans.take())
	}
}

// sendMetrics sends all metrics at the interval, and once at the end.
func (t *Telemetry) sendMetrics(ctx, sending context.Context) {
	tick := time.NewTicker(t.cfg.Settings.interval())
	defer tick.Stop()
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-tick.C:
		}
		families, err := t.cfg.Gatherer.Gather()
		if err != nil {
			// What could be gathered is sent all the same.
			t.often.Warn(t.log, "gather", "a metric can not be gathered", "error", err)
		}
		t.tell("metrics", t.metrics.uploadMetrics(sending, families, t.resource, t.began, time.Now()))
	}
}

// tell counts how a request ended, and logs a failure: at once, then once per tally.Interval.
func (t *Telemetry) tell(signal string, err error) {
	if err == nil {
		t.counts.exports.WithLabelValues(signal, "ok").Inc()
		return
	}
	t.counts.exports.WithLabelValues(signal, "failed").Inc()
	t.often.Warn(t.log, signal, "the OTLP collector does not take "+signal, "error", err, "remedy", "see that it runs and can be reached from here, or take away --otlp-endpoint (OTEL_EXPORTER_OTLP_ENDPOINT)")
}
