package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"sallyway/client"
	"sallyway/internal/legs"
)

// metrics are the gateway's own counters.
type metrics struct {
	flows          *prometheus.CounterVec // by protocol (bench is the gateway's own service) and result: ok or the RFC 9209 error type
	packetsDropped prometheus.Counter     // inside of CONNECT-IP: neither TCP, UDP nor an echo request, or too many of these
	benchRuns      prometheus.Gauge
	benchBytes     *prometheus.CounterVec // by direction, as the gateway sees it
}

func newMetrics() *metrics {
	return &metrics{
		flows: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_gateway_flows_total", Help: "Flows asked for, by protocol and result (ok or an RFC 9209 error type).",
		}, []string{"proto", "result"}),
		packetsDropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sallyway_gateway_ip_packets_dropped_total", Help: "IP packets of peers that were not passed on.",
		}),
		benchRuns: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "sallyway_gateway_bench_runs", Help: "Runs of sallyway bench that are answered now.",
		}),
		benchBytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_gateway_bench_bytes_total", Help: "Bytes of load that runs of sallyway bench sent to peers or received from them.",
		}, []string{"direction"}),
	}
}

// The metrics of how the gateway's peers come.
var (
	sessionsDesc = prometheus.NewDesc("sallyway_gateway_sessions", "Sessions of peers by the rung and the relay that carry them, as the gateway sees it.",
		[]string{"rung", "relay"}, nil)
	lastConnsDesc = prometheus.NewDesc("sallyway_gateway_last_rung_connections", "SSH connections of the last rung that are up, by relay.", []string{"relay"}, nil)
	lastLinksDesc = prometheus.NewDesc("sallyway_gateway_last_rung_links", "Links of peers over them, by relay.", []string{"relay"}, nil)
)

// ways shows how the gateway's peers come; it is read when it is asked for.
type ways struct{ d *gatewayDaemon }

var _ prometheus.Collector = (*ways)(nil)

// Describe implements prometheus.Collector.
func (w *ways) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sessionsDesc, lastConnsDesc, lastLinksDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (w *ways) Collect(ch chan<- prometheus.Metric) {
	var paths []string
	for _, s := range w.d.srv.Sessions() {
		paths = append(paths, s.Path.Name)
	}
	for at, n := range countWays(paths, w.d.legs.Status()) {
		ch <- prometheus.MustNewConstMetric(sessionsDesc, prometheus.GaugeValue, float64(n), at.rung, at.relay)
	}
	conns, links := map[string]int{}, map[string]int{} // two relays may have one name
	for _, t := range w.d.last.status() {
		conns[t.Name] += t.Connections
		links[t.Name] += t.Links
	}
	for relay := range conns {
		ch <- prometheus.MustNewConstMetric(lastConnsDesc, prometheus.GaugeValue, float64(conns[relay]), relay)
		ch <- prometheus.MustNewConstMetric(lastLinksDesc, prometheus.GaugeValue, float64(links[relay]), relay)
	}
}

// way is a rung and a relay.
type way struct{ rung, relay string }

// countWays counts sessions by their paths. Those over a relay's first port are on the rung of the gateway's own leg there; the relays with a
// leg are named also where they carry none.
func countWays(paths []string, up []legs.Status) map[way]int {
	out, transport := map[way]int{}, map[string]string{}
	for _, st := range up {
		if st.Up {
			transport[st.Name] = string(st.Transport)
			out[way{string(st.Transport), st.Name}] = 0
		}
	}
	for _, p := range paths {
		rung, relay := client.Rung(p)
		if rung == "" {
			rung = transport[relay]
		}
		if rung == "" {
			rung = "down" // the leg went, and the session has not moved yet
		}
		out[way{rung, relay}]++
	}
	return out
}
