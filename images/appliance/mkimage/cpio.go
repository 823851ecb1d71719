package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Types of files as the archive writes them (stat.h).
const (
	typeFolder = 0o040000
	typeFile   = 0o100000
	typeDevice = 0o020000
)

// archive is an initramfs: a cpio archive in the form "newc" that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format). Everything
// belongs to root, and has one time. Folders of added files are added by themselves.
type archive struct {
	epoch   int64
	entries map[string]entry
}

type entry struct {
	mode         uint32
	data         []byte
	major, minor uint32
}

func (a *archive) add(name string, e entry) {
	if a.entries == nil {
		a.entries = make(map[string]entry)
	}
	name = strings.Trim(path.Clean(name), "/")
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := a.entries[dir]; !ok {
			a.entries[dir] = entry{mode: typeFolder | 0o755}
		}
	}
	a.entries[name] = e
}

func (a *archive) folder(name string, perm fs.FileMode) {
	a.add(name, entry{mode: typeFolder | uint32(perm.Perm())})
}

func (a *archive) file(name string, data []byte, perm fs.FileMode) {
	a.add(name, entry{mode: typeFile | uint32(perm.Perm()), data: data})
}

func (a *archive) copy(name, from string, perm fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.file(name, data, perm)
	return nil
}

func (a *archive) device(name string, major, minor uint32, perm fs.FileMode) {
	a.add(name, entry{mode: typeDevice | uint32(perm.Perm()), major: major, minor: minor})
}

// trailer is the name of the last entry.
const trailer = "TRAILER!!!"

// writeTo writes the archive in the order of names, so that a folder comes before what is in it.
func (a *archive) writeTo(w io.Writer) error {
	names := make([]string, 0, len(a.entries))
	for name := range a.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if err := writeEntry(w, uint32(i+1), name, a.entries[name], a.epoch); err != nil {
			return err
		}
	}
	return writeEntry(w, 0, trailer, entry{}, 0)
}

func writeEntry(w io.Writer, inode uint32, name string, e entry, epoch int64) error {
	links := 1
	if e.mode&^0o7777 == typeFolder {
		links = 2
	}
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		inode, e.mode, 0, 0, links, uint32(epoch), len(e.data), 0, 0, e.major, e.minor, len(name)+1, 0)
	if _, err := io.WriteString(w, pad4(head+name+"\x00")); err != nil {
		return err
	}
	if _, err := w.Write(e.data); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, -len(e.data)&3))
	return err
}

// pad4 fills up to a multiple of four bytes.
func pad4(s string) string { return s + strings.Repeat("\x00", -len(s)&3) }
