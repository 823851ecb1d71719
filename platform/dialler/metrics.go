package dialler

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	dials, tests *prometheus.CounterVec
	opened       *prometheus.CounterVec
}

func newMetrics(to prometheus.Registerer, d *Dialler) metrics {
	m := metrics{
		dials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_platform_dials_total", Help: "Connections that the platform opened through gateways, by result.",
		}, []string{"result"}),
		tests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_platform_resource_tests_total", Help: "Tests of resources, by result.",
		}, []string{"result"}),
		opened: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyway_platform_dial_sessions_total", Help: "Sessions that the platform opened with gateways, by rung; none is that no rung led there.",
		}, []string{"rung"}),
	}
	if to != nil {
		to.MustRegister(m.dials, m.tests, m.opened, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "sallyway_platform_dial_sessions", Help: "Sessions of the platform with gateways, those that are being opened among them.",
		}, func() float64 {
			d.mu.Lock()
			defer d.mu.Unlock()
			return float64(d.total)
		}))
	}
	return m
}
