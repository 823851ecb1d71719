package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"sallyway/bench"
)

// alone are the measurements of single layers.
type alone struct {
	relay, netstack, layers bool
}

// flags adds the flags that choose one.
func (a *alone) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&a.relay, "relay", false, "measure the relay alone, next to pion's server")
	f.BoolVar(&a.netstack, "netstack", false, "measure TUN and netstack alone, next to the usual construction")
	f.BoolVar(&a.layers, "layers", false, "measure what each layer of the path costs: raw TCP, the relay alone, legs and QUIC, the whole")
	cmd.MarkFlagsMutuallyExclusive("relay", "netstack", "layers")
}

// measurement is the one that was chosen, or nil.
func (a *alone) measurement(cfg bench.Config, quick bool, runs int) func(context.Context, io.Writer) (*bench.Result, error) {
	switch {
	case a.relay:
		c := bench.RelayDefaults()
		if quick {
			c = bench.RelayQuick()
		}
		if c.Bin = cfg.Bin; runs > 0 {
			c.Runs = runs
		}
		return func(ctx context.Context, out io.Writer) (*bench.Result, error) { return bench.RunRelay(ctx, c, out) }
	case a.netstack:
		c := bench.NetstackDefaults()
		if quick {
			c = bench.NetstackQuick()
		}
		if c.Bin, c.MTU = cfg.Bin, cfg.MTU; runs > 0 {
			c.Runs = runs
		}
		return func(ctx context.Context, out io.Writer) (*bench.Result, error) { return bench.RunNetstack(ctx, c, out) }
	case a.layers:
		c := bench.LayersDefaults()
		if quick {
			c = bench.LayersQuick()
		}
		if c.Bin, c.MTU = cfg.Bin, cfg.MTU; runs > 0 {
			c.Runs = runs
		}
		return func(ctx context.Context, out io.Writer) (*bench.Result, error) { return bench.RunLayers(ctx, c, out) }
	}
	return nil
}

// partCommand is a process of such a measurement; bench starts it on a host of its lab.
func partCommand() *cobra.Command {
	return &cobra.Command{
		Use: "part NAME CONFIG", Short: "A process of a measurement of one layer, started by bench", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.Part(cmd.Context(), args[0], []byte(args[1]))
		},
	}
}
