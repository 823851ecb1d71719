package main

import (
	"context"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// source is the notice about the source code of what others have written, as the GPL version 2 section 3 asks for.
const source = `The appliance contains the Linux kernel and other free software of Debian, unchanged and in these versions:

%s
Their licences lie beside this file. Their complete source code is in Debian's archive: "apt-get source --only-source NAME=VERSION" with the names
and versions of the right column fetches it, and https://snapshot.debian.org keeps every version that ever was.

Sallyway itself and the Go packages in it: see sallyway.txt and go.txt.
`

// notices adds the licences and the notice about source code to the boot partition's texts.
func (b *builder) notices(texts map[string]string, bios bool) error {
	var list strings.Builder
	for _, p := range b.packages {
		fmt.Fprintf(&list, "  %-40s %-24s %s\n", p.Name, p.Version, p.Source)
		copyright, err := os.ReadFile(filepath.Join(b.root, "usr/share/doc", p.Name, "copyright"))
		if err != nil {
			return fmt.Errorf("the licence of %s: %w", p.Name, err)
		}
		texts["licences/debian/"+p.Name+".txt"] = string(copyright)
	}
	if bios {
		version, copyright, err := installed("syslinux")
		if err != nil {
			return err
		}
		fmt.Fprintf(&list, "  %-40s %-24s %s\n", "syslinux", version, "syslinux "+version)
		texts["licences/debian/syslinux.txt"] = copyright
	}
	texts["licences/SOURCE.txt"] = fmt.Sprintf(source, list.String())
	for _, name := range []string{"GPL-2", "GPL-3", "LGPL-2", "LGPL-2.1", "MPL-2.0"} {
		text, err := os.ReadFile(filepath.Join(b.root, "usr/share/common-licenses", name))
		if err != nil {
			return err
		}
		texts["licences/"+name+".txt"] = string(text)
	}
	ours, err := os.ReadFile("LICENSE")
	if err != nil {
		return fmt.Errorf("%w: run mkimage in the root of the repository", err)
	}
	texts["licences/sallyway.txt"] = string(ours)
	modules, err := b.goLicences()
	texts["licences/go.txt"] = modules
	return err
}

// installed returns version and licence of a package of the host: syslinux writes itself onto the disk.
func installed(name string) (version, copyright string, err error) {
	out, err := run(context.Background(), "", "dpkg-query", "-W", "-f", "${Version}", name)
	if err != nil {
		return "", "", err
	}
	text, err := os.ReadFile(filepath.Join("/usr/share/doc", name, "copyright"))
	return strings.TrimSpace(string(out)), string(text), err
}

// goLicences returns the licences of Go and of every module in the program.
func (b *builder) goLicences() (string, error) {
	info, err := buildinfo.ReadFile(b.init)
	if err != nil {
		return "", fmt.Errorf("%s: %w", b.init, err)
	}
	var all strings.Builder
	root, err := run(context.Background(), "", "go", "env", "GOROOT")
	if err != nil {
		return "", err
	}
	if err := addLicences(&all, "Go "+info.GoVersion, strings.TrimSpace(string(root))); err != nil {
		return "", err
	}
	args := []string{"mod", "download", "-json"}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		args = append(args, m.Path+"@"+m.Version)
	}
	if len(args) == 3 {
		return all.String(), nil
	}
	out, err := run(context.Background(), "", "go", args...)
	if err != nil {
		return "", err
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var m struct{ Path, Version, Dir string }
		if err := d.Decode(&m); err != nil {
			return "", err
		}
		if err := addLicences(&all, m.Path+" "+m.Version, m.Dir); err != nil {
			return "", err
		}
	}
	return all.String(), nil
}

// addLicences adds the licence files at the top of a folder.
func addLicences(to *strings.Builder, what, dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	found := false
	for _, f := range files {
		name := strings.ToUpper(f.Name())
		if f.IsDir() || !slices.ContainsFunc([]string{"LICENSE", "LICENCE", "COPYING", "NOTICE", "PATENTS"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(to, "==== %s: %s\n\n%s\n", what, f.Name(), strings.TrimSpace(string(text)))
		to.WriteString("\n")
		found = true
	}
	if !found {
		return fmt.Errorf("%s: no licence in %s", what, dir)
	}
	return nil
}

// manifest writes NAME.json.
func (b *builder) manifest(made []string) error {
	type file struct {
		Size   int64  `json:"size"` // bytes
		SHA256 string `json:"sha256"`
	}
	m := struct {
		Version  string          `json:"version"`
		Arch     string          `json:"arch"`
		Kernel   string          `json:"kernel"`
		Cmdline  string          `json:"cmdline"`
		Packages []debianPackage `json:"packages"`
		Files    map[string]file `json:"files"`
	}{b.version, b.arch, b.kernel.release, b.arguments(), b.packages, make(map[string]file)}
	for _, name := range made {
		path := filepath.Join(b.work, name)
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		m.Files[name] = file{fi.Size(), hashFile(path)}
		b.tell(fmt.Sprintf("%5.1f MB %s", float64(fi.Size())/1e6, name))
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.work, b.name+".json"), append(text, '\n'), 0o644)
}
