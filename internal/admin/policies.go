package admin

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/platformapi"
	"sallyway/internal/policy"
)

const (
	policies = "policies"
	groups   = "groups"
)

// platformSubject is the platform itself as a subject.
const platformSubject = string(identity.Platform)

// subjectFlags say who.
type subjectFlags struct{ client, from, group string }

func (f *subjectFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.client, "client", "", "a client")
	cmd.Flags().StringVar(&f.from, "from", "", "gateway:NAME (a site), client:NAME, group:NAME, person:LOGIN, or platform (for tests and webhooks)")
	cmd.Flags().StringVar(&f.group, "group", "", "a group")
}

// subject returns kind:NAME.
func (f *subjectFlags) subject() (string, error) {
	var found []string
	if f.client != "" {
		found = append(found, "client:"+f.client)
	}
	if f.group != "" {
		found = append(found, "group:"+f.group)
	}
	if f.from != "" {
		if err := checkSubject(f.from, "client", "gateway", "group", "person"); err != nil && f.from != platformSubject {
			return "", daemon.Usagef("--from %w, or %s", err, platformSubject)
		}
		found = append(found, f.from)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", daemon.Usagef("who? add one of --client C, --from gateway:G, --from platform, --group G")
	}
	return "", daemon.Usagef("%s: name one subject at a time (a group holds many)", strings.Join(found, " and "))
}

// checkSubject holds s to the form kind:NAME with one of kinds.
func checkSubject(s string, kinds ...string) error {
	kind, name, ok := strings.Cut(s, ":")
	for _, k := range kinds {
		if ok && kind == k && (identity.ValidLabel(name) || kind == "person" && strings.Contains(name, "@")) { // a login may be an e-mail address
			return nil
		}
	}
	return fmt.Errorf("%q is not of the form %s:NAME", s, strings.Join(kinds, ":NAME or "))
}

func (a *app) policy() *cobra.Command {
	one := one("the policy's name")
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a policy", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show policy "+args[0], func(ctx context.Context, c *Client) error {
				p, err := c.ShowPolicy(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) {
					fields(w, "name", p.Name, "id", p.ID, "state", enabledWord(p.Disabled), "subject", p.Subject, "resource", p.Resource, "created", moment(&p.Created))
				})
			})
		},
	}
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a policy: what it allowed ends", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error { return a.deleteOne(cmd, "policy", policies, args[0]) },
	}
	return group("policy", "Policies: who may reach what (what none allows is denied)", `  sallyway policy allow --client laptop --resource db
  sallyway policy allow --from gateway:branch --resource lan
  sallyway policy explain --client laptop --resource db --tcp 5432`,
		a.policyAllow(), a.policyList(), a.completing(policies, show), a.completing(policies, del),
		a.policySwitch("enable", false), a.policySwitch("disable", true), a.policyExplain())
}

func (a *app) policyAllow() *cobra.Command {
	var who subjectFlags
	var resource, name string
	cmd := &cobra.Command{
		Use: "allow --client C|--from gateway:G|--group G --resource R", Short: "Let a client, a site or a group reach a resource", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			subject, err := who.subject()
			if err != nil {
				return err
			}
			if resource == "" {
				return daemon.Usagef("what may %s reach? add --resource R (sallyway resource list)", subject)
			}
			return a.do(cmd, "allow "+subject+" resource "+resource, func(ctx context.Context, c *Client) error {
				p, err := c.CreatePolicy(ctx, c.org, control.CreatePolicy{Name: name, Subject: subject, Resource: resource})
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) {
					fmt.Fprintf(w, "%s may reach %s (policy %s)\n", p.Subject, p.Resource, p.Name)
				})
			})
		},
	}
	who.register(cmd)
	cmd.Flags().StringVar(&resource, "resource", "", "the resource")
	cmd.Flags().StringVar(&name, "name", "", "the policy's name (default: made from subject and resource)")
	return cmd
}

func (a *app) policyList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the policies", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list policies", func(ctx context.Context, c *Client) error {
				items, err := platformapi.Collect(c.AllPolicies(ctx, c.org))
				if err != nil {
					return err
				}
				none := fmt.Sprintf("organization %s has no policies, so nobody reaches anything; allow something: sallyway policy allow --client C --resource R", c.org)
				return list(a, cmd, items, none, "NAME SUBJECT RESOURCE STATE CREATED", func(p control.PolicyRecord) []any {
					return []any{p.Name, p.Subject, p.Resource, enabledWord(p.Disabled), ago(&p.Created)}
				})
			})
		},
	}
}

func (a *app) policySwitch(verb string, disabled bool) *cobra.Command {
	return a.completing(policies, &cobra.Command{
		Use: verb + " NAME", Short: strings.ToUpper(verb[:1]) + verb[1:] + " a policy", Args: one("the policy's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, verb+" policy "+args[0], func(ctx context.Context, c *Client) error {
				p, err := c.UpdatePolicy(ctx, c.org, args[0], control.UpdatePolicy{Disabled: &disabled})
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { fmt.Fprintf(w, "policy %s %s\n", p.Name, enabledWord(disabled)) })
			})
		},
	})
}

func (a *app) policyExplain() *cobra.Command {
	var who subjectFlags
	var resource string
	var tcp, udp uint16
	var icmp bool
	cmd := &cobra.Command{
		Use: "explain --client C|--from gateway:G|--group G --resource R [--tcp N|--udp N|--icmp]", Short: "Say whether and why a subject reaches a resource; exit code 1 when not", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			subject, err := who.subject()
			if err != nil {
				return err
			}
			if resource == "" {
				return daemon.Usagef("what? add --resource R (sallyway resource list)")
			}
			req := control.ExplainRequest{Subject: subject, Resource: resource}
			switch {
			case tcp != 0:
				req.Proto, req.Port = policy.TCP, tcp
			case udp != 0:
				req.Proto, req.Port = policy.UDP, udp
			case icmp:
				req.Proto = policy.ICMP
			}
			return a.do(cmd, "explain policy", func(ctx context.Context, c *Client) error {
				e, err := c.Explain(ctx, c.org, req)
				if err != nil {
					return err
				}
				if err := a.show(cmd, e, func(w io.Writer) { explainText(w, subject, resource, e) }); err != nil || e.Allowed {
					return err
				}
				return daemon.Silent(daemon.ExitDegraded)
			})
		},
	}
	who.register(cmd)
	cmd.Flags().StringVar(&resource, "resource", "", "the resource")
	cmd.Flags().Uint16Var(&tcp, "tcp", 0, "a TCP port")
	cmd.Flags().Uint16Var(&udp, "udp", 0, "a UDP port")
	cmd.Flags().BoolVar(&icmp, "icmp", false, "ICMP echo")
	cmd.MarkFlagsMutuallyExclusive("tcp", "udp", "icmp")
	return cmd
}

func explainText(w io.Writer, subject, resource string, e control.Explanation) {
	verdict := "DENIED"
	if e.Allowed {
		verdict = "ALLOWED"
	}
	fmt.Fprintf(w, "%s: %s → %s\n", verdict, subject, resource)
	fields(w, "  rule", e.Rule, "  why", e.Reason, "  gateways", join(e.Gateways), "  what to do", e.Remedy)
}

func (a *app) group() *cobra.Command {
	one := one("the group's name")
	var members []string
	create := &cobra.Command{
		Use: "create NAME [--member client:C]…", Short: "Make a group", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkMembers(members); err != nil {
				return err
			}
			return a.do(cmd, "create group "+args[0], func(ctx context.Context, c *Client) error {
				g, err := c.CreateGroup(ctx, c.org, control.CreateGroup{Name: args[0], Members: members})
				if err != nil {
					return err
				}
				return a.show(cmd, g, func(w io.Writer) {
					fmt.Fprintf(w, "group %s created with %s\n", g.Name, count(len(g.Members), "member"))
				})
			})
		},
	}
	create.Flags().StringSliceVar(&members, "member", nil, "client:NAME, gateway:NAME or person:LOGIN")
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the groups", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list groups", func(ctx context.Context, c *Client) error {
				items, err := platformapi.Collect(c.AllGroups(ctx, c.org))
				if err != nil {
					return err
				}
				none := fmt.Sprintf("organization %s has no groups; make one: sallyway group create NAME --member client:C", c.org)
				return list(a, cmd, items, none, "NAME MEMBERS CREATED", func(g control.GroupRecord) []any {
					return []any{g.Name, join(g.Members), ago(&g.Created)}
				})
			})
		},
	}
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a group", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show group "+args[0], func(ctx context.Context, c *Client) error {
				g, err := c.ShowGroup(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, g, func(w io.Writer) {
					fields(w, "name", g.Name, "members", join(g.Members), "created", moment(&g.Created))
				})
			})
		},
	}
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a group", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error { return a.deleteOne(cmd, "group", groups, args[0]) },
	}
	return group("group", "Groups: subjects that stand for many", `  sallyway group create devs --member client:laptop,client:desktop
  sallyway group update devs --add client:new --remove client:old
  sallyway policy allow --group devs --resource db`,
		create, ls, a.completing(groups, show), a.groupUpdate(), a.completing(groups, del))
}

func checkMembers(members []string) error {
	for _, m := range members {
		if err := checkSubject(m, "client", "gateway", "person"); err != nil {
			return daemon.Usagef("member %w", err)
		}
	}
	return nil
}

func (a *app) groupUpdate() *cobra.Command {
	var set, add, drop []string
	cmd := &cobra.Command{
		Use: "update NAME [--member M]…|[--add M]… [--remove M]…", Short: "Replace, add or remove members", Args: one("the group's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, l := range [][]string{set, add, drop} {
				if err := checkMembers(l); err != nil {
					return err
				}
			}
			replace := cmd.Flags().Changed("member")
			if !replace && len(add)+len(drop) == 0 {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update group "+args[0], func(ctx context.Context, c *Client) error {
				members := append([]string{}, set...)
				if !replace {
					g, err := c.ShowGroup(ctx, c.org, args[0])
					if err != nil {
						return err
					}
					members = changed(g.Members, add, drop)
				}
				g, err := c.UpdateGroup(ctx, c.org, args[0], control.UpdateGroup{Members: &members})
				if err != nil {
					return err
				}
				return a.show(cmd, g, func(w io.Writer) {
					fmt.Fprintf(w, "group %s has %s: %s\n", g.Name, count(len(g.Members), "member"), join(g.Members))
				})
			})
		},
	}
	cmd.Flags().StringSliceVar(&set, "member", nil, "the members from now on: client:NAME, gateway:NAME or person:LOGIN")
	cmd.Flags().StringSliceVar(&add, "add", nil, "members to add")
	cmd.Flags().StringSliceVar(&drop, "remove", nil, "members to remove")
	cmd.MarkFlagsMutuallyExclusive("member", "add")
	cmd.MarkFlagsMutuallyExclusive("member", "remove")
	return a.completing(groups, cmd)
}

// changed returns members with add and without drop, each once.
func changed(members, add, drop []string) []string {
	seen := make(map[string]bool)
	for _, d := range drop {
		seen[d] = true
	}
	out := []string{}
	for _, m := range append(append([]string{}, members...), add...) {
		if !seen[m] {
			seen[m] = true
			out = append(out, m)
		}
	}
	return out
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
