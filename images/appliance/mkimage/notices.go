package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sallyway/images/notices"
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
	modules, err := notices.Of(context.Background(), "go", b.init)
	texts["licences/go.txt"] = string(modules)
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
