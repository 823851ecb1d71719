package update

import (
	"debug/pe"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Names on a boot partition that a BIOS starts from.
const (
	BIOSFolder = "bios"
	BIOSMenu   = "bios/syslinux.cfg"
	BIOSKernel = "vmlinuz"
	BIOSInitrd = "initrd"
	// BIOSGood is the file in a version's folder that says that it was blessed. An image as it is shipped has it.
	BIOSGood = "good"
)

// MenuEntry is an image in syslinux's menu.
type MenuEntry struct {
	Version Version
	CmdLine string // of the kernel, without Parameter
}

// Menu is syslinux's menu: the first entry starts by itself after three seconds with another one to choose instead, or at once where there is none.
func Menu(entries ...MenuEntry) []byte {
	var b strings.Builder
	b.WriteString("SERIAL 0 115200\n")
	if len(entries) > 1 {
		b.WriteString("SAY Sallyway: press Enter to start the first of these, or type another one's name:\n")
		for _, e := range entries {
			fmt.Fprintf(&b, "SAY   %s\n", e.Version)
		}
		b.WriteString("PROMPT 1\nTIMEOUT 30\n")
	} else {
		b.WriteString("PROMPT 0\nTIMEOUT 0\n")
	}
	for i, e := range entries {
		if i == 0 {
			fmt.Fprintf(&b, "DEFAULT %s\n", e.Version)
		}
		fmt.Fprintf(&b, "LABEL %[1]s\n  LINUX /%[2]s/%[1]s/%[3]s\n  INITRD /%[2]s/%[1]s/%[4]s\n  APPEND %[5]s %[6]s%[1]s\n",
			e.Version, BIOSFolder, BIOSKernel, BIOSInitrd, strings.TrimSpace(e.CmdLine), Parameter)
	}
	return []byte(b.String())
}

// maxMenu bounds a menu. We write two entries.
const maxMenu = 16

// parseMenu reads what Menu writes; what it does not know it skips. Of entries of one version the first counts.
func parseMenu(b []byte) []MenuEntry {
	var all []MenuEntry
	first, at := "", -1 // at is the entry that lines belong to
	for line := range strings.Lines(string(b)) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		rest = strings.TrimSpace(rest)
		switch strings.ToUpper(word) {
		case "DEFAULT":
			first = rest
		case "LABEL":
			v, err := ParseVersion(rest)
			at = -1
			if err == nil && len(all) < maxMenu && !slices.ContainsFunc(all, func(e MenuEntry) bool { return e.Version == v }) {
				at = len(all)
				all = append(all, MenuEntry{Version: v})
			}
		case "APPEND":
			if at >= 0 {
				var words []string
				for _, w := range strings.Fields(rest) {
					if !strings.HasPrefix(w, Parameter) {
						words = append(words, w)
					}
				}
				all[at].CmdLine = strings.Join(words, " ")
			}
		}
	}
	for i, e := range all {
		if string(e.Version) == first && i > 0 {
			all[0], all[i] = all[i], all[0]
		}
	}
	return all
}

// biosSlots are kernels and initramfs that syslinux starts.
type biosSlots struct {
	disk
	running Version
}

func (b *biosSlots) folder() string { return b.path(BIOSFolder) }

func (b *biosSlots) menu() ([]MenuEntry, error) {
	text, err := os.ReadFile(b.path(BIOSMenu))
	if err != nil {
		return nil, err
	}
	return parseMenu(text), nil
}

func (b *biosSlots) list() ([]Slot, error) {
	menu, err := b.menu()
	if err != nil {
		return nil, err
	}
	folders, err := os.ReadDir(b.folder())
	if err != nil {
		return nil, err
	}
	var all []Slot
	for _, f := range folders {
		v, err := ParseVersion(f.Name())
		if err != nil || !f.IsDir() || string(v) != f.Name() {
			continue
		}
		_, err = os.Stat(b.path(BIOSFolder, f.Name(), BIOSGood))
		s := Slot{Version: v, File: BIOSFolder + "/" + f.Name(), Running: v == b.running, Good: err == nil}
		s.Next = len(menu) > 0 && menu[0].Version == v
		// Somebody chose the other one: this is as much as a BIOS lets us know.
		s.Failed = s.Next && !s.Good && !s.Running && b.tried(v)
		all = append(all, s)
	}
	newest(all)
	return all, nil
}

// triedFile says that a version has been running, blessed or not.
const triedFile = "tried"

func (b *biosSlots) tried(v Version) bool {
	_, err := os.Stat(b.path(BIOSFolder, string(v), triedFile))
	return err == nil
}

// begin notes that the running version was started.
func (b *biosSlots) begin() error {
	if b.tried(b.running) {
		return nil
	}
	return b.write(b.path(BIOSFolder, string(b.running), triedFile), nil)
}

func (b *biosSlots) bless() error {
	if err := b.write(b.path(BIOSFolder, string(b.running), BIOSGood), nil); err != nil {
		return err
	}
	return syncDir(b.path(BIOSFolder, string(b.running)))
}

// setMenu replaces the menu by renaming.
func (b *biosSlots) setMenu(entries []MenuEntry) error {
	part := b.path(BIOSMenu + ".part")
	if err := b.write(part, Menu(entries...)); err != nil {
		return err
	}
	return b.rename(part, b.path(BIOSMenu))
}

// install takes kernel and initramfs out of a unified kernel image, and puts them first in the menu when both are on the disk.
func (b *biosSlots) install(m Manifest, image string) error {
	cmdline, err := b.extract(m, image)
	if err != nil {
		return err
	}
	final := b.path(BIOSFolder, string(m.Version))
	if err := b.removeAll(final); err != nil { // of an earlier update that was cut off before it was in the menu
		return err
	}
	if err := b.rename(final+".part", final); err != nil {
		return err
	}
	menu, err := b.menu()
	if err != nil {
		return err
	}
	menu = slices.DeleteFunc(menu, func(e MenuEntry) bool { return e.Version == m.Version })
	// The one that runs is the one to go back to.
	slices.SortStableFunc(menu, func(x, y MenuEntry) int {
		switch {
		case x.Version == b.running && y.Version != b.running:
			return -1
		case y.Version == b.running && x.Version != b.running:
			return 1
		}
		return 0
	})
	if err := b.setMenu(append([]MenuEntry{{Version: m.Version, CmdLine: cmdline}}, menu...)); err != nil {
		return err
	}
	return b.removeAll(image)
}

// extract writes kernel and initramfs into a folder whose name ends in .part, and returns the command line.
func (b *biosSlots) extract(m Manifest, image string) (string, error) {
	part := b.path(BIOSFolder, string(m.Version)+".part")
	if err := b.step("create " + part); err != nil {
		return "", err
	}
	if err := os.MkdirAll(part, 0o755); err != nil {
		return "", err
	}
	f, err := pe.Open(image)
	if err != nil {
		return "", fmt.Errorf("the image is no unified kernel image: %w", err)
	}
	defer f.Close()
	for name, section := range map[string]string{BIOSKernel: ".linux", BIOSInitrd: ".initrd"} {
		r, err := content(f, section)
		if err == nil {
			err = copySync(filepath.Join(part, name), r)
		}
		if err != nil {
			return "", err
		}
	}
	r, err := content(f, ".cmdline")
	if err != nil {
		return "", err
	}
	line, err := io.ReadAll(io.LimitReader(r, 4096))
	if err != nil {
		return "", err
	}
	// One line of a menu: nothing in it may begin another.
	var words []string
	for _, w := range strings.Fields(strings.TrimRight(string(line), "\x00")) {
		if !strings.HasPrefix(w, Parameter) {
			words = append(words, w)
		}
	}
	return strings.Join(words, " "), syncDir(part)
}

// content is what a section holds, without the padding that the file has behind it.
func content(f *pe.File, section string) (io.Reader, error) {
	s := f.Section(section)
	if s == nil {
		return nil, fmt.Errorf("the image is no unified kernel image: it has no section %s", section)
	}
	size := s.Size
	if s.VirtualSize > 0 {
		size = min(size, s.VirtualSize)
	}
	return io.LimitReader(s.Open(), int64(size)), nil
}

// copySync writes a file that is on the disk when it returns.
func copySync(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Sync(), f.Close())
}

// remove takes an image out of the menu first.
func (b *biosSlots) remove(s Slot) error {
	menu, err := b.menu()
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(menu), func(e MenuEntry) bool { return e.Version == s.Version })
	if len(left) == 0 {
		return errors.New("it is the only one in the boot menu")
	}
	if len(left) < len(menu) {
		if err := b.setMenu(left); err != nil {
			return err
		}
	}
	return b.removeAll(b.path(s.File))
}

func (b *biosSlots) clean() error { return b.cleanParts(b.folder()) }
