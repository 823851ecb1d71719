package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sync/errgroup"
)

// qcow2 writes a disk compressed, as QEMU since 1.7 reads it.
func (b *builder) qcow2(ctx context.Context, raw, name string) error {
	_, err := run(ctx, b.work, "qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1", raw, name)
	return err
}

// formats writes the disk in the forms that other hypervisors and clouds import, side by side, and returns the names of the files. The raw disk
// goes.
func (b *builder) formats(ctx context.Context, raw string) ([]string, error) {
	vmdk, vhd, plain := b.name+".vmdk", b.name+".vhd", b.name+".raw"
	if err := os.Rename(raw, filepath.Join(b.work, plain)); err != nil {
		return nil, err
	}
	convert := func(name, format, how string, fix func([]byte) error) error {
		if _, err := run(ctx, b.work, "qemu-img", "convert", "-q", "-f", "raw", "-O", format, "-o", how, plain, name); err != nil {
			return err
		}
		return b.rewrite(name, fix)
	}
	var all errgroup.Group
	all.Go(func() error { return convert(vmdk, "vmdk", "subformat=streamOptimized,compat6", fixVMDK) })
	all.Go(func() error { return convert(vhd, "vpc", "subformat=dynamic,force_size=on", fixVHD) })
	all.Go(func() error {
		// Two threads whatever the machine has: with one, the file would be another.
		_, err := run(ctx, b.work, "xz", "-6", "-T2", "--keep", plain)
		return err
	})
	if err := all.Wait(); err != nil {
		return nil, err
	}
	return []string{vmdk, vhd, plain + ".xz"}, os.Remove(filepath.Join(b.work, plain))
}

func (b *builder) rewrite(name string, fix func([]byte) error) error {
	path := filepath.Join(b.work, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := fix(data); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return os.WriteFile(path, data, 0o644)
}

// vmdkID is the content identifier in the descriptor of a VMDK, for which qemu-img draws a number: up to eight digits.
var vmdkID = regexp.MustCompile(`\nCID=[0-9a-f]{1,8}\n`)

// vmdkDescriptor begins the descriptor, a text that zeros follow.
const vmdkDescriptor = "# Disk DescriptorFile"

// fixVMDK makes the identifier the same in every build.
func fixVMDK(data []byte) error {
	start := bytes.Index(data[:min(len(data), 64<<10)], []byte(vmdkDescriptor))
	if start < 0 {
		return errors.New("no descriptor")
	}
	length := bytes.IndexByte(data[start:], 0)
	if length < 0 {
		return errors.New("the descriptor has no end")
	}
	old := data[start : start+length]
	if vmdkID.Find(old) == nil {
		return errors.New("the descriptor has no CID")
	}
	id := identifier("vmdk")
	text := vmdkID.ReplaceAll(old, fmt.Appendf(nil, "\nCID=%x\n", id[:4]))
	room := data[start:min(len(data), start+max(len(text)+1, length))]
	if len(room) <= len(text) || !zero(room[length:]) {
		return errors.New("the descriptor has no room")
	}
	clear(room)
	copy(room, text)
	return nil
}

// A VHD's footer (Virtual Hard Disk Image Format Specification).
const (
	vhdCookie   = "conectix"
	vhdFooter   = 512
	vhdTime     = 24
	vhdChecksum = 64
	vhdID       = 68
)

// fixVHD gives both copies of the footer a time and an identifier that are the same in every build.
func fixVHD(data []byte) error {
	if len(data) < 2*vhdFooter {
		return errors.New("cut off")
	}
	for _, f := range [][]byte{data[:vhdFooter], data[len(data)-vhdFooter:]} {
		if !bytes.HasPrefix(f, []byte(vhdCookie)) {
			return errors.New("no footer")
		}
		clear(f[vhdTime : vhdTime+4])
		id := identifier("vhd")
		copy(f[vhdID:], id[:])
		clear(f[vhdChecksum : vhdChecksum+4])
		var sum uint32
		for _, v := range f {
			sum += uint32(v)
		}
		binary.BigEndian.PutUint32(f[vhdChecksum:], ^sum)
	}
	return nil
}
