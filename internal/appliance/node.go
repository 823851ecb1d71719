package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/console"
	"sallyway/internal/appliance/machine"
	"sallyway/internal/appliance/network"
	"sallyway/internal/appliance/network/firewall"
	"sallyway/internal/appliance/state"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/version"
)

// node is the running appliance.
type node struct {
	started time.Time
	log     *supervise.Ring
	slog    *slog.Logger
	console *console.Console
	state   *state.Mounted
	power   chan power
	beat    atomic.Int64 // when the status loop last went round, in seconds since started

	// healthy is what blesses an image: everything that this appliance is for works.
	healthy atomic.Bool
	updates updates

	mu     sync.Mutex
	notes  []string // guarded by mu
	sealed string   // a platform's credential for its administrator, encrypted; guarded by mu
}

// errAgain says that there may be another configuration.
var errAgain = errors.New("the configuration has changed")

// savedConfig is the file on the state partition with what the appliance was last configured with.
var savedConfig = filepath.Join(stateFolder, "appliance", "config.yaml")

// sources asks everything on this machine that can hold a configuration, in the order in which they count.
func (n *node) sources() ([]config.Found, config.CmdlineOnly) {
	sys := os.DirFS("/sys")
	found := []config.Found{config.SMBIOS(sys), config.FwCfg(sys)}
	found = append(found, seeds("/sys", "/dev")...)
	found = append(found, saved(savedConfig))
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		n.note(err.Error())
	}
	cmdline, only := config.Cmdline(string(line))
	return append(found, cmdline), only
}

// saved reads what the appliance was configured with before.
func saved(path string) config.Found {
	f := config.Found{Source: "state"}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f
	}
	if err == nil {
		f.Config, err = config.Parse(b)
	}
	f.Err = err
	return f
}

// keep writes a configuration, without its token, where saved finds it.
func keep(path string, c *config.Config) error {
	b, err := c.Save()
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return daemon.WriteFile(path, b, 0o600)
}

// configured finds a configuration and serves it. errAgain says that it wants to be called again.
func (n *node) configured(ctx context.Context) error {
	disks := present("/sys", "/dev")
	found, only := n.sources()
	r := config.Choose(found)
	for _, t := range r.Notes {
		n.note(t)
	}
	for _, err := range r.Errs {
		n.note("a configuration is wrong and is passed over: " + err.Error())
	}
	n.startUpdater(r.Config)
	s := &service{node: n, result: r, disks: disks, metadata: only.Metadata && r.Config == nil, drawn: time.Now().Add(-time.Hour)}
	return s.run(ctx)
}

// service is an appliance under one configuration, or without one.
type service struct {
	*node
	result   config.Result
	disks    string // what the configuration was looked for on
	metadata bool   // the cloud is to be asked

	net     *network.Network
	daemons []*running
	health  *running // nil without health-listen

	ready bool
	seen  []view        // of the last time
	last  console.Block // what was drawn
	drawn time.Time
}

// running is a program and who looks after it.
type running struct {
	program
	daemon *supervise.Daemon
}

// onlineWait is how long daemons wait for the network: they deal with its absence themselves, and their log says so.
const onlineWait = 20 * time.Second

// run serves until ctx ends, or there is something new. Everything it started has ended when it returns.
func (s *service) run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer s.healthy.Store(false)
	cfg := s.networkConfig()
	cfg.ResolvConf, cfg.Log = resolvConf, s.slog
	var err error
	if s.net, err = network.New(cfg); err != nil {
		s.note("network: " + err.Error() + "; DHCP and router advertisements are used")
		if s.net, err = network.New(network.Config{ResolvConf: resolvConf, Log: s.slog, Ports: cfg.Ports}); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	failed := make(chan error, 1)
	wg.Go(func() {
		if err := s.net.Run(ctx); err != nil && ctx.Err() == nil {
			failed <- fmt.Errorf("the network is closed: %w", err)
		}
	})
	timer := time.NewTimer(onlineWait)
	defer timer.Stop()
	if s.result.Config != nil || s.metadata {
		if err := s.waitOnline(ctx, timer.C, failed); err != nil {
			return err
		}
	}
	if s.metadata {
		s.askCloud(ctx)
	}
	if c := s.result.Config; c != nil {
		if err := firewall.Verify(openPorts(c)); err != nil { // nothing listens before this is so
			return err
		}
		if err := s.prepareDaemons(c); err != nil {
			return err
		}
		for _, d := range s.daemons {
			wg.Go(func() { s.look(ctx, d) })
		}
		if c.Role.Has(config.Platform) {
			wg.Go(func() { s.handOver(ctx, c) })
		}
		if s.health != nil {
			wg.Go(func() { _ = s.health.daemon.Run(ctx) }) // always nil
		}
	}
	return s.watch(ctx, failed)
}

func (s *service) waitOnline(ctx context.Context, limit <-chan time.Time, failed <-chan error) error {
	show := time.NewTicker(time.Second)
	defer show.Stop()
	for {
		select {
		case <-s.net.Online():
			return nil
		case err := <-failed:
			return err
		case <-limit:
			s.note("there is no address and no way out yet; see network below")
			return nil
		case <-ctx.Done():
			return nil
		case <-show.C:
			s.beat.Store(int64(time.Since(s.started) / time.Second))
		}
	}
}

// networkConfig is what the configuration says about the network.
func (s *service) networkConfig() network.Config {
	c := s.result.Config
	if c == nil {
		return network.Config{}
	}
	out := network.Config{Hostname: c.Hostname, DNS: c.Network.DNS, Search: c.Network.Search, NTP: c.Network.NTP, Ports: openPorts(c)}
	for _, i := range c.Network.Interfaces {
		out.Interfaces = append(out.Interfaces, nic(i))
	}
	if len(c.Network.Addresses) > 0 || len(c.Network.Routers) > 0 {
		out.Interfaces = append(out.Interfaces, network.Interface{Addresses: c.Network.Addresses, Routers: c.Network.Routers}) // of the first NIC
	}
	return out
}

func nic(i config.Interface) network.Interface {
	out := network.Interface{Name: i.Name, MAC: i.MAC, Addresses: i.Addresses, Routers: i.Routers, MTU: i.MTU, Disabled: i.Disabled}
	for _, r := range i.Routes {
		out.Routes = append(out.Routes, network.Route{To: r.To, Via: r.Via})
	}
	return out
}

// prepareDaemons makes folders and files of the configuration's daemons.
func (s *service) prepareDaemons(c *config.Config) error {
	if err := keep(savedConfig, c); err != nil {
		s.note("the configuration is not kept: " + err.Error())
	}
	for _, p := range of(c.Role) {
		if err := machine.Folder(p.folder(), p.jail.UID); err != nil {
			return fmt.Errorf("state of %s: %w", p.name, err)
		}
		if err := machine.GiveTree(p.folder(), p.jail.UID); err != nil {
			return fmt.Errorf("state of %s: %w", p.name, err)
		}
		cred := filepath.Join(runFolder, "credentials", p.name)
		if err := machine.Folder(cred, p.jail.UID); err != nil {
			return err
		}
		if err := p.writeFile(filepath.Join(runFolder, "config", p.name+".yaml"), c); err != nil {
			return err
		}
		_ = os.Remove(filepath.Join(cred, "token")) // of a configuration before
		if c.Token != "" && c.Role == p.role {
			if err := secretFile(filepath.Join(cred, "token"), []byte(c.Token.Reveal()), p.jail.UID); err != nil {
				return err
			}
		}
		s.daemons = append(s.daemons, &running{p, supervise.New(s.childOf(p, memoryFor(c.Role)))})
	}
	if c.HealthListen != "" {
		s.health = s.healthProgram(c)
	}
	return nil
}

// watchdogTime is the longest silence of a daemon.
const watchdogTime = time.Minute

// memoryFor is how much memory each daemon of a role aims at, in bytes: four fifths of what is free, shared among them.
func memoryFor(role config.Role) uint64 {
	used, total := memory("/proc/meminfo")
	return (total - used) / 5 * 4 / uint64(max(len(of(role)), 1))
}

// childOf says how a daemon is run; limit is the memory that it aims at, in bytes.
func (s *service) childOf(p program, limit uint64) supervise.Program {
	args := append([]string{jailWord, p.jail.String(), p.name}, p.start...)
	args = append(args, "--config", filepath.Join(runFolder, "config", p.name+".yaml"), "--"+p.state, p.folder())
	return supervise.Program{
		Name: p.name, Path: executable, Args: args, Dir: "/", UID: p.jail.UID, Socket: filepath.Join(runFolder, "notify", p.name),
		Env:         []string{"GOMEMLIMIT=" + strconv.FormatUint(limit, 10), "PATH=/nonexistent", "HOME=" + p.folder(), "TMPDIR=/tmp", "CREDENTIALS_DIRECTORY=" + filepath.Join(runFolder, "credentials", p.name)},
		StopTimeout: p.stop, Watchdog: watchdogTime, Log: s.slog, Attr: &syscall.SysProcAttr{Setsid: false},
	}
}

// look runs a daemon. On a host with all roles a node enrols at the host's own platform first.
func (s *service) look(ctx context.Context, d *running) {
	if c := s.result.Config; c.Role == config.All && d.role != config.Platform && !agent.Enrolled(d.folder()) {
		if err := s.enrolHere(ctx, d); err != nil {
			return // ctx has ended
		}
	}
	_ = d.daemon.Run(ctx) // always nil
}

// Limits of what the watchdog lets pass, in seconds: a repair of the state partition comes before the status loop, which then never stands still.
const (
	longestStart = 60 * 60
	longestRound = 90
)

// alive is what feeds the watchdog: the status loop goes round.
func (n *node) alive() error {
	now, beat := int64(time.Since(n.started)/time.Second), n.beat.Load()
	if beat == 0 && now < longestStart {
		return nil
	}
	if idle := now - beat; idle > longestRound {
		return fmt.Errorf("the status loop stands still for %d s", idle)
	}
	return nil
}

// How often the daemons are asked: often until all is well for the first time, then now and then.
const (
	watchFast = 500 * time.Millisecond
	watchSlow = 3 * time.Second
)

// watch follows the daemons, tells the console, and looks for new seed disks where one could help.
func (s *service) watch(ctx context.Context, failed <-chan error) error {
	var unconfigured sync.Once
	began := time.Now()
	t := time.NewTimer(watchFast) // daemons have begun by then
	defer t.Stop()
	for {
		enter := false
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-s.console.Enter():
			enter = true
		case <-t.C:
		}
		s.beat.Store(int64(time.Since(s.started) / time.Second))
		views := s.views(ctx)
		if ctx.Err() != nil {
			return nil
		}
		net := s.net.Status()
		healthy := len(views) > 0
		stuck := len(views) == 0
		for _, v := range views {
			healthy = healthy && v.ready && v.status.State == supervise.Ready
			stuck = stuck || v.status.State == supervise.Refused
		}
		s.healthy.Store(healthy || s.result.Config == nil && len(s.result.Errs) == 0 && net.Online)
		announced := healthy && !s.ready
		if announced {
			s.ready = true
			s.console.Machine(console.ReadyLine, s.readyDocument(views, net))
		}
		if s.result.Config == nil && (net.Online || time.Since(began) > onlineWait) {
			unconfigured.Do(func() { s.console.Machine(console.UnconfiguredLine, s.unconfiguredDocument(net)) })
		}
		s.draw(s.block(views, net), announced, enter)
		if stuck && s.disks != present("/sys", "/dev") {
			return errAgain
		}
		wait := watchSlow
		if !s.ready && time.Since(began) < time.Minute {
			wait = watchFast
		}
		t.Reset(wait)
	}
}

// views asks all daemons at once.
func (s *service) views(ctx context.Context) []view {
	out := make([]view, len(s.daemons))
	var wg sync.WaitGroup
	for i, d := range s.daemons {
		wg.Go(func() { out[i] = look(ctx, d.program, d.daemon) })
	}
	wg.Wait()
	for i := range out {
		if i < len(s.seen) {
			out[i] = out[i].after(s.seen[i])
		}
	}
	s.seen = out
	return out
}

// name is what the appliance is called.
func (s *service) name(views []view) string {
	for _, v := range views {
		if v.doc.Platform.Name != "" {
			return v.doc.Platform.Name
		}
	}
	if c := s.result.Config; c != nil && c.Hostname != "" {
		return c.Hostname
	}
	return network.DefaultHostname
}

func (s *service) stateText() string {
	if s.state.Device == "" {
		return "memory"
	}
	return s.state.Device
}

func (s *service) readyDocument(views []view, net network.Status) console.Ready {
	used, _ := memory("/proc/meminfo")
	return console.Ready{
		Role: string(s.result.Config.Role), Name: s.name(views), Version: version.Get().Version, Addresses: addresses(net), Config: s.result.Source,
		State: s.stateText(), Slot: s.slot().Version, SinceBoot: machine.SinceBoot().Seconds(), MemoryBytes: used,
	}
}

func (s *service) unconfiguredDocument(net network.Status) console.Unconfigured {
	d := console.Unconfigured{MAC: []string{}, Addresses: addresses(net), Version: version.Get().Version, SinceBoot: machine.SinceBoot().Seconds()}
	for _, l := range net.Links {
		d.MAC = append(d.MAC, l.MAC)
	}
	for _, err := range s.result.Errs {
		d.Problems = append(d.Problems, err.Error())
	}
	return d
}

// block is the status block of this moment.
func (s *service) block(views []view, net network.Status) console.Block {
	v := version.Get().Version
	c := s.result.Config
	var b console.Block
	if c == nil {
		b.Title = "Sallyway " + v + ": not configured"
		b.Say = []string{
			"Nothing runs here and no port is open. Where you are admin of Sallyway, run",
			"  sallyway gateway create NAME --appliance-iso seed.iso",
			"(or relay create) and attach seed.iso to this machine as a CD.",
		}
	} else {
		b.Title = fmt.Sprintf("Sallyway %s: %s %q", v, c.Role, s.name(views))
	}
	b.Rows = append(b.Rows, networkRows(net)...)
	for _, w := range views {
		rows, live := w.rows()
		b.Rows, b.Live = append(b.Rows, rows...), append(b.Live, live...)
	}
	if c != nil {
		b.Rows = append(b.Rows, console.Row{Name: "configured", Text: "by " + s.result.Source})
	}
	st := s.state.Device
	switch {
	case st == "":
		st = "in memory: this appliance's identity does not survive a restart"
	case s.state.Bytes > 0:
		st += fmt.Sprintf(", %d MiB", s.state.Bytes>>20)
	}
	b.Rows = append(b.Rows, console.Row{Name: "state", Text: st})
	if slot := s.slot(); slot.Text != "" {
		b.Rows = append(b.Rows, console.Row{Name: "image", Text: slot.Text})
	}
	for _, err := range s.result.Errs {
		b.Rows = append(b.Rows, console.Row{Name: "problem", Text: err.Error()})
	}
	last := "none"
	for _, w := range views {
		if e := w.lastError(); e != "" {
			last = e
		}
	}
	b.Rows = append(b.Rows, console.Row{Name: "last error", Text: last})
	used, total := memory("/proc/meminfo")
	b.Live = append(b.Live, console.Row{Name: "memory", Text: fmt.Sprintf("%d of %d MiB used", used>>20, total>>20)},
		console.Row{Name: "up", Text: machine.SinceBoot().Round(time.Second).String()})
	return b
}

// drawEvery is the shortest time between two blocks that nobody asked for.
const drawEvery = 4 * time.Second

// draw shows the block when it has changed, and now where that is said or somebody asks for it; who asks sees the latest of the logs, too.
func (s *service) draw(b console.Block, now, asked bool) {
	if !now && !asked && (s.last.Same(b) || time.Since(s.drawn) < drawEvery) {
		return
	}
	s.last, s.drawn = b, time.Now()
	s.console.Print(b.String())
	if asked {
		s.mu.Lock()
		notes, sealed := slices.Clone(s.notes), s.sealed
		s.mu.Unlock()
		if sealed != "" {
			s.console.Print(sealed)
		}
		for _, t := range notes {
			s.console.Print("* " + t)
		}
		for _, d := range s.daemons {
			for _, l := range d.daemon.Logs().Last(5) {
				s.console.Print(l.At.UTC().Format(time.TimeOnly) + " " + d.name + " " + l.Text)
			}
		}
	}
}
