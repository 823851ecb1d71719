package admin

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/platformapi"
	"sallyway/internal/policy"
)

const resources = "resources"

// resourceFlags describe a resource.
type resourceFlags struct {
	gateways, domains []string
	address           string
	tcp, udp          string
	icmp              bool
	health            string
}

func (f *resourceFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringSliceVar(&f.gateways, "gateway", nil, "gateways that serve it, most preferred first, as NAME[:PRIORITY[:WEIGHT]]; of those with the lowest priority that reach it, flows are spread by weight")
	flags.StringVar(&f.address, "address", "", "IP address, CIDR, host name or *.domain, as the gateway sees it")
	flags.StringVar(&f.tcp, "tcp", "", `TCP ports, such as 5432,8000-8100 or all`)
	flags.StringVar(&f.udp, "udp", "", `UDP ports, in the same form`)
	flags.BoolVar(&f.icmp, "icmp", false, "allow ICMP echo (ping)")
	flags.StringVar(&f.health, "health", "", "how its gateways probe it: off, tcp, tls, http or https, then [:PORT][/PATH] (default: tcp, where it has a port of its own)")
	flags.StringSliceVar(&f.domains, "domain", nil, "DNS suffixes that the gateway's network resolves")
}

func (a *app) resource() *cobra.Command {
	one := one("the resource's name")
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a resource", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show resource "+args[0], func(ctx context.Context, c *Client) error {
				r, err := c.ShowResource(ctx, c.org, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { showResource(w, r) })
			})
		},
	}
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a resource", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.deleteOne(cmd, "resource", resources, args[0])
		},
	}
	return group("resource", "Resources: what is private and who serves it", `  sallyway resource create db --gateway office --address 10.0.3.7 --tcp 5432
  sallyway resource create lan --gateway office,office-2 --address 10.0.3.0/24 --tcp all --udp all --icmp
  sallyway resource create apps --gateway office --address '*.corp.example' --tcp 80,443 --domain corp.example`,
		a.resourceCreate(), a.resourceList(), a.completing(resources, show), a.resourceUpdate(), a.completing(resources, del),
		a.resourceSwitch("enable", false), a.resourceSwitch("disable", true), a.resourceTest())
}

func (a *app) resourceCreate() *cobra.Command {
	var f resourceFlags
	cmd := &cobra.Command{
		Use:   "create NAME --gateway G[,G2] --address HOST|CIDR [--tcp PORTS] [--udp PORTS] [--icmp] [--domain D]",
		Short: "Name something private and say who serves it", Args: one("the resource's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(f.gateways) == 0:
				return daemon.Usagef("by which gateway is it reached? add --gateway NAME (sallyway gateway list)")
			case f.address == "":
				return daemon.Usagef("what is it? add --address with a host or a CIDR as the gateway sees it")
			case f.tcp == "" && f.udp == "" && !f.icmp && len(f.domains) == 0:
				return daemon.Usagef("what of it may be reached? add --tcp PORTS, --udp PORTS or --icmp (PORTS such as 5432,8000-8100 or all)")
			}
			req := control.CreateResource{Name: args[0], Gateways: f.gateways, Address: f.address, ICMP: f.icmp, Domains: f.domains}
			var err error
			if req.TCP, err = parsePorts("--tcp", f.tcp); err != nil {
				return err
			}
			if req.UDP, err = parsePorts("--udp", f.udp); err != nil {
				return err
			}
			if req.Health, err = policy.ParseHealth(f.health); err != nil {
				return daemon.Usagef("--health: %w", err)
			}
			return a.do(cmd, "create resource "+args[0], func(ctx context.Context, c *Client) error {
				r, err := c.CreateResource(ctx, c.org, req)
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) {
					fmt.Fprintf(w, "resource %s created; its name for clients is %s\nnobody may reach it yet: sallyway policy allow --client C --resource %[1]s\n", r.Name, r.FQDN)
				})
			})
		},
	}
	f.register(cmd)
	return cmd
}

func (a *app) resourceList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the resources", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list resources", func(ctx context.Context, c *Client) error {
				items, err := platformapi.Collect(c.AllResources(ctx, c.org))
				if err != nil {
					return err
				}
				none := fmt.Sprintf("organization %s has no resources; make one: sallyway resource create NAME --gateway G --address HOST --tcp PORT", c.org)
				return list(a, cmd, items, none, "NAME ADDRESS ALLOWS GATEWAYS VIRTUAL STATE REACHED", func(r control.ResourceRecord) []any {
					return []any{r.Name, r.Address, allows(r.Resource), join(r.Names), join(r.Virtual), enabledWord(r.Disabled), reached(r)}
				})
			})
		},
	}
}

// reached says in a word what the gateways' probes found.
func reached(r control.ResourceRecord) string {
	var by, not []string
	for _, h := range r.Reached {
		if h.OK {
			by = append(by, h.Gateway)
		} else {
			not = append(not, h.Gateway)
		}
	}
	switch {
	case len(not) > 0 && len(by) > 0:
		return "not by " + strings.Join(not, ", ")
	case len(not) > 0:
		return "no"
	case len(by) > 0:
		return "yes"
	}
	return "-"
}

func enabledWord(disabled bool) string {
	if disabled {
		return "disabled"
	}
	return "enabled"
}

// allows writes ports and protocols: tcp 5432,8000-8100 icmp.
func allows(r policy.Resource) string {
	var words []string
	for _, p := range []struct {
		name  string
		ports []policy.PortRange
	}{{"tcp", r.TCP}, {"udp", r.UDP}} {
		if len(p.ports) > 0 {
			words = append(words, p.name+" "+strings.ReplaceAll(join(p.ports), ", ", ","))
		}
	}
	if r.ICMP {
		words = append(words, "icmp")
	}
	return strings.Join(words, " ")
}

// serving writes a resource's gateways with their priority and weight, and what their probes found.
func serving(r control.ResourceRecord) string {
	words := make([]string, len(r.Names))
	for i, name := range r.Names {
		words[i] = name
		if i < len(r.Gateways) {
			words[i] += fmt.Sprintf(" (priority %d, weight %d)", r.Gateways[i].Priority, r.Gateways[i].Weight)
		}
		for _, h := range r.Reached {
			switch {
			case h.Gateway != name:
			case h.OK:
				words[i] += " reaches it"
			default:
				words[i] += " does not reach it since " + moment(&h.Since) + ": " + h.Reason
			}
		}
	}
	return strings.Join(words, ", ")
}

// probe writes how the gateways probe a resource.
func probe(r control.ResourceRecord) string {
	_, h, ok := r.Probe()
	if !ok {
		return "off"
	}
	return h.String()
}

func showResource(w io.Writer, r control.ResourceRecord) {
	fields(w, "name", r.Name, "id", r.ID, "state", enabledWord(r.Disabled), "address", r.Address, "allows", allows(r.Resource),
		"domains", join(r.Domains), "gateways", serving(r), "probe", probe(r), "name for clients", r.FQDN, "virtual", join(r.Virtual), "created", moment(&r.Created))
}

func (a *app) resourceUpdate() *cobra.Command {
	var f resourceFlags
	var name string
	cmd := &cobra.Command{
		Use: "update NAME [flags]", Short: "Change a resource: a flag replaces that part as a whole", Args: one("the resource's name"),
		Example: `  sallyway resource update db --tcp 5432,6432
  sallyway resource update db --gateway office-2,office
  sallyway resource update db --gateway office:0:3,branch:0:1     # three flows in four by way of office
  sallyway resource update db --health tls:5432
  sallyway resource update db --udp ''                 # no UDP any more`,
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := f.update(cmd, &name)
			if err != nil {
				return err
			}
			if u == (control.UpdateResource{}) {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update resource "+args[0], func(ctx context.Context, c *Client) error {
				r, err := c.UpdateResource(ctx, c.org, args[0], u)
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { fmt.Fprintf(w, "resource %s updated\n", r.Name) })
			})
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&name, "name", "", "a new name")
	return a.completing(resources, cmd)
}

// update takes over the flags that were given.
func (f *resourceFlags) update(cmd *cobra.Command, name *string) (control.UpdateResource, error) {
	var u control.UpdateResource
	given := cmd.Flags().Changed
	if given("name") {
		u.Name = name
	}
	if given("gateway") {
		u.Gateways = &f.gateways
	}
	if given("address") {
		u.Address = &f.address
	}
	if given("icmp") {
		u.ICMP = &f.icmp
	}
	if given("domain") {
		u.Domains = &f.domains
	}
	if given("health") {
		h, err := policy.ParseHealth(f.health)
		if err != nil {
			return u, daemon.Usagef("--health: %w", err)
		}
		u.Health = &h
	}
	for _, p := range []struct {
		flag, value string
		into        **[]policy.PortRange
	}{{"tcp", f.tcp, &u.TCP}, {"udp", f.udp, &u.UDP}} {
		if !given(p.flag) {
			continue
		}
		ports, err := parsePorts("--"+p.flag, p.value)
		if err != nil {
			return u, err
		}
		if ports == nil {
			ports = []policy.PortRange{}
		}
		*p.into = &ports
	}
	return u, nil
}

func (a *app) resourceSwitch(verb string, disabled bool) *cobra.Command {
	return a.completing(resources, &cobra.Command{
		Use: verb + " NAME", Short: strings.ToUpper(verb[:1]) + verb[1:] + " a resource", Args: one("the resource's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, verb+" resource "+args[0], func(ctx context.Context, c *Client) error {
				r, err := c.UpdateResource(ctx, c.org, args[0], control.UpdateResource{Disabled: &disabled})
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { fmt.Fprintf(w, "resource %s %s\n", r.Name, enabledWord(disabled)) })
			})
		},
	})
}
