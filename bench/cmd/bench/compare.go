package main

import (
	"github.com/spf13/cobra"

	"sallyway/bench"
)

// compareCommand puts two results side by side.
func compareCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "compare A.json B.json", Short: "Put two results side by side: medians, spread and change of every figure", Args: cobra.ExactArgs(2),
		Long: `Prints every figure that both results have: the median of the runs of either, the least and the most, and by how much B
differs from A. "beyond" marks a change that the runs of both do not explain: every run of B is on one side of every run of A.
Slower is no error: the exit code says only whether both files could be read.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := bench.Read(args[0])
			if err != nil {
				return err
			}
			b, err := bench.Read(args[1])
			if err != nil {
				return err
			}
			return bench.Compare(cmd.OutOrStdout(), a, b, all)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "list also the ways that are not Sallyway")
	return cmd
}
