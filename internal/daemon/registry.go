package daemon

import (
	"cmp"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Registry is a Prometheus registry that can say what may be in it: a metric with labels is not shown before it has a value, and whoever writes rules
// and dashboards wants to know of it all the same.
type Registry struct {
	*prometheus.Registry

	mu    sync.Mutex
	known map[string]MetricName // guarded by mu
}

var (
	_ prometheus.Registerer = (*Registry)(nil)
	_ prometheus.Gatherer   = (*Registry)(nil)
)

// MetricName describes a metric.
type MetricName struct {
	Name   string   `json:"name"`
	Help   string   `json:"help"`
	Labels []string `json:"labels,omitempty"`
}

// Register implements prometheus.Registerer.
func (r *Registry) Register(c prometheus.Collector) error {
	if err := r.Registry.Register(c); err != nil {
		return err
	}
	descs := make(chan *prometheus.Desc)
	go func() { c.Describe(descs); close(descs) }()
	r.mu.Lock()
	defer r.mu.Unlock()
	for d := range descs {
		if m, ok := metricName(d); ok {
			if old, twice := r.known[m.Name]; twice {
				m.Labels = append(m.Labels, old.Labels...) // one collector for each value of a constant label
				slices.Sort(m.Labels)
				m.Labels = slices.Compact(m.Labels)
			}
			r.known[m.Name] = m
		}
	}
	return nil
}

// MustRegister implements prometheus.Registerer.
func (r *Registry) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			panic(err)
		}
	}
}

// Names are all metrics that were ever registered, by name.
func (r *Registry) Names() []MetricName {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.known), func(a, b MetricName) int { return cmp.Compare(a.Name, b.Name) })
}

// descText is what prometheus.Desc says of itself; it has no other way.
var descText = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*")(?:, unit: "[^"]*")?, constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// constLabel is one of its constant labels.
var constLabel = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"`)

func metricName(d *prometheus.Desc) (MetricName, bool) {
	m := descText.FindStringSubmatch(d.String())
	if m == nil {
		return MetricName{}, false
	}
	name, err1 := strconv.Unquote(m[1])
	help, err2 := strconv.Unquote(m[2])
	if err1 != nil || err2 != nil {
		return MetricName{}, false
	}
	out := MetricName{Name: name, Help: help}
	for _, l := range constLabel.FindAllStringSubmatch(m[3], -1) {
		out.Labels = append(out.Labels, l[1])
	}
	for l := range strings.SplitSeq(m[4], ",") {
		if l != "" {
			out.Labels = append(out.Labels, l)
		}
	}
	slices.Sort(out.Labels)
	return out, true
}
