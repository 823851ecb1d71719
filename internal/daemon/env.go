package daemon

import (
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/datagram"
)

// otherVariables are the environment variables that are no flags.
var otherVariables = []string{
	datagram.NoOffload,
	EnvPrefix + "ORG", EnvPrefix + "CREDENTIALS", // of the admin verbs; whoever works with these has them in every shell
	EnvPrefix + "LAB", // marks the processes of the laboratory
}

// warnUnknown says which variables with the prefix mean nothing to the program that cmd belongs to: they are ignored, and one with a typing
// error would be in silence. Values are never shown.
func warnUnknown(log *slog.Logger, cmd *cobra.Command, environ []string) {
	known := keysOfProgram(cmd.Root(), true)
	known["config"] = true
	var names []string // in lower case, without the prefix
	for k := range known {
		names = append(names, strings.ToLower(strings.TrimPrefix(envName(k), EnvPrefix)))
	}
	for _, v := range otherVariables {
		names = append(names, strings.ToLower(strings.TrimPrefix(v, EnvPrefix)))
	}
	for _, entry := range slices.Sorted(slices.Values(environ)) {
		name, _, _ := strings.Cut(entry, "=")
		rest, ours := strings.CutPrefix(strings.ToLower(name), strings.ToLower(EnvPrefix))
		if !ours || (name == strings.ToUpper(name) && slices.Contains(names, rest)) {
			continue
		}
		args := []any{"name", name}
		if n := nearest(rest, names); n != "" {
			args = append(args, "did_you_mean", EnvPrefix+strings.ToUpper(n))
		}
		log.Warn("environment variable ignored: no flag or setting of this program has that name", args...)
	}
}
