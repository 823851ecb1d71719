package admin

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
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

func (q *flowQuery) values() (url.Values, error) {
	v := url.Values{}
	for name, s := range map[string]string{"client": q.client, "person": q.person, "resource": q.resource, "gateway": q.gateway} {
		if s != "" {
			v.Set(name, s)
		}
	}
	if q.since > 0 {
		if q.from != "" {
			return nil, daemon.Usagef("--since and --from say the same: use one")
		}
		v.Set("from", time.Now().Add(-q.since).UTC().Format(time.RFC3339))
	}
	for name, s := range map[string]string{"from": q.from, "to": q.to} {
		if s == "" {
			continue
		}
		t, err := parseMoment(s)
		if err != nil {
			return nil, err
		}
		v.Set(name, t.UTC().Format(time.RFC3339))
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
			v, err := q.values()
			if err != nil {
				return err
			}
			return a.do(cmd, "list flows", func(ctx context.Context, c *Client) error {
				items := []control.FlowRecord{}
				for len(items) < lines {
					v.Set("limit", strconv.Itoa(min(lines-len(items), pageSize)))
					l, err := get[control.List[control.FlowRecord]](ctx, c, c.path("flows")+"?"+v.Encode())
					if err != nil {
						return err
					}
					items = append(items, l.Items...)
					if l.NextCursor == "" {
						break
					}
					v.Set("cursor", l.NextCursor)
				}
				return list(a, cmd, items, "no flows; the organization may keep none: sallyway flow log", "STARTED WHO RESOURCE GATEWAY PATH SENT RECEIVED TOOK ENDED", func(f control.FlowRecord) []any {
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
			v, err := q.values()
			if err != nil {
				return err
			}
			return a.do(cmd, "export flows", func(ctx context.Context, c *Client) error {
				body, err := c.stream(ctx, c.path("flows:export")+"?"+v.Encode())
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
					v, err = patch[control.FlowLog](ctx, c, c.path("flow-log"), control.FlowLog{On: args[0] == "on"})
				} else {
					v, err = get[control.FlowLog](ctx, c, c.path("flow-log"))
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
