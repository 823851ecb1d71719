package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sallyway/internal/appliance/update"
)

// fatEpoch is the first moment that FAT can write, 1980.
const fatEpoch = 315532800

// loaderConf is systemd-boot's: no menu, no editing of the command line.
const loaderConf = "timeout 0\neditor no\nauto-firmware no\n"

// loaderEntry is the entry of systemd-boot for kernel and initramfs of a hybrid disk. Sort key and version are those of osRelease, so that it is
// ordered among unified kernel images by its version.
const loaderEntry = "title Sallyway %[1]s\nsort-key sallyway\nversion %[1]s\nlinux /%[2]s/%[1]s/%[3]s\ninitrd /%[2]s/%[1]s/%[4]s\noptions %[5]s\n"

// disks makes the disks and returns the names of their files.
func (b *builder) disks(ctx context.Context) ([]string, error) {
	efi, err := b.disk(ctx, "uefi", false)
	if err != nil {
		return nil, err
	}
	made := []string{b.name + ".qcow2"}
	if err := b.qcow2(ctx, efi, made[0]); err != nil {
		return nil, err
	}
	widest := efi
	if b.arch == "amd64" {
		if widest, err = b.disk(ctx, "hybrid", true); err != nil {
			return nil, err
		}
		made = append(made, b.name+"-hybrid.qcow2")
		if err := b.qcow2(ctx, widest, made[1]); err != nil {
			return nil, err
		}
	}
	if b.quick {
		return made, nil
	}
	others, err := b.formats(ctx, widest)
	return append(made, others...), err
}

// disk makes a raw disk and returns its path.
func (b *builder) disk(ctx context.Context, name string, bios bool) (string, error) {
	tree := filepath.Join(b.work, name+".tree")
	if err := b.tree(tree, bios); err != nil {
		return "", err
	}
	fat := filepath.Join(b.work, name+".fat")
	if err := os.WriteFile(fat, nil, 0o644); err != nil {
		return "", err
	}
	if err := os.Truncate(fat, espSize); err != nil {
		return "", err
	}
	id := identifier("boot file system")
	if _, err := run(ctx, b.work, "mkfs.vfat", "--invariant", "-F", "32", "-s", "4", "-h", strconv.Itoa(espStart/sectorSize), "-n", "SALLYWAY",
		"-i", fmt.Sprintf("%x", id[:4]), fat); err != nil {
		return "", err
	}
	top, err := os.ReadDir(tree)
	if err != nil {
		return "", err
	}
	args := []string{"-s", "-m", "-Q", "-i", fat}
	for _, e := range top {
		args = append(args, filepath.Join(tree, e.Name()))
	}
	if _, err := run(ctx, b.work, "mcopy", append(args, "::/")...); err != nil {
		return "", err
	}
	var boot []byte
	if bios {
		if _, err := run(ctx, b.work, "syslinux", "--install", "--directory", "/"+update.BIOSFolder, fat); err != nil {
			return "", err
		}
		if boot, err = os.ReadFile("/usr/lib/SYSLINUX/gptmbr.bin"); err != nil {
			return "", err
		}
	}
	raw := filepath.Join(b.work, name+".raw")
	f, err := os.Create(raw)
	if err != nil {
		return "", err
	}
	err = errors.Join(f.Truncate(diskSize), partitionTable(f, boot), copySparse(f, espStart, fat), f.Close())
	return raw, err
}

// tree lays out the boot partition's files below a folder, with their time.
func (b *builder) tree(dir string, bios bool) error {
	files := map[string]string{ // by their source
		"EFI/BOOT/BOOT" + map[string]string{"amd64": "X64", "arm64": "AA64"}[b.arch] + ".EFI": filepath.Join(b.root, "usr/lib/systemd/boot/efi/systemd-boot"+efiName[b.arch]+".efi"),
	}
	texts := map[string]string{"loader/loader.conf": loaderConf}
	image := update.Entry{Version: update.Version(b.version)}
	if bios {
		folder := update.BIOSFolder + "/" + b.version + "/"
		files[folder+update.BIOSKernel] = filepath.Join(b.work, b.name+".vmlinuz")
		files[folder+update.BIOSInitrd] = filepath.Join(b.work, b.name+".initrd")
		texts[folder+update.BIOSGood] = ""
		texts[update.BIOSMenu] = string(update.Menu(update.MenuEntry{Version: image.Version, CmdLine: cmdline[b.arch]}))
		texts["loader/entries/"+strings.TrimSuffix(image.String(), ".efi")+".conf"] = fmt.Sprintf(loaderEntry,
			b.version, update.BIOSFolder, update.BIOSKernel, update.BIOSInitrd, b.arguments())
	} else {
		files[update.EFILinux+"/"+image.String()] = filepath.Join(b.work, b.name+".efi")
	}
	if err := b.notices(texts, bios); err != nil {
		return err
	}
	for name, from := range files {
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.Link(from, to); err != nil { // from is another disk's as well
			return err
		}
	}
	for name, text := range texts {
		to := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	at := time.Unix(b.epoch, 0)
	return filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, at, at)
	})
}

// copySparse copies a file into another from an offset on, without the parts that are zero.
func copySparse(to io.WriterAt, at int64, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(f, block)
		if n > 0 && !zero(block[:n]) {
			if _, err := to.WriteAt(block[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func zero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
