package main

import (
	"context"
	"net/netip"

	"github.com/spf13/cobra"

	"sallyway/bench"
	"sallyway/internal/daemon"
)

// turnCommand are the processes of the stand-in for TURN as it is commonly built; bench starts them on its hosts.
func turnCommand() *cobra.Command {
	parent := &cobra.Command{Use: "turn", Short: "The ends of the TURN stand-in, started by bench", Hidden: true}
	for name, run := range map[string]func(context.Context, bench.TurnConfig) error{
		"server": bench.TurnServer, "agent": bench.TurnAgent, "listener": bench.TurnListener, "client": bench.TurnClient, "relay": bench.RelayServer,
	} {
		var server, client, target, dir string
		var local []uint
		cmd := &cobra.Command{Use: name, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := bench.TurnConfig{Dir: dir}
			var err error
			if cfg.Server, err = netip.ParseAddrPort(server); err != nil {
				return daemon.Usagef("--server: %w", err)
			}
			if cfg.Client, err = netip.ParseAddr(client); err != nil {
				return daemon.Usagef("--client: %w", err)
			}
			if cfg.Target, err = netip.ParseAddr(target); err != nil {
				return daemon.Usagef("--target: %w", err)
			}
			for i, p := range local[:min(len(local), len(cfg.Local))] {
				cfg.Local[i] = uint16(p) //nolint:gosec // bench gives ports
			}
			return run(cmd.Context(), cfg)
		}}
		f := cmd.Flags()
		f.StringVar(&server, "server", "", "address and port of the TURN server")
		f.StringVar(&client, "client", "", "address of the client")
		f.StringVar(&target, "target", "", "address of the private host")
		f.StringVar(&dir, "dir", "", "folder of the certificates")
		f.UintSliceVar(&local, "local", nil, "the client's ports on loopback: of iperf3 and of echo")
		parent.AddCommand(cmd)
	}
	return parent
}

// forwardCommand is the yardstick of added latency, started by bench on a relay's host.
func forwardCommand() *cobra.Command {
	return &cobra.Command{
		Use: "udp-forward LISTEN TARGET", Short: "Pass UDP datagrams on one by one, started by bench", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := netip.ParseAddrPort(args[0])
			if err != nil {
				return daemon.Usagef("LISTEN: %w", err)
			}
			to, err := netip.ParseAddrPort(args[1])
			if err != nil {
				return daemon.Usagef("TARGET: %w", err)
			}
			return bench.ForwardUDP(cmd.Context(), at, to)
		},
	}
}
