package update

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// EFILinux is the folder of unified kernel images (the Boot Loader Specification's type 2 entries).
const EFILinux = "EFI/Linux"

// LoaderEntries is the folder of systemd-boot's other entries (type 1). A disk that boots by BIOS as well comes with one, which starts the BIOS's kernel.
const LoaderEntries = "loader/entries"

// uefiSlots are what systemd-boot starts: the newest one first, those without tries left last.
type uefiSlots struct {
	disk
	running Version
	tries   int
}

// entryFile is an entry and where it is.
type entryFile struct {
	Entry
	folder, name string // below the boot partition
	suffix       string
}

func (u *uefiSlots) folder() string { return u.path(EFILinux) }

func (u *uefiSlots) entries() ([]entryFile, error) {
	var all []entryFile
	for folder, suffix := range map[string]string{EFILinux: ".efi", LoaderEntries: ".conf"} {
		files, err := os.ReadDir(u.path(folder))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, f := range files {
			if e, got, ok := parseEntry(f.Name()); ok && got == suffix && f.Type().IsRegular() {
				all = append(all, entryFile{e, folder, f.Name(), suffix})
			}
		}
	}
	slices.SortFunc(all, func(a, b entryFile) int {
		return cmp.Or(b.Version.Compare(a.Version), strings.Compare(b.suffix, a.suffix), strings.Compare(a.name, b.name))
	})
	return all, nil
}

func (u *uefiSlots) list() ([]Slot, error) {
	entries, err := u.entries()
	if err != nil {
		return nil, err
	}
	var all []Slot
	for _, e := range entries {
		running := e.Version == u.running
		all = append(all, Slot{
			Version: e.Version, File: filepath.Join(e.folder, e.name), Running: running,
			Good: !e.Counted, Failed: e.Failed() && !running, TriesLeft: e.Left, TriesDone: e.Done,
		})
	}
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
	for _, e := range entries {
		if e.Version == u.running && e.Counted {
			good := prefix + string(e.Version) + e.suffix
			return u.rename(u.path(e.folder, e.name), u.path(e.folder, good))
		}
	}
	return fmt.Errorf("its file is not in %s", u.folder())
}

func (u *uefiSlots) clean() error { return u.cleanParts(u.folder()) }
