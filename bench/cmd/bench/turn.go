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
		"server": bench.TurnServer, "agent": bench.TurnAgent, "client": bench.TurnClient, "relay": bench.RelayServer,
	} {
		var server, client, target, dir string
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
			return run(cmd.Context(), cfg)
		}}
		f := cmd.Flags()
		f.StringVar(&server, "server", "", "address and port of the TURN server")
		f.StringVar(&client, "client", "", "address of the client")
		f.StringVar(&target, "target", "", "address of the private host")
		f.StringVar(&dir, "dir", "", "folder of the certificates")
		parent.AddCommand(cmd)
	}
	return parent
}
