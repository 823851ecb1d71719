package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"sallyway/bench"
	"sallyway/internal/daemon"
)

// failoverOptions are the flags of bench failover.
type failoverOptions struct {
	cfg         bench.Failover
	quick, list bool
	peers       []string
	out         string
}

// failoverCommand measures what open connections see when something in the middle goes away.
func failoverCommand() *cobra.Command {
	o := &failoverOptions{cfg: bench.FailoverDefaults()}
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Measure how long open connections stall when something in the middle is killed, cut, drained or blocked",
		Long: `Disturbs what is between the two ends of open TCP connections, again and again, and measures the longest stall of small exchanges and of a
stream whose every byte is checked, the time until a new connection works, and what is lost. Several labs are laid out at once; one of them
is measured at a time, while the others become whole again.`,
		Example: "  bench failover\n  bench failover --quick --causes relay-killed,udp-blocked --loads up\n  bench failover --peers all --own=false",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.quick, "quick", false, "one run of each, in fewer labs")
	f.BoolVar(&o.list, "list", false, "list the causes and measure nothing")
	f.StringSliceVar(&o.cfg.Causes, "causes", nil, "only these causes; see --list")
	f.StringSliceVar(&o.cfg.Loads, "loads", nil, "only beside these loads: up, down, idle")
	f.IntVar(&o.cfg.Runs, "runs", o.cfg.Runs, "runs of each cause beside each load")
	f.DurationVar(&o.cfg.Window, "window", o.cfg.Window, "how long connections are watched before and at least after")
	f.IntVar(&o.cfg.Labs, "labs", o.cfg.Labs, "labs at once")
	f.StringSliceVar(&o.peers, "peers", nil, "also these other products, with the causes that apply to them; all is every one")
	f.IntVar(&o.cfg.PeerRuns, "peer-runs", o.cfg.PeerRuns, "runs of each cause beside each load of other products, which are silent for long")
	own := f.Bool("own", true, "measure Sallyway itself")
	f.StringVar(&o.out, "out", "", "folder of the results (default: bench/results of the source tree)")
	cmd.PreRun = func(*cobra.Command, []string) { o.cfg.NoOwn = !*own }
	return cmd
}

func (o *failoverOptions) run(cmd *cobra.Command) error {
	if o.list {
		for _, c := range bench.AboutCauses() {
			fmt.Fprintf(cmd.OutOrStdout(), "%-20s %s\n", c[0], c[1])
		}
		return nil
	}
	if q := bench.FailoverQuick(); o.quick {
		for flag, set := range map[string]func(){
			"runs": func() { o.cfg.Runs = q.Runs }, "peer-runs": func() { o.cfg.PeerRuns = q.PeerRuns }, "labs": func() { o.cfg.Labs = q.Labs },
		} {
			if !cmd.Flags().Changed(flag) {
				set()
			}
		}
	}
	if o.cfg.Peers = o.peers; slices.Contains(o.peers, "all") {
		o.cfg.Peers = bench.Peers()
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	o.cfg.Bin = filepath.Dir(exe)
	o.out, err = resultsFolder(o.out)
	if err != nil {
		return err
	}
	// What was found before something failed is kept.
	res, failed := bench.RunFailover(cmd.Context(), o.cfg, cmd.ErrOrStderr())
	if res == nil {
		return daemon.Usagef("%w", failed)
	}
	if len(res.Tries) == 0 {
		return failed
	}
	return errors.Join(failed, keep(cmd, res, o.out))
}
