package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace is how long a process has to end after SIGTERM before it is killed.
const stopGrace = 10 * time.Second

// Spec describes a process that stays.
type Spec struct {
	Name  string // of its log, unique on its host
	Args  []string
	Env   []string // added to the host's
	UID   uint32   // 0 is root; another is also the group
	GID   uint32   // zero: as UID
	Stdin string   // what it reads; empty is nothing
	Grace time.Duration
}

// Proc is a process of a host. It may be stopped and started again; its log goes on. Methods may be called concurrently,
// except Start.
type Proc struct {
	Spec
	Host *Host
	Log  *Log

	mu   sync.Mutex
	cmd  *exec.Cmd     // nil before the first start; guarded by mu
	done chan struct{} // closed when cmd has ended; guarded by mu
	err  error         // of Wait, valid when done is closed
}

// Start starts a process on the host. The lab ends it at the latest.
func (h *Host) Start(spec Spec) (*Proc, error) {
	log, err := newLog(filepath.Join(h.dir, spec.Name+".log"))
	if err != nil {
		return nil, err
	}
	p := &Proc{Spec: spec, Host: h, Log: log}
	if err := p.Start(); err != nil {
		return nil, err
	}
	l := h.lab
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		go p.Kill()
		return nil, errors.New("the lab is closed")
	}
	l.procs = append(l.procs, p)
	return p, nil
}

// Start starts the process again after it has ended.
func (p *Proc) Start() error {
	cmd := p.Host.command(context.Background(), p.Args...)
	cmd.Cancel = nil
	cmd.Env = append(cmd.Env, p.Env...)
	cmd.Stdout, cmd.Stderr = p.Log, p.Log
	if p.Stdin != "" {
		cmd.Stdin = strings.NewReader(p.Stdin)
	}
	if p.UID != 0 {
		gid := p.GID
		if gid == 0 {
			gid = p.UID
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: p.UID, Gid: gid}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		select {
		case <-p.done:
		default:
			return fmt.Errorf("%s runs already", p.Name)
		}
	}
	if err := p.Host.Do(cmd.Start); err != nil {
		return fmt.Errorf("start %s on %s: %w", p.Name, p.Host.Name, err)
	}
	done := make(chan struct{})
	p.cmd, p.done = cmd, done
	p.Host.lab.note(cmd.Process.Pid)
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(done)
	}()
	return nil
}

// PID is the process's number.
func (p *Proc) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Done is closed when the process has ended.
func (p *Proc) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// Signal sends a signal. A process that has ended already is no error.
func (p *Proc) Signal(s unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Wait waits for the end and returns the exit code, -1 for a signal.
func (p *Proc) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s goes on: %w", p.Name, context.Cause(ctx))
	}
}

// Stop asks the process to end, and kills it when it has not in time, which is an error.
func (p *Proc) Stop() error {
	if p.Grace != 0 {
		return p.stop(p.Grace)
	}
	return p.stop(stopGrace)
}

func (p *Proc) stop(grace time.Duration) error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.Done():
		return nil
	case <-t.C:
	}
	p.Kill()
	return fmt.Errorf("%s on %s did not end within %v of SIGTERM and was killed", p.Name, p.Host.Name, grace)
}

// Kill ends the process and its group at once.
func (p *Proc) Kill() {
	_ = unix.Kill(-p.PID(), unix.SIGKILL) // the group may be gone
	_ = p.Signal(unix.SIGKILL)
	<-p.Done()
}

// Restart stops and starts the process.
func (p *Proc) Restart() error {
	if err := p.Stop(); err != nil {
		return err
	}
	return p.Start()
}

// Usage is what a process has used.
type Usage struct {
	CPU time.Duration // user and system
	RSS int64         // bytes now
}

// Usage reads what the process has used so far.
func (p *Proc) Usage() (Usage, error) { return ReadUsage(p.PID()) }

// ReadUsage reads what a process has used so far.
func ReadUsage(pid int) (Usage, error) {
	fields, err := statFields(pid)
	if err != nil {
		return Usage{}, err
	}
	const tick = time.Second / 100 // USER_HZ is 100 on every Linux that Go runs on
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	pages, err3 := strconv.ParseInt(fields[21], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return Usage{}, fmt.Errorf("stat of process %d: %w", pid, err)
	}
	return Usage{CPU: time.Duration(user+system) * tick, RSS: pages * int64(os.Getpagesize())}, nil
}

// statFields are the fields of /proc/PID/stat from the third on: the second may hold anything, in parentheses.
func statFields(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	_, rest, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" "))
	fields := strings.Fields(string(rest))
	if !ok || len(fields) < 22 {
		return nil, fmt.Errorf("stat of process %d is cut short", pid)
	}
	return fields, nil
}

// Line is a line of a log.
type Line struct {
	At   time.Time // when it was read
	Text string
}

// Log is what a process writes, both outputs, over all its starts: the whole in a file, the newest lines in memory.
// The zero Log is not useful. Methods may be called concurrently.
type Log struct {
	Path string

	mu    sync.Mutex
	file  *os.File
	rest  []byte // of a line that has not ended
	lines []Line // the newest; lines[0] has number first
	first int
	more  chan struct{} // closed and replaced when a line comes
}

// keepLines bounds what a Log keeps in memory; older lines are in its file only.
const keepLines = 8192

func newLog(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &Log{Path: path, file: f, more: make(chan struct{})}, nil
}

// Write takes what the process wrote.
func (g *Log) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, err := g.file.Write(b); err != nil {
		return 0, err
	}
	now, n := time.Now(), len(b)
	for {
		line, after, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			g.rest = append(g.rest, b...)
			break
		}
		g.lines = append(g.lines, Line{now, string(append(g.rest, line...))})
		g.rest, b = g.rest[:0], after
	}
	if over := len(g.lines) - keepLines; over > 0 {
		g.lines = append([]Line(nil), g.lines[over:]...)
		g.first += over
	}
	close(g.more)
	g.more = make(chan struct{})
	return n, nil
}

// Mark is the place after the newest line, for Since and Wait.
func (g *Log) Mark() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.first + len(g.lines)
}

// Since returns the lines after a mark that match the expression.
func (g *Log) Since(mark int, expression string) []Line {
	re := regexp.MustCompile(expression)
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []Line
	for _, l := range g.lines[min(max(mark-g.first, 0), len(g.lines)):] {
		if re.MatchString(l.Text) {
			out = append(out, l)
		}
	}
	return out
}

// Wait waits until a line after the mark matches the expression and returns it.
func (g *Log) Wait(ctx context.Context, mark int, expression string) (Line, error) {
	for {
		g.mu.Lock()
		more := g.more
		g.mu.Unlock()
		if ls := g.Since(mark, expression); len(ls) > 0 {
			return ls[0], nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return Line{}, fmt.Errorf("no line of %s matches %q: %w\n%s", filepath.Base(g.Path), expression, context.Cause(ctx), g.Tail(15))
		}
	}
}

// Tail returns the newest lines, indented, to be shown with an error.
func (g *Log) Tail(n int) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var b strings.Builder
	for _, l := range g.lines[max(0, len(g.lines)-n):] {
		fmt.Fprintf(&b, "    | %s\n", l.Text)
	}
	return b.String()
}

// WaitReady waits for a line of the process's log, and fails at once when the process ends.
func (p *Proc) WaitReady(ctx context.Context, mark int, expression string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := p.Done()
	go func() {
		select {
		case <-done:
			cancel(fmt.Errorf("%s on %s has ended", p.Name, p.Host.Name))
		case <-ctx.Done():
		}
	}()
	_, err := p.Log.Wait(ctx, mark, expression)
	return err
}

// Until calls f until it returns nil, with pauses of the given length, and returns its last error when ctx ends.
func Until(ctx context.Context, pause time.Duration, f func() error) error {
	t := time.NewTicker(pause)
	defer t.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-t.C:
		}
	}
}

// processMark names a process for good: its number and when it started.
func processMark(pid int) (string, error) {
	fields, err := statFields(pid)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d %s", pid, fields[19]), nil
}

// alive reports whether the process that processMark named still runs.
func alive(mark string) bool {
	pid, err := strconv.Atoi(strings.SplitN(mark, " ", 2)[0])
	if err != nil {
		return false
	}
	now, err := processMark(pid)
	return err == nil && now == mark
}

// note writes down a process of the lab for Sweep.
func (l *Lab) note(pid int) {
	mark, err := processMark(pid)
	if err != nil {
		return // it has ended already
	}
	f, err := os.OpenFile(filepath.Join(l.dir, "processes"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		l.cfg.Log.Warn("a process is not noted", "pid", pid, "error", err)
		return
	}
	_, err = fmt.Fprintln(f, mark)
	if err = errors.Join(err, f.Close()); err != nil {
		l.cfg.Log.Warn("a process is not noted", "pid", pid, "error", err)
	}
}

// Sweep removes what labs left behind whose process is gone: their folders, and processes that outlived them. Namespaces
// end by themselves.
func Sweep(log *slog.Logger) error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	if err != nil {
		return err
	}
	var errs error
	for _, dir := range dirs {
		owner, err := os.ReadFile(filepath.Join(dir, "owner"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // being made at this moment, or none of ours
		}
		if err != nil || alive(string(owner)) {
			errs = errors.Join(errs, err)
			continue
		}
		marks, _ := os.ReadFile(filepath.Join(dir, "processes")) // none were started
		for mark := range strings.Lines(string(marks)) {
			if mark = strings.TrimSpace(mark); alive(mark) {
				pid, _ := strconv.Atoi(strings.SplitN(mark, " ", 2)[0]) // alive has read it
				errs = errors.Join(errs, unix.Kill(pid, unix.SIGKILL))
			}
		}
		log.Info("removed the leftovers of a lab that was killed", "dir", dir)
		errs = errors.Join(errs, os.RemoveAll(dir))
	}
	return errs
}

// descendants are the living processes below a process, their parents before them.
func descendants(pid int) []int {
	var all []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is good
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // a thread that has ended has no children
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				all = append(append(all, child), descendants(child)...)
			}
		}
	}
	return all
}
