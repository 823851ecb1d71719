// Bench measures Sallyway's throughput, latency, CPU and memory in labs, next to raw TCP and to other products, and prints
// and keeps the result.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"sallyway/bench"
	"sallyway/internal/daemon"
)

func main() { os.Exit(daemon.Main(new(options).command())) }

// options are the flags.
type options struct {
	quick, peers bool
	list         bool
	scenarios    []string
	runs, mtu    int
	flows        []int
	out          string
	only         alone
}

// command is bench with its sub-commands.
func (o *options) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the whole path in network namespaces, next to raw TCP over the same links",
		Long: `Measures a list of topologies, each with its loads, next to raw TCP over the same links and to other products.
Without flags: all of it, and each layer alone; that takes more than an hour.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.quick, "quick", false, "a short look at each kind of topology: a few minutes")
	f.BoolVar(&o.peers, "peers", true, "measure other products too, those that are installed (--quick: only when asked for)")
	f.BoolVar(&o.list, "list", false, "list the scenarios and measure nothing")
	f.StringSliceVar(&o.scenarios, "scenario", nil, "only these scenarios, such as one-relay,two-relays; see --list")
	f.IntVar(&o.runs, "runs", 0, "runs of each kind (default: as the scenario says, 5 of the usual ones)")
	f.IntSliceVar(&o.flows, "flows", nil, "how many TCP connections at once (default: as the scenario says, such as 1,8)")
	f.IntVar(&o.mtu, "mtu", 0, "MTU of the links between the sites, in bytes, where the scenario has none of its own (default 1500)")
	f.StringVar(&o.out, "out", "", "folder of the results (default: bench/results of the source tree)")
	o.only.flags(cmd)
	cmd.AddCommand(failoverCommand(), soakCommand(), compareCommand(), turnCommand(), forwardCommand(), partCommand(), platformCommand())
	return cmd
}

// config turns the flags into what is measured.
func (o *options) config(cmd *cobra.Command) (bench.Config, error) {
	cfg := bench.Config{Scenarios: bench.Full(), MTU: o.mtu}
	if o.quick {
		cfg.Scenarios = bench.Quick()
	}
	if len(o.scenarios) > 0 {
		// Of a quick run all may be asked for, with the loads of a full one where it has none itself.
		var err error
		if cfg.Scenarios, err = bench.Select(bench.Merge(cfg.Scenarios, bench.Full()), o.scenarios); err != nil {
			return cfg, daemon.Usagef("--scenario: %w", err)
		}
	}
	all := bench.Topologies()
	for i := range cfg.Scenarios {
		s := &cfg.Scenarios[i]
		if cmd.Flags().Changed("peers") {
			s.Beside = nil
			if t, err := bench.Select(all, []string{s.Name}); err == nil && o.peers {
				s.Beside = t[0].Beside
			}
		}
		if o.runs > 0 && s.Load.Runs > 0 {
			s.Load.Runs = o.runs
		}
		if len(o.flows) > 0 && len(s.Load.Flows) > 0 {
			s.Load.Flows = o.flows
		}
	}
	exe, err := os.Executable()
	cfg.Bin = filepath.Dir(exe)
	return cfg, err
}

func (o *options) run(cmd *cobra.Command) error {
	cfg, err := o.config(cmd)
	if err != nil {
		return err
	}
	if o.list {
		for _, s := range cfg.Scenarios {
			fmt.Fprintf(cmd.OutOrStdout(), "%-22s %s\n", s.Name, s.About)
		}
		return nil
	}
	o.out, err = resultsFolder(o.out)
	if err != nil {
		return err
	}
	// What was found before something failed is kept.
	res, failed := o.measure(cmd, cfg)
	if res == nil {
		return failed
	}
	paths, err := res.Write(o.out)
	if err != nil {
		return errors.Join(failed, err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "\n%s\n", res.Markdown())
	for _, p := range paths {
		fmt.Fprintln(cmd.OutOrStdout(), p)
	}
	return failed
}

// measure measures one layer where that was chosen, else the scenarios, and every layer where nothing was chosen at all.
func (o *options) measure(cmd *cobra.Command, cfg bench.Config) (*bench.Result, error) {
	ctx, log := cmd.Context(), cmd.ErrOrStderr()
	if single := o.only.measurement(cfg, o.quick, o.runs); single != nil {
		return single(ctx, log)
	}
	res, failed := bench.Run(ctx, cfg, log)
	if o.quick || len(o.scenarios) > 0 {
		return res, failed
	}
	for _, layer := range []alone{{relay: true}, {netstack: true}, {layers: true}} {
		if ctx.Err() != nil {
			break
		}
		more, err := layer.measurement(cfg, o.quick, o.runs)(ctx, log)
		failed = errors.Join(failed, err)
		if more != nil {
			res.Join(more)
		}
	}
	return res, failed
}
