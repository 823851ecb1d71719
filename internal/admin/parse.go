package admin

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/policy"
)

// completeTimeout bounds what a completion may take: somebody waits with a finger on the key.
const completeTimeout = 2 * time.Second

// parseAll reads the values of a list flag. Empty values are left out.
func parseAll[T any](values []string, flag string, parse func(string) (T, error)) ([]T, error) {
	var out []T
	for _, v := range values {
		if v = strings.TrimSpace(v); v == "" {
			continue
		}
		p, err := parse(v)
		if err != nil {
			return nil, daemon.Usagef("%s %q: %w", flag, v, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

// parsePorts reads --tcp or --udp.
func parsePorts(flag, s string) ([]policy.PortRange, error) {
	p, err := policy.ParsePorts(s)
	if err != nil {
		return nil, daemon.Usagef("%s: %w", flag, err)
	}
	return p, nil
}

// parseMoment reads a date (its first moment, UTC) or a time of RFC 3339.
func parseMoment(s string) (time.Time, error) {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, daemon.Usagef("--from %.40q is neither a date such as 2027-01-31 nor a time such as 2027-01-31T22:00:00Z", s)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// completing lets the shell complete the name of an object of the organization.
func (a *app) completing(plural string, cmd *cobra.Command) *cobra.Command {
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c, err := a.connect()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		found, err := objectNames(ctx, c, plural)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}
