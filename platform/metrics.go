package platform

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
)

// censusTimeout bounds a scrape's look at the database.
const censusTimeout = 5 * time.Second

var (
	nodesDesc     = prometheus.NewDesc("sallyway_platform_nodes", "Nodes by organization, kind and state.", []string{"org", "kind", "state"}, nil)
	outdatedDesc  = prometheus.NewDesc("sallyway_platform_nodes_outdated", "Nodes whose software is of an older release than the platform's, or of one that is not known, by organization and kind.", []string{"org", "kind"}, nil)
	sessionsDesc  = prometheus.NewDesc("sallyway_platform_sessions", "Live sessions as gateways report them.", []string{"org"}, nil)
	expiryDesc    = prometheus.NewDesc("sallyway_platform_certificate_expiry_seconds", "Seconds until the soonest end of a certificate: of a CA that issues or will, of a node that is there and renews, of the platform's own server. Below 0 it has ended.", []string{"org", "what", "kind"}, nil)
	readyDesc     = prometheus.NewDesc("sallyway_platform_ready", "1 when everything works.", nil, nil)
	conditionDesc = prometheus.NewDesc("sallyway_platform_condition", "1 for what keeps the platform from being ready now. That the database can not be written is always there, as 0 or 1.", []string{"condition"}, nil)
)

// census counts what there is at every scrape, so that a number is never older than it looks.
type census struct{ s *Server }

var _ prometheus.Collector = (*census)(nil)

// Describe implements prometheus.Collector.
func (*census) Describe(ch chan<- *prometheus.Desc) {
	ch <- nodesDesc
	ch <- outdatedDesc
	ch <- sessionsDesc
	ch <- readyDesc
	ch <- conditionDesc
	ch <- expiryDesc
}

// Collect implements prometheus.Collector.
func (c *census) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), censusTimeout)
	defer cancel()
	ready := 1.0
	conditions := c.s.Conditions()
	if len(conditions) > 0 {
		ready = 0
	}
	if _, bad := conditions[conditionDatabase]; !bad {
		ch <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, 0, conditionDatabase)
	}
	for name := range conditions {
		ch <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, 1, name)
	}
	ch <- prometheus.MustNewConstMetric(readyDesc, prometheus.GaugeValue, ready)
	names, err := c.s.reg.OrgNames(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(nodesDesc, err)
		return
	}
	now := c.s.reg.Now()
	for _, org := range names {
		ends, err := c.s.reg.Ends(ctx, org)
		if err != nil {
			ch <- prometheus.NewInvalidMetric(expiryDesc, err)
			return
		}
		for what, end := range ends {
			ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, end.Sub(now).Seconds(), org, what[0], what[1])
		}
		st, err := c.s.reg.Status(ctx, org)
		if err != nil {
			ch <- prometheus.NewInvalidMetric(nodesDesc, err)
			return
		}
		counts, old := make(map[[2]string]float64), make(map[string]float64)
		for _, nodes := range [][]control.NodeRecord{st.Relays, st.Gateways, st.Clients} {
			for _, n := range nodes {
				counts[[2]string{string(n.Kind), string(n.State)}]++
				old[string(n.Kind)] += map[bool]float64{true: 1}[n.Outdated]
			}
		}
		for kind, v := range old {
			ch <- prometheus.MustNewConstMetric(outdatedDesc, prometheus.GaugeValue, v, org, kind)
		}
		for k, v := range counts {
			ch <- prometheus.MustNewConstMetric(nodesDesc, prometheus.GaugeValue, v, org, k[0], k[1])
		}
		ch <- prometheus.MustNewConstMetric(sessionsDesc, prometheus.GaugeValue, float64(st.Sessions), org)
	}
}
