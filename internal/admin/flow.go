package admin

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/platformapi"
)

// flowQuery are the flags that choose flows.
type flowQuery struct {
	client, person, resource, gateway string
	since                             time.Duration
	from, to                          string
}

func (q *flowQuery) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&q.client, "client", "", "of this client (or gateway that dials), by name or id")
	f.StringVar(&q.person, "person", "", "of this person's clients, by login")
	f.StringVar(&q.resource, "resource", "", "to this resource, by name or id")
	f.StringVar(&q.gateway, "gateway", "", "by this gateway, by name or id")
	f.DurationVar(&q.since, "since", 0, "that began in this time, such as 1h")
	f.StringVar(&q.from, "from", "", "that began at this date or time, or later")
	f.StringVar(&q.to, "to", "", "that began before this date or time")
}

// query is what the flags choose.
func (q *flowQuery) query() (platformapi.ExportFlowsQuery, error) {
	v := platformapi.ExportFlowsQuery{Client: q.client, Person: q.person, Resource: q.resource, Gateway: q.gateway}
	if q.since > 0 {
		if q.from != "" {
			return v, daemon.Usagef("--since and --from say the same: use one")
		}
		v.From = time.Now().Add(-q.since).UTC()
	}
	for _, at := range []struct {
		text string
		to   *time.Time
	}{{q.from, &v.From}, {q.to, &v.To}} {
		if at.text == "" {
			continue
		}
		t, err := parseMoment(at.text)
		if err != nil {
			return v, err
		}
		*at.to = t.UTC()
	}
	return v, nil
}

func (a *app) flow() *cobra.Command {
	return group("flow", "Flows: connections that there were, who to what, how much, and why they ended", `  sallyway flow list --since 1h
  sallyway flow list --client laptop --resource db
  sallyway flow export --from 2027-03-01 -o flows.jsonl
  sallyway flow log off`, a.flowList(), a.flowExport(), a.flowLog())
}

func (a *app) flowList() *cobra.Command {
	var q flowQuery
	var lines int
	cmd := &cobra.Command{
		Use: "list [--client C] [--resource R] [--since 1h]", Short: "List flows, the newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := q.query()
			if err != nil {
				return err
			}
			return a.do(cmd, "list flows", func(ctx context.Context, c *Client) error {
				flows := []control.FlowRecord{}
				page := platformapi.ListFlowsQuery{Client: v.Client, Person: v.Person, Resource: v.Resource, Gateway: v.Gateway, From: v.From, To: v.To}
				for len(flows) < lines {
					page.Limit = min(lines-len(flows), pageSize)
					l, err := c.ListFlows(ctx, c.org, page)
					if err != nil {
						return err
					}
					flows = append(flows, l.Items...)
					if page.Cursor = l.NextCursor; page.Cursor == "" {
						break
					}
				}
				return list(a, cmd, flows, "no flows; the organization may keep none: sallyway flow log", "STARTED WHO RESOURCE GATEWAY PATH SENT RECEIVED TOOK ENDED", func(f control.FlowRecord) []any {
					who, path := f.Client, f.Path
					if f.Person != "" {
						who += " (" + f.Person + ")"
					}
					if f.Relay != "" {
						path = f.Relay + " " + path
					}
					end := f.Reason
					if f.Ended.IsZero() {
						end = "open"
					}
					return []any{f.Started.Local().Format(time.DateTime), who, f.Resource + " " + f.Destination, f.Gateway, path, f.Sent, f.Received, span(time.Duration(f.Seconds * float64(time.Second))), end}
				})
			})
		},
	}
	q.register(cmd)
	cmd.Flags().IntVarP(&lines, "lines", "n", 50, "how many")
	return cmd
}

func (a *app) flowExport() *cobra.Command {
	var q flowQuery
	var file string
	cmd := &cobra.Command{
		Use: "export [-o FILE]", Short: "Write flows, one JSON document a line, the newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := q.query()
			if err != nil {
				return err
			}
			return a.do(cmd, "export flows", func(ctx context.Context, c *Client) error {
				body, err := c.ExportFlows(ctx, c.org, v)
				if err != nil {
					return err
				}
				defer body.Close()
				return save(cmd, file, body)
			})
		},
	}
	q.register(cmd)
	cmd.Flags().StringVarP(&file, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

func (a *app) flowLog() *cobra.Command {
	return &cobra.Command{
		Use: "log [on|off]", Short: "Say whether the organization's connections are written down, or change that", ValidArgs: []string{"on", "off"},
		Args: cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "flow log", func(ctx context.Context, c *Client) error {
				var v control.FlowLog
				var err error
				if len(args) == 1 {
					v, err = c.UpdateFlowLog(ctx, c.org, control.FlowLog{On: args[0] == "on"})
				} else {
					v, err = c.ShowFlowLog(ctx, c.org)
				}
				if err != nil {
					return err
				}
				return a.show(cmd, v, func(w io.Writer) {
					state := "off: connections are not written down"
					if v.On {
						state = "on: gateways tell of every connection"
					}
					fmt.Fprintln(w, "the flow log is "+state)
				})
			})
		},
	}
}
