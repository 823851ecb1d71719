package incoming

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics count requests.
type metrics struct {
	requests *prometheus.CounterVec
	took     *prometheus.HistogramVec
}

// newMetrics registers them at r; nil is nowhere.
func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_platform_requests_total", Help: "Requests by what answered (api, node, page, health) and status. A node's control stream counts when it ends.",
		}, []string{"surface", "status"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sallyway_platform_request_seconds", Help: "How long requests took, streams aside.", Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10},
		}, []string{"surface"}),
	}
	if r != nil {
		r.MustRegister(m.requests, m.took)
	}
	return m
}

func (m *metrics) count(r *http.Request, status int, took time.Duration) {
	s := surface(r.URL.Path)
	m.requests.WithLabelValues(s, strconv.Itoa(status)).Inc()
	if s != "health" && !unspanned(r) {
		m.took.WithLabelValues(s).Observe(took.Seconds())
	}
}

// surface is which part of the platform a path is of.
func surface(path string) string {
	switch {
	case path == "/livez", path == "/readyz", path == "/healthz":
		return "health"
	case strings.HasPrefix(path, "/api/v1/node/"), strings.HasPrefix(path, "/api/v1/enroll"):
		return "node"
	case strings.HasPrefix(path, "/api/"):
		return "api"
	}
	return "page"
}
