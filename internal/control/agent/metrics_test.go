package agent

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMetrics(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	for _, tc := range []struct {
		st   Status
		want map[string]float64
	}{
		{Status{Connected: true, CertificateExpiry: at, SnapshotNotAfter: at.Add(time.Hour), ClockOffset: -1500 * time.Millisecond}, map[string]float64{
			"sallyway_node_platform_connected": 1, "sallyway_node_blocked": 0, "sallyway_node_certificate_expiry_timestamp_seconds": 1_800_000_000,
			"sallyway_node_policy_expiry_timestamp_seconds": 1_800_003_600, "sallyway_node_clock_offset_seconds": -1.5,
		}},
		{Status{Blocked: "revoked"}, map[string]float64{
			"sallyway_node_platform_connected": 0, "sallyway_node_blocked": 1, "sallyway_node_certificate_expiry_timestamp_seconds": 0,
			"sallyway_node_policy_expiry_timestamp_seconds": 0, "sallyway_node_clock_offset_seconds": 0,
		}},
	} {
		r := prometheus.NewRegistry()
		r.MustRegister(collector{func() Status { return tc.st }})
		families, err := r.Gather()
		if err != nil || len(families) != len(tc.want) {
			t.Fatal(families, err)
		}
		for _, f := range families {
			if got := f.GetMetric()[0].GetGauge().GetValue(); got != tc.want[f.GetName()] {
				t.Errorf("%s is %v, want %v", f.GetName(), got, tc.want[f.GetName()])
			}
		}
	}
}
