package oci

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"sallyway/images/notices"
)

// Compiler builds the programs from a source tree, the same bytes wherever the tree lies.
type Compiler struct {
	Go      string // path of the go command
	Source  string // root of the tree
	Dir     string // where the programs are written, below a folder per architecture
	Version string
	Commit  string
}

// Compile builds programs for one architecture.
func (c Compiler) Compile(ctx context.Context, arch string, programs []Program) error {
	dir, err := filepath.Abs(filepath.Join(c.Dir, arch))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args := []string{
		"build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X sallyway/internal/version.Version=" + c.Version + " -X sallyway/internal/version.Commit=" + c.Commit,
		"-o", dir + string(filepath.Separator),
	}
	for _, p := range programs {
		args = append(args, "./cmd/"+p.Name)
	}
	cmd := exec.CommandContext(ctx, c.Go, args...)
	cmd.Dir = c.Source
	// What the caller's environment adds for other builds must not reach the images.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=", "GOEXPERIMENT=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build for %s: %w\n%s", arch, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Binary is Config.Binary: the path of what Compile wrote.
func (c Compiler) Binary(program, arch string) (string, error) {
	return filepath.Join(c.Dir, arch, program), nil
}

// Notices is Config.Notices.
func (c Compiler) Notices(program, arch string) ([]byte, error) {
	return notices.Of(context.Background(), c.Go, filepath.Join(c.Dir, arch, program))
}
