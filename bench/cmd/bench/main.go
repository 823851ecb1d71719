// Bench measures Sallyway's throughput, latency, CPU and memory in a lab, next to raw TCP, and prints and keeps the result.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"sallyway/bench"
	"sallyway/internal/daemon"
	"sallyway/internal/lab"
)

func main() { os.Exit(daemon.Main(command())) }

func command() *cobra.Command {
	var quick, peers bool
	var only alone
	var runs, mtu int
	var flows []int
	var out string
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the whole path in network namespaces, next to raw TCP over the same links",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := bench.Full()
			if quick {
				cfg = bench.Quick()
			}
			if runs > 0 {
				cfg.Runs = runs
			}
			if len(flows) > 0 {
				cfg.Flows = flows
			}
			cfg.MTU = mtu
			if cmd.Flags().Changed("peers") {
				cfg.Peers = peers
			}
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			cfg.Bin = filepath.Dir(exe)
			if out == "" {
				root, err := lab.SourceRoot()
				if err != nil {
					return daemon.Usagef("%w\nname a folder for the results with --out", err)
				}
				out = filepath.Join(root, "bench", "results")
			}
			run := func() (*bench.Result, error) { return bench.Run(cmd.Context(), cfg, cmd.ErrOrStderr()) }
			single := only.measurement(cfg, quick, runs)
			if single != nil {
				run = func() (*bench.Result, error) { return single(cmd.Context(), cmd.ErrOrStderr()) }
			}
			res, err := run()
			if err != nil {
				return err
			}
			paths, err := res.Write(out, !quick && single == nil)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "\n%s\n", res.Markdown())
			for _, p := range paths {
				fmt.Fprintln(cmd.OutOrStdout(), p)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&quick, "quick", false, "a few minutes instead of half an hour")
	f.BoolVar(&peers, "peers", true, "measure other products too, those that are installed (--quick: only when asked for)")
	f.IntVar(&runs, "runs", 0, "runs of each kind (default: 3 quick, else 7)")
	f.IntSliceVar(&flows, "flows", nil, "how many TCP connections at once, such as 1,8 (default: 1,8 quick, else 1,2,4,8,32)")
	f.IntVar(&mtu, "mtu", 0, "MTU of the links between the sites, in bytes (default 1500)")
	f.StringVar(&out, "out", "", "folder of the results (default: bench/results of the source tree)")
	only.flags(cmd)
	cmd.AddCommand(turnCommand(), partCommand())
	return cmd
}
