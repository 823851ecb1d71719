package update

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// EFILinux is the folder of unified kernel images (the Boot Loader Specification's type 2 entries).
const EFILinux = "EFI/Linux"

// uefiSlots are unified kernel images that systemd-boot starts: the newest one first, those without tries left last.
type uefiSlots struct {
	disk
	running Version
	tries   int
}

func (u *uefiSlots) folder() string { return u.path(EFILinux) }

func (u *uefiSlots) entries() (map[string]Entry, error) {
	files, err := os.ReadDir(u.folder())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := map[string]Entry{}
	for _, f := range files {
		if e, ok := ParseEntry(f.Name()); ok && f.Type().IsRegular() {
			all[f.Name()] = e
		}
	}
	return all, nil
}

func (u *uefiSlots) list() ([]Slot, error) {
	entries, err := u.entries()
	if err != nil {
		return nil, err
	}
	var all []Slot
	for name, e := range entries {
		running := e.Version == u.running
		all = append(all, Slot{
			Version: e.Version, File: filepath.Join(EFILinux, name), Running: running,
			Good: !e.Counted, Failed: e.Failed() && !running, TriesLeft: e.Left, TriesDone: e.Done,
		})
	}
	newest(all)
	for _, tried := range []bool{false, true} {
		for i := range all {
			if spent := !all[i].Good && all[i].TriesLeft == 0; spent == tried {
				all[i].Next = true
				return all, nil
			}
		}
	}
	return all, nil
}

func (u *uefiSlots) install(m Manifest, image string) error {
	return u.rename(image, u.path(EFILinux, Entry{Version: m.Version, Counted: true, Left: u.tries}.String()))
}

func (u *uefiSlots) remove(s Slot) error { return u.removeAll(u.path(s.File)) }

// begin has nothing to do: systemd-boot has counted.
func (u *uefiSlots) begin() error { return nil }

func (u *uefiSlots) bless() error {
	entries, err := u.entries()
	if err != nil {
		return err
	}
	for name, e := range entries {
		if e.Version == u.running && e.Counted {
			return u.rename(u.path(EFILinux, name), u.path(EFILinux, Entry{Version: e.Version}.String()))
		}
	}
	return fmt.Errorf("its file is not in %s", u.folder())
}

func (u *uefiSlots) clean() error { return u.cleanParts(u.folder()) }
