package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// releases are the Debian releases that the packages are installed on.
var releases = []string{"bookworm", "trixie"}

// debian makes the root folders of releases, all at once, by mmdebstrap, from the mirror that apt here uses. They hold the
// minimal system and systemd. SALLYWAY_DEBIAN_ROOTS names a folder where they are kept and taken from again, for who
// works on these tests.
func debian(ctx context.Context, t *testing.T, releases ...string) map[string]string {
	t.Helper()
	dir := os.Getenv("SALLYWAY_DEBIAN_ROOTS")
	if dir == "" {
		dir = t.TempDir()
	}
	mirror := "http://deb.debian.org/debian"
	if out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian").Output(); err == nil {
		if line, _, _ := strings.Cut(string(out), "\n"); line != "" {
			mirror = line
		}
	}
	type result struct {
		release, root string
		err           error
	}
	made := make(chan result)
	for _, r := range releases {
		go func() {
			root := filepath.Join(dir, r)
			if _, err := os.Stat(filepath.Join(root, "usr/lib/systemd/systemd")); err == nil {
				made <- result{r, root, nil}
				return
			}
			var log bytes.Buffer
			cmd := exec.CommandContext(ctx, "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", "--include=systemd,rpm",
				"--dpkgopt=path-exclude=/usr/share/locale/*", r, root, mirror)
			cmd.Stdout, cmd.Stderr = &log, &log
			err := cmd.Run()
			if err != nil {
				err = fmt.Errorf("mmdebstrap %s: %w\n%s", r, err, log.Bytes())
			}
			made <- result{r, root, err}
		}()
	}
	roots := map[string]string{}
	var errs error
	for range releases {
		r := <-made
		roots[r.release], errs = r.root, errors.Join(errs, r.err)
	}
	if errs != nil {
		t.Fatal(errs)
	}
	return roots
}

// machine is a host of a lab that runs a Debian of its own: its root is a release's with a layer in memory above it, its
// first process systemd or one that only waits, and it has its own processes, mounts and cgroups beside the host's network.
type machine struct {
	*lab.Host
	t       *testing.T
	release string
	pid     int // of its first process, as seen from here
}

// begin joins a cgroup of the machine's own; as says what its first process is.
const begin = `
set -eu
base=$1 dir=$2 group=$3 name=$4 init=$5
mkdir -p "$dir/cgroup"
mount -t cgroup2 none "$dir/cgroup"
mkdir "$dir/cgroup/$group"
echo 0 >"$dir/cgroup/$group/cgroup.procs"
exec unshare --cgroup bash -c "$6" machine "$@"
`

// enter builds the root. What the kernel shares between machines can be read there and not changed.
const enter = `
set -eu
base=$1 dir=$2 name=$4 init=$5
umount "$dir/cgroup"
mkdir -p "$dir/fs"
mount -t tmpfs tmpfs "$dir/fs"
mkdir "$dir/fs/upper" "$dir/fs/work" "$dir/fs/root"
root=$dir/fs/root
mount -t overlay -o "lowerdir=$base,upperdir=$dir/fs/upper,workdir=$dir/fs/work" overlay "$root"
mkdir -p "$root/packages"
mount --bind "$7" "$root/packages"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
for d in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200"; do
	set -- $d
	mknod -m 666 "$root/dev/$1" c "$2" "$3"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
hostname "$name"
echo "$name" >"$root/etc/hostname"
rm -f "$root/usr/sbin/policy-rc.d"
cd "$root"
pivot_root . mnt
umount -l /mnt
mount --make-rshared /
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin $init
`

// boot starts a machine with systemd on host h and waits until it is up. packages is a folder that it sees as /packages.
func boot(ctx context.Context, h *lab.Host, t *testing.T, release, root, packages string) *machine {
	t.Helper()
	m := start(ctx, h, t, release, root, packages, "/lib/systemd/systemd --system --unit=multi-user.target")
	var r lab.Result
	err := lab.Until(ctx, 100*time.Millisecond, func() error {
		r, _ = m.try(ctx, "", "systemctl", "is-system-running", "--wait") // degraded is an exit code, too
		if s := strings.TrimSpace(r.Stdout); s != "running" && s != "degraded" {
			return fmt.Errorf("systemd says %q %s", s, r.Stderr)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s does not boot on %s: %v", release, h.Name, err)
	}
	return m
}

// start starts a machine whose first process is init.
func start(ctx context.Context, h *lab.Host, t *testing.T, release, root, packages, init string) *machine {
	t.Helper()
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	group := "sallyway-packages-" + hex.EncodeToString(b[:])
	dir := h.Path("machine")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(lab.Spec{Name: "machine", Args: []string{
		"unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--propagation", "private",
		"bash", "-c", begin, "machine", root, dir, group, h.Name, init, enter, packages,
	}})
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{Host: h, t: t, release: release}
	t.Cleanup(func() {
		p.Kill()
		removeGroup(t, group)
	})
	err = lab.Until(ctx, 20*time.Millisecond, func() error {
		select {
		case <-p.Done():
			return errors.New("it has ended")
		default:
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.PID()))
		if err != nil {
			return err
		}
		if _, err := fmt.Sscan(string(children), &m.pid); err != nil {
			return fmt.Errorf("no first process: %w", err)
		}
		cmd, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", m.pid))
		if first, _, _ := strings.Cut(init, " "); err != nil || !strings.HasPrefix(string(cmd), first) {
			return fmt.Errorf("the first process is not there yet: %q %w", cmd, err)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("machine on %s: %v\n%s", h.Name, err, p.Log.Tail(20))
	}
	return m
}

// removeGroup removes the cgroups that a machine had, once its processes have ended.
func removeGroup(t *testing.T, group string) {
	dir, err := os.MkdirTemp("", "cgroup-*")
	if err != nil {
		t.Error(err)
		return
	}
	defer os.Remove(dir)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	script := `set -e; mount -t cgroup2 none "$1"; [ ! -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} +`
	err = lab.Until(ctx, 100*time.Millisecond, func() error {
		out, err := exec.CommandContext(ctx, "unshare", "--mount", "bash", "-c", script, "remove", dir, group).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Errorf("cgroup %s stays: %v", group, err)
	}
}

// try runs a command in the machine.
func (m *machine) try(ctx context.Context, stdin string, args ...string) (lab.Result, error) {
	enter := []string{
		"nsenter", "-t", fmt.Sprint(m.pid), "--all", "--root", "--wd", "--", "env", "-i", "HOME=/root", "DEBIAN_FRONTEND=noninteractive",
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8",
	}
	return m.RunWith(ctx, lab.Exec{Args: append(enter, args...), Stdin: stdin})
}

// run runs a command in the machine and ends the test if it fails. It returns everything that was printed.
func (m *machine) run(ctx context.Context, args ...string) string {
	m.t.Helper()
	return m.feed(ctx, "", args...)
}

// feed is run with standard input.
func (m *machine) feed(ctx context.Context, stdin string, args ...string) string {
	m.t.Helper()
	r, err := m.try(ctx, stdin, args...)
	if err != nil {
		log, _ := m.try(context.WithoutCancel(ctx), "", "journalctl", "--no-pager", "-n", "30") // a chroot has none
		m.t.Fatalf("%s (%s): %s: %v\n%s%s%s", m.Name, m.release, strings.Join(args, " "), err, r.Stdout, r.Stderr, log.Stdout)
	}
	return r.Stdout + r.Stderr
}

// apt installs packages of one version, by the names of products.
func (m *machine) apt(ctx context.Context, version string, names ...string) string {
	m.t.Helper()
	args := []string{"apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends", "install"}
	for _, n := range names {
		args = append(args, "/packages/"+fileName(product{Name: n}, version, arch, "deb"))
	}
	return m.run(ctx, args...)
}

// tree lists every path of the machine's root outside of what is never a package's, with the size of files.
func (m *machine) tree(ctx context.Context) []string {
	m.t.Helper()
	out := m.run(ctx, "find", "/", "-xdev", "(", "-path", "/var/lib/apt", "-o", "-path", "/var/cache", "-o", "-path", "/var/log", "-o", "-path", "/tmp", "-o",
		"-path", "/var/lib/dpkg", "-o", "-path", "/packages", ")", "-prune", "-o", "-printf", "%p %y\n")
	return strings.Split(strings.TrimSpace(out), "\n")
}
