// Package demo shows the product at work in a lab, step by step, to a person.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/lab"
)

// Config is what the user may choose.
type Config struct {
	Bin    string // folder of the programs; empty is that of the running program
	NAT    bool
	MTU    int // bytes; zero is 1500
	NoWait bool
}

// Lengths of the measurements.
const (
	iperfTime   = 3 * time.Second
	loadTime    = 12 * time.Second
	beforeKill  = 2 * time.Second
	pulsePace   = 10 * time.Millisecond
	recoverWait = 60 * time.Second
	stepWait    = 30 * time.Second
)

// Ports of the private host.
const (
	webPort   = 80
	echoPort  = 7000
	iperfPort = 5201
	vaultPort = 8200
	httpProxy = "127.0.0.1:3128" // on the client
)

const page = `<h1>Hello from the private network</h1>
`

// Run shows everything and returns after it has cleaned up. When in and out are a terminal it waits for the end of ctx
// (Ctrl-C) before it does. The end of ctx is no error.
func Run(ctx context.Context, cfg Config, in *os.File, out io.Writer) error {
	if cfg.Bin == "" {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		cfg.Bin = filepath.Dir(exe)
	}
	s := &show{cfg: cfg, out: out, start: time.Now()}
	s.colour = isTerminal(out)
	err := s.run(ctx, isTerminal(in) && isTerminal(out) && !cfg.NoWait)
	if ctx.Err() != nil {
		err = nil
	}
	return err
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// show is a running demo.
type show struct {
	cfg    Config
	out    io.Writer
	colour bool
	start  time.Time
	steps  int
	site   *lab.Site
}

func (s *show) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// step begins a part of the demo.
func (s *show) step(title string) {
	s.steps++
	fmt.Fprintf(s.out, "\n%s %s\n", s.paint("1;36", fmt.Sprintf("%d.", s.steps)), s.paint("1", title))
}

// say prints a line of the current part.
func (s *show) say(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	for _, line := range strings.Split(text, "\n") {
		fmt.Fprintf(s.out, "   %s\n", line)
	}
}

// typed prints a command as the user would type it.
func (s *show) typed(where, command string) { s.say("%s %s", s.paint("2", where+"$"), command) }

func (s *show) run(ctx context.Context, wait bool) (err error) {
	l, err := lab.New(lab.Config{Bin: s.cfg.Bin, NAT: s.cfg.NAT, MTU: s.cfg.MTU})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			s.logs()
		}
		l.Close()
		fmt.Fprintf(s.out, "\nCleaned up. Total time: %s.\n", round(time.Since(s.start)))
	}()
	s.picture()
	for _, part := range []func(context.Context, *lab.Lab) error{s.enrol, s.resources, s.page, s.throughput, s.denied, s.kill} {
		if err := part(ctx, l); err != nil {
			return err
		}
	}
	fmt.Fprintf(s.out, "\nAll of it took %s.\n", round(time.Since(s.start)))
	if wait {
		s.byHand()
		<-ctx.Done()
		fmt.Fprintln(s.out)
	}
	return nil
}

func (s *show) picture() {
	s.step("A small internet in network namespaces")
	s.say(`laptop ───┐                 ┌── relay-1   relay-2
          ├──── router ─────┤
office ───┘       │         └── platform
  └─ private      branch`)
	s.say("The router passes what goes to relays (5349, 49152–65535/udp, 2222, 8443/tcp) and to the platform (443/tcp),")
	s.say("and drops everything else: laptop and office cannot reach each other, and nobody can call them.")
}

// enrol starts every daemon.
func (s *show) enrol(ctx context.Context, l *lab.Lab) error {
	s.step("Enrolment: each node makes its key, spends its token and has its certificate from the organization's CA")
	var err error
	s.site, err = l.Build(ctx, lab.SiteConfig{ClientArgs: []string{"--http", httpProxy}}, func(step string) { s.say("%s", step) })
	if err != nil {
		return err
	}
	s.typed("admin", "sallyway status")
	r, err := l.Sallyway(ctx, "status")
	if err != nil {
		return err
	}
	s.say("%s", r.Stdout)
	return nil
}

// resources starts the private servers and lets the laptop reach two of them.
func (s *show) resources(ctx context.Context, l *lab.Lab) error {
	s.step("Private resources behind the gateway, and who may reach them")
	at := func(port uint16) string { return netip.AddrPortFrom(lab.WebAddr, port).String() }
	if _, err := l.Private.Web(at(webPort), page); err != nil {
		return err
	}
	if _, err := l.Private.Web(at(vaultPort), "secret\n"); err != nil {
		return err
	}
	if _, err := l.Private.Echo(at(echoPort)); err != nil {
		return err
	}
	if _, err := l.Private.Iperf3Server(ctx, iperfPort); err != nil {
		var missing *lab.MissingError
		if !errors.As(err, &missing) {
			return err
		}
	}
	web := lab.Resource{Name: "web", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: "80,5201,7000", UDP: "5201", ICMP: true}
	s.typed("admin", "sallyway resource create web --gateway office --address 10.20.0.10 --tcp 80,5201,7000 --icmp")
	s.typed("admin", "sallyway policy allow --client laptop --resource web")
	if err := l.AddResource(ctx, web, "client:"+lab.Laptop); err != nil {
		return err
	}
	s.typed("admin", "sallyway resource create vault --gateway office --address 10.20.0.10 --tcp 8200")
	return l.AddResource(ctx, lab.Resource{Name: "vault", Gateway: lab.Office, Address: lab.WebAddr.String(), TCP: "8200"})
}

// page fetches a page by name through the TUN device.
func (s *show) page(ctx context.Context, l *lab.Lab) error {
	s.step("A page by name: curl → TUN → netstack → QUIC → relay → gateway")
	url := "http://" + lab.FQDN("web", lab.DefaultOrg) + "/"
	fetch, err := fetcher()
	if err != nil {
		return err
	}
	s.typed("laptop", "curl "+url)
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	var r lab.Result
	err = lab.Until(ctx, 100*time.Millisecond, func() (err error) {
		r, err = l.Client.Run(ctx, fetch(url)...)
		return err
	})
	if err != nil {
		return err
	}
	s.say("%s", r.Stdout)
	again, err := l.Client.Run(ctx, fetch(url)...)
	if err != nil {
		return err
	}
	s.say("(once more, as a warm call: %s for the whole of curl)", round(again.Took))
	return nil
}

// fetcher returns how to fetch a URL with what the machine has: curl, else wget.
func fetcher() (func(url string) []string, error) {
	curl, err := lab.Program("curl")
	if err == nil {
		return func(url string) []string { return []string{curl, "-sS", "--max-time", "10", url} }, nil
	}
	if wget, wgetErr := lab.Program("wget"); wgetErr == nil {
		return func(url string) []string { return []string{wget, "-q", "-T", "10", "-O", "-", url} }, nil
	}
	return nil, err
}

// throughput measures both ways with iperf3, or with HTTP where iperf3 is not installed.
func (s *show) throughput(ctx context.Context, l *lab.Lab) error {
	s.step("Throughput through the tunnel, all five hosts sharing this machine's cores")
	if _, err := lab.Program("iperf3"); err != nil {
		s.say("%v; measured with HTTP instead", err)
		return s.httpThroughput(ctx, l)
	}
	name := lab.FQDN("web", lab.DefaultOrg)
	for _, down := range []bool{false, true} {
		run := lab.IperfRun{Addr: name, Port: iperfPort, Time: iperfTime, Down: down}
		flag, word := "", "up"
		if down {
			flag, word = " -R", "down"
		}
		s.typed("laptop", fmt.Sprintf("iperf3 -c %s -t %d%s", name, int(iperfTime.Seconds()), flag))
		r, err := l.Client.Iperf3(ctx, run)
		if err != nil {
			return err
		}
		s.say("%-4s %.0f Mbit/s, %d MB arrived", word, r.BitsPerSecond/1e6, r.Bytes/1e6)
	}
	return nil
}

// httpThroughput moves a fixed amount by HTTP both ways.
func (s *show) httpThroughput(ctx context.Context, l *lab.Lab) error {
	const size = 64 << 20
	c := l.Client.HTTPClient()
	url := fmt.Sprintf("http://%s", lab.WebAddr)
	start := time.Now()
	resp, err := c.Post(url+"/sum", "application/octet-stream", lab.Pattern(size))
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if err != nil {
		return err
	}
	s.say("up   %.0f Mbit/s", size*8/time.Since(start).Seconds()/1e6)
	start = time.Now()
	if resp, err = c.Get(fmt.Sprintf("%s/bytes?n=%d", url, size)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if err != nil {
		return err
	}
	s.say("down %.0f Mbit/s", size*8/time.Since(start).Seconds()/1e6)
	return ctx.Err()
}

// denied shows a target that no policy allows: to curl, in words, and in the client's log.
func (s *show) denied(ctx context.Context, l *lab.Lab) error {
	s.step("A target that no policy allows, and why")
	mark := s.site.Laptop.Log.Mark()
	target := netip.AddrPortFrom(lab.WebAddr, vaultPort).String()
	if curl, err := lab.Program("curl"); err == nil {
		s.typed("laptop", "curl -v --proxytunnel --proxy "+httpProxy+" http://"+target+"/")
		r, err := l.Client.Run(ctx, curl, "-sSv", "--max-time", "10", "--proxytunnel", "--proxy", "http://"+httpProxy, "http://"+target+"/")
		if err == nil {
			return fmt.Errorf("the vault opened to %s: %s", lab.Laptop, r.Stdout)
		}
		for line := range strings.Lines(r.Stderr) {
			if l := strings.TrimSpace(line); strings.HasPrefix(l, "< HTTP/") || strings.HasPrefix(strings.ToLower(l), "< proxy-status") || strings.HasPrefix(l, "curl:") {
				s.say("%s", l)
			}
		}
	}
	s.typed("admin", "sallyway policy explain --client laptop --resource vault")
	r, err := l.Sallyway(ctx, "policy", "explain", "--client", lab.Laptop, "--resource", "vault")
	if err != nil && r.Stdout == "" {
		return err
	}
	s.say("%s%s", r.Stdout, r.Stderr)
	for _, line := range s.site.Laptop.Log.Since(mark, `(?i)den(y|ied)|prohibited|refused`) {
		s.say("laptop's log: %s", line.Text)
		break
	}
	return nil
}

// kill ends the relay in use under load and tells what it cost.
func (s *show) kill(ctx context.Context, l *lab.Lab) error {
	s.step("The relay in use is killed (SIGKILL) under load")
	ctx, cancel := context.WithTimeout(ctx, loadTime+recoverWait)
	defer cancel()
	pulse, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(lab.WebAddr, echoPort), pulsePace)
	if err != nil {
		return err
	}
	defer pulse.Stop()
	if err := pulse.WaitBeats(ctx, 20); err != nil {
		return err
	}
	load := s.load(ctx, l)
	used, err := lab.Busier(beforeKill, l.Relay1, l.Relay2)
	if err != nil {
		return err
	}
	victim := s.site.RelayA
	if used == l.Relay2 {
		victim = s.site.RelayB
	}
	usual, _ := pulse.LongestGap(time.Time{})
	before := pulse.Beats()
	victim.Kill()
	killed := time.Now()
	s.say("%s carried the traffic and is dead. Before: an answer every %v, the longest gap %s.", victim.Name, pulsePace, round(usual))

	again, err := firstDial(ctx, l, killed)
	if err != nil {
		return fmt.Errorf("new connections do not work again %s after the kill: %w", round(time.Since(killed)), err)
	}
	s.say("A new connection worked %s after the kill.", round(again))
	survived := pulse.WaitBeats(ctx, 20) == nil
	loaded := <-load
	gap, _ := pulse.LongestGap(killed)
	if survived {
		s.say("The open connection lived on: its longest silence was %s (%d answers before, %d after).", round(gap), before, pulse.Beats()-before)
	} else {
		s.say("The open connection was lost: %v.", pulse.Err())
	}
	s.say("%s", loaded)
	if err := victim.Proc.Start(); err != nil {
		return err
	}
	if err := victim.WaitReady(ctx); err != nil {
		return err
	}
	s.say("%s is back.", victim.Name)
	return nil
}

// load sends for loadTime and returns a sentence on how it ended.
func (s *show) load(ctx context.Context, l *lab.Lab) <-chan string {
	result := make(chan string, 1)
	go func() {
		if _, err := lab.Program("iperf3"); err != nil {
			result <- "(iperf3 is not installed: the load was the connection itself.)"
			return
		}
		r, err := l.Client.Iperf3(ctx, lab.IperfRun{Addr: lab.WebAddr.String(), Port: iperfPort, Time: loadTime})
		if err != nil {
			result <- fmt.Sprintf("iperf3, which ran meanwhile, was cut off: %v.", err)
			return
		}
		result <- fmt.Sprintf("iperf3 ran through it for %v: %.0f Mbit/s on average.", loadTime, r.BitsPerSecond/1e6)
	}()
	return result
}

// firstDial opens new connections until one is answered, and returns how long that took since the kill.
func firstDial(ctx context.Context, l *lab.Lab, since time.Time) (time.Duration, error) {
	err := lab.Until(ctx, 20*time.Millisecond, func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		p, err := l.Client.StartPulse(ctx, netip.AddrPortFrom(lab.WebAddr, echoPort), pulsePace)
		if err != nil {
			return err
		}
		defer p.Stop()
		return p.WaitBeats(ctx, 1)
	})
	return time.Since(since), err
}

// byHand prints lines to paste.
func (s *show) byHand() {
	enter := func(pid int) string { return fmt.Sprintf("sudo nsenter -t %d -n -m", pid) }
	s.step("Your turn, in another terminal (Ctrl-C here ends it all)")
	laptop := enter(s.site.Laptop.PID())
	s.say("%s curl http://%s/", laptop, lab.FQDN("web", lab.DefaultOrg))
	s.say("%s bash        # a shell on the laptop", laptop)
	s.say("%s env HOME=%s %s/sallyway status   # as the admin", enter(s.site.PlatformD.PID()), s.site.Platform.Dir(), s.cfg.Bin)
	s.say("logs: %s/*/*.log", s.site.Dir())
}

// logs shows the ends of the logs after a failure.
func (s *show) logs() {
	if s.site == nil {
		return
	}
	fmt.Fprintln(s.out, "\nThe ends of the logs:")
	for _, n := range []*lab.Node{s.site.RelayA, s.site.RelayB, s.site.GatewayA, s.site.GatewayB, s.site.Laptop} {
		if n != nil && n.Proc != nil {
			fmt.Fprintf(s.out, "   %s\n%s", n.Name, n.Log.Tail(8))
		}
	}
}

// round makes a duration readable: three digits or so.
func round(d time.Duration) time.Duration {
	switch {
	case d >= 10*time.Second:
		return d.Round(100 * time.Millisecond)
	case d >= time.Second:
		return d.Round(10 * time.Millisecond)
	case d >= time.Millisecond:
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}
