package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/lab"
)

// relayDrain is how long a relay that is asked to end waits for its allocations.
const relayDrain = "5s"

// prepare starts everything and waits until all ways work.
func (r *runner) prepare(ctx context.Context, l *lab.Lab) error {
	var err error
	site := lab.SiteConfig{NoBranch: !r.scenario.Branch, RelayArgs: []string{"--drain-timeout", relayDrain}}
	if r.site, err = l.Build(ctx, site, func(step string) { fmt.Fprintln(r.out, step) }); err != nil {
		return err
	}
	if err := r.serve(ctx, l); err != nil {
		return err
	}
	ports := fmt.Sprintf("%d,%d", iperfPort, echoPort)
	web := lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: ports, UDP: ports}
	if err := l.AddResource(ctx, web, "client:"+lab.Laptop); err != nil {
		return err
	}
	r.ways = []way{
		{name: Raw, addr: lab.RawAddr, iperf: iperfPort, echo: echoPort, packets: true},
		{name: Sallyway, addr: lab.WebAddr, iperf: iperfPort, echo: echoPort, packets: true, procs: r.processes()},
	}
	soon, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("the private host is not reached"))
	defer cancel()
	for _, w := range r.ways {
		err := lab.Until(soon, 50*time.Millisecond, func() error {
			_, err := r.firstByte(ctx, w)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	if err := r.forwardUDP(ctx, l); err != nil {
		return err
	}
	if err := r.startPeers(ctx, l); err != nil {
		return err
	}
	return r.memory(false)
}

// serve starts what the private host offers: iperf3 and echo, on every address by which a way reaches it. UDP is answered
// from the address that was asked only by a server that listens on that one.
func (r *runner) serve(ctx context.Context, l *lab.Lab) error {
	r.servers = make(map[netip.Addr]*lab.Proc)
	if _, err := l.Private.Echo(fmt.Sprintf(":%d", echoPort)); err != nil {
		return err
	}
	for _, addr := range []netip.Addr{lab.RawAddr, lab.WebAddr, lab.DBAddr, lab.SSHAddr, lab.DNSAddr} {
		if _, err := l.Private.EchoUDP(netip.AddrPortFrom(addr, echoPort).String()); err != nil {
			return err
		}
		p, err := l.Private.Iperf3ServerAt(ctx, netip.AddrPortFrom(addr, iperfPort))
		if err != nil {
			return err
		}
		r.servers[addr] = p
	}
	return nil
}

// processes are ours, with the platform.
func (r *runner) processes() []*lab.Proc {
	s := r.site
	procs := []*lab.Proc{s.Laptop.Proc, s.GatewayA.Proc, s.RelayA.Proc, s.RelayB.Proc, s.PlatformD}
	if s.GatewayB != nil {
		procs = append(procs, s.GatewayB.Proc)
	}
	return procs
}

// firstByte opens a connection, and returns how long it took until an answer had come.
func (r *runner) firstByte(ctx context.Context, w way) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	start := time.Now()
	c, err := r.site.Client.Dial(ctx, "tcp", netip.AddrPortFrom(w.addr, w.echo).String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return 0, err
	}
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return 0, err
	}
	_, err = io.ReadFull(c, b)
	return time.Since(start), err
}

// iperf runs iperf3 and waits until the way's server listens again: it closes its port between two tests.
func (r *runner) iperf(ctx context.Context, l *lab.Lab, w way, run lab.IperfRun) (lab.IperfResult, error) {
	server := r.server
	if server == nil {
		at := w.addr
		if w.behind.IsValid() {
			at = w.behind
		}
		server = r.servers[at]
	}
	run.Addr, run.Port, run.Time = w.addr.String(), w.iperf, cmp.Or(run.Time, r.cfg.Time)
	mark := server.Log.Mark()
	res, err := l.Client.Iperf3(ctx, run)
	if err == nil {
		_, err = server.Log.Wait(ctx, mark, "Server listening")
	}
	return res, err
}

// excuse takes a way that fails out of the run and names it in the result. The two that are always compared are not excused.
func (r *runner) excuse(ctx context.Context, w way, err error) error {
	if err == nil || ctx.Err() != nil || w.name == Raw || w.name == Sallyway {
		return err
	}
	fmt.Fprintf(r.out, "%s leaves the run: %v\n", w.name, err)
	r.o.Missing = append(r.o.Missing, Missing{w.name, err.Error()})
	r.ways = slices.DeleteFunc(r.ways, func(o way) bool { return o.name == w.name })
	for _, p := range w.procs {
		p.Kill()
	}
	return nil
}

// each calls f for every way that the run still has, and once more where it fails: on a loaded machine iperf3 loses its
// control connection now and then. What was measured again is told in the result.
func (r *runner) each(ctx context.Context, f func(way) error) error {
	for _, w := range slices.Clone(r.ways) {
		err := f(w)
		if err != nil && ctx.Err() == nil {
			fmt.Fprintf(r.out, "%s once more: %v\n", w.name, err)
			r.o.Again = append(r.o.Again, w.name+": "+err.Error())
			err = f(w)
		}
		if err := r.excuse(ctx, w, err); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

// memory notes what each way's processes hold, before any load or after all of it.
func (r *runner) memory(loaded bool) error {
	for _, w := range r.ways {
		for _, p := range w.procs {
			u, err := p.Usage()
			if err != nil {
				return fmt.Errorf("memory of %s: %w", p.Name, err)
			}
			i := slices.IndexFunc(r.o.Memory, func(m Memory) bool { return m.Way == w.name && m.Process == p.Name })
			if i < 0 {
				i = len(r.o.Memory)
				r.o.Memory = append(r.o.Memory, Memory{Way: w.name, Process: p.Name})
			}
			if loaded {
				r.o.Memory[i].Loaded = u.RSS
			} else {
				r.o.Memory[i].Idle = u.RSS
			}
		}
	}
	return nil
}

// cpu is what each of a way's processes has used so far, with the children that it has now.
func cpu(w way) (map[string]time.Duration, error) {
	used := make(map[string]time.Duration)
	for _, p := range w.procs {
		d, err := treeCPU(p.PID())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		used[p.Name] = d
	}
	return used, nil
}

// treeCPU is what a process and its living descendants have used. Servers such as sshd work in children that stay as long
// as their connection.
func treeCPU(pid int) (time.Duration, error) {
	u, err := lab.ReadUsage(pid)
	if err != nil {
		return 0, err
	}
	sum := u.CPU
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is good
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // a thread that has ended has no children
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				d, _ := treeCPU(child) // has ended meanwhile
				sum += d
			}
		}
	}
	return sum, nil
}

// ms is a duration in milliseconds.
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func direction(down bool) string {
	if down {
		return "down"
	}
	return "up"
}
