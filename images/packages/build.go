package main

import (
	"bytes"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"
)

//go:embed files
var files embed.FS

// builder makes packages of one version for one architecture.
type builder struct {
	Version  version
	Arch     string // as Go names it
	Bin      string // folder with the programs
	Nfpm     string // the program nfpm
	ModCache string // Go's module cache, for the licences of what is linked in; empty leaves them out, for tests
	GoRoot   string // the Go distribution, for its own
}

// entry is one path of a package, in nfpm's words.
type entry struct {
	Src  string `json:"src,omitempty"`
	Dst  string `json:"dst"`
	Type string `json:"type,omitempty"`
	Info info   `json:"file_info"`
}

type info struct {
	Mode  fs.FileMode `json:"mode"`
	Owner string      `json:"owner"`
	Group string      `json:"group"`
	MTime time.Time   `json:"mtime"`
}

// build writes p's packages into folder out and returns their paths.
func (b *builder) build(p product, out string) ([]string, error) {
	stage, err := os.MkdirTemp("", p.Name+"-*")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(stage) }()
	var made []string
	for _, format := range []string{"deb", "rpm"} {
		s := &stager{product: p, builder: b, format: format, root: filepath.Join(stage, format)}
		if err := s.fill(); err != nil {
			return nil, fmt.Errorf("%s, %s: %w", p.Name, format, err)
		}
		config, err := b.config(s, filepath.Join(stage, format+"-scripts"))
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w", p.Name, format, err)
		}
		path := filepath.Join(out, fileName(p, b.Version.Package, b.Arch, format))
		cmd := exec.Command(b.Nfpm, "package", "--config", config, "--packager", format, "--target", path)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", b.Version.Time.Unix()))
		if text, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("nfpm, %s: %w\n%s", path, err, bytes.TrimSpace(text))
		}
		made = append(made, path)
	}
	return made, nil
}

// rpmArch are rpm's names of architectures.
var rpmArch = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// fileName follows what either system does: name_version_arch.deb, name-version-release.arch.rpm.
func fileName(p product, version, arch, format string) string {
	if format == "deb" {
		return fmt.Sprintf("%s_%s_%s.deb", p.Name, version, arch)
	}
	return fmt.Sprintf("%s-%s-1.%s.rpm", p.Name, version, rpmArch[arch])
}

// config writes nfpm's configuration, and the scripts that it names into folder scripts. JSON is YAML.
func (b *builder) config(s *stager, scripts string) (string, error) {
	if err := os.MkdirAll(scripts, 0o755); err != nil {
		return "", err
	}
	contents, err := s.contents()
	if err != nil {
		return "", err
	}
	c := map[string]any{
		"name": s.product.Name, "arch": b.Arch, "platform": "linux", "version": b.Version.Package, "version_schema": "none",
		"maintainer": "Sallyway authors <sallyway@localhost>", "license": "Apache-2.0", "mtime": b.Version.Time,
		"contents": contents, "umask": 0o022, "recommends": []string{"ca-certificates"},
	}
	names := map[string]string{"postinst": "postinstall", "prerm": "preremove", "postrm": "postremove"}
	switch s.format {
	case "deb":
		c["section"], c["priority"] = "net", "optional"
		c["description"] = s.product.Summary + "\n" + s.product.About
		c["depends"] = []string{"init-system-helpers (>= 1.54~)"}
		c["deb"] = map[string]any{"compression": "zstd"}
	case "rpm":
		names = map[string]string{"post": "postinstall", "preun": "preremove", "postun": "postremove"}
		c["release"], c["description"] = "1", s.product.About
		c["rpm"] = map[string]any{"compression": "zstd", "summary": s.product.Summary, "group": "System Environment/Daemons", "buildhost": "sallyway"}
	}
	paths := map[string]string{}
	for file, key := range names {
		text, err := render(s.format+"."+file, s.product)
		if err != nil {
			return "", err
		}
		paths[key] = filepath.Join(scripts, file)
		if err := os.WriteFile(paths[key], []byte(text), 0o755); err != nil { //nolint:gosec // a script that the package system runs
			return "", err
		}
	}
	c["scripts"] = paths
	text, err := json.MarshalIndent(c, "", " ")
	if err != nil {
		return "", err
	}
	path := filepath.Join(scripts, "nfpm.yaml")
	return path, os.WriteFile(path, text, 0o600)
}

// render fills one of the templates in files for p.
func render(name string, p product) (string, error) {
	text, err := files.ReadFile("files/" + name)
	if err != nil {
		return "", err
	}
	t, err := template.New(name).Option("missingkey=error").Parse(string(text))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	if err := t.Execute(&b, p); err != nil {
		return "", err
	}
	return b.String(), nil
}

// contents lists the staged files. Folders that others own as well are not the package's.
func (s *stager) contents() ([]entry, error) {
	var out []entry
	err := filepath.WalkDir(s.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		dst := strings.TrimPrefix(path, s.root)
		e := entry{Dst: dst, Info: info{Mode: 0o644, Owner: "root", Group: "root", MTime: s.builder.Version.Time}}
		switch {
		case d.IsDir() && (dst == "/etc/sallyway" || dst == "/usr/share/doc/"+s.product.Name):
			e.Type, e.Info.Mode = "dir", 0o755
		case d.IsDir():
			return nil
		case strings.HasPrefix(dst, "/etc/"):
			e.Src, e.Type = path, "config|noreplace"
		case strings.HasPrefix(dst, "/usr/bin/"):
			e.Src, e.Info.Mode = path, 0o755
		default:
			e.Src = path
		}
		out = append(out, e)
		return nil
	})
	slices.SortFunc(out, func(a, b entry) int { return strings.Compare(a.Dst, b.Dst) })
	return out, err
}
