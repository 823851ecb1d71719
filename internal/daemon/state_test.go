package daemon

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenState(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s, err := OpenState(dir, "testd", "state")
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Fatalf("mode %v, %v", fi.Mode(), err)
	}
	_, err = OpenState(dir, "testd", "state")
	if ExitCode(err) != ExitUsage || !strings.Contains(err.Error(), "already runs") || !strings.Contains(err.Error(), "pid ") {
		t.Fatalf("second daemon: %v", err)
	}
	if held, err := locked(dir); err != nil || !held {
		t.Fatalf("locked: %v %v", held, err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if held, err := locked(dir); err != nil || held {
		t.Fatalf("locked after Close: %v %v", held, err)
	}
	s, err = OpenState(dir, "testd", "state")
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpenStateRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(dir, "testd", "state"); ExitCode(err) != ExitUsage || !strings.Contains(err.Error(), "other users") {
		t.Fatalf("folder of everybody: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(filepath.Join(file, "x"), "testd", "state"); ExitCode(err) != ExitUsage || !strings.Contains(err.Error(), "--state") {
		t.Fatalf("below a file: %v", err)
	}
}

func TestDefaultStateDir(t *testing.T) {
	if os.Geteuid() == 0 {
		if got := DefaultStateDir("relayd"); got != "/var/lib/sallyway/relayd" {
			t.Fatal(got)
		}
		return
	}
	t.Setenv("XDG_STATE_HOME", "/x")
	if got := DefaultStateDir("relayd"); got != "/x/sallyway/relayd" {
		t.Fatal(got)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	for _, tc := range []struct {
		text string
		mode fs.FileMode
	}{{"one", 0o600}, {"two, longer", 0o644}, {"", 0o600}} {
		if err := WriteFile(path, []byte(tc.text), tc.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != tc.text {
			t.Fatalf("%q %v", b, err)
		}
		if fi, _ := os.Stat(path); fi.Mode().Perm() != tc.mode {
			t.Fatalf("mode %v, want %v", fi.Mode(), tc.mode)
		}
	}
	if err := WriteFile(filepath.Join(dir, "no", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("missing folder: %v", err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, ".*")); len(names) > 0 {
		t.Fatalf("left behind: %q", names)
	}
}

// TestFullDisk writes onto a file system of 64 KiB.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "state")
	if err := WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := WriteFile(path, bytes.Repeat([]byte("x"), 128<<10), 0o600)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "make room") {
		t.Fatalf("full disk: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "old" {
		t.Fatalf("old content: %q %v", b, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("left behind: %v %v", entries, err)
	}
	if c := checkState(dir); c.Result == Pass || c.Remedy == "" {
		t.Fatalf("doctor on a small disk: %+v", c)
	}
}

func TestCheckState(t *testing.T) {
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]Result{t.TempDir() + "/none": Warn, open: Fail, file: Fail} {
		if c := checkState(dir); c.Result != want || c.Remedy == "" {
			t.Errorf("%s: %+v, want %s", dir, c, want)
		}
	}
}

// What root made in a daemon's folder is the daemon's when the folder is closed: a restored database, say.
func TestCloseGivesFilesBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving files to another user needs root")
	}
	const user = 65534
	dir := filepath.Join(t.TempDir(), "state")
	s, err := OpenState(dir, "testd", "state")
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	for _, path := range []string{s.Path("platform.db"), outside} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Link(outside, s.Path("hard")), os.Symlink(outside, s.Path("soft")), os.Chown(dir, user, user)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{s.Path("platform.db"): user, s.Path(lockFile): user, outside: 0, s.Path("hard"): 0} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid, _ := owner(fi); uid != want {
			t.Errorf("%s is of user %d, want %d", path, uid, want)
		}
	}
}
