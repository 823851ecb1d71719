package admin

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/platformapi"
)

const webhooks = "webhooks"

func (a *app) webhook() *cobra.Command {
	c := group("webhook", "Webhooks: what happens in the organization, sent to a URL as it happens", `  sallyway webhook create siem --url https://siem.example/in --events 'node.*,policy.*'
  sallyway webhook test siem
  sallyway webhook list`, a.webhookCreate(), a.webhookList(), a.webhookShow(), a.webhookTest(), a.webhookUpdate(),
		a.webhookSwitch("disable", true), a.webhookSwitch("enable", false), a.webhookDelete())
	c.Long = `What happens in the organization, sent to a URL as it happens. Events are the entries of the audit log (sallyway audit tail shows their names); each
that fits is sent in order, at least once, until the receiver answers 2xx. Requests are signed as Standard Webhooks are: HMAC-SHA256 over
webhook-id.webhook-timestamp.body, in the header webhook-signature. docs/platform.md shows how a receiver checks that.`
	return c
}

func (a *app) webhookCreate() *cobra.Command {
	var req control.CreateWebhook
	var secretFile string
	cmd := &cobra.Command{
		Use: "create NAME --url URL [--events PATTERN,…]", Short: "Make a webhook, beginning with what happens from now on; prints its secret, once", Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if req.URL == "" {
				return daemon.Usagef("--url is missing: where events are sent, such as https://siem.example/in")
			}
			if secretFile != "" {
				if req.Secret, err = readSecret(cmd.InOrStdin(), secretFile); err != nil {
					return err
				}
			}
			req.Name = args[0]
			return a.do(cmd, "create webhook "+args[0], func(ctx context.Context, c *Client) error {
				w, err := c.CreateWebhook(ctx, c.org, req)
				if err != nil {
					return err
				}
				return a.show(cmd, w, func(out io.Writer) {
					showWebhook(out, w)
					if secretFile == "" {
						fmt.Fprintln(cmd.ErrOrStderr(), "the receiver needs the secret to check signatures; it is not shown again")
					}
				})
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.URL, "url", "", "where events are sent: https://…")
	f.StringSliceVar(&req.Events, "events", nil, "actions, or patterns such as node.*,policy.* (default: all)")
	f.StringVar(&secretFile, "secret-file", "", "file with a secret of your own, - is standard input (default: one is made)")
	f.BoolVar(&req.ThroughGateways, "through-gateways", false, "dial through the organization's gateways, as a policy allows the platform: for a receiver in a private network")
	return cmd
}

func showWebhook(w io.Writer, h control.Webhook) {
	events := strings.Join(h.Events, ", ")
	if events == "" {
		events = "all"
	}
	way := ""
	if h.ThroughGateways {
		way = "through gateways"
	}
	fields(w, "name", h.Name, "id", h.ID, "url", h.URL, "events", events, "dialled", way, "state", h.State, "reason", h.Reason, "last success", moment(h.LastSuccess),
		"failing since", moment(h.FailedSince), "next try", moment(h.NextTry), "backlog", h.Backlog, "secret", h.Secret)
}

func (a *app) webhookList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List webhooks and how they go", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list webhooks", func(ctx context.Context, c *Client) error {
				items, err := platformapi.Collect(c.AllWebhooks(ctx, c.org))
				if err != nil {
					return err
				}
				return list(a, cmd, items, "no webhooks; make one: sallyway webhook create NAME --url https://…", "NAME STATE BACKLOG LAST-SUCCESS URL REASON", func(h control.Webhook) []any {
					return []any{h.Name, h.State, h.Backlog, ago(h.LastSuccess), h.URL, h.Reason}
				})
			})
		},
	}
}

func (a *app) webhookShow() *cobra.Command {
	return a.completing(webhooks, &cobra.Command{
		Use: "show NAME", Short: "Show a webhook", Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show webhook "+args[0], func(ctx context.Context, c *Client) error {
				h, err := c.ShowWebhook(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, h, func(w io.Writer) { showWebhook(w, h) })
			})
		},
	})
}

func (a *app) webhookTest() *cobra.Command {
	return a.completing(webhooks, &cobra.Command{
		Use: "test NAME", Short: "Send a test event now; exit code 1 when it is not taken", Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "test webhook "+args[0], func(ctx context.Context, c *Client) error {
				t, err := c.TestWebhook(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				if err := a.show(cmd, t, func(w io.Writer) {
					if t.OK {
						fmt.Fprintf(w, "taken: HTTP %d after %v\n", t.Status, time.Duration(t.Millis)*time.Millisecond)
					}
				}); err != nil || t.OK {
					return err
				}
				return daemon.Failf("the test event was not taken: %s", printable(t.Problem))
			})
		},
	})
}

func (a *app) webhookUpdate() *cobra.Command {
	var url, secretFile string
	var events []string
	var gateways, rotate, skip bool
	cmd := &cobra.Command{
		Use: "update NAME", Short: "Change a webhook; one that fails is tried at once", Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := control.UpdateWebhook{Skip: skip}
			f := cmd.Flags()
			if f.Changed("url") {
				req.URL = &url
			}
			if f.Changed("events") {
				req.Events = &events
			}
			if f.Changed("through-gateways") {
				req.ThroughGateways = &gateways
			}
			if rotate || secretFile != "" {
				secret := ""
				if secretFile != "" {
					var err error
					if secret, err = readSecret(cmd.InOrStdin(), secretFile); err != nil {
						return err
					}
				}
				req.Secret = &secret
			}
			if req == (control.UpdateWebhook{}) { // all are pointers
				return daemon.Usagef("nothing to change: see sallyway webhook update --help")
			}
			return a.do(cmd, "update webhook "+args[0], func(ctx context.Context, c *Client) error {
				h, err := c.UpdateWebhook(ctx, c.org, args[0], req)
				if err != nil {
					return err
				}
				if secretFile != "" {
					h.Secret = "" // who has the file has it
				}
				return a.show(cmd, h, func(w io.Writer) { showWebhook(w, h) })
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&url, "url", "", "where events are sent")
	f.StringSliceVar(&events, "events", nil, "actions or patterns; empty is all")
	f.BoolVar(&gateways, "through-gateways", false, "dial through the organization's gateways")
	f.StringVar(&secretFile, "secret-file", "", "file with a new secret, - is standard input")
	f.BoolVar(&rotate, "new-secret", false, "have a new secret made, and print it")
	f.BoolVar(&skip, "skip", false, "leave out what waits, and go on with what comes")
	return a.completing(webhooks, cmd)
}

func (a *app) webhookSwitch(verb string, off bool) *cobra.Command {
	short := map[bool]string{true: "Send nothing until it is enabled; what happens meanwhile waits", false: "Go on where it was"}[off]
	return a.completing(webhooks, &cobra.Command{
		Use: verb + " NAME", Short: short, Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, verb+" webhook "+args[0], func(ctx context.Context, c *Client) error {
				h, err := c.UpdateWebhook(ctx, c.org, args[0], control.UpdateWebhook{Disabled: &off})
				if err != nil {
					return err
				}
				return a.show(cmd, h, func(w io.Writer) { fmt.Fprintf(w, "webhook %s: %s\n", h.Name, h.State) })
			})
		},
	})
}

func (a *app) webhookDelete() *cobra.Command {
	return a.completing(webhooks, &cobra.Command{
		Use: "delete NAME", Short: "Delete a webhook", Args: one("the webhook's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "delete webhook "+args[0], func(ctx context.Context, c *Client) error {
				if err := c.DeleteWebhook(ctx, c.org, args[0]); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "webhook %s deleted\n", args[0])
				return err
			})
		},
	})
}
