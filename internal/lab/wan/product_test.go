//go:build measure

package wan_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
	"sallyway/internal/lab/wan"
)

const echoPort = 5202

// TestProductOverWAN measures the product and plain TCP over one long access link, interleaved, and reports medians. It is a
// measurement, not a check, and is built when asked for:
//
//	go test -tags measure -count=1 -v -run TestProductOverWAN ./internal/lab/wan
//
// SALLYWAY_WAN_RTT (ms), _LOSS (percent), _MBIT, _SECONDS, _RUNS and _CC change the link and the load; SALLYWAY_WAN_ONLY
// measures one of "raw TCP" and "sallyway" alone, SALLYWAY_WAN_WAY one of up and down, and SALLYWAY_WAN_IDLE pauses for so many seconds before
// each: what a session has carried before decides how it starts. SALLYWAY_WAN_NETEM=1 has the kernel's netem emulate the link.
//
// The ceiling is what raw TCP gets out of the same link without loss and delay: what the emulator adds to or takes from the figures. Dropped is
// what hosts lost on their own: full socket buffers, full queues of devices.
func TestProductOverWAN(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	number := func(name string, otherwise float64) float64 {
		v := os.Getenv("SALLYWAY_WAN_" + name)
		if v == "" {
			return otherwise
		}
		n, err := strconv.ParseFloat(v, 64)
		if err != nil {
			t.Fatalf("SALLYWAY_WAN_%s: %v", name, err)
		}
		return n
	}
	way := wan.Direction{
		Delay: time.Duration(number("RTT", 80) / 2 * float64(time.Millisecond)),
		Rate:  int64(number("MBIT", 100) * 1e6),
		Loss:  number("LOSS", 0.5) / 100,
	}
	seconds, runs := time.Duration(number("SECONDS", 10))*time.Second, int(number("RUNS", 3))
	cc := os.Getenv("SALLYWAY_WAN_CC")
	if cc == "" {
		cc = "cubic"
	}
	netem := os.Getenv("SALLYWAY_WAN_NETEM") != ""
	ctx := t.Context()
	l, err := lab.New(lab.Config{Raw: true, Access: &wan.Config{AtoB: way, BtoA: way, Seed: 1}, AccessNetem: netem})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Private.Iperf3Server(ctx, iperfPort); err != nil {
		t.Fatal(err)
	}
	directions := []bool{false, true}
	switch os.Getenv("SALLYWAY_WAN_WAY") {
	case "up":
		directions = directions[:1]
	case "down":
		directions = directions[1:]
	}
	run := func(r lab.IperfRun) (res lab.IperfResult, err error) {
		soon, cancel := context.WithTimeout(ctx, 3*r.Time+30*time.Second)
		defer cancel()
		err = lab.Until(soon, time.Second, func() error { // iperf3's server resets who comes between two tests
			res, err = l.Client.Iperf3(soon, r)
			return err
		})
		return res, err
	}
	if !netem { // before the product sees a delay that is not the path's
		for _, c := range []struct {
			name string
			way  wan.Direction
		}{{"its rate, no loss, no delay", wan.Direction{Rate: way.Rate}}, {"no limit", wan.Direction{}}} {
			if err := l.SetAccess(c.way, c.way); err != nil {
				t.Fatal(err)
			}
			for _, down := range directions {
				res, err := run(lab.IperfRun{Addr: lab.RawAddr.String(), Port: iperfPort, Time: 3 * time.Second, Down: down, CC: cc})
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("ceiling with %s, down %t: %.1f Mbit/s", c.name, down, res.BitsPerSecond/1e6)
			}
		}
		if err := l.SetAccess(way, way); err != nil {
			t.Fatal(err)
		}
	}
	site, err := l.Build(ctx, lab.SiteConfig{NoBranch: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Private.Echo(":" + strconv.Itoa(echoPort)); err != nil {
		t.Fatal(err)
	}
	ports := strconv.Itoa(iperfPort) + "," + strconv.Itoa(echoPort)
	web := lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: ports}
	if err := l.AddResource(ctx, web, "client:"+lab.Laptop); err != nil {
		t.Fatal(err)
	}
	addrs := map[string]string{"raw TCP": lab.RawAddr.String(), "sallyway": lab.WebAddr.String()}
	names := []string{"raw TCP", "sallyway"}
	if only := os.Getenv("SALLYWAY_WAN_ONLY"); only != "" {
		names = []string{only}
	}
	soon, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("the private host is not reached"))
	defer cancel()
	err = lab.Until(soon, 50*time.Millisecond, func() error {
		ctx, cancel := context.WithTimeout(soon, 3*time.Second)
		defer cancel()
		c, err := l.Client.Dial(ctx, "tcp", lab.WebAddr.String()+":"+strconv.Itoa(echoPort))
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string][]float64)
	idle := time.Duration(number("IDLE", 0) * float64(time.Second))
	for range runs {
		for _, down := range directions {
			for _, name := range names {
				key := name + " up"
				if down {
					key = name + " down"
				}
				<-time.After(idle) // a part of the load
				before, dropped := l.AccessStats(), drops(t, l)
				res, err := run(lab.IperfRun{Addr: addrs[name], Port: iperfPort, Time: seconds, Down: down, CC: cc})
				if err != nil {
					t.Errorf("%s: %v", key, err)
					continue
				}
				mbit := res.BitsPerSecond / 1e6
				found[key] = append(found[key], mbit)
				t.Logf("%s: %.1f Mbit/s, %d retransmits of the sender's TCP", key, mbit, res.Retransmits)
				t.Logf("  link up %s", difference(before.AtoB, l.AccessStats().AtoB))
				t.Logf("  link down %s", difference(before.BtoA, l.AccessStats().BtoA))
				for what, n := range drops(t, l) {
					if n > dropped[what] {
						t.Logf("  dropped %d: %s", n-dropped[what], what)
					}
				}
			}
		}
	}
	for key, f := range found {
		slices.Sort(f)
		t.Logf("median of %d: %s %.1f Mbit/s (%.1f to %.1f)", len(f), key, f[len(f)/2], f[0], f[len(f)-1])
	}
	for _, n := range []*lab.Node{site.Laptop, site.GatewayA} {
		var status json.RawMessage
		if err := n.Status(ctx, &status); err != nil {
			t.Error(err)
		}
		t.Logf("status of %s: %s", n.Name, status)
	}
	if t.Failed() {
		t.Log(site.Laptop.Log.Tail(20))
	}
}

// drops counts what the lab's hosts dropped: datagrams that found a socket's buffer full, packets at their devices.
func drops(t *testing.T, l *lab.Lab) map[string]uint64 {
	t.Helper()
	found := make(map[string]uint64)
	for _, h := range l.Hosts() {
		var snmp, dev []byte
		err := h.Do(func() (err error) {
			if snmp, err = os.ReadFile("/proc/thread-self/net/snmp"); err == nil {
				dev, err = os.ReadFile("/proc/thread-self/net/dev")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for line := range strings.Lines(string(snmp)) {
			f := strings.Fields(line)
			if f[0] != "Udp:" {
				continue
			}
			if names == nil {
				names = f
				continue
			}
			for i, name := range names {
				if n, _ := strconv.ParseUint(f[i], 10, 64); name == "RcvbufErrors" || name == "SndbufErrors" {
					found[h.Name+" "+name] = n
				}
			}
		}
		for line := range strings.Lines(string(dev)) {
			name, counts, ok := strings.Cut(line, ":")
			f := strings.Fields(counts)
			if !ok || len(f) < 16 {
				continue
			}
			for i, way := range map[int]string{3: "received", 11: "sent"} {
				n, _ := strconv.ParseUint(f[i], 10, 64)
				found[h.Name+" "+strings.TrimSpace(name)+" "+way] = n
			}
		}
	}
	return found
}

// difference tells what has come through between two counts.
func difference(a, b wan.Count) string {
	n := func(x, y uint64) string { return strconv.FormatUint(y-x, 10) }
	return n(a.Passed, b.Passed) + " passed, " + n(a.Lost, b.Lost) + " lost, " + n(a.QueueDrops, b.QueueDrops) + " found the queue full, " +
		n(a.Bytes, b.Bytes) + " bytes"
}
