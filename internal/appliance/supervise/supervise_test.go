package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/goleak"
)

// behaviour is the environment variable that turns the test's binary into a daemon.
const behaviour = "SUPERVISE_TEST_BEHAVIOUR"

func TestMain(m *testing.M) {
	if b := os.Getenv(behaviour); b != "" {
		os.Exit(behave(b))
	}
	goleak.VerifyTestMain(m)
}

// behave is a daemon: it does one word after the other.
func behave(words string) int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	for w := range strings.FieldsSeq(words) {
		word, arg, _ := strings.Cut(w, "=")
		switch word {
		case "say":
			fmt.Fprintln(os.Stderr, arg)
		case "notify":
			if sent, err := sd.SdNotify(false, strings.ReplaceAll(strings.ReplaceAll(arg, ":", "="), ",", "\n")); err != nil || !sent {
				fmt.Fprintln(os.Stderr, "notify", sent, err)
				return 99
			}
		case "exit":
			n, _ := strconv.Atoi(arg)
			return n
		case "wait": // for SIGTERM
			<-stop
		case "stubborn": // hears it, and stays
			<-stop
			select {}
		case "child": // leaves one behind that outlives it
			c := exec.Command("/proc/self/exe")
			c.Env = []string{behaviour + "=stubborn"}
			if err := c.Start(); err != nil {
				return 98
			}
			fmt.Fprintln(os.Stderr, "child", c.Process.Pid)
		case "beat": // signs of life until SIGTERM
			interval, err := sd.SdWatchdogEnabled(false)
			if err != nil || interval == 0 {
				return 97
			}
			for t := time.NewTicker(interval / 4); ; {
				select {
				case <-stop:
					return 0
				case <-t.C:
					_, _ = sd.SdNotify(false, sd.SdNotifyWatchdog)
				}
			}
		}
	}
	return 0
}

// under runs a daemon that behaves so, and returns it with a function that stops it.
func under(t *testing.T, words string, change func(p *Program)) (*Daemon, func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sv") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := Program{
		Name: "test", Path: self, Env: []string{behaviour + "=" + words}, UID: -1, Socket: filepath.Join(dir, "notify"),
		BackoffMin: 10 * time.Millisecond, BackoffMax: 40 * time.Millisecond, Refused: time.Hour, StopTimeout: 10 * time.Second,
	}
	if change != nil {
		change(&p)
	}
	d := New(p)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if s := d.Status(); s.State != Stopped || s.PID != 0 {
			t.Errorf("after the stop: %+v", s)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return d, stop
}

// until waits for a status.
func until(t *testing.T, d *Daemon, what string, ok func(Status) bool) Status {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		s := d.Status()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("not %s: %+v\n%v", what, s, d.Logs().Last(10))
		}
	}
}

func TestReadyAndStopped(t *testing.T) {
	t.Parallel()
	changes := make(chan struct{}, 100)
	d, stop := under(t, "say=hello notify=READY:1,STATUS:serving wait say=bye", func(p *Program) { p.Changed = func() { changes <- struct{}{} } })
	s := until(t, d, "ready", func(s Status) bool { return s.State == Ready })
	if s.Text != "serving" || s.PID == 0 || s.Restarts != 0 {
		t.Errorf("%+v", s)
	}
	stop()
	var said []string
	for _, l := range d.Logs().Last(10) {
		said = append(said, l.Text)
	}
	if strings.Join(said, " ") != "hello bye" {
		t.Errorf("it said %q", said)
	}
	if len(changes) < 3 {
		t.Errorf("%d changes were told", len(changes))
	}
	if gone(s.PID) != nil {
		t.Error("the process is still there")
	}
}

// gone returns an error while a process exists.
func gone(pid int) error {
	if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
		return nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil || strings.Contains(string(b), ") Z ") { // dead, and waits for whoever inherited it
		return nil
	}
	return fmt.Errorf("process %d is there", pid)
}

func TestRestarts(t *testing.T) {
	t.Parallel()
	d, stop := under(t, "notify=READY:1 exit=1", nil)
	s := until(t, d, "restarted", func(s Status) bool { return s.Restarts >= 4 })
	if s.Code != 1 || !strings.Contains(s.Exit, "exit code 1") {
		t.Errorf("%+v", s)
	}
	stop()
	e, stop := under(t, "exit=0", nil)
	until(t, e, "restarted though it ended well", func(s Status) bool { return s.Restarts >= 2 })
	stop()
}

// TestRefused: exit codes 2 and 3 are retried late.
func TestRefused(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"2", "3"} {
		d, stop := under(t, "exit="+code, nil)
		s := until(t, d, "refused", func(s Status) bool { return s.State == Refused })
		if s.Restarts != 1 || time.Until(s.Next) < 50*time.Minute {
			t.Errorf("exit code %s: %+v", code, s)
		}
		stop()
	}
	d, stop := under(t, "exit=2", func(p *Program) { p.Refused = 10 * time.Millisecond })
	until(t, d, "tried again in the end", func(s Status) bool { return s.Restarts >= 2 })
	stop()
}

func TestStubbornIsKilled(t *testing.T) {
	t.Parallel()
	d, stop := under(t, "notify=READY:1 child stubborn", func(p *Program) { p.StopTimeout = 50 * time.Millisecond })
	s := until(t, d, "ready", func(s Status) bool { return s.State == Ready && len(d.Logs().Last(1)) == 1 })
	stop()
	child, err := strconv.Atoi(strings.TrimPrefix(d.Logs().Last(1)[0].Text, "child "))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); errors.Join(gone(s.PID), gone(child)) != nil; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(errors.Join(gone(s.PID), gone(child)))
		}
	}
}

func TestWatchdog(t *testing.T) {
	t.Parallel()
	d, stop := under(t, "notify=READY:1 wait", func(p *Program) { p.Watchdog = 100 * time.Millisecond })
	s := until(t, d, "killed for its silence", func(s Status) bool { return s.Restarts >= 1 })
	if !strings.Contains(s.Exit, "no sign of life") {
		t.Errorf("%+v", s)
	}
	stop()
	d, stop = under(t, "notify=READY:1 beat", func(p *Program) { p.Watchdog = 2 * time.Second })
	first := until(t, d, "ready", func(s Status) bool { return s.State == Ready })
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if s := d.Status(); s.PID != first.PID {
			t.Fatalf("a daemon that gives signs of life was restarted: %+v", s)
		}
	}
	stop()
}

func TestStartTimeout(t *testing.T) {
	t.Parallel()
	d, stop := under(t, "wait", func(p *Program) { p.StartTimeout = 50 * time.Millisecond })
	s := until(t, d, "killed", func(s Status) bool { return s.Restarts >= 1 })
	if !strings.Contains(s.Exit, "not ready") {
		t.Errorf("%+v", s)
	}
	stop()
}

func TestNoExecutable(t *testing.T) {
	t.Parallel()
	d, stop := under(t, "wait", func(p *Program) { p.Path = "/nonexistent" })
	s := until(t, d, "tried again", func(s Status) bool { return s.Restarts >= 2 })
	if !strings.Contains(s.Exit, "/nonexistent") {
		t.Errorf("%+v", s)
	}
	stop()
}

func TestParseNotice(t *testing.T) {
	for in, want := range map[string]notice{
		"READY=1":                        {ready: true},
		"READY=0\nX":                     {},
		"STOPPING=1":                     {stopping: true},
		"WATCHDOG=1\nSTATUS=a b=c":       {alive: true, status: "a b=c"},
		"STATUS=\x1b[2Jcleared\nREADY=1": {ready: true, status: "?[2Jcleared"},
		"":                               {},
	} {
		if got := parseNotice([]byte(in)); got != want {
			t.Errorf("%q: %+v, want %+v", in, got, want)
		}
	}
}

func FuzzParseNotice(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=x\nWATCHDOG=1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := parseNotice(b); strings.ContainsAny(n.status, "\x1b\r\n") {
			t.Errorf("the status %q moves a cursor", n.status)
		}
	})
}

func TestRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRing()
		for i := range ringLines + 7 {
			fmt.Fprintf(r, "line %d\nha", i)
			fmt.Fprintf(r, "lf %d\n", i)
		}
		all := r.Last(ringLines * 2)
		if len(all) != ringLines || all[len(all)-1].Text != fmt.Sprintf("half %d", ringLines+6) || all[len(all)-2].Text != fmt.Sprintf("line %d", ringLines+6) {
			t.Errorf("%d lines, the last ones %v", len(all), all[len(all)-2:])
		}
		if got := r.Last(1); len(got) != 1 || got[0].Text != all[len(all)-1].Text {
			t.Errorf("the last line: %v", got)
		}
		fmt.Fprintln(r, strings.Repeat("x", 10*lineBytes)+"\x1b[2J")
		if l := r.Last(1)[0].Text; len(l) != lineBytes {
			t.Errorf("a long line has %d bytes", len(l))
		}
		fmt.Fprintln(r, "a\x1b[2Jb\xffc")
		if l := r.Last(1)[0].Text; l != "a?[2Jb?c" {
			t.Errorf("%q", l)
		}
	})
}
