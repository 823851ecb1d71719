package main

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyway/bench"
)

// soakCommand loads a session for long and counts what it should not do.
func soakCommand() *cobra.Command {
	cfg, out := bench.Soak{For: 30 * time.Minute}, ""
	cmd := &cobra.Command{
		Use:   "soak",
		Short: "Saturate one session for half an hour and count its needless moves",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			cfg.Bin = filepath.Dir(exe)
			out, err = resultsFolder(out)
			if err != nil {
				return err
			}
			res, failed := bench.RunSoak(cmd.Context(), cfg, cmd.ErrOrStderr())
			if res == nil {
				return failed
			}
			return errors.Join(failed, keep(cmd, res, out))
		},
	}
	cmd.Flags().DurationVar(&cfg.For, "for", cfg.For, "how long")
	cmd.Flags().StringVar(&out, "out", "", "folder of the results (default: bench/results of the source tree)")
	return cmd
}
