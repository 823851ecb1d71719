package relay

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestSocketMetrics gathers what is told of each socket of the port.
func TestSocketMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	l := start(t, func(c *Config) { c.Shards, c.Metrics = 2, reg })
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			for _, label := range m.Label {
				v := m.GetGauge().GetValue() + m.GetCounter().GetValue()
				got[f.GetName()+" "+label.GetValue()] = v
			}
		}
	}
	for _, socket := range []string{"control", "data0", "data1", "aside0", "aside1"} {
		for _, name := range []string{"receive_buffer_bytes", "send_buffer_bytes"} {
			if got["sallyway_relay_"+name+" "+socket] < 64<<10 {
				t.Errorf("%s of %s: %v", name, socket, got["sallyway_relay_"+name+" "+socket])
			}
		}
		if v, ok := got["sallyway_relay_receive_buffer_errors_total "+socket]; !ok || v != 0 {
			t.Errorf("drops of %s: %v", socket, v)
		}
	}
	for _, name := range []string{"sallyway_relay_receive_buffer_errors_total relayed", "sallyway_system_udp_receive_buffer_errors_total ipv4"} {
		if _, ok := got[name]; !ok {
			t.Errorf("no %s", name)
		}
	}
	if len(l.sockets) != 5 {
		t.Errorf("%d sockets", len(l.sockets))
	}
}

func TestUDPCounter(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snmp")
	if err := os.WriteFile(file, []byte("Ip: A B\nIp: 1 2\nUdp: InDatagrams NoPorts RcvbufErrors\nUdp: 5 6 7\nUdpLite: RcvbufErrors\nUdpLite: 9\nUdp6RcvbufErrors 8\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if v, ok := udpCounter(file, "RcvbufErrors", ""); v != 7 || !ok {
		t.Errorf("column: %d %v", v, ok)
	}
	if v, ok := udpCounter(file, "", "Udp6RcvbufErrors"); v != 8 || !ok {
		t.Errorf("row: %d %v", v, ok)
	}
	if _, ok := udpCounter(file, "Other", ""); ok {
		t.Error("a column that is not there")
	}
}
