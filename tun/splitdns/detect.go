package splitdns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// stub is the address of systemd-resolved's stub resolver.
var stub = netip.AddrFrom4([4]byte{127, 0, 0, 53})

// commandTimeout is how long resolvectl may take: it waits for D-Bus where that hangs.
const commandTimeout = 10 * time.Second

// run runs a command.
func run(name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return out, nil
}

// detect says how the host does DNS, and for Off why nothing can be done.
func detect(c Config) (Mode, string) {
	if runtime.GOOS != "linux" {
		return Off, "split DNS is not there yet on " + runtime.GOOS
	}
	foreign := foreignNamespace(c.root)
	if foreign && shared(c) {
		return Off, "this network namespace shares " + c.ResolvConf + " with the host: give it one of its own in /etc/netns"
	}
	// The host's systemd-resolved knows nothing of the links in another namespace.
	if !foreign && leadsToResolved(c) {
		if _, err := c.Run("resolvectl", "status", c.Interface); err == nil {
			return Resolved, ""
		}
	}
	if _, err := os.Stat(c.ResolvConf); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Off, err.Error()
	}
	return ResolvConf, ""
}

// leadsToResolved reports whether programs that read resolv.conf ask systemd-resolved.
func leadsToResolved(c Config) bool {
	if fi, err := os.Stat(filepath.Join(c.root, "/run/systemd/resolve")); err != nil || !fi.IsDir() {
		return false
	}
	if target, err := filepath.EvalSymlinks(c.ResolvConf); err == nil && strings.HasPrefix(target, filepath.Join(c.root, "/run/systemd/resolve")+"/stub") {
		return true
	}
	b, err := os.ReadFile(c.ResolvConf)
	if err != nil {
		return false
	}
	servers := nameservers(b)
	return len(servers) == 1 && servers[0] == stub
}

// foreignNamespace reports whether we are in another network namespace than the host: than its first process, or where we
// may not look at that (it has capabilities that we lack, or a sandbox hides it), its kernel threads or else our ancestors.
func foreignNamespace(root string) bool {
	own, err := netNamespace(root, "thread-self")
	if err != nil {
		return false // no namespaces here
	}
	pid := "1"
	first, err := netNamespace(root, pid)
	if err != nil && comm(root, "2") == "kthreadd" {
		first, err = netNamespace(root, "2")
	}
	if err == nil {
		return first != own
	}
	for pid = parent(root, "thread-self"); pid != "0" && pid != ""; pid = parent(root, pid) {
		if ns, err := netNamespace(root, pid); err == nil && ns != own {
			return true
		}
	}
	return false
}

func netNamespace(root, pid string) (string, error) {
	return os.Readlink(filepath.Join(root, "/proc", pid, "ns/net"))
}

func comm(root, pid string) string {
	b, _ := os.ReadFile(filepath.Join(root, "/proc", pid, "comm"))
	return strings.TrimSpace(string(b))
}

// parent is the parent of a process, or "".
func parent(root, pid string) string {
	b, _ := os.ReadFile(filepath.Join(root, "/proc", pid, "status"))
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strings.TrimSpace(p)
		}
	}
	return ""
}

// shared reports whether resolv.conf is the host's: the file that the first process sees under that name, or where we may
// not look at that, a file that is not mounted, as `ip netns exec` does with one of /etc/netns.
func shared(c Config) bool {
	theirs, err := os.Stat(filepath.Join(c.root, "/proc/1/root", c.ResolvConf))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		own, err1 := os.Stat(c.ResolvConf)
		if err != nil || err1 != nil {
			return err != nil && err1 != nil
		}
		return os.SameFile(own, theirs)
	}
	path, err := filepath.EvalSymlinks(c.ResolvConf)
	if err != nil {
		return true
	}
	b, err := os.ReadFile(filepath.Join(c.root, "/proc/thread-self/mountinfo"))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		// Field 5 is the mount point (proc_pid_mountinfo(5)); a path with a space would not match, and counts as shared.
		if f := strings.Fields(line); len(f) > 4 && f[4] == path {
			return false
		}
	}
	return true
}

// setResolved gives the link our servers and routing-only domains: the tilde keeps them out of the search list, and a link
// that is no default route gets no other questions (resolvectl(1)).
func (d *DNS) setResolved(servers []netip.Addr, domains []string) error {
	dns := []string{"dns", d.cfg.Interface}
	for _, s := range servers {
		dns = append(dns, s.String())
	}
	domain := []string{"domain", d.cfg.Interface}
	for _, n := range domains {
		domain = append(domain, "~"+n)
	}
	// The default route goes first: never is our server asked about everything, not even between two commands.
	for _, args := range [][]string{{"default-route", d.cfg.Interface, "false"}, domain, dns} {
		if _, err := d.cfg.Run("resolvectl", args...); err != nil {
			return fmt.Errorf("resolvectl %s: %w", args[0], err)
		}
	}
	return nil
}

// currentUpstreams are the resolvers in force, those behind systemd-resolved's stub where that is named.
func (d *DNS) currentUpstreams() []netip.Addr {
	b, err := os.ReadFile(d.cfg.ResolvConf)
	if err != nil {
		return nil
	}
	servers := nameservers(b)
	if len(servers) == 1 && servers[0] == stub {
		if b, err := os.ReadFile(filepath.Join(d.cfg.root, "/run/systemd/resolve/resolv.conf")); err == nil {
			if behind := nameservers(b); len(behind) > 0 {
				return behind
			}
		}
	}
	return servers
}

// nameservers returns the addresses of the nameserver lines of a resolv.conf(5).
func nameservers(b []byte) []netip.Addr {
	var as []netip.Addr
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 || string(f[0]) != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(string(f[1])); err == nil {
			as = append(as, a.Unmap())
		}
	}
	return as
}
