package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// tools are programs of Debian's in the image, with the libraries that they need. They make and check the state partition's file system.
var tools = []string{"/sbin/mke2fs", "/sbin/e2fsck"}

// initramfs writes NAME.initrd; internal/appliance says what lies where in it.
func (b *builder) initramfs(ctx context.Context) error {
	a := &archive{epoch: b.epoch}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc"} {
		a.folder(dir, 0o755)
	}
	a.device("dev/console", 5, 1, 0o600)
	a.device("dev/null", 1, 3, 0o666)
	if err := a.copy("init", b.init, 0o755); err != nil {
		return err
	}
	if err := b.addModules(a); err != nil {
		return err
	}
	for _, t := range tools {
		if err := b.addProgram(a, t); err != nil {
			return err
		}
	}
	if err := a.copy("etc/mke2fs.conf", filepath.Join(b.root, "etc/mke2fs.conf"), 0o644); err != nil {
		return err
	}
	roots, err := b.certificates()
	if err != nil {
		return err
	}
	a.file("etc/ssl/certs/ca-certificates.crt", roots, 0o644)
	a.file("etc/os-release", []byte(b.osRelease()), 0o644)

	raw := filepath.Join(b.work, "initramfs")
	f, err := os.Create(raw)
	if err != nil {
		return err
	}
	if err := errors.Join(a.writeTo(f), f.Close()); err != nil {
		return err
	}
	packed, err := run(ctx, b.work, "xz", append(compression[b.arch], "--stdout", raw)...)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.work, b.name+".initrd"), packed, 0o644)
}

// compression are xz's arguments. The kernel knows CRC32 alone, and of the filters for machine code the one for x86. Xz takes 1.5 s longer to unpack than
// zstd where a processor is emulated, nothing that is noticed elsewhere, and is a seventh smaller. Blocks can be packed side by side; their size is given
// so that it does not depend on the machine. The dictionary is memory that the kernel needs.
var compression = map[string][]string{
	"amd64": {"--check=crc32", "--threads=2", "--block-size=28MiB", "--x86", "--lzma2=preset=6,dict=16MiB,lc=4"},
	"arm64": {"--check=crc32", "--threads=2", "--block-size=28MiB", "--lzma2=preset=6,dict=16MiB,lc=4"},
}

// osRelease is os-release(5) of the image. Boot loaders order images by its version.
func (b *builder) osRelease() string {
	return fmt.Sprintf("ID=sallyway\nNAME=Sallyway\nPRETTY_NAME=\"Sallyway %s\"\nVERSION_ID=%s\nIMAGE_ID=sallyway\nIMAGE_VERSION=%s\n", b.version, b.version, b.version)
}

func (b *builder) addModules(a *archive) error {
	c, err := b.kernel.choose(always, byDevice[b.arch])
	if err != nil {
		return err
	}
	for dir, modules := range map[string][]module{"modules": c.always, "modules/hw": c.byDevice} {
		for i, m := range modules {
			if err := a.copy(fmt.Sprintf("%s/%03d-%s.ko", dir, i, m.name), filepath.Join(b.kernel.modules, m.path), 0o644); err != nil {
				return err
			}
		}
	}
	a.file("modules/hw/aliases", []byte(c.aliases), 0o644)
	return nil
}

// addProgram adds a program with its interpreter and libraries, at the places where the interpreter looks.
func (b *builder) addProgram(a *archive, name string) error {
	path, err := b.find(name)
	if err != nil {
		return err
	}
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	if err := a.copy(name, path, 0o755); err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		text := make([]byte, p.Filesz)
		if _, err := p.ReadAt(text, 0); err != nil {
			return err
		}
		interpreter := strings.TrimRight(string(text), "\x00")
		from, err := b.find(interpreter)
		if err != nil {
			return err
		}
		if err := a.copy(interpreter, from, 0o755); err != nil {
			return err
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, l := range libraries {
		to := "lib/" + map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[b.arch] + "/" + l
		if _, done := a.entries[to]; done || strings.HasPrefix(l, "ld-linux") {
			continue
		}
		if err := b.addProgram(a, "/"+to); err != nil {
			return err
		}
	}
	return nil
}

// find returns where a file of the unpacked packages really lies: some still use /lib, others /usr/lib, and links lead from one to the other.
func (b *builder) find(name string) (string, error) {
	for range 8 {
		var fi fs.FileInfo
		var err error
		for _, try := range []string{name, "/usr" + name, strings.TrimPrefix(name, "/usr")} {
			if fi, err = os.Lstat(filepath.Join(b.root, try)); err == nil {
				name = try
				break
			}
		}
		if err != nil {
			return "", fmt.Errorf("no package holds %s", name)
		}
		if fi.Mode()&fs.ModeSymlink == 0 {
			return filepath.Join(b.root, name), nil
		}
		to, err := os.Readlink(filepath.Join(b.root, name))
		if err != nil {
			return "", err
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(name), to)
		}
		name = to
	}
	return "", fmt.Errorf("%s: links go round in circles", name)
}

// certificates are the roots of Mozilla's list, in the order of their files.
func (b *builder) certificates() ([]byte, error) {
	found, err := filepath.Glob(filepath.Join(b.root, "usr/share/ca-certificates/mozilla/*.crt"))
	if err != nil {
		return nil, err
	}
	if len(found) < 50 {
		return nil, fmt.Errorf("only %d root certificates were found", len(found))
	}
	slices.Sort(found)
	var all bytes.Buffer
	for _, f := range found {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		all.Write(bytes.TrimSpace(text))
		all.WriteByte('\n')
	}
	return all.Bytes(), nil
}
