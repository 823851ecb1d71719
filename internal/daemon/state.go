package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// State is a daemon's state folder, held by a lock that no second daemon gets. Close gives the lock back; so does the
// end of the process, however it ends.
type State struct {
	dir  string
	lock *os.File
}

// lockFile is locked while a daemon runs on the folder; its content is the daemon's pid, for people.
const lockFile = "lock"

// DefaultStateDir returns the state folder of a daemon: the one that systemd made for its unit, else
// /var/lib/sallyway/NAME for root, and below the XDG state folder of any other user.
func DefaultStateDir(name string) string {
	// systemd.exec(5), "StateDirectory=". A unit's children inherit the variable: it has to be the folder of this daemon.
	if dir := os.Getenv("STATE_DIRECTORY"); strings.HasSuffix(dir, "/sallyway/"+name) && filepath.IsAbs(dir) {
		return dir
	}
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib/sallyway", name)
	}
	base := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification has relative paths ignored
		home, err := os.UserHomeDir()
		if err != nil {
			home = filepath.Join(os.TempDir(), fmt.Sprintf("sallyway-%d", os.Geteuid()))
		}
		base = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(base, "sallyway", name)
}

// OpenState creates dir (0700) where it is missing, checks that it can be written and is nobody else's to write, and
// takes its lock. program and flag, the name of the flag that names the folder, are for errors, which are usage errors.
func OpenState(dir, program, flag string) (*State, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, Usagef("state folder: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, stateError(dir, flag, err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, stateError(dir, flag, err)
	}
	if openToOthers(fi) {
		return nil, Usagef("state folder %s can be written by other users (mode %04o)\nchmod 700 it, or name another with --%s", dir, fi.Mode().Perm(), flag)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, stateError(dir, flag, err)
	}
	if taken, err := takeLock(f); err != nil || taken {
		defer f.Close()
		if err != nil {
			return nil, stateError(dir, flag, err)
		}
		who := "another process"
		if b, _ := io.ReadAll(io.LimitReader(f, 32)); len(b) > 0 {
			who = "pid " + strings.TrimSpace(string(b))
		}
		return nil, Usagef("a daemon already runs on the state folder %s (%s)\nstop it, or give this %s a folder of its own with --%s DIR", dir, who, program, flag)
	}
	s := &State{dir: dir, lock: f}
	if err := s.writePid(); err != nil {
		return nil, errors.Join(stateError(dir, flag, err), s.Close())
	}
	return s, nil
}

func (s *State) writePid() error {
	if err := s.lock.Truncate(0); err != nil {
		return err
	}
	_, err := s.lock.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return err
}

// stateError says what to do about a state folder that cannot be used.
func stateError(dir, flag string, err error) error {
	if isDiskFull(err) {
		return fullDisk(dir, err)
	}
	hint := fmt.Sprintf("name a folder that can be written with --%s DIR", flag)
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		hint = "run as root, or " + hint
	}
	return Usagef("state folder %s cannot be used: %w\n%s", dir, err, hint)
}

// fullDisk says what to do about a disk without room.
func fullDisk(path string, err error) error {
	return Failf("%s: %w\nmake room on that disk (df -h %s; df -i %s) or move the state to another disk", path, err, filepath.Dir(path), filepath.Dir(path))
}

// locked says whether a daemon holds the lock of dir.
func locked(dir string) (bool, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	return isLocked(f)
}

// Dir returns the folder's absolute path.
func (s *State) Dir() string { return s.dir }

// Path returns the path of a file in the folder.
func (s *State) Path(name string) string { return filepath.Join(s.dir, name) }

// WriteFile replaces a file in the folder atomically (see the function of the same name).
func (s *State) WriteFile(name string, data []byte, mode fs.FileMode) error {
	return WriteFile(s.Path(name), data, mode)
}

// Close gives the lock back. It is idempotent. What root made in a folder of another user's, as `sudo platformd admin restore` does, becomes
// that user's first: the daemon could not open it.
func (s *State) Close() error {
	given := giveBack(s.dir)
	err := s.lock.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return errors.Join(given, err)
}

// WriteFile replaces path atomically: after a crash or a power cut it holds the old content or the new one, whole. A
// full disk leaves the old content; the error then names the path and what to do.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	err := replace(path, data, mode)
	if isDiskFull(err) {
		return fullDisk(path, err)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func replace(path string, data []byte, mode fs.FileMode) error {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	if err := errors.Join(fill(tmp, data, mode), tmp.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return syncDir(dir)
}

// fill gives f its content and mode, durably. The mode is not cut by the umask: the caller means it.
func fill(f *os.File, data []byte, mode fs.FileMode) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	return f.Sync()
}

// syncDir makes a rename in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// checkState is the doctor's look at a state folder. It changes nothing.
func checkState(dir string) Check {
	c := Check{Check: "state folder", Result: Pass, Detail: dir}
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.Result, c.Detail, c.Remedy = Warn, dir+" does not exist yet", "the first start makes it"
	case err != nil:
		c.Result, c.Detail, c.Remedy = Fail, err.Error(), "run the doctor as root, or name another folder"
	case !fi.IsDir():
		c.Result, c.Detail, c.Remedy = Fail, dir+" is not a folder", "name a folder"
	case openToOthers(fi):
		c.Result, c.Detail, c.Remedy = Fail, fmt.Sprintf("%s can be written by other users (mode %04o)", dir, fi.Mode().Perm()), "chmod 700 "+dir
	case !writable(dir):
		c.Result, c.Detail, c.Remedy = Fail, dir+" cannot be written by this user", "run the doctor as root"
	default:
		if free, known := freeBytes(dir); known && free < minFree {
			c.Result, c.Detail, c.Remedy = Warn, fmt.Sprintf("less than %d MiB free below %s", minFree>>20, dir), "make room: state cannot be saved on a full disk"
		}
	}
	return c
}

// minFree is the room on the state's disk below which the doctor warns, in bytes.
const minFree = 64 << 20
