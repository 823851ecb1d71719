//go:build unix

package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// isDiskFull says whether err means that there is no room.
func isDiskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// openToOthers says whether other users may write to a file or folder.
func openToOthers(fi fs.FileInfo) bool { return fi.Mode().Perm()&0o022 != 0 }

// writable says whether this process may write to dir.
func writable(dir string) bool { return unix.Access(dir, unix.W_OK) == nil }

// freeBytes returns the room on dir's disk for ordinary users.
func freeBytes(dir string) (free uint64, known bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Blocks == 0 {
		return 0, false
	}
	return uint64(st.Bavail) * uint64(st.Bsize), true //nolint:unconvert // of another type on the BSDs
}

// owner returns the user that a file belongs to.
func owner(fi fs.FileInfo) (uid int, known bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(st.Uid), true
}

// giveBack makes root's files in dir the folder owner's. Links are left alone: only what lies in the folder itself, under one name, changes hands.
func giveBack(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return nil //nolint:nilerr // a folder that is gone has nothing to give back
	}
	to, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || to.Uid == 0 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("give files back to the owner of %s: %w", dir, err)
	}
	var errs error
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !fi.Mode().IsRegular() {
			continue // gone meanwhile, or nothing that a daemon opens
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid == 0 && st.Nlink == 1 {
			errs = errors.Join(errs, os.Lchown(filepath.Join(dir, e.Name()), int(to.Uid), int(to.Gid)))
		}
	}
	return errs
}
