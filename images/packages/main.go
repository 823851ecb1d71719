// Command packages makes Sallyway's Debian and RPM packages: `make packages` runs it from the root of the repository.
//
//	go run ./images/packages --out dist --nfpm bin/nfpm --arch amd64,arm64
//
// There are five: sallyway (the command line and the client's unit), sallyway-gateway, sallyway-relay,
// sallyway-platform and sallyway-license. Each has its program, and what is made from the program's own commands: manual pages, completions,
// the unit, an example of the configuration. Two runs of one commit give the same bytes.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	out := flag.String("out", "dist", "folder that the packages are written to")
	archs := flag.String("arch", "amd64,arm64", "architectures, as Go names them")
	nfpm := flag.String("nfpm", "bin/nfpm", "the program that writes deb and rpm")
	goTool := flag.String("go", "go", "the go command")
	flag.Parse()
	if err := run(*out, strings.Split(*archs, ","), *nfpm, *goTool); err != nil {
		fmt.Fprintln(os.Stderr, "packages:", err)
		os.Exit(1)
	}
}

func run(out string, archs []string, nfpm, goTool string) error {
	v, err := describe(".")
	if err != nil {
		return err
	}
	cache, err := output(goTool, "env", "GOMODCACHE")
	if err != nil {
		return err
	}
	goRoot, err := output(goTool, "env", "GOROOT")
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "sallyway-packages-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for _, arch := range archs {
		bin := filepath.Join(work, "bin-"+arch)
		if err := compile(goTool, v, arch, bin); err != nil {
			return err
		}
		b := builder{Version: v, Arch: arch, Bin: bin, Nfpm: nfpm, ModCache: cache, GoRoot: goRoot}
		for _, p := range products {
			files, err := b.build(p, out)
			if err != nil {
				return err
			}
			for _, f := range files {
				fi, err := os.Stat(f)
				if err != nil {
					return err
				}
				fmt.Printf("%s  %.1f MB\n", f, float64(fi.Size())/1e6)
			}
		}
	}
	return nil
}

// compile builds the programs of every package for arch into folder bin, as `make build` builds them.
func compile(goTool string, v version, arch, bin string) error {
	const at = "sallyway/internal/version."
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X " + at + "Version=" + v.Tag + " -X " + at + "Commit=" + v.Commit, "-o", bin + "/"}
	for _, p := range products {
		args = append(args, "./cmd/"+p.Program)
	}
	cmd := exec.Command(goTool, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build for %s: %w", arch, err)
	}
	return nil
}

// output runs a command and returns the first line of what it prints.
func output(name string, args ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		return "", errors.Join(fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err), errors.New(strings.TrimSpace(stderr.String())))
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line), nil
}
