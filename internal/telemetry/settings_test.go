package telemetry

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestEnvironment(t *testing.T) {
	ratio := func(f float64) *float64 { return &f }
	for name, tc := range map[string]struct {
		env   map[string]string
		want  Settings
		wrong string // part of the error
	}{
		"nothing": {},
		"all": {env: map[string]string{
			"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%20b,x=1", "OTEL_EXPORTER_OTLP_TIMEOUT": "5000",
			"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_METRIC_EXPORT_INTERVAL": "15000",
			"OTEL_SERVICE_NAME": "gw", "OTEL_RESOURCE_ATTRIBUTES": "a=b", "OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25",
		}, want: Settings{
			Endpoint: "http://c:4318/", Headers: map[string]string{"api-key": "a b", "x": "1"}, Timeout: 5 * time.Second, Gzip: true, Interval: 15 * time.Second, Service: "gw",
			Attributes: map[string]string{"a": "b"}, Ratio: ratio(0.25),
		}},
		"traces alone": {env: map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/x", "OTEL_METRICS_EXPORTER": "none"}, want: Settings{Traces: "https://c/x", NoMetrics: true}},
		"disabled":     {env: map[string]string{"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, want: Settings{Disabled: true}},
		"off":          {env: map[string]string{"OTEL_TRACES_SAMPLER": "always_off"}, want: Settings{Ratio: ratio(0)}},
		"grpc":         {env: map[string]string{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, wrong: "OTEL_EXPORTER_OTLP_PROTOCOL"},
		"headers":      {env: map[string]string{"OTEL_EXPORTER_OTLP_HEADERS": "s3cret"}, wrong: "OTEL_EXPORTER_OTLP_HEADERS"},
		"time":         {env: map[string]string{"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}, wrong: "milliseconds"},
		"sampler":      {env: map[string]string{"OTEL_TRACES_SAMPLER": "jaeger_remote"}, wrong: "OTEL_TRACES_SAMPLER"},
		"ratio":        {env: map[string]string{"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, wrong: "from 0 to 1"},
		"exporter":     {env: map[string]string{"OTEL_TRACES_EXPORTER": "zipkin"}, wrong: "OTEL_TRACES_EXPORTER"},
	} {
		got, err := Environment(func(k string) (string, bool) { v, ok := tc.env[k]; return v, ok })
		if tc.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), tc.wrong) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		}
	}
}

func TestURLs(t *testing.T) {
	for _, tc := range []struct {
		s               Settings
		traces, metrics string
		bad             bool
	}{
		{s: Settings{Endpoint: "http://c:4318"}, traces: "http://c:4318/v1/traces", metrics: "http://c:4318/v1/metrics"},
		{s: Settings{Endpoint: "https://c/otlp/"}, traces: "https://c/otlp/v1/traces", metrics: "https://c/otlp/v1/metrics"},
		{s: Settings{Endpoint: "https://c", Traces: "https://t/as/it/is"}, traces: "https://t/as/it/is", metrics: "https://c/v1/metrics"},
		{s: Settings{Endpoint: "c:4317"}, traces: "c:4317/v1/traces", metrics: "c:4317/v1/metrics", bad: true},
		{s: Settings{Endpoint: "https://me:pw@c"}, traces: "https://me:pw@c/v1/traces", metrics: "https://me:pw@c/v1/metrics", bad: true},
		{s: Settings{Endpoint: "http://c", CertFile: "x"}, traces: "http://c/v1/traces", metrics: "http://c/v1/metrics", bad: true},
	} {
		if tc.s.tracesURL() != tc.traces || tc.s.metricsURL() != tc.metrics {
			t.Errorf("%+v: %s, %s", tc.s, tc.s.tracesURL(), tc.s.metricsURL())
		}
		err := tc.s.check()
		if (err != nil) != tc.bad || err != nil && strings.Contains(err.Error(), "pw") {
			t.Errorf("%+v: %v", tc.s, err)
		}
	}
}

func FuzzKeyValues(f *testing.F) {
	for _, s := range []string{"", "a=b", "a=b,c=d%20e", "a", "=", ",", "a=%zz"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, ok := keyValues(s)
		if !ok && m != nil {
			t.Errorf("%q: refused with %v", s, m)
		}
		if _, empty := m[""]; empty {
			t.Errorf("%q has a key without a name", s)
		}
	})
}
