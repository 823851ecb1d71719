package admin

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/platformapi"
)

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the organization: relays, gateways, clients and how they are", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "read status", func(ctx context.Context, c *Client) error {
				st, err := c.Status(ctx, c.org)
				if err != nil {
					return err
				}
				return a.show(cmd, st, func(w io.Writer) {
					fmt.Fprintf(w, "%s at %s (platform %s): %s, %s, %s\n", st.Organization, c.URL(), st.Version,
						count(st.Resources, "resource"), policyCount(st.Policies), count(st.Sessions, "session"))
					for _, part := range []struct {
						kind  nodeKind
						nodes []control.NodeRecord
					}{{relays, st.Relays}, {gateways, st.Gateways}, {clients, st.Clients}} {
						if len(part.nodes) == 0 {
							fmt.Fprintf(w, "\nno %s yet: sallyway %s create NAME\n", part.kind.plural, part.kind.name)
							continue
						}
						fmt.Fprintf(w, "\n%s\n", part.kind.plural)
						table(w, nodeHead(part.kind), part.nodes, nodeRow(part.kind))
					}
					if n := outdated(&st); n > 0 {
						fmt.Fprintf(w, "\n%s of an older release than the platform: upgrade relays, then gateways, then clients, one after the other\n", count(n, "node"))
					}
				})
			})
		},
	}
}

// outdated is how many nodes are of an older release than the platform.
func outdated(st *control.OrgStatus) (n int) {
	for _, nodes := range [][]control.NodeRecord{st.Relays, st.Gateways, st.Clients} {
		for _, r := range nodes {
			if r.Outdated {
				n++
			}
		}
	}
	return n
}

func policyCount(n int) string {
	if n == 1 {
		return "1 policy"
	}
	return fmt.Sprintf("%d policies", n)
}

func (a *app) session() *cobra.Command {
	var gateway string
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the live sessions", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list sessions", func(ctx context.Context, c *Client) error {
				items, err := platformapi.Collect(c.AllSessions(ctx, c.org))
				if err != nil {
					return err
				}
				if gateway != "" {
					kept := []control.SessionRecord{}
					for _, s := range items {
						if s.Gateway == gateway {
							kept = append(kept, s)
						}
					}
					items = kept
				}
				return list(a, cmd, items, fmt.Sprintf("no session is open (gateways report every %.0f s)", control.HeartbeatInterval.Seconds()), "PEER GATEWAY RELAY SINCE FLOWS SENT RECEIVED", func(s control.SessionRecord) []any {
					return []any{s.Peer, s.Gateway, s.Relay, ago(&s.Since), s.Flows, size(s.SentBytes), size(s.RecvBytes)}
				})
			})
		},
	}
	ls.Flags().StringVar(&gateway, "gateway", "", "only those of this gateway")
	kill := &cobra.Command{
		Use: "kill NODE", Short: "End the sessions of a node; its key stays good, so it may come again", Args: one("the node's name or id"),
		Long: "End the sessions of a node. Its key stays good, so it may come again: to keep it out, disable or revoke it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "end sessions of "+args[0], func(ctx context.Context, c *Client) error {
				if err := c.EndSessions(ctx, c.org, args[0]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "sessions of %s end\n", args[0]) })
			})
		},
	}
	return group("session", "Sessions: who is connected to which gateway", `  sallyway session list
  sallyway session kill laptop`, ls, kill)
}

// size writes a number of bytes with a binary unit.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
