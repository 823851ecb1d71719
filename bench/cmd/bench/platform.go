package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/bench"
	"sallyway/internal/daemon"
)

// platformCommand measures the control plane under many nodes.
func platformCommand() *cobra.Command {
	var cfg bench.Platform
	var out string
	cmd := &cobra.Command{
		Use:   "platform",
		Short: "Measure the platform: 10 000 connected nodes, changes of policy, grants, audit, pages",
		Long: `Starts a platformd of its own and plays its nodes in this process: each with its own key and its own connections, over TLS, on loopback.
Both share the cores of this machine, and the result tells the CPU seconds of each. All of it takes about a quarter of an hour.`,
		Args: cobra.NoArgs,
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
			// What was found before something failed is kept.
			res, failed := bench.RunPlatform(cmd.Context(), cfg, cmd.ErrOrStderr())
			if res == nil {
				return daemon.Usagef("%w", failed)
			}
			return errors.Join(failed, keep(cmd, res, out))
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Nodes, "nodes", 10_000, "nodes that are connected at once")
	f.StringSliceVar(&cfg.Parts, "parts", bench.PlatformParts(), "what is measured: "+strings.Join(bench.PlatformParts(), ", "))
	f.StringSliceVar(&cfg.Stores, "store", bench.PlatformStores(), "databases; nodes and pages are measured on the first, PostgreSQL is Debian's package")
	f.DurationVar(&cfg.Steady, "steady", 0, "how long all nodes stay connected while nothing changes (default 1m)")
	f.DurationVar(&cfg.Grants, "grants", 0, "how long clients start, 200 a second (default 1m)")
	f.DurationVar(&cfg.Audit, "audit", 0, "how long audit entries are appended (default 10s)")
	f.IntVar(&cfg.PageGateways, "page-gateways", 1000, "gateways of the organization whose pages are read")
	f.StringVar(&out, "out", "", "folder of the results (default: bench/results of the source tree)")
	return cmd
}
