package fallback

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// counters are the server's, since its start.
type counters struct {
	acceptErrors atomic.Uint64
	limited      atomic.Uint64 // connections refused before their handshake
	sshFailed    atomic.Uint64 // handshakes
	sshRefused   atomic.Uint64 // certificates
	sshConnected atomic.Uint64
	sshReplaced  atomic.Uint64 // by a newer connection of the slot
	sshRejected  atomic.Uint64 // channels and requests
	tlsFailed    atomic.Uint64 // handshakes
	tlsRefused   atomic.Uint64 // after the handshake
	joined       atomic.Uint64
	overBudget   atomic.Uint64 // bytes of frames dropped
	up, down     atomic.Uint64 // bytes of frames, from clients and to them
}

// register makes the counters visible to Prometheus.
func (s *Server) register(r prometheus.Registerer) error {
	c := &s.count
	for _, m := range []struct {
		name, help string
		labels     prometheus.Labels
		v          *atomic.Uint64
	}{
		{"accept_errors_total", "Errors of accepting connections.", nil, &c.acceptErrors},
		{"limited_total", "Connections refused by rate or number before their handshake.", nil, &c.limited},
		{"handshakes_failed_total", "Handshakes that failed.", prometheus.Labels{"port": "ssh"}, &c.sshFailed},
		{"handshakes_failed_total", "Handshakes that failed.", prometheus.Labels{"port": "tls"}, &c.tlsFailed},
		{"refused_total", "Connections of who may not, or leads nowhere.", prometheus.Labels{"port": "ssh"}, &c.sshRefused},
		{"refused_total", "Connections of who may not, or leads nowhere.", prometheus.Labels{"port": "tls"}, &c.tlsRefused},
		{"ssh_connected_total", "SSH connections of gateways.", nil, &c.sshConnected},
		{"ssh_replaced_total", "SSH connections that a newer one of the same gateway replaced.", nil, &c.sshReplaced},
		{"ssh_rejected_total", "Channels and requests that gateways were refused.", nil, &c.sshRejected},
		{"links_total", "Links between clients and gateways.", nil, &c.joined},
		{"over_budget_bytes_total", "Bytes of frames dropped: more than the node or its organization may send.", nil, &c.overBudget},
		{"bytes_total", "Bytes of frames passed on.", prometheus.Labels{"direction": "to_gateway"}, &c.up},
		{"bytes_total", "Bytes of frames passed on.", prometheus.Labels{"direction": "to_client"}, &c.down},
	} {
		if err := r.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: "sallyway", Subsystem: "relay_fallback", Name: m.name, Help: m.help, ConstLabels: m.labels,
		}, func() float64 { return float64(m.v.Load()) })); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		name, help string
		f          func(Snapshot) int
	}{
		{"ssh_connections", "Live SSH connections of gateways.", func(v Snapshot) int { return v.Connections }},
		{"links", "Live links between clients and gateways.", func(v Snapshot) int { return v.Links }},
	} {
		if err := r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "sallyway", Subsystem: "relay_fallback", Name: m.name, Help: m.help,
		}, func() float64 { return float64(m.f(s.Snapshot())) })); err != nil {
			return err
		}
	}
	return nil
}
