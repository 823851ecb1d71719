package update

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// spare is what has to stay free on the boot partition, in bytes.
const spare = 1 << 20

// write fetches the image and installs it. Images that are not needed go first: what stays are the one that runs and the newest good one
// beside it, and that goes, too, where there is no room otherwise and the running one is good.
func (u *Updater) write(ctx context.Context, src source, m Manifest, s Status) error {
	if err := u.slots.clean(); err != nil {
		return fmt.Errorf("remove what an update left: %w", err)
	}
	var fallback *Slot
	for _, slot := range s.Slots {
		if slot.Running {
			continue
		}
		if slot.Good && slot.Version != m.Version && fallback == nil {
			fallback = &slot
			continue
		}
		if err := u.slots.remove(slot); err != nil {
			return fmt.Errorf("remove version %s: %w", slot.Version, err)
		}
	}
	free, err := u.cfg.free(u.cfg.ESP)
	if err != nil {
		return fmt.Errorf("free space of the boot partition: %w", err)
	}
	// The file may come to lie there twice: as it came, and as what is taken out of it for a BIOS.
	need := m.Size + spare
	if !u.cfg.Boot.UEFI {
		need += m.Size
	}
	if free < need && fallback != nil && !s.Trial {
		if err := u.slots.remove(*fallback); err != nil {
			return fmt.Errorf("remove version %s: %w", fallback.Version, err)
		}
		if free, err = u.cfg.free(u.cfg.ESP); err != nil {
			return fmt.Errorf("free space of the boot partition: %w", err)
		}
	}
	if free < need {
		return fmt.Errorf("version %s needs %d MB on the boot partition, where %d are free: install the appliance anew from a disk image, its state partition can be kept", m.Version, need>>20, free>>20)
	}
	part := filepath.Join(u.slots.folder(), prefix+string(m.Version)+".part")
	if err := u.cfg.step("create " + part); err != nil {
		return err
	}
	if err := fetch(ctx, src, m, part); err != nil {
		_ = os.Remove(part)
		return fmt.Errorf("fetch %s: %w", m.File, err)
	}
	if err := check(part, m); err != nil { // what the disk gives back, not what came
		_ = os.Remove(part)
		return err
	}
	if err := u.slots.install(m, part); err != nil {
		return fmt.Errorf("install version %s: %w", m.Version, err)
	}
	u.log.Info("installed", "version", m.Version, "size", m.Size, "from", s.Running)
	u.latest = fmt.Sprintf("%s is installed and waits for a restart", m.Version)
	return nil
}

// fetch writes the image to a file, checked while it comes, and on the disk when it returns.
func fetch(ctx context.Context, src source, m Manifest, path string) error {
	r, err := src.image(ctx, m)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, m.Size+1))
	err = errors.Join(err, f.Sync(), f.Close())
	switch {
	case err != nil:
		return err
	case n < m.Size:
		return fmt.Errorf("it ends after %d of %d bytes", n, m.Size)
	case n > m.Size:
		return fmt.Errorf("it has more than the %d bytes that its manifest says", m.Size)
	case hex.EncodeToString(h.Sum(nil)) != m.SHA256:
		return errors.New("it is not what its manifest says")
	}
	return nil
}

// check reads an image back from the disk, past the cache where that can be had.
func check(path string, m Manifest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return fmt.Errorf("read the new image back: %w", err)
	}
	if n != m.Size || hex.EncodeToString(h.Sum(nil)) != m.SHA256 {
		return errors.New("the boot partition gives back other bytes than were written: the disk is failing")
	}
	return nil
}

func freeSpace(folder string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(folder, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// disk changes files of the boot partition so that each change is on the disk when it returns. Step is asked before each.
type disk struct {
	root string
	step func(string) error
}

func (d disk) path(elem ...string) string { return filepath.Join(append([]string{d.root}, elem...)...) }

// rename moves a file or folder and waits until that is on the disk.
func (d disk) rename(from, to string) error {
	if err := d.step("rename " + filepath.Base(from)); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return errors.Join(syncDir(filepath.Dir(to)), syncDir(filepath.Dir(from)))
}

// removeAll removes a file or folder.
func (d disk) removeAll(path string) error {
	if err := d.step("remove " + filepath.Base(path)); err != nil {
		return err
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// write writes a whole file, not atomically.
func (d disk) write(path string, b []byte) error {
	if err := d.step("write " + filepath.Base(path)); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// syncDir writes a folder to the disk.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // some file systems know nothing of it
		return err
	}
	return nil
}

// cleanParts removes what ends in .part from a folder.
func (d disk) cleanParts(folder string) error {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".part") {
			if err := d.removeAll(filepath.Join(folder, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// newest sorts slots, newest first.
func newest(all []Slot) {
	slices.SortStableFunc(all, func(a, b Slot) int { return b.Version.Compare(a.Version) })
}
