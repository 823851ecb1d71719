package admin

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// resourceTest has the platform reach a resource itself.
func (a *app) resourceTest() *cobra.Command {
	var req control.TestResource
	cmd := &cobra.Command{
		Use: "test NAME [--gateway G] [--host HOST] [--port PORT]", Short: "Have the platform reach a resource itself, and show what each step took", Args: one("the resource's name"),
		Long: `Have the platform open a session to a resource, as a client would: platform, relay, gateway, resource. It goes by each gateway
that serves the resource, over the first rung that leads there: UDP 5349, TLS 5349, TLS 8443.

A policy must let the platform reach the resource (sallyway policy allow --from platform --resource NAME), the test stands in the audit,
and an organization may switch it off (sallyway organization update --platform-dial off). The exit code is 0 when one gateway reached it.`,
		Example: `  sallyway policy allow --from platform --resource db
  sallyway resource test db
  sallyway resource test lan --host 10.0.3.7 --port 22 --gateway office`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "test resource "+args[0], func(ctx context.Context, c *Client) error {
				t, err := c.TestResource(ctx, c.org, args[0], req)
				if err != nil {
					return err
				}
				if err := a.show(cmd, t, func(w io.Writer) { showTest(w, t) }); err != nil {
					return err
				}
				if !t.OK {
					return daemon.Failf("resource %s is not reached from the platform: %s%s", t.Resource, t.Verdict, below(t.Remedy))
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&req.Gateway, "gateway", "", "go by this gateway alone (default: by each that serves it)")
	cmd.Flags().StringVar(&req.Host, "host", "", "one of the resource's hosts, where it is a network or a domain")
	cmd.Flags().Uint16Var(&req.Port, "port", 0, "a TCP port of the resource (default: the one that is probed, else its first)")
	return a.completing(resources, cmd)
}

// showTest prints a table for each gateway.
func showTest(w io.Writer, t control.ResourceTest) {
	for _, g := range t.Gateways {
		head := "platform → gateway " + g.Gateway + " → " + t.Target
		if g.Path != "" {
			head += ", by " + g.Path
		}
		fmt.Fprintln(w, printable(head))
		if len(g.Hops) > 0 {
			table(w, "STEP TO MS RESULT", g.Hops, func(h control.TestHop) []any {
				result := string(h.State)
				if h.Detail != "" {
					result += ": " + h.Detail
				}
				ms := fmt.Sprintf("%.1f", h.Millis)
				if h.State == control.HopSkipped {
					ms = "-"
				}
				return []any{h.Name, h.To, ms, result}
			})
		}
		for _, s := range g.Tried {
			fmt.Fprintln(w, "tried: "+printable(s))
		}
		if g.RTT > 0 {
			fmt.Fprintf(w, "to the gateway and back: %.1f ms\n", g.RTT)
		}
		if !g.OK && len(t.Gateways) > 1 {
			fmt.Fprintln(w, strings.TrimSpace(printable(g.Verdict)+below(printable(g.Remedy))))
		}
		fmt.Fprintln(w)
	}
	if t.OK {
		fmt.Fprintf(w, "%s, in %.0f ms in all\n", printable(t.Verdict), t.Millis)
	}
}
