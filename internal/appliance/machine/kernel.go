package machine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func isInvalid(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM)
}

// reapAfter is how long a dead process may wait for whoever started it here. Processes that nobody waits for are orphans, whose parent
// ended: there are few, since daemons start none.
const reapAfter = 5 * time.Second

// Reap buries orphans until ctx ends. It leaves processes alone that have been dead for less than reapAfter: those are waited for by who
// started them.
func Reap(ctx context.Context, log *slog.Logger) {
	t := time.NewTicker(reapAfter)
	defer t.Stop()
	var before map[int]bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := zombies("/proc", os.Getpid())
		for pid := range now {
			if before[pid] {
				var ws unix.WaitStatus
				if got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil); err == nil && got == pid {
					log.Debug("buried an orphan", "pid", pid)
				}
			}
		}
		before = now
	}
}

// zombies returns the dead children of a process. proc is /proc.
func zombies(proc string, parent int) map[int]bool {
	out := make(map[int]bool)
	stats, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "stat")) // the pattern is right
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // has gone
		}
		pid, state, ppid, ok := parseStat(string(b))
		if ok && state == "Z" && ppid == parent {
			out[pid] = true
		}
	}
	return out
}

// parseStat reads pid, state and parent from a line of /proc/PID/stat (proc(5)); the command in parentheses may hold anything.
func parseStat(s string) (pid int, state string, ppid int, ok bool) {
	first, _, found := strings.Cut(s, " (")
	end := strings.LastIndex(s, ") ")
	if !found || end < 0 {
		return 0, "", 0, false
	}
	rest := strings.Fields(s[end+2:])
	pid, err := strconv.Atoi(first)
	if err != nil || len(rest) < 2 {
		return 0, "", 0, false
	}
	if ppid, err = strconv.Atoi(rest[1]); err != nil {
		return 0, "", 0, false
	}
	return pid, rest[0], ppid, true
}

// watchdogInterval is how often the watchdog is fed; the hardware's or softdog's own limit is 60 s.
const watchdogInterval = 5 * time.Second

// Watchdog feeds the kernel's watchdog until ctx ends, as long as alive says nil; then it is closed in a way that stops it. A machine
// without one returns an error at once.
func Watchdog(ctx context.Context, path string, alive func() error, log *slog.Logger) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	defer f.Close()
	t := time.NewTicker(watchdogInterval)
	defer t.Stop()
	for {
		if err := alive(); err == nil {
			if _, err := f.Write([]byte{0}); err != nil {
				return fmt.Errorf("watchdog: %w", err)
			}
		} else {
			log.Error("the watchdog gets no sign of life: the machine restarts soon", "err", err)
		}
		select {
		case <-ctx.Done():
			_, err := f.WriteString("V") // magic close: Documentation/watchdog/watchdog-api.rst
			return err
		case <-t.C:
		}
	}
}

// keyPower and what surrounds it are from linux/input-event-codes.h.
const (
	evKey     = 1
	keyPower  = 116
	eventSize = 24 // struct input_event on 64-bit machines: two longs of time, type, code, value
)

// PowerButton calls pressed when the ACPI power button is, until ctx ends. A machine without one does nothing.
func PowerButton(ctx context.Context, pressed func()) {
	files, _ := filepath.Glob("/dev/input/event*") // the pattern is right
	var wg sync.WaitGroup
	for _, path := range files {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		wg.Go(func() {
			stop := context.AfterFunc(ctx, func() { _ = f.Close() })
			defer stop()
			buf := make([]byte, 16*eventSize)
			for {
				n, err := f.Read(buf)
				if err != nil {
					return
				}
				if powerPressed(buf[:n]) {
					pressed()
				}
			}
		})
	}
	wg.Wait()
}

// powerPressed says whether input events have a press of the power key.
func powerPressed(b []byte) bool {
	for ; len(b) >= eventSize; b = b[eventSize:] {
		kind, code, value := binary.NativeEndian.Uint16(b[16:]), binary.NativeEndian.Uint16(b[18:]), binary.NativeEndian.Uint32(b[20:])
		if kind == evKey && code == keyPower && value == 1 {
			return true
		}
	}
	return false
}

// Off ends the machine: it writes everything out and powers off or restarts. It returns only when the kernel refuses.
func Off(restart bool) error {
	unix.Sync()
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if restart {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	return unix.Reboot(how)
}

// SinceBoot is the time since the kernel started.
func SinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
