package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	connectedDesc = prometheus.NewDesc("sallyway_node_platform_connected", "1 while the control stream to the platform is up.", nil, nil)
	blockedDesc   = prometheus.NewDesc("sallyway_node_blocked", "1 while the platform does not talk to this node: it is disabled, revoked or deleted.", nil, nil)
	leafDesc      = prometheus.NewDesc("sallyway_node_certificate_expiry_timestamp_seconds", "When the node's certificate ends; it is renewed at half of its life.", nil, nil)
	snapshotDesc  = prometheus.NewDesc("sallyway_node_policy_expiry_timestamp_seconds", "When the policies held here are past their time, and new flows are refused; 0 where there are none.", nil, nil)
	clockDesc     = prometheus.NewDesc("sallyway_node_clock_offset_seconds", "The platform's clock minus this host's, at the last answer.", nil, nil)
)

// Metrics are what a node knows of itself and its platform.
func (a *Agent) Metrics() prometheus.Collector { return collector{a.Status} }

type collector struct{ status func() Status }

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connectedDesc, blockedDesc, leafDesc, snapshotDesc, clockDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	st := c.status()
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	gauge(connectedDesc, truth(st.Connected))
	gauge(blockedDesc, truth(st.Blocked != ""))
	gauge(leafDesc, seconds(st.CertificateExpiry))
	gauge(snapshotDesc, seconds(st.SnapshotNotAfter))
	gauge(clockDesc, st.ClockOffset.Seconds())
}

func truth(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// seconds is a time since 1970; none is 0.
func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
