package telemetry

import (
	"context"
	"time"

	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
)

// Metrics keep the names and labels that they have for Prometheus: one alert rule and one dashboard serve both ways.

// uploadMetrics sends families as they are at now. began is the start of counters that do not say theirs.
func (u *uploader) uploadMetrics(ctx context.Context, families []*dto.MetricFamily, r *resource.Resource, began, now time.Time) error {
	c := conversion{began: uint64(began.UnixNano()), now: uint64(now.UnixNano())}
	ms := make([]*metricspb.Metric, 0, len(families))
	for _, f := range families {
		if m := c.family(f); m != nil {
			ms = append(ms, m)
		}
	}
	return u.post(ctx, &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{
		Resource:     &resourcepb.Resource{Attributes: attributes(r)},
		ScopeMetrics: []*metricspb.ScopeMetrics{{Scope: &commonpb.InstrumentationScope{Name: scope}, Metrics: ms}},
	}}})
}

func attributes(r *resource.Resource) []*commonpb.KeyValue {
	var out []*commonpb.KeyValue
	for _, kv := range r.Attributes() {
		if kv.Value.Type() == attribute.STRING {
			out = append(out, text(string(kv.Key), kv.Value.AsString()))
		}
	}
	return out
}

func text(k, v string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: k, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
}

// conversion turns Prometheus' families into OTLP's metrics. Times are nanoseconds since 1970.
type conversion struct{ began, now uint64 }

// family returns nil for one without anything in it.
func (c conversion) family(f *dto.MetricFamily) *metricspb.Metric {
	if len(f.GetMetric()) == 0 {
		return nil
	}
	m := &metricspb.Metric{Name: f.GetName(), Description: f.GetHelp(), Unit: f.GetUnit()}
	const cumulative = metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE
	switch f.GetType() {
	case dto.MetricType_COUNTER:
		sum := &metricspb.Sum{AggregationTemporality: cumulative, IsMonotonic: true}
		for _, p := range f.GetMetric() {
			start := c.began
			if t := p.GetCounter().GetCreatedTimestamp(); t != nil {
				start = uint64(t.AsTime().UnixNano())
			}
			sum.DataPoints = append(sum.DataPoints, c.number(p, start, p.GetCounter().GetValue()))
		}
		m.Data = &metricspb.Metric_Sum{Sum: sum}
	case dto.MetricType_HISTOGRAM:
		h := &metricspb.Histogram{AggregationTemporality: cumulative}
		for _, p := range f.GetMetric() {
			h.DataPoints = append(h.DataPoints, c.histogram(p))
		}
		m.Data = &metricspb.Metric_Histogram{Histogram: h}
	case dto.MetricType_SUMMARY:
		s := &metricspb.Summary{}
		for _, p := range f.GetMetric() {
			s.DataPoints = append(s.DataPoints, c.summary(p))
		}
		m.Data = &metricspb.Metric_Summary{Summary: s}
	default: // gauge and untyped; native histograms are not in use
		g := &metricspb.Gauge{}
		for _, p := range f.GetMetric() {
			v := p.GetGauge().GetValue()
			if p.GetUntyped() != nil {
				v = p.GetUntyped().GetValue()
			}
			g.DataPoints = append(g.DataPoints, c.number(p, 0, v))
		}
		m.Data = &metricspb.Metric_Gauge{Gauge: g}
	}
	return m
}

func labels(m *dto.Metric) []*commonpb.KeyValue {
	out := make([]*commonpb.KeyValue, len(m.GetLabel()))
	for i, l := range m.GetLabel() {
		out[i] = text(l.GetName(), l.GetValue())
	}
	return out
}

func (c conversion) number(m *dto.Metric, start uint64, v float64) *metricspb.NumberDataPoint {
	return &metricspb.NumberDataPoint{Attributes: labels(m), StartTimeUnixNano: start, TimeUnixNano: c.now, Value: &metricspb.NumberDataPoint_AsDouble{AsDouble: v}}
}

// histogram turns Prometheus' buckets, each of which counts what the smaller ones count too, into OTLP's, which do not. The bucket without an upper
// bound is the last there, and goes without saying here.
func (c conversion) histogram(m *dto.Metric) *metricspb.HistogramDataPoint {
	h := m.GetHistogram()
	start := c.began
	if t := h.GetCreatedTimestamp(); t != nil {
		start = uint64(t.AsTime().UnixNano())
	}
	sum := h.GetSampleSum()
	p := &metricspb.HistogramDataPoint{Attributes: labels(m), StartTimeUnixNano: start, TimeUnixNano: c.now, Count: h.GetSampleCount(), Sum: &sum}
	var before uint64
	for _, b := range h.GetBucket() {
		if b.GetUpperBound() > maxBound {
			continue
		}
		p.ExplicitBounds = append(p.ExplicitBounds, b.GetUpperBound())
		p.BucketCounts = append(p.BucketCounts, b.GetCumulativeCount()-before)
		before = b.GetCumulativeCount()
	}
	p.BucketCounts = append(p.BucketCounts, h.GetSampleCount()-before)
	return p
}

// maxBound is below +Inf alone.
const maxBound = 1.7e308

func (c conversion) summary(m *dto.Metric) *metricspb.SummaryDataPoint {
	s := m.GetSummary()
	start := c.began
	if t := s.GetCreatedTimestamp(); t != nil {
		start = uint64(t.AsTime().UnixNano())
	}
	p := &metricspb.SummaryDataPoint{Attributes: labels(m), StartTimeUnixNano: start, TimeUnixNano: c.now, Count: s.GetSampleCount(), Sum: s.GetSampleSum()}
	for _, q := range s.GetQuantile() {
		p.QuantileValues = append(p.QuantileValues, &metricspb.SummaryDataPoint_ValueAtQuantile{Quantile: q.GetQuantile(), Value: q.GetValue()})
	}
	return p
}
