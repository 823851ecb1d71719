package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is a machine of the lab: a network namespace and a mount namespace of its own, with its own resolv.conf, hosts file
// and /run. One operating system thread lives in them for as long as the host does; whatever is to happen on the host is
// started from this thread and so inherits both. The namespaces have no names, so that a lab that is killed leaves none
// behind. All methods may be called concurrently.
type Host struct {
	Name string

	lab   *Lab
	dir   string // the host's folder in the lab's
	netns *os.File
	calls chan func()
	ended chan struct{} // closed when the thread is gone
	once  sync.Once
}

// newHost makes the namespaces. The caller closes the host.
func newHost(l *Lab, name string) (*Host, error) {
	h := &Host{Name: name, lab: l, dir: filepath.Join(l.dir, name), calls: make(chan func()), ended: make(chan struct{})}
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(h.ResolvConf(), nil, 0o644); err != nil {
		return nil, err
	}
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	if err := os.WriteFile(filepath.Join(h.dir, "hosts"), []byte(hosts), 0o644); err != nil {
		return nil, err
	}
	made := make(chan error)
	onThread(func() { h.keep(made) })
	if err := <-made; err != nil {
		<-h.ended
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	return h, nil
}

// keep is the host's thread.
func (h *Host) keep(made chan<- error) {
	defer close(h.ended)
	err := h.enter()
	made <- err
	if err != nil {
		return
	}
	defer h.netns.Close()
	for f := range h.calls {
		f()
	}
}

// onThread starts f on an operating system thread that runs nothing else and ends with it. It is never the process's first
// thread, by which /proc/self shows namespaces.
func onThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f() // never unlocked
			return
		}
		moved := make(chan struct{})
		go func() { // cannot be given the first thread while it is locked here
			runtime.LockOSThread()
			close(moved)
			f()
		}()
		<-moved
		runtime.UnlockOSThread()
	}()
}

// enter makes the namespaces around the calling thread.
func (h *Host) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make namespaces (needs root): %w", err)
	}
	var err error
	if h.netns, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); err != nil {
		return err
	}
	if err := h.mount(); err != nil {
		return errors.Join(err, h.netns.Close())
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("loopback: %w", err), h.netns.Close())
	}
	return nil
}

// mount gives the thread its own view of the files that name resolvers and local services. Nothing of it is seen outside.
func (h *Host) mount() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	// The sysfs of the new network namespace; where it cannot be had, programs see the machine's.
	_ = unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	resolv, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		resolv = "/etc/resolv.conf"
	}
	// An empty /run hides the machine's own resolver, D-Bus and systemd from the host.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	for _, dir := range []string{"/run/sshd", "/run/lock"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for from, to := range map[string]string{h.ResolvConf(): resolv, filepath.Join(h.dir, "hosts"): "/etc/hosts"} {
		if err := bindFile(from, to); err != nil {
			return err
		}
	}
	return nil
}

// bindFile mounts a file over another, which is made first where it is missing below the new /run.
func bindFile(from, to string) error {
	if _, err := os.Stat(to); errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(to, "/run/") {
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, nil, 0o644); err != nil {
			return err
		}
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount over %s: %w", to, err)
	}
	return nil
}

// close ends the thread. What still holds the namespaces (a process, a socket) keeps them until it is gone.
func (h *Host) close() {
	h.once.Do(func() { close(h.calls) })
	<-h.ended
}

// Do runs f on the host's thread and waits for it. F must not start goroutines that count on being on the host, and must
// not call Do of the same host.
func (h *Host) Do(f func() error) error {
	err := make(chan error, 1)
	select {
	case <-h.ended:
		return fmt.Errorf("host %s is gone", h.Name)
	case h.calls <- func() { err <- f() }:
	}
	return <-err
}

// Dir is the host's own folder, removed with the lab.
func (h *Host) Dir() string { return h.dir }

// ResolvConf is the path outside of the host of what is /etc/resolv.conf on it.
func (h *Host) ResolvConf() string { return filepath.Join(h.dir, "resolv.conf") }

// SetResolvers writes the host's resolv.conf.
func (h *Host) SetResolvers(servers ...string) error {
	var b bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return os.WriteFile(h.ResolvConf(), b.Bytes(), 0o644)
}

// Path returns a path in the host's folder.
func (h *Host) Path(elem ...string) string {
	return filepath.Join(append([]string{h.dir}, elem...)...)
}

// Listen opens a TCP listener on the host. The lab closes it at the latest.
func (h *Host) Listen(addr string) (net.Listener, error) {
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	h.lab.onClose(func() { ln.Close() })
	return ln, nil
}

// ListenUDP opens a UDP socket on the host. The lab closes it at the latest.
func (h *Host) ListenUDP(addr string) (*net.UDPConn, error) {
	var conn net.PacketConn
	err := h.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	h.lab.onClose(func() { conn.Close() })
	return conn.(*net.UDPConn), nil
}

// Dial connects from the host to an address that is an IP address and a port: names are for programs on the host. It works
// on a thread of its own, so that slow dials do not queue.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	onThread(func() {
		if err := unix.Setns(int(h.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{nil, err}
			return
		}
		var d net.Dialer
		d.SetMultipathTCP(false)
		c, err := d.DialContext(ctx, network, addr)
		done <- result{c, err}
	})
	r := <-done
	return r.c, r.err
}

// command prepares a program to be run on the host: it is started by Do(cmd.Start).
func (h *Host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = h.dir
	cmd.Env = h.environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = time.Second
	return cmd
}

// environ is what programs on the host see: the caller's PATH, a home of the host's own, and the lab's mark.
func (h *Host) environ() []string {
	return []string{
		"PATH=" + os.Getenv("PATH") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + h.dir,
		"LANG=C.UTF-8",
		"TMPDIR=" + h.lab.tmp,
		"SALLYWAY_LAB=" + h.lab.ID,
	}
}

// ExitError is a program that ended with another code than 0.
type ExitError struct {
	Args   []string
	Code   int
	Stderr string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: exit code %d: %s", filepath.Base(e.Args[0]), e.Code, bytes.TrimSpace([]byte(e.Stderr)))
}

// Result is what a program that ran to its end has left.
type Result struct {
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

// Run runs a program on the host to its end. Ending with a code other than 0 is an *ExitError, and the result holds the
// code and both outputs all the same.
func (h *Host) Run(ctx context.Context, args ...string) (Result, error) {
	return h.RunWith(ctx, Exec{Args: args})
}

// Exec is a program to run to its end.
type Exec struct {
	Args  []string
	Env   []string // added to the host's
	Stdin string
	UID   uint32 // 0 is root; another is also the group
}

// RunWith is Run with more choices.
func (h *Host) RunWith(ctx context.Context, x Exec) (Result, error) {
	cmd := h.command(ctx, x.Args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(cmd.Env, x.Env...)
	if x.Stdin != "" {
		cmd.Stdin = bytes.NewReader([]byte(x.Stdin))
	}
	if x.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: x.UID, Gid: x.UID}
	}
	start := time.Now()
	if err := h.Do(cmd.Start); err != nil {
		return Result{Code: -1}, fmt.Errorf("%s: %w", h.Name, err)
	}
	err := cmd.Wait()
	r := Result{Stdout: out.String(), Stderr: errs.String(), Code: cmd.ProcessState.ExitCode(), Took: time.Since(start)}
	if ctx.Err() != nil {
		return r, fmt.Errorf("%s on %s: %w\n%s%s", filepath.Base(x.Args[0]), h.Name, context.Cause(ctx), r.Stdout, r.Stderr)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return r, &ExitError{Args: x.Args, Code: r.Code, Stderr: r.Stderr}
	}
	return r, err
}
