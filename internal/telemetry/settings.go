package telemetry

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Defaults of the OpenTelemetry specification.
const (
	defaultTimeout  = 10 * time.Second // of one request
	defaultInterval = time.Minute      // between metrics
)

// Settings say where metrics and traces go. The zero value is off.
type Settings struct {
	// Endpoint is the collector's URL, such as http://127.0.0.1:4318; /v1/traces and /v1/metrics are added. Traces and Metrics are whole URLs
	// that take its place for one signal.
	Endpoint, Traces, Metrics string
	// NoTraces and NoMetrics leave one signal out.
	NoTraces, NoMetrics bool
	// Headers are sent with every request, TraceHeaders and MetricHeaders with one signal's. They may be secret.
	Headers, TraceHeaders, MetricHeaders map[string]string
	// CAFile has the authorities (PEM) of the collector's certificate instead of the system's; CertFile and KeyFile are shown to it.
	CAFile, CertFile, KeyFile string
	// Gzip compresses.
	Gzip bool
	// Timeout bounds a request and Interval is between two of metrics; zero is the specification's default.
	Timeout, Interval time.Duration
	// Ratio of the traces that begin here is sampled, from 0 to 1; nil is all. Those that begin elsewhere are sampled as it was decided there.
	Ratio *float64
	// Service is the program's name at the collector instead of the one in Config; Attributes describe it further.
	Service    string
	Attributes map[string]string
	// Disabled turns everything off.
	Disabled bool
}

// On says whether anything is sent.
func (s Settings) On() bool {
	return !s.Disabled && (s.tracesURL() != "" || s.metricsURL() != "")
}

func (s Settings) tracesURL() string {
	if s.NoTraces {
		return ""
	}
	return cmp.Or(s.Traces, below(s.Endpoint, "v1/traces"))
}

func (s Settings) metricsURL() string {
	if s.NoMetrics {
		return ""
	}
	return cmp.Or(s.Metrics, below(s.Endpoint, "v1/metrics"))
}

func below(base, path string) string {
	if base == "" {
		return ""
	}
	return strings.TrimSuffix(base, "/") + "/" + path
}

func (s Settings) ratio() float64 {
	if s.Ratio == nil {
		return 1
	}
	return *s.Ratio
}

func (s Settings) interval() time.Duration { return cmp.Or(s.Interval, defaultInterval) }

// check refuses what can not be. An error names no header's value.
func (s Settings) check() error {
	for _, u := range []string{s.tracesURL(), s.metricsURL()} {
		if u == "" {
			continue
		}
		p, err := url.Parse(u)
		if err != nil || p.Host == "" || p.Scheme != "http" && p.Scheme != "https" {
			return errors.New("the OTLP endpoint is not of the form http://HOST:4318 or https://HOST: name a collector's URL that speaks OTLP over HTTP")
		}
		if p.User != nil {
			return errors.New("the OTLP endpoint holds a password: put it into OTEL_EXPORTER_OTLP_HEADERS, as Authorization=Basic%20…")
		}
	}
	if r := s.ratio(); !(r >= 0 && r <= 1) {
		return fmt.Errorf("the ratio of traces %v is not from 0 to 1", r)
	}
	if s.Timeout < 0 || s.Interval < 0 {
		return errors.New("a time of OTLP is negative")
	}
	if (s.CertFile == "") != (s.KeyFile == "") {
		return errors.New("a client certificate for the OTLP collector and its key go together: give both or none")
	}
	return nil
}

// Environment reads the standard variables (https://opentelemetry.io/docs/specs/otel/protocol/exporter/). Of the samplers it knows those that
// a ratio can say. What one of them can not mean is an error that names it; nothing is taken for granted.
func Environment(lookup func(string) (string, bool)) (Settings, error) {
	get := func(name string) string {
		v, _ := lookup(name)
		return strings.TrimSpace(v)
	}
	const otlp = "OTEL_EXPORTER_OTLP_"
	s := Settings{
		Endpoint: get(otlp + "ENDPOINT"), Traces: get(otlp + "TRACES_ENDPOINT"), Metrics: get(otlp + "METRICS_ENDPOINT"),
		CAFile: get(otlp + "CERTIFICATE"), CertFile: get(otlp + "CLIENT_CERTIFICATE"), KeyFile: get(otlp + "CLIENT_KEY"),
		Service: get("OTEL_SERVICE_NAME"), Disabled: strings.EqualFold(get("OTEL_SDK_DISABLED"), "true"),
	}
	if s.Disabled {
		return Settings{Disabled: true}, nil
	}
	var errs []error
	wrong := func(name, want string) { errs = append(errs, fmt.Errorf("environment variable %s: %s", name, want)) }
	pairs := func(name string) map[string]string {
		m, ok := keyValues(get(name))
		if !ok {
			wrong(name, "want KEY=VALUE,KEY=VALUE, with values percent-encoded")
		}
		return m
	}
	s.Headers, s.TraceHeaders, s.MetricHeaders = pairs(otlp+"HEADERS"), pairs(otlp+"TRACES_HEADERS"), pairs(otlp+"METRICS_HEADERS")
	s.Attributes = pairs("OTEL_RESOURCE_ATTRIBUTES")
	for _, name := range []string{otlp + "PROTOCOL", otlp + "TRACES_PROTOCOL", otlp + "METRICS_PROTOCOL"} {
		if v := get(name); v != "" && v != "http/protobuf" {
			wrong(name, "only http/protobuf is spoken, on a collector's port 4318")
		}
	}
	switch v := get(otlp + "COMPRESSION"); v {
	case "", "none":
	case "gzip":
		s.Gzip = true
	default:
		wrong(otlp+"COMPRESSION", "want gzip or none")
	}
	for name, off := range map[string]*bool{"OTEL_TRACES_EXPORTER": &s.NoTraces, "OTEL_METRICS_EXPORTER": &s.NoMetrics} {
		switch get(name) {
		case "", "otlp":
		case "none":
			*off = true
		default:
			wrong(name, "want otlp or none")
		}
	}
	for name, d := range map[string]*time.Duration{otlp + "TIMEOUT": &s.Timeout, "OTEL_METRIC_EXPORT_INTERVAL": &s.Interval} {
		if v := get(name); v != "" {
			ms, err := strconv.ParseUint(v, 10, 31)
			if err != nil || ms == 0 {
				wrong(name, "want milliseconds, more than 0")
			}
			*d = time.Duration(ms) * time.Millisecond
		}
	}
	s.Ratio = sampler(get("OTEL_TRACES_SAMPLER"), get("OTEL_TRACES_SAMPLER_ARG"), wrong)
	return s, errors.Join(errs...)
}

// sampler turns the standard samplers into the ratio of traces that begin here.
func sampler(name, arg string, wrong func(name, want string)) *float64 {
	ratio := 1.0
	switch name {
	case "":
		return nil
	case "always_on", "parentbased_always_on":
	case "always_off", "parentbased_always_off":
		ratio = 0
	case "traceidratio", "parentbased_traceidratio":
		if arg != "" {
			var err error
			if ratio, err = strconv.ParseFloat(arg, 64); err != nil || !(ratio >= 0 && ratio <= 1) {
				wrong("OTEL_TRACES_SAMPLER_ARG", "want a ratio from 0 to 1")
				return nil
			}
		}
	default:
		wrong("OTEL_TRACES_SAMPLER", "want parentbased_always_on, parentbased_always_off or parentbased_traceidratio")
		return nil
	}
	return &ratio
}

// keyValues parses KEY=VALUE,KEY=VALUE with percent-encoded values, as W3C baggage has them.
func keyValues(text string) (map[string]string, bool) {
	if text == "" {
		return nil, true
	}
	out := make(map[string]string)
	for pair := range strings.SplitSeq(text, ",") {
		k, v, ok := strings.Cut(pair, "=")
		v, err := url.PathUnescape(strings.TrimSpace(v))
		if k = strings.TrimSpace(k); !ok || k == "" || err != nil {
			return nil, false
		}
		out[k] = v
	}
	return out, true
}
