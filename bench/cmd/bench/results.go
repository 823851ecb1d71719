package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/lab"
)

// resultsFolder is where results go: the named folder, or that of the source tree.
func resultsFolder(named string) (string, error) {
	if named != "" {
		return named, nil
	}
	root, err := lab.SourceRoot()
	if err != nil {
		return "", daemon.Usagef("%w\nname a folder for the results with --out", err)
	}
	return filepath.Join(root, "bench", "results"), nil
}

// result is what a command has found.
type result interface {
	Write(folder string) (paths []string, err error)
	Markdown() string
}

// keep writes what was found to a folder, shows its tables, and says where they are.
func keep(cmd *cobra.Command, r result, folder string) error {
	paths, err := r.Write(folder)
	if err != nil {
		return err
	}
	fmt.Fprint(cmd.OutOrStdout(), r.Markdown())
	for _, p := range paths {
		fmt.Fprintln(cmd.ErrOrStderr(), "wrote", p)
	}
	return nil
}
