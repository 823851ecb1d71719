package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/console"
	"sallyway/internal/appliance/machine"
	"sallyway/internal/appliance/state"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/daemon"
	"sallyway/internal/version"
)

// Words after which process 1 calls its own program again.
const (
	jailWord   = "jail"   // jail UID:CAPS NAME ARGS…: give up root's power, then be the program NAME
	daemonWord = "daemon" // daemon NAME ARGS…: be the program NAME
	healthWord = "health" // answer for the daemons' health
)

// Main is the whole program: process 1 of an image when it is that, else one of the programs, by its own name or the word daemon.
func Main(programs map[string]func() *cobra.Command) int {
	if os.Getpid() == 1 {
		boot()
	}
	name, args := filepath.Base(os.Args[0]), os.Args
	if make, known := programs[name]; known {
		return daemon.Main(make())
	}
	if len(args) >= 2 && args[1] == healthWord {
		return serveHealth(args[2:])
	}
	if len(args) >= 4 && args[1] == jailWord {
		err := enterJail(args[2], args[3:])
		fmt.Fprintf(os.Stderr, "%s: %v\n", args[3], err)
		return daemon.ExitUsage
	}
	if len(args) >= 3 && args[1] == daemonWord {
		if make, known := programs[args[2]]; known {
			os.Args = args[2:]
			return daemon.Main(make())
		}
	}
	fmt.Fprintf(os.Stderr, "%s is the operating system of an appliance image and runs as process 1 there\nits programs: %s daemon gatewayd|relayd|platformd|sallyway …\n", name, name)
	return daemon.ExitUsage
}

// executable is this program's file in a running image.
const executable = "/proc/self/exe"

func enterJail(spec string, args []string) error {
	j, err := machine.ParseJail(spec)
	if err != nil {
		return err
	}
	self, err := os.Readlink(executable)
	if err != nil {
		return err
	}
	if args[0] == healthWord { // a part of this program without a name of its own
		args = append([]string{"appliance"}, args...)
	}
	return j.Enter(self, args, os.Environ())
}

// pid1Memory is how much memory process 1 aims at, in bytes: what is left is for the daemons.
const pid1Memory = 24 << 20

// boot is process 1. It never returns: its end would be the kernel's panic.
func boot() {
	debug.SetMemoryLimit(pid1Memory)
	debug.SetGCPercent(50)
	n := &node{started: time.Now(), log: supervise.NewRing(), power: make(chan power, 1)}
	n.slog = slog.New(slog.NewTextHandler(n.log, nil))
	mountErr := machine.Mount()
	n.console = console.Open("/dev", console.Names("/sys"))
	n.console.Print("Sallyway " + version.Get().Version + " starts")
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGPWR)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // Ctrl-Alt-Del comes as SIGINT then; a kernel without it restarts at once
	go func() {
		for s := range signals {
			n.turnOff(s == syscall.SIGINT, "signal: "+s.String())
		}
	}()
	var around sync.WaitGroup
	around.Go(func() { machine.Reap(ctx, n.slog) })
	work, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := errors.Join(mountErr, n.run(work, &around)); err != nil && work.Err() == nil {
			n.halted(work, err)
		}
	}()
	p := <-n.power
	n.console.Print(p.why + ": stopping")
	stop()
	select {
	case <-done:
	case <-time.After(2 * time.Minute): // each daemon has its own, shorter limit
		n.console.Print("not everything has stopped")
	}
	n.stopUpdater()
	for _, f := range []string{stateFolder, bootFolder} {
		if err := machine.Unmount(f); err != nil {
			n.console.Print(f + ": " + err.Error())
		}
	}
	cancel()
	bye, gone := context.WithTimeout(context.Background(), 2*time.Second)
	what := "powering off"
	if p.restart {
		what = "restarting"
	}
	n.console.Print(what)
	n.console.Close(bye)
	gone()
	err := machine.Off(p.restart)
	for { // process 1 has to stay whatever comes
		fmt.Fprintln(os.Stderr, "the kernel does not", what, err)
		time.Sleep(time.Hour)
	}
}

// power is a wish to end.
type power struct {
	restart bool
	why     string
}

// turnOff asks for the end. The first wish wins.
func (n *node) turnOff(restart bool, why string) {
	select {
	case n.power <- power{restart, why}:
	default:
	}
}

// halted shows why nothing runs, and stays.
func (n *node) halted(ctx context.Context, err error) {
	b := console.Block{Title: "Sallyway " + version.Get().Version + ": NOT RUNNING", Rows: []console.Row{{Name: "problem", Text: err.Error()}}}
	n.console.Print(b.String())
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.console.Enter():
			n.console.Print(b.String())
		}
	}
}

// modulesFolder is where an image has its kernel modules.
const modulesFolder = "/modules"

// run is everything between the first mount and the end.
func (n *node) run(ctx context.Context, around *sync.WaitGroup) error {
	if err := n.prepare(); err != nil {
		return err
	}
	around.Go(func() {
		if err := machine.Watchdog(ctx, "/dev/watchdog", n.alive, n.slog); err != nil && ctx.Err() == nil {
			n.note("no watchdog: " + err.Error())
		}
	})
	around.Go(func() { machine.PowerButton(ctx, func() { n.turnOff(false, "power button") }) })
	var err error
	if n.state, err = (state.Finder{Sys: "/sys", Dev: "/dev", Log: n.slog}).Open(ctx, stateFolder); err != nil {
		return err
	}
	if err := os.Chmod(stateFolder, 0o755); err != nil { // daemons go through it to their own folders
		return fmt.Errorf("state folder: %w", err)
	}
	for _, t := range n.state.Notes {
		n.note(t)
	}
	for ctx.Err() == nil {
		err := n.configured(ctx)
		if !errors.Is(err, errAgain) {
			return err
		}
	}
	return nil
}

// prepare makes the rest of a running system: modules, settings, folders, files that resolvers look for. Then the root is read-only.
func (n *node) prepare() error {
	m, err := machine.ReadModules(os.DirFS(modulesFolder))
	if err != nil {
		return fmt.Errorf("kernel modules: %w", err)
	}
	if _, err := m.Load(modulesFolder); err != nil {
		n.note(err.Error())
	}
	machine.MountOptional() // EFI's variables need a module
	if err := machine.Settings("/proc/sys"); err != nil {
		n.note(err.Error())
	}
	for _, dir := range []string{"/etc", stateFolder, bootFolder, runFolder, runFolder + "/etc", runFolder + "/notify", runFolder + "/config", runFolder + "/credentials"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n::1 localhost\n"), 0o644); err != nil {
		return err
	}
	if err := os.Symlink(resolvConf, "/etc/resolv.conf"); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.Chown("/dev/net/tun", gatewayUID, gatewayUID); err != nil {
		n.note("no TUN device: " + err.Error())
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		n.note("the root file system stays writable: " + err.Error())
	}
	return nil
}

// resolvConf is where the network writes which name servers there are.
const resolvConf = runFolder + "/etc/resolv.conf"

// maxNotes is how many notes are kept for the status block.
const maxNotes = 12

// note shows something on the console once and keeps it for the status block.
func (n *node) note(text string) {
	n.mu.Lock()
	fresh := !slices.Contains(n.notes, text)
	if fresh {
		n.notes = append(n.notes, text)
		n.notes = n.notes[max(0, len(n.notes)-maxNotes):]
	}
	n.mu.Unlock()
	if fresh {
		n.console.Print("* " + text)
	}
}
