package bench

import (
	"os"
	"testing"
)

func TestParseCounts(t *testing.T) {
	dev := `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       9       9    0    0    0     0          0         0        9       9    0    0    0     0       0          0
  eth0: 3000000     100    0    0    0     0          0         0  2000000      90    0    0    0     0       0          0
`
	snmp := `Tcp: RtoAlgorithm InSegs
Tcp: 1 5
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors
Udp: 60 1 2 50 3 0
UdpLite: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors
UdpLite: 7 7 7 7 7 7
`
	c, err := parseCounts([]byte(dev), []byte(snmp))
	if want := (kernelCounts{in: 3000000, out: 2000000, packets: 100, reads: 60, writes: 50, receiveFull: 3}); err != nil || c != want {
		t.Errorf("%+v, %v; want %+v", c, err, want)
	}
	got := bundles([]kernelCounts{{}, c}, []kernelCounts{c, c})
	if want := (Bundles{Packet: 30000, Read: 50000, Write: 40000, Dropped: 3}); got == nil || *got != want {
		t.Errorf("bundles %+v, want %+v", got, want)
	}
	if b := bundles([]kernelCounts{c}, []kernelCounts{c}); b != nil {
		t.Errorf("nothing went through: %+v", b)
	}
	for name, bad := range map[string][2]string{
		"no link":    {"  eth1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n", snmp},
		"no number":  {"  eth0: x 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n", snmp},
		"no UDP":     {dev, "Tcp: a\nTcp: 1\n"},
		"cut short":  {dev, "Udp: InDatagrams\n"},
		"bad number": {dev, "Udp: InDatagrams\nUdp: x\n"},
	} {
		if c, err := parseCounts([]byte(bad[0]), []byte(bad[1])); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
	// The machine's own has no such link, and the same form.
	own, err := os.ReadFile("/proc/self/net/snmp")
	if err != nil {
		t.Skip(err)
	}
	if _, err := parseCounts([]byte(dev), own); err != nil {
		t.Errorf("this kernel's: %v", err)
	}
}
