package appliance

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/machine"
)

// blockDevices are the names of this machine's disks, partitions and optical drives.
func blockDevices(sys string) []string {
	all, _ := os.ReadDir(filepath.Join(sys, "class/block"))
	var out []string
	for _, e := range all {
		if !slices.ContainsFunc([]string{"loop", "ram", "zram", "fd", "nbd"}, func(p string) bool { return strings.HasPrefix(e.Name(), p) }) {
			out = append(out, e.Name())
		}
	}
	return out
}

// seedHead is how much of a seed disk is looked at to see whether it is another one: our own seeds are smaller, in bytes.
const seedHead = 128 << 10

// present describes the disks of this machine and the seeds among them: when it changes, there may be another configuration.
func present(sys, dev string) string {
	var out strings.Builder
	for _, name := range blockDevices(sys) {
		out.WriteString(name)
		if r, err := os.Open(filepath.Join(dev, name)); err == nil {
			if kind, _ := config.Seed(r); kind != config.NoSeed {
				h := sha256.New()
				_, _ = io.Copy(h, io.NewSectionReader(r, 0, seedHead)) // what cannot be read is not new
				fmt.Fprintf(&out, ":%x", h.Sum(nil))
			}
			_ = r.Close() // was only read
		}
		out.WriteByte(' ')
	}
	return out.String()
}

// seeds reads every seed disk of this machine. Each is mounted read-only for as long as it is read.
func seeds(sys, dev string) []config.Found {
	var out []config.Found
	for _, name := range blockDevices(sys) {
		path := filepath.Join(dev, name)
		r, err := os.Open(path)
		if err != nil {
			continue // a drive without a disk
		}
		kind, fstype := config.Seed(r)
		_ = r.Close() // was only read
		if kind == config.NoSeed {
			continue
		}
		f, err := readSeed(path, name, kind, fstype)
		if err != nil {
			f = config.Found{Source: string(kind), Where: name, Err: err}
		}
		out = append(out, f)
	}
	return out
}

func readSeed(path, name string, kind config.Kind, fstype string) (config.Found, error) {
	at := filepath.Join(runFolder, "seed")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return config.Found{}, err
	}
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount(path, at, fstype, flags, ""); err != nil {
		return config.Found{}, fmt.Errorf("mount: %w", err)
	}
	defer func() { _ = machine.Unmount(at) }() // it is read-only: nothing is lost
	return config.ReadSeed(os.DirFS(at), kind, name), nil
}
