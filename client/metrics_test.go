package client

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/legs"
	"sallyway/tunnel"
	"sallyway/tunnel/pathstate"
)

// metricsOf gathers metrics as name{labels by name} → value.
func metricsOf(t *testing.T, cs ...prometheus.Collector) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(cs...)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			out[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	h := newHarness(t)
	want := func(values map[string]float64) {
		t.Helper()
		got := metricsOf(t, append(h.Metrics(), LegMetrics(map[string]*legs.Keeper{"dialling": legs.New(legs.Config{})}))...)
		for k, v := range values {
			if have, ok := got[k]; !ok || have != v {
				t.Errorf("%s is %v (%v), want %v", k, have, ok, v)
			}
		}
		if t.Failed() {
			t.Log(got)
		}
	}
	want(map[string]float64{
		"sallyway_path_active{gateway=office,relay=memory,rung=}": 1,
		"sallyway_last_rung_sessions{}":                           0,
		"sallyway_legs_up{for=dialling,transport=udp}":            0,
		"sallyway_legs_up{for=dialling,transport=tls}":            0,
		"sallyway_legs_wanted{for=dialling}":                      0,
		"sallyway_leg_dials_total{for=dialling,result=failed}":    0,
		"sallyway_leg_dropped_total{for=dialling,reason=full}":    0,
		"sallyway_path_moves_total{reason=draining}":              0,
		"sallyway_path_moves_total{reason=other}":                 0,
	})
	var seen tunnel.PathInfo
	owner := func(n uint64) map[tunnel.MoveCause]uint64 {
		return map[tunnel.MoveCause]uint64{pathstate.CauseOwner: n}
	}
	h.noteMoves(tunnel.PathInfo{Causes: owner(2), LastReason: "the relay is draining"}, &seen)
	h.noteMoves(tunnel.PathInfo{Causes: owner(2), LastReason: "the relay is draining"}, &seen)
	h.noteMoves(tunnel.PathInfo{Causes: owner(3), LastReason: "whatever 17"}, &seen)
	want(map[string]float64{"sallyway_path_moves_total{reason=draining}": 2, "sallyway_path_moves_total{reason=other}": 1})
	h.Sessions.gateways[gateway1].set(nil, nil)
	if got := metricsOf(t, h.Metrics()...); got["sallyway_path_active{gateway=office,relay=memory,rung=}"] != 0 {
		t.Errorf("without a session: %v", got)
	}
}

func TestRung(t *testing.T) {
	for path, want := range map[string][2]string{
		"fra-1 udp":                    {"udp", "fra-1"},
		"fra-1 tls-8443":               {"tls-8443", "fra-1"},
		"direct 192.0.2.1:4444":        {"direct", ""},
		"direct [2001:db8::1%eth0]:44": {"direct", ""},
		"fra-1":                        {"", "fra-1"},
	} {
		if rung, relay := Rung(path); rung != want[0] || relay != want[1] {
			t.Errorf("%q is %q at %q", path, rung, relay)
		}
	}
}

// An app that tries again and again is a line for each reason, and every try is counted.
func TestRefusalsAreOneLine(t *testing.T) {
	var log strings.Builder
	c := &capture{log: slog.New(slog.NewTextHandler(&log, nil))}
	for i := range 50 {
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 22)
		c.refuse("tcp", dst, fmt.Errorf("gateway office: %w", tunnel.Denied("no-entry", "the rule says no")))
		c.refuse("tcp", dst, &NoRouteError{dst.Addr().String()})
		c.refuse("udp", dst, &NoRouteError{dst.Addr().String()})
	}
	if n := strings.Count(log.String(), "\n"); n != 3 || c.refused.Load() != 150 {
		t.Errorf("%d lines, %d refused:\n%s", n, c.refused.Load(), log.String())
	}
}
