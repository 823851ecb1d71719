package splitdns

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespaces runs f on a thread with network and mount namespaces of its own, against the real /proc.
func inNamespaces(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespaces
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			t.Error(err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// TestRealNamespace: without a resolv.conf of its own the namespace's DNS is left alone; with one, mounted as `ip netns exec`
// does, that one is edited in place and undone, and the host's stays as it was.
func TestRealNamespace(t *testing.T) {
	dir := t.TempDir()
	host, own, state := filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "own.conf"), filepath.Join(dir, "state")
	os.WriteFile(host, []byte(original), 0o644)
	os.WriteFile(own, []byte("nameserver 10.9.9.9\n"), 0o644)
	os.Mkdir(state, 0o755)
	inNamespaces(t, func() {
		c := Config{Interface: "sally0", StateDir: state, ResolvConf: host}
		d, err := New(c)
		if err != nil {
			t.Error(err)
			return
		}
		if m, why := d.Mode(); m != Off {
			t.Error(m, why)
		}
		set(t, d)
		d.Close()
		if b, _ := os.ReadFile(host); string(b) != original {
			t.Errorf("the host's file: %q", b)
		}

		if err := unix.Mount(own, host, "", unix.MS_BIND, ""); err != nil {
			t.Error(err)
			return
		}
		if d, err = New(c); err != nil {
			t.Error(err)
			return
		}
		if m, why := d.Mode(); m != ResolvConf {
			t.Error(m, why)
		}
		set(t, d)
		if b, _ := os.ReadFile(host); len(nameservers(b)) != 2 || nameservers(b)[0] != ours[0] {
			t.Errorf("%q", b)
		}
		if _, err := New(c); err != nil { // as after a crash
			t.Error(err)
		}
		if b, _ := os.ReadFile(host); string(b) != "nameserver 10.9.9.9\n" {
			t.Errorf("not undone: %q", b)
		}
	})
	if b, _ := os.ReadFile(host); string(b) != original {
		t.Errorf("the host's file: %q", b)
	}
}
