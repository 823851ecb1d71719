// Package supervise keeps a daemon running as a child process: it starts it, waits for its readiness (sd_notify), restarts it when it ends
// or when its watchdog gets no sign of life, and stops it gently.
//
//	d := supervise.New(supervise.Program{Name: "gatewayd", Path: "/init", Args: []string{"daemon", "gatewayd", "up"}, …})
//	err := d.Run(ctx)   // returns after the process has ended
//	d.Status()
package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/daemon"
)

// Program is what is run and how.
type Program struct {
	Name string
	Path string   // executable
	Args []string // without the executable's own name
	Env  []string // whole; the notify socket is added
	Dir  string
	// Attr goes to the process; it always gets a process group of its own.
	Attr *syscall.SysProcAttr
	// UID may write to the notify socket, -1 is the caller's.
	UID int
	// Socket is the path of the notify socket.
	Socket string
	// StartTimeout bounds the time until readiness, 0 is not bounded: a daemon may wait for its platform for as long as that is away.
	StartTimeout time.Duration
	// StopTimeout is how long the daemon may take after SIGTERM; then its group is killed. Zero is 90 s.
	StopTimeout time.Duration
	// Watchdog is the longest silence of a daemon that has given a sign of life; zero asks for none.
	Watchdog time.Duration
	Log      *slog.Logger
	// Output gets the daemon's standard output and error besides the ring. Nil: nobody.
	Output io.Writer
	// Changed is called after each change of the status, from Run's goroutine. Nil: nobody.
	Changed func()
	// Backoff are the shortest and longest wait before a restart. Zero is a second, and a minute.
	BackoffMin, BackoffMax time.Duration
	// Refused is the wait after an exit code that says that trying again changes nothing (2, 3). Zero is ten minutes.
	Refused time.Duration
}

// State is what a daemon does.
type State string

// The states. Waiting is between two runs; Refused is that after an exit code that only another configuration changes.
const (
	Stopped  State = "stopped"
	Starting State = "starting"
	Ready    State = "ready"
	Stopping State = "stopping"
	Waiting  State = "waiting"
	Refused  State = "refused"
)

// Status is a daemon's state, for the console.
type Status struct {
	State    State
	PID      int // 0: no process
	Since    time.Time
	Restarts int
	Text     string // what it last said about itself (sd_notify's STATUS)
	Exit     string // how it last ended, "" where it never did
	Code     int    // its last exit code, -1 where it never ended or was killed
	Next     time.Time
}

// Daemon is a program under supervision.
type Daemon struct {
	p    Program
	logs *Ring

	mu     sync.Mutex
	status Status // guarded by mu
}

// New fills the defaults of p. It starts nothing.
func New(p Program) *Daemon {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&p.StopTimeout, 90*time.Second)
	def(&p.BackoffMin, time.Second)
	def(&p.BackoffMax, time.Minute)
	def(&p.Refused, 10*time.Minute)
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if p.Changed == nil {
		p.Changed = func() {}
	}
	return &Daemon{p: p, logs: NewRing(), status: Status{State: Stopped, Code: -1, Since: time.Now()}}
}

// Name is the program's.
func (d *Daemon) Name() string { return d.p.Name }

// Logs are the last lines of the daemon's log.
func (d *Daemon) Logs() *Ring { return d.logs }

// Status returns the present state.
func (d *Daemon) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status
}

func (d *Daemon) set(change func(s *Status)) {
	d.mu.Lock()
	before := d.status
	change(&d.status)
	if d.status.State != before.State {
		d.status.Since = time.Now()
	}
	changed := d.status != before
	d.mu.Unlock()
	if changed {
		d.p.Changed()
	}
}

// steady is how long a daemon has to run for the next wait to be the shortest again.
const steady = time.Minute

// Run runs the program until ctx ends, and then stops it. A daemon that ends well (exit code 0) was told to by somebody else: it is
// restarted, too, since nobody can start it by hand here.
func (d *Daemon) Run(ctx context.Context) error {
	wait := d.p.BackoffMin
	for {
		began := time.Now()
		code, err := d.once(ctx)
		if ctx.Err() != nil {
			d.set(func(s *Status) { s.State, s.PID = Stopped, 0 })
			return nil
		}
		if time.Since(began) > steady {
			wait = d.p.BackoffMin
		}
		pause, state := wait, Waiting
		wait = min(2*wait, d.p.BackoffMax)
		if code == daemon.ExitUsage || code == daemon.ExitEnrolmentRefused {
			pause, state = d.p.Refused, Refused
		}
		d.p.Log.Warn("daemon ended", "daemon", d.p.Name, "how", err, "restart_in", pause)
		next := time.Now().Add(pause)
		d.set(func(s *Status) {
			s.State, s.PID, s.Exit, s.Code, s.Next = state, 0, err.Error(), code, next
			s.Restarts++
		})
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			d.set(func(s *Status) { s.State = Stopped })
			return nil
		case <-t.C:
		}
	}
}

// errEnded is how a program that ended with exit code 0 did.
var errEnded = errors.New("ended by itself (exit code 0)")

// once runs the program one time, until it has ended. The error says how and is never nil.
func (d *Daemon) once(ctx context.Context) (code int, err error) {
	life, done := context.WithCancel(context.WithoutCancel(ctx)) // of everything around this process
	defer done()
	sock, err := listenNotify(d.p.Socket, d.p.UID)
	if err != nil {
		return -1, err
	}
	notices := make(chan notice)
	var readers sync.WaitGroup
	readers.Go(func() { sock.read(life, notices) })
	defer readers.Wait()
	defer func() { _ = sock.close() }() // the folder is in memory, and the next run makes it anew
	defer done()

	out := io.Writer(d.logs)
	if d.p.Output != nil {
		out = io.MultiWriter(d.logs, d.p.Output)
	}
	cmd := exec.Command(d.p.Path, d.p.Args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.p.Dir, out, out
	cmd.Env = append(append([]string{}, d.p.Env...), "NOTIFY_SOCKET="+d.p.Socket)
	if d.p.Watchdog > 0 {
		cmd.Env = append(cmd.Env, "WATCHDOG_USEC="+strconv.FormatInt(d.p.Watchdog.Microseconds(), 10))
	}
	var attr syscall.SysProcAttr
	if d.p.Attr != nil {
		attr = *d.p.Attr
	}
	attr.Setpgid = true
	cmd.SysProcAttr = &attr
	cmd.WaitDelay = 2 * time.Second // a child of the daemon that kept its log open
	if err := cmd.Start(); err != nil {
		return -1, fmt.Errorf("start %s: %w", d.p.Path, err)
	}
	pid := cmd.Process.Pid
	d.set(func(s *Status) { s.State, s.PID, s.Text = Starting, pid, "" })
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer d.killGroup(pid) // what the daemon left behind
	return d.attend(ctx, pid, exited, notices)
}

// attend looks after a process until it has ended.
func (d *Daemon) attend(ctx context.Context, pid int, exited <-chan error, notices <-chan notice) (code int, err error) {
	stop := ctx.Done()
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	if d.p.StartTimeout > 0 {
		timer.Reset(d.p.StartTimeout)
	}
	var why error
	phase := Starting
	for {
		select {
		case err := <-exited:
			code, err := ended(err)
			if why != nil {
				err = why
			}
			return code, err
		case n := <-notices:
			if n.status != "" {
				d.set(func(s *Status) { s.Text = n.status })
			}
			switch {
			case n.ready && phase == Starting:
				phase = Ready
				timer.Stop()
				d.set(func(s *Status) { s.State = Ready })
			case n.stopping && phase != Stopping:
				phase = Stopping
				timer.Reset(d.p.StopTimeout)
				d.set(func(s *Status) { s.State = Stopping })
			}
			if (n.alive || n.ready) && phase == Ready && d.p.Watchdog > 0 {
				timer.Reset(d.p.Watchdog)
			}
		case <-stop:
			stop = nil
			phase = Stopping
			d.set(func(s *Status) { s.State = Stopping })
			timer.Reset(d.p.StopTimeout)
			d.signal(pid, syscall.SIGTERM)
		case <-timer.C:
			switch phase {
			case Starting:
				why = fmt.Errorf("not ready after %v: ended by force", d.p.StartTimeout)
			case Ready:
				why = fmt.Errorf("no sign of life for %v: ended by force", d.p.Watchdog)
			default:
				why = fmt.Errorf("did not stop within %v: ended by force", d.p.StopTimeout)
			}
			d.killGroup(pid)
			timer.Reset(10 * time.Second) // a process in the kernel dies late
		}
	}
}

// ended turns the error of Wait into an exit code and words.
func ended(err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return 0, errEnded
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), fmt.Errorf("ended with exit code %d", exit.ExitCode())
	}
	return -1, err
}

func (d *Daemon) signal(pid int, sig syscall.Signal) {
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, syscall.ESRCH) {
		d.p.Log.Error("signal", "daemon", d.p.Name, "err", err)
	}
}

// killGroup ends everything in the daemon's process group. The group's number is the first process's: it is not given out again while
// the group has a member, and Setpgid made it ours.
func (d *Daemon) killGroup(pid int) {
	if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) && !errors.Is(err, syscall.EPERM) {
		d.p.Log.Error("kill", "daemon", d.p.Name, "err", err)
	}
}
