// Command ocibuild builds the programs and writes their container images; `make containers` runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sallyway/images/oci"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ocibuild:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("ocibuild", flag.ContinueOnError)
	out := fs.String("out", "dist/containers", "folder to write archives and the OCI layout to")
	source := fs.String("source", ".", "root of the source tree")
	goCommand := fs.String("go", "go", "the go command")
	version := fs.String("version", "devel", "version, which is also the tag")
	commit := fs.String("commit", "", "commit of the source")
	arches := fs.String("arch", "amd64,arm64", "architectures, separated by commas")
	repository := fs.String("repository", oci.DefaultRepository, "registry and path that begin the images' names")
	push := fs.String("push", "", "send the images to this registry and path too, such as registry.example/sallyway, with docker's or podman's login there")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *push != "" {
		*repository = strings.TrimSuffix(*push, "/")
	}
	created, err := epoch(os.Getenv("SOURCE_DATE_EPOCH"))
	if err != nil {
		return err
	}
	license, err := os.ReadFile(filepath.Join(*source, "LICENSE"))
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "sallyway-images-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }() // the system's temporary folder is emptied anyway
	c := oci.Compiler{Go: *goCommand, Source: *source, Dir: tmp, Version: *version, Commit: *commit}
	list := strings.Split(*arches, ",")
	for _, arch := range list {
		if err := c.Compile(ctx, arch, oci.Programs()); err != nil {
			return err
		}
	}
	images, err := oci.Build(oci.Config{
		Binary: c.Binary, Arches: list, Repository: *repository, Version: *version, Commit: *commit, Created: created, License: license, Notices: c.Notices,
	})
	if err != nil {
		return err
	}
	if err := oci.Save(images, *out); err != nil {
		return err
	}
	for _, i := range images {
		d, err := i.Content.Digest()
		if err != nil {
			return err
		}
		fmt.Printf("%-44s %-6s %5.1f MB  %s  %s\n", i.Name, i.Arch, float64(i.Size)/1e6, d, filepath.Join(*out, i.Archive()))
	}
	if *push == "" {
		return nil
	}
	pushed, err := oci.Push(ctx, images)
	for _, p := range pushed {
		fmt.Println("pushed", p)
	}
	return err
}

// epoch reads SOURCE_DATE_EPOCH, seconds since 1970. Empty is 1970, which is as reproducible as any.
func epoch(s string) (time.Time, error) {
	if s == "" {
		return time.Unix(0, 0), nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH=%.20q is no number of seconds since 1970", s)
	}
	return time.Unix(n, 0), nil
}
