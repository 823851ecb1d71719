package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Bundles says how large the pieces were in which the relay got and gave what it carried, small acknowledgements included:
// on them rests what a byte costs. All are means, in bytes, from the counters of the relays' kernels.
type Bundles struct {
	Packet  float64 `json:"link_packet_bytes"`   // on the relay's link: above the MTU where super-packets cross whole
	Read    float64 `json:"read_bytes"`          // of a system call
	Write   float64 `json:"write_bytes"`         // of a system call
	Dropped uint64  `json:"receive_buffer_full"` // datagrams or bundles that found the receive buffer full
}

// kernelCounts are what the kernel counts on a host since it exists.
type kernelCounts struct {
	in, out     uint64 // bytes on its link
	packets     uint64 // that came in
	reads       uint64 // Udp InDatagrams: one for each read, however many segments it brought
	writes      uint64 // Udp OutDatagrams: one for each write
	receiveFull uint64 // Udp RcvbufErrors
}

// readCounts reads the counts of a process's host.
func readCounts(pid int) (kernelCounts, error) {
	dev, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return kernelCounts{}, err
	}
	snmp, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", pid))
	if err != nil {
		return kernelCounts{}, err
	}
	return parseCounts(dev, snmp)
}

// siteLink is the name of a host's link to the router.
const siteLink = "eth0"

// parseCounts reads /proc/net/dev and /proc/net/snmp (proc_net(5)).
func parseCounts(dev, snmp []byte) (c kernelCounts, err error) {
	found := false
	for s := bufio.NewScanner(bytes.NewReader(dev)); s.Scan(); {
		name, rest, ok := strings.Cut(s.Text(), ":")
		f := strings.Fields(rest)
		if !ok || strings.TrimSpace(name) != siteLink || len(f) < 16 {
			continue
		}
		var errs [3]error
		c.in, errs[0] = strconv.ParseUint(f[0], 10, 64)
		c.packets, errs[1] = strconv.ParseUint(f[1], 10, 64)
		c.out, errs[2] = strconv.ParseUint(f[8], 10, 64)
		found, err = true, errors.Join(errs[:]...)
	}
	if !found || err != nil {
		return c, errors.Join(fmt.Errorf("no counts of %s", siteLink), err)
	}
	var names []string
	for s := bufio.NewScanner(bytes.NewReader(snmp)); s.Scan(); {
		rest, ok := strings.CutPrefix(s.Text(), "Udp: ")
		if !ok {
			continue
		}
		f := strings.Fields(rest)
		if names == nil {
			names = f
			continue
		}
		for i, name := range names[:min(len(names), len(f))] {
			to := map[string]*uint64{"InDatagrams": &c.reads, "OutDatagrams": &c.writes, "RcvbufErrors": &c.receiveFull}[name]
			if to == nil {
				continue
			}
			if *to, err = strconv.ParseUint(f[i], 10, 64); err != nil {
				return c, err
			}
		}
		return c, nil
	}
	return c, errors.New("no counts of UDP")
}

// bundles is what went through between two counts; nil where nothing did.
func bundles(before, after []kernelCounts) *Bundles {
	var d kernelCounts
	for i := range after {
		d.in += after[i].in - before[i].in
		d.out += after[i].out - before[i].out
		d.packets += after[i].packets - before[i].packets
		d.reads += after[i].reads - before[i].reads
		d.writes += after[i].writes - before[i].writes
		d.receiveFull += after[i].receiveFull - before[i].receiveFull
	}
	if d.packets == 0 || d.reads == 0 || d.writes == 0 {
		return nil
	}
	return &Bundles{
		Packet: ratio(float64(d.in), float64(d.packets)), Read: ratio(float64(d.in), float64(d.reads)),
		Write: ratio(float64(d.out), float64(d.writes)), Dropped: d.receiveFull,
	}
}

// relayCounts are the counts of both relays' hosts, for a run through the product; nil for others.
func (r *runner) relayCounts(w way) ([]kernelCounts, error) {
	if w.name != Sallyway || r.site == nil {
		return nil, nil
	}
	var out []kernelCounts
	for _, n := range []int{r.site.RelayA.PID(), r.site.RelayB.PID()} {
		c, err := readCounts(n)
		if err != nil {
			return nil, fmt.Errorf("counts of a relay's host: %w", err)
		}
		out = append(out, c)
	}
	return out, nil
}
