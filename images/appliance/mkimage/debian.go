package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// release is the Debian release that the images are made of. Its kernel boots in every emulator and hypervisor that was tried; the next release's
// crashes in QEMU before version 10 unless the CPU hides cmpxchg16b.
const release = "bookworm"

// wanted are the packages, besides the kernel, that parts of the images come from. Nothing else that these depend on is fetched.
var wanted = []string{
	"systemd-boot-efi",                                                         // the boot loader and the stub of the unified kernel image
	"e2fsprogs", "libext2fs2", "libcom-err2", "libblkid1", "libuuid1", "libc6", // makes and checks the state partition's file system
	"ca-certificates",
	"base-files", // texts of licences
}

// indexAge is after how long the archive's index is fetched again.
const indexAge = 24 * time.Hour

// debianPackage is a package that parts of the image come from.
type debianPackage struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Source  string `json:"source"` // name and version of the source package
	SHA256  string `json:"sha256"`
	file    string
}

// run runs a program in dir and returns what it prints. Programs of the system administrator's folders are found, too.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		for _, d := range []string{"/usr/sbin", "/sbin"} {
			if p := filepath.Join(d, name); exec.Command(p).Err == nil {
				path, err = p, nil
				break
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%w: install what build/prerequisites.sh names", err)
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC", "MTOOLS_SKIP_CHECK=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}

// apt is an apt of its own: sources, index and cache below a folder, for an architecture that need not be the host's. Proxies and the like stay the
// host's.
type apt struct {
	dir, arch, mirror string
}

func (a apt) run(ctx context.Context, dir, tool string, args ...string) ([]byte, error) {
	set := []string{
		"APT::Architecture=" + a.arch, "APT::Architectures::=" + a.arch,
		"Dir::Etc::sourcelist=" + filepath.Join(a.dir, "sources.list"), "Dir::Etc::sourceparts=-", "Dir::Etc::preferences=-", "Dir::Etc::preferencesparts=-",
		"Dir::State=" + filepath.Join(a.dir, "state"), "Dir::State::status=" + filepath.Join(a.dir, "status"), "Dir::Cache=" + filepath.Join(a.dir, "cache"),
		"Acquire::Languages=none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "Acquire::Retries=3",
		"Debug::NoLocking=1", "APT::Sandbox::User=",
	}
	var full []string
	for _, s := range set {
		full = append(full, "-o", s)
	}
	return run(ctx, dir, tool, append(full, args...)...)
}

// index fetches the archive's index when there is none of today.
func (a apt) index(ctx context.Context) error {
	stamp := filepath.Join(a.dir, "stamp")
	if fi, err := os.Stat(stamp); err == nil && time.Since(fi.ModTime()) < indexAge {
		return nil
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return err
		}
	}
	const from = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
	sources := from + a.mirror + "/debian " + release + " main\n" + from + a.mirror + "/debian-security " + release + "-security main\n"
	if err := errors.Join(os.WriteFile(filepath.Join(a.dir, "sources.list"), []byte(sources), 0o644), os.WriteFile(filepath.Join(a.dir, "status"), nil, 0o644)); err != nil {
		return err
	}
	if _, err := a.run(ctx, a.dir, "apt-get", "-q", "update"); err != nil {
		return fmt.Errorf("fetch the index of Debian's archive: %w", err)
	}
	return os.WriteFile(stamp, nil, 0o644)
}

// show returns the fields of the newest versions of packages, by name.
func (a apt) show(ctx context.Context, names ...string) (map[string]map[string]string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", append([]string{"show", "--no-all-versions"}, names...)...)
	if err != nil {
		return nil, err
	}
	all := make(map[string]map[string]string)
	for paragraph := range strings.SplitSeq(string(out), "\n\n") {
		fields := make(map[string]string)
		for line := range strings.Lines(paragraph) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && line[0] != ' ' {
				fields[key] = value
			}
		}
		if fields["Package"] != "" { // there is nothing behind the last empty line
			all[fields["Package"]] = fields
		}
	}
	for _, name := range names {
		if all[name]["Filename"] == "" {
			return nil, fmt.Errorf("there is no package %s for %s in Debian %s", name, a.arch, release)
		}
	}
	return all, nil
}

// fetch downloads what is not in the cache yet and unpacks everything below b.root.
func (b *builder) fetch(ctx context.Context) error {
	dir, err := filepath.Abs(filepath.Join(b.cache, release+"-"+b.arch))
	if err != nil {
		return err
	}
	a := apt{dir: dir, arch: b.arch, mirror: b.mirror}
	if err := os.MkdirAll(filepath.Join(dir, "pool"), 0o755); err != nil {
		return err
	}
	if err := a.index(ctx); err != nil {
		return err
	}
	// The package without a version in its name depends on exactly one kernel.
	meta, err := a.show(ctx, flavour[b.arch])
	if err != nil {
		return err
	}
	image, _, _ := strings.Cut(meta[flavour[b.arch]]["Depends"], " ")
	names := append([]string{image}, wanted...)
	all, err := a.show(ctx, names...)
	if err != nil {
		return err
	}
	b.root = filepath.Join(b.work, "root")
	slices.Sort(names)
	for _, name := range names {
		p, err := a.get(ctx, name, all[name])
		if err != nil {
			return err
		}
		if _, err := run(ctx, b.work, "dpkg-deb", "-x", p.file, b.root); err != nil {
			return err
		}
		b.packages = append(b.packages, p)
	}
	return nil
}

// get returns a package out of the cache, where it is put first when it is missing there or is not what the index says.
func (a apt) get(ctx context.Context, name string, fields map[string]string) (p debianPackage, err error) {
	p = debianPackage{Name: name, Version: fields["Version"], Source: fields["Source"], SHA256: fields["SHA256"]}
	if p.Source == "" {
		p.Source = name
	}
	if source, version, ok := strings.Cut(p.Source, " "); ok {
		p.Source = source + " " + strings.Trim(version, "()")
	} else {
		p.Source += " " + p.Version
	}
	pool := filepath.Join(a.dir, "pool")
	p.file = filepath.Join(pool, filepath.Base(fields["Filename"]))
	if hashFile(p.file) == p.SHA256 {
		return p, nil
	}
	// In a folder of its own: two builds may share the cache.
	dir, err := os.MkdirTemp(pool, "get-")
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if _, err := a.run(ctx, dir, "apt-get", "-q", "download", name+"="+p.Version); err != nil {
		return p, fmt.Errorf("fetch %s: %w", name, err)
	}
	got, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(got) != 1 || hashFile(got[0]) != p.SHA256 {
		return p, fmt.Errorf("fetch %s %s: what came is not what the index names", name, p.Version)
	}
	return p, os.Rename(got[0], p.file)
}

// hashFile returns the SHA-256 of a file in hexadecimal digits, "" where there is none.
func hashFile(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}
