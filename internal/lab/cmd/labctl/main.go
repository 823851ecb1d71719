// Labctl lays out Sallyway's lab on this machine: `labctl demo` shows the whole product at work in network namespaces.
package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/lab"
	"sallyway/internal/lab/demo"
)

func main() { os.Exit(daemon.Main(command())) }

func command() *cobra.Command {
	root := &cobra.Command{Use: "labctl", Short: "A lab of network namespaces for Sallyway"}
	root.AddCommand(demoCommand(), &cobra.Command{
		Use:   "sweep",
		Short: "Remove what labs left behind that were killed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return lab.Sweep(slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
		},
	})
	return root
}

func demoCommand() *cobra.Command {
	var cfg demo.Config
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Lay out client, two relays, gateway and a private network on this machine and show them work",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo.Run(cmd.Context(), cfg, os.Stdin, os.Stdout)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Bin, "bin", "", "folder of the programs (default: that of labctl)")
	f.BoolVar(&cfg.NAT, "nat", false, "put client and gateway behind NAT")
	f.IntVar(&cfg.MTU, "mtu", 0, "MTU of the links between the sites, in bytes (default 1500)")
	f.BoolVar(&cfg.NoWait, "no-wait", false, "end at once in a terminal too")
	return cmd
}
