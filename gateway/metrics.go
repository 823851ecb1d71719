package gateway

import "github.com/prometheus/client_golang/prometheus"

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
