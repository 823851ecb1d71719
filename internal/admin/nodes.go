package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/relay/reverse"
)

// nodeKind is one of the three kinds of node that people make.
type nodeKind struct {
	name, plural string
	short        string
	example      string
}

var (
	relays = nodeKind{"relay", "relays", "Relays: hosts that both ends can reach", `  sallyway relay create fra-1 --host relay.example
  sallyway relay create ams-1 --host 203.0.113.9 --region eu-west --failure-domain provider-b
  sallyway relay drain fra-1
  sallyway relay credential fra-1 --client laptop      # for standard TURN software
  sallyway relay create eu-1 --shared --host eu.example # for every organization of the platform`}
	gateways = nodeKind{"gateway", "gateways", "Gateways: hosts in the private network", `  sallyway gateway create office
  sallyway gateway update office --pin-relay fra-1     # this relay first; --exclude-relay, --prefer-relay likewise
  sallyway gateway explain office                      # every relay, and why the gateway has it or has not
  sallyway gateway token office                        # a fresh token, for a new host or after a loss
  sallyway gateway create office --json | jq -r .token | ssh office sudo gatewayd install --token-file -
  sallyway gateway create office --appliance-iso office.iso # a disk for the appliance's image`}
	clients = nodeKind{"client", "clients", "Clients: who reaches private resources", `  sallyway client create laptop
  sallyway client revoke laptop                        # open sessions end within seconds`}
)

// relayFlags are what only relays have.
type relayFlags struct {
	host  string
	port  uint16
	peers []string
}

func (f *relayFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.host, "host", "", "address or DNS name under which nodes reach the relay")
	cmd.Flags().Uint16Var(&f.port, "port", 0, "its STUN/TURN port (default 5349)")
	cmd.Flags().StringSliceVar(&f.peers, "peer", nil, "address and port outside that may exchange packets with allocations, such as 192.0.2.7:9000")
}

func (a *app) node(k nodeKind) *cobra.Command {
	enable := "Let a disabled NODE work again"
	if k == relays {
		enable = "Let a disabled or drained relay work again; the relayd of a drained one has ended, start it after this"
	}
	verbs := []*cobra.Command{
		a.nodeCreate(k), a.nodeList(k), a.nodeShow(k), a.nodeUpdate(k), a.nodeDelete(k), a.nodeToken(k),
		a.nodeAction(k, "disable", "Refuse the NODE until it is enabled again", "disabled"),
		a.nodeAction(k, "enable", enable, "enabled"),
		a.nodeAction(k, "revoke", "Deny the NODE's key: its sessions end within seconds, and it needs a new token", "revoked"),
	}
	if k == clients {
		verbs = append(verbs, a.clientEnrol(), a.clientMine())
	}
	if k == gateways {
		verbs = append(verbs, a.gatewayExplain())
	}
	if k == relays {
		verbs = append(verbs, a.nodeAction(k, "drain", "Move everybody off a relay, without a break where they have another; then its relayd ends", "draining"), a.relayCredential())
	}
	cmd := group(k.name, k.short, k.example, verbs...)
	if k == relays {
		cmd.PersistentFlags().BoolVar(&a.shared, "shared", false, "relays of the platform, which organizations share")
	}
	return cmd
}

func (a *app) nodeCreate(k nodeKind) *cobra.Command {
	var relay relayFlags
	var aws awsFlags
	var places placesFlags
	var appliance applianceFlags
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a " + k.name + " and print the command for its host", Args: one("the " + k.name + "'s name"),
		Long: "Make a " + k.name + " and print the command for its host. The token in it is good for one use within an hour; `sallyway " + k.name + " token NAME` makes a fresh one.",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			req := control.CreateNode{Name: args[0], Host: relay.host, Port: relay.port}
			if k == relays {
				if relay.host == "" {
					return daemon.Usagef("under which address do nodes reach the relay? add --host: sallyway relay create %s --host HOST", args[0])
				}
				if req.Peers, err = parseAll(relay.peers, "--peer", netip.ParseAddrPort); err != nil {
					return err
				}
			}
			places.create(&req)
			if err := aws.create(cmd, &req); err != nil {
				return err
			}
			if req.Authentication == control.AuthAWS && appliance.iso != "" {
				return daemon.Usagef("--appliance-iso hands over a token, and --auth aws has none: leave one of them out")
			}
			disk, err := appliance.open()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, disk.close()) }()
			return a.do(cmd, "create "+k.name+" "+args[0], func(ctx context.Context, c *Client) error {
				n, err := k.of(c).create(ctx, req)
				if err != nil {
					return err
				}
				if err := holdToRoot(c, &n); err != nil {
					return err
				}
				if err := disk.write(k, n); err != nil {
					return err
				}
				return a.show(cmd, n, func(w io.Writer) { disk.tell(w, k, n, "created") })
			})
		},
	}
	if k.appliance() {
		appliance.register(cmd)
	}
	if k != clients {
		aws.register(cmd)
	}
	places.register(cmd, k)
	if k == relays {
		cmd.Use = "create NAME --host HOST [--port N] [--peer ADDR:PORT]"
		relay.register(cmd)
	}
	return cmd
}

// created prints what to do with a token. The commands hold it: they go to standard output and nowhere else.
func created(w io.Writer, k nodeKind, n control.CreatedNode, done string) {
	if n.Authentication == control.AuthAWS {
		if n.Token == "" && strings.Contains(done, "token") {
			done = "enrols by AWS and has no token"
		}
		fmt.Fprintf(w, "%s %s %s (%s). It enrols by the AWS identity of its host.\n", k.name, n.Name, done, n.ID)
	} else {
		fmt.Fprintf(w, "%s %s %s (%s). The token works once, for %s.\n", k.name, n.Name, done, n.ID, span(time.Until(n.Expires).Round(time.Minute)))
	}
	forGood, toTry := "On its host, for good:", "Or to try it, in the foreground:"
	if k == clients {
		forGood, toTry = "On its host, with names and routes to the resources (root):", "Or without root, with --socks, --http, --forward or --stdio:"
	}
	fmt.Fprintf(w, "\n%s\n\n%s\n", forGood, indent(n.Command))
	if n.Foreground != "" {
		fmt.Fprintf(w, "\n%s\n\n%s\n", toTry, indent(n.Foreground))
	}
}

// indent leaves commands of several lines where they are: the end mark of a here-document has to stand at the margin.
func indent(s string) string {
	if strings.Contains(s, "\n") {
		return s
	}
	return "  " + s
}

func (a *app) nodeList(k nodeKind) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the " + k.plural, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list "+k.plural, func(ctx context.Context, c *Client) error {
				nodes, err := k.of(c).list(ctx)
				if err != nil {
					return err
				}
				none := fmt.Sprintf("organization %s has no %s; make one: sallyway %s create NAME", c.org, k.plural, k.name)
				return list(a, cmd, nodes, none, nodeHead(k), nodeRow(k))
			})
		},
	}
}

func nodeHead(k nodeKind) string {
	switch k {
	case relays:
		return "NAME STATE HOST RTT REGION VERSION SEEN PROBLEMS"
	case gateways:
		return "NAME STATE RELAYS VIRTUAL VERSION SEEN PROBLEMS"
	}
	return "NAME STATE VIRTUAL VERSION SEEN PROBLEMS"
}

func nodeRow(k nodeKind) func(control.NodeRecord) []any {
	return func(n control.NodeRecord) []any {
		row, problems := []any{n.Name, n.State}, n.Problems
		switch k {
		case relays:
			row = append(row, hostPort(n.Host, n.Port)+announced(n), roundTrip(n.RTT), n.Region)
		case gateways:
			row = append(row, join(n.Relays), join(n.Virtual))
			if n.State == control.StateDegraded && len(problems) == 0 && len(n.Relays) == 0 {
				problems = n.RelayReasons
			}
		default:
			row = append(row, join(n.Virtual))
		}
		return append(row, shownVersion(n), ago(n.LastSeen), strings.Join(problems, "; "))
	}
}

// announced says that a relay's address will change.
func announced(n control.NodeRecord) string {
	if n.NextHost == "" {
		return ""
	}
	return fmt.Sprintf(" (%s from %s)", n.NextHost, moment(n.NextFrom))
}

func hostPort(host string, port uint16) string {
	switch {
	case host == "" || port == 0:
		return host
	case strings.Contains(host, ":"):
		return fmt.Sprintf("[%s]:%d", host, port)
	}
	return fmt.Sprintf("%s:%d", host, port)
}

func (a *app) nodeShow(k nodeKind) *cobra.Command {
	return a.completing(k.plural, &cobra.Command{
		Use: "show NAME", Short: "Show a " + k.name, Args: one("the " + k.name + "'s name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show "+k.name+" "+args[0], func(ctx context.Context, c *Client) error {
				n, err := k.of(c).show(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, n, func(w io.Writer) { showNode(w, n) })
			})
		},
	})
}

func showNode(w io.Writer, n control.NodeRecord) {
	key := ""
	if n.Key != nil {
		key = n.Key.String()
	}
	var load []string
	for _, name := range sortedKeys(n.Load) {
		load = append(load, fmt.Sprintf("%s %g", name, n.Load[name]))
	}
	var accounts, principals string
	if n.AWS != nil {
		accounts, principals = join(n.AWS.Accounts), join(n.AWS.Principals)
	}
	fields(w, "name", n.Name, "id", n.ID, "kind", n.Kind, "person", n.Person, "state", n.State, "authentication", n.Authentication, "aws accounts", accounts, "aws principals", principals, "host", hostPort(n.Host, n.Port)+announced(n), "last rung", lastRung(n), "peers", join(n.Peers),
		"region", n.Region, "failure domain", n.FailureDomain, "rtt", roundTrip(n.RTT), "from outside", outside(n.Outside),
		"relays", join(n.Relays), "why", strings.Join(n.RelayReasons, "\n"), "pinned relays", join(n.PinRelays), "excluded relays", join(n.ExcludeRelays), "preferred relays", join(n.PreferRelays), "virtual", join(n.Virtual), "version", shownVersion(n), "load", strings.Join(load, ", "),
		"problems", strings.Join(n.Problems, "; "), "key", key, "certificate until", moment(n.NotAfter),
		"created", moment(&n.Created), "enrolled", moment(n.Enrolled), "last seen", moment(n.LastSeen))
}

// lastRung words the ports of a relay's last rung.
func lastRung(n control.NodeRecord) string {
	var out []string
	if n.SSHPort != 0 {
		out = append(out, fmt.Sprintf("ssh %d", n.SSHPort))
	}
	if n.TLSPort != 0 {
		out = append(out, fmt.Sprintf("tls %d", n.TLSPort))
	}
	return strings.Join(out, ", ")
}

func (a *app) nodeUpdate(k nodeKind) *cobra.Command {
	var relay relayFlags
	var aws awsFlags
	var places placesFlags
	var name, from string
	var sshPort, tlsPort uint16
	cmd := &cobra.Command{
		Use: "update NAME [--name NEW]", Short: "Change a " + k.name, Args: one("the " + k.name + "'s name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var u control.UpdateNode
			flags := cmd.Flags()
			if flags.Changed("name") {
				u.Name = &name
			}
			if flags.Changed("host") {
				u.Host = &relay.host
			}
			if flags.Changed("from") {
				at, err := parseMoment(from)
				if err != nil {
					return err
				}
				if u.Host == nil {
					return daemon.Usagef("--from says when --host changes: add --host HOST")
				}
				u.From = &at
			}
			if flags.Changed("port") {
				u.Port = &relay.port
			}
			if flags.Changed("ssh-port") {
				u.SSHPort = &sshPort
			}
			if flags.Changed("tls-port") {
				u.TLSPort = &tlsPort
			}
			if flags.Changed("peer") {
				peers, err := parseAll(relay.peers, "--peer", netip.ParseAddrPort)
				if err != nil {
					return err
				}
				if peers == nil {
					peers = []netip.AddrPort{} // null would mean no change
				}
				u.Peers = &peers
			}
			places.update(cmd, &u)
			if err := aws.update(cmd, &u); err != nil {
				return err
			}
			if u == (control.UpdateNode{}) {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update "+k.name+" "+args[0], func(ctx context.Context, c *Client) error {
				n, err := k.of(c).update(ctx, args[0], u)
				if err != nil {
					return err
				}
				return a.show(cmd, n, func(w io.Writer) { fmt.Fprintf(w, "%s %s updated\n", k.name, n.Name) })
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "a new name")
	places.register(cmd, k)
	if k != clients {
		aws.register(cmd)
	}
	if k == relays {
		cmd.Use = "update NAME [--name NEW] [--host HOST [--from DATE]] [--port N] [--ssh-port N] [--tls-port N] [--peer ADDR:PORT]"
		cmd.Flags().Uint16Var(&sshPort, "ssh-port", reverse.SSHPort, "SSH port of the last rung that gateways are told to dial; 0 is none")
		cmd.Flags().Uint16Var(&tlsPort, "tls-port", reverse.TLSPort, "TLS port of the last rung that clients are told to dial; 0 is none")
		cmd.Long = "Change a relay. With --from the new host is announced: until then nodes use the old one, and `sallyway firewall` lists both."
		cmd.Flags().StringVar(&from, "from", "", "when the new host takes over, such as 2027-01-31 or 2027-01-31T22:00:00Z (default: at once)")
		relay.register(cmd)
	}
	return a.completing(k.plural, cmd)
}

func nothingToChange(cmd *cobra.Command) error {
	return daemon.Usagef("nothing to change is named\nsee `%s --help`", cmd.CommandPath())
}

func (a *app) nodeDelete(k nodeKind) *cobra.Command {
	return a.completing(k.plural, &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a " + k.name + " and deny its key", Args: one("the " + k.name + "'s name"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.deleteOne(cmd, k.name, k.plural, args[0]) },
	})
}

// deleteOne deletes an object of the organization.
func (a *app) deleteOne(cmd *cobra.Command, name, plural, object string) error {
	return a.do(cmd, "delete "+name+" "+object, func(ctx context.Context, c *Client) error {
		if err := removeObject(ctx, c, plural, object); err != nil {
			return err
		}
		return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "%s %s deleted\n", name, object) })
	})
}

func (a *app) nodeToken(k nodeKind) *cobra.Command {
	var appliance applianceFlags
	cmd := &cobra.Command{
		Use: "token NAME", Short: "Make a fresh enrolment token and print the command for the host", Args: one("the " + k.name + "'s name"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			disk, err := appliance.open()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, disk.close()) }()
			return a.do(cmd, "make a token for "+k.name+" "+args[0], func(ctx context.Context, c *Client) error {
				n, err := k.of(c).token(ctx, args[0])
				if err != nil {
					return err
				}
				if err := holdToRoot(c, &n); err != nil {
					return err
				}
				if err := disk.write(k, n); err != nil {
					return err
				}
				return a.show(cmd, n, func(w io.Writer) { disk.tell(w, k, n, "has a fresh token; older ones are void") })
			})
		},
	}
	if k.appliance() {
		appliance.register(cmd)
	}
	return a.completing(k.plural, cmd)
}

func (a *app) nodeAction(k nodeKind, verb, short, done string) *cobra.Command {
	return a.completing(k.plural, &cobra.Command{
		Use: verb + " NAME", Short: strings.ReplaceAll(short, "NODE", k.name), Args: one("the " + k.name + "'s name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, verb+" "+k.name+" "+args[0], func(ctx context.Context, c *Client) error {
				calls := k.of(c)
				var before control.NodeRecord
				if k == relays && verb == "enable" {
					before, _ = calls.show(ctx, args[0]) // for what is said afterwards alone: whoever may not read may enable
				}
				n, err := calls.verbs[verb](ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, n, func(w io.Writer) {
					fmt.Fprintf(w, "%s %s %s\n", k.name, args[0], done)
					if verb == "enable" {
						fmt.Fprint(w, afterDrain(before.State, n.State))
					}
				})
			})
		},
	})
}

// afterDrain says what enabling a relay does not do: a relayd that was told to drain ends, and nothing but its host starts it again.
func afterDrain(before, now control.NodeState) string {
	switch {
	case before == control.StateDraining || now == control.StateDraining:
		return "it still drains, and its relayd ends by that: when it has, start it on its host: sudo systemctl start sallyway-relay\n"
	case before == control.StateUnreachable && now == control.StateUnreachable:
		return "it is not connected: one that has drained has ended, start it on its host: sudo systemctl start sallyway-relay\n"
	}
	return ""
}

func (a *app) relayCredential() *cobra.Command {
	var client string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use: "credential NAME --client C [--ttl 1h]", Short: "Make a credential with which standard TURN software may use a relay", Args: one("the relay's name"),
		Example: "  sallyway relay credential fra-1 --client laptop --ttl 2h",
		RunE: func(cmd *cobra.Command, args []string) error {
			if client == "" {
				return daemon.Usagef("for which client? add --client C: the credential acts for it and ends with it")
			}
			if ttl < time.Second || ttl > 24*time.Hour {
				return daemon.Usagef("--ttl %v is not between 1s and 24h", ttl)
			}
			return a.do(cmd, "make a credential for relay "+args[0], func(ctx context.Context, c *Client) error {
				cred, err := c.CreateTURNCredential(ctx, c.org, args[0],
					control.CreateTURNCredential{Client: client, TTL: int(ttl.Seconds())})
				if err != nil {
					return err
				}
				return a.show(cmd, cred, func(w io.Writer) {
					fields(w, "username", cred.Username, "password", cred.Password, "realm", cred.Realm, "uris", strings.Join(cred.URIs, " "), "expires", moment(&cred.Expires))
				})
			})
		},
	}
	cmd.Flags().StringVar(&client, "client", "", "the client for which it acts")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it works, at most 24h")
	return a.completing(relays.plural, cmd)
}

// shownVersion is a node's version, marked when it is older than the platform's.
func shownVersion(n control.NodeRecord) string {
	switch {
	case !n.Outdated:
		return n.Version
	case n.Version == "":
		return "(outdated)"
	}
	return n.Version + " (outdated)"
}
