package daemon

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/windows"
)

// socketPath returns the path of the socket in dir.
func socketPath(dir string) (string, func(), error) {
	return filepath.Join(dir, controlSocket), func() {}, nil
}

// peerUID returns this process's user: who may open the socket is the folder's access list to say.
func peerUID(*net.UnixConn) (int, error) { return os.Geteuid(), nil }

// takeLock takes an exclusive lock on the open file. taken says that another process holds it.
func takeLock(f *os.File) (taken bool, err error) {
	err = windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 1, new(windows.Overlapped))
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return true, nil
	}
	return false, err
}

// isLocked says whether another process holds the lock.
func isLocked(f *os.File) (bool, error) {
	taken, err := takeLock(f)
	if !taken && err == nil {
		err = windows.UnlockFileEx(windows.Handle(f.Fd()), 0, 1, 1, new(windows.Overlapped))
	}
	return taken, err
}

func isDiskFull(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, syscall.ENOSPC)
}

// openToOthers is for the folder's access list to say, which mode bits do not show.
func openToOthers(fs.FileInfo) bool { return false }

func writable(string) bool { return true }

func freeBytes(dir string) (free uint64, known bool) {
	p, err := windows.UTF16PtrFromString(dir)
	if err != nil || windows.GetDiskFreeSpaceEx(p, &free, nil, nil) != nil {
		return 0, false
	}
	return free, true
}

// owner is not known by number.
func owner(fs.FileInfo) (uid int, known bool) { return 0, false }

// giveBack has nothing to do: new files have the folder's access list.
func giveBack(string) error { return nil }
