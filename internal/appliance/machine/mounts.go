// Package machine is the part of process 1 that deals with the kernel: file systems, modules, settings, orphans, the watchdog, the power
// button, and how a daemon loses root's power before it starts.
package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mount is one file system that process 1 makes.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
	optional               bool // a kernel may lack it
}

const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mounts are in the order in which they are made.
var mounts = []mount{
	{"proc", "/proc", "proc", plain, "hidepid=2", false},
	{"sysfs", "/sys", "sysfs", plain, "", false},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755", false},
	{"tmpfs", "/run", "tmpfs", plain, "mode=0755,size=32m", false},
	{"tmpfs", "/tmp", "tmpfs", plain, "mode=1777,size=64m", false},
	{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", plain, "", true},
	{"securityfs", "/sys/kernel/security", "securityfs", plain, "", true},
}

// Mount makes the file systems of a running system below an empty root.
func Mount() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil && !m.optional {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
		err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) && !m.optional {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// MountOptional tries again what a kernel may lack: some of it comes with modules.
func MountOptional() {
	for _, m := range mounts {
		if m.optional {
			_ = unix.Mount(m.source, m.target, m.fstype, m.flags, m.data) // busy where it is there already
		}
	}
}

// Unmount writes everything out and takes a file system away; one that is in use becomes read-only.
func Unmount(target string) error {
	unix.Sync()
	err := unix.Unmount(target, 0)
	if errors.Is(err, unix.EBUSY) {
		return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	if errors.Is(err, unix.EINVAL) {
		return nil // was not mounted
	}
	return err
}

// Folder makes a folder for one user alone.
func Folder(path string, uid int) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	return errors.Join(os.Chmod(path, 0o700), os.Lchown(path, uid, uid))
}

// GiveTree gives a folder and what is in it to a user: the numbers of users are this program's, and one version may have others than the next.
func GiveTree(path string, uid int) error {
	return filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, uid, uid)
	})
}
