package admin

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// reach is where people, accounts and tokens are looked at: an organization, or with --platform the platform.
type reach struct{ platform bool }

func (r *reach) register(cmd *cobra.Command) *cobra.Command {
	cmd.PersistentFlags().BoolVar(&r.platform, "platform", false, "of the platform instead of one organization: their rights hold in all")
	return cmd
}

// where names it in texts.
func (r *reach) where(c *Client) string {
	if r.platform {
		return "the platform"
	}
	return "organization " + c.org
}

func (a *app) whoami() *cobra.Command {
	return &cobra.Command{
		Use: "whoami", Short: "Show who is logged in, and where with what rights", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "whoami", func(ctx context.Context, c *Client) error {
				me, err := c.Me(ctx)
				if err != nil {
					return err
				}
				return a.show(cmd, me, func(w io.Writer) {
					fields(w, "platform", c.URL(), "as", me.Kind+" "+me.Name)
					table(w, "ORGANIZATION ROLE SCOPES", me.Organizations, func(o control.MyOrganization) []any {
						org := o.Org
						if me.All {
							org = "(all)"
						}
						return []any{org, o.Role, join(o.Scopes)}
					})
				})
			})
		},
	}
}

func (a *app) user() *cobra.Command {
	var at reach
	one := one("the login")
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the people", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list users", func(ctx context.Context, c *Client) error {
				items, err := at.people(c).list(ctx)
				if err != nil {
					return err
				}
				return list(a, cmd, items, "nobody is here; invite somebody: sallyway user create LOGIN --role member", "LOGIN NAME ROLE STATE LOGIN-BY SEEN", userRow)
			})
		},
	}
	show := &cobra.Command{
		Use: "show LOGIN", Short: "Show a person", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show user "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.people(c).show(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) {
					var roles []string
					for _, r := range p.Roles {
						roles = append(roles, r.Role+" of "+r.Org)
					}
					fields(w, "login", p.Login, "name", p.Name, "e-mail", p.Email, "id", p.ID, "roles", strings.Join(roles, ", "), "state", userState(p), "logs in by", loginBy(p),
						"clients", join(p.Clients), "created", moment(&p.Created), "last login", moment(p.LastLogin))
				})
			})
		},
	}
	del := &cobra.Command{
		Use: "delete LOGIN", Aliases: []string{"rm"}, Short: "Take a person out of the organization; who is at home there is deleted. Their clients are revoked", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "delete user "+args[0], func(ctx context.Context, c *Client) error {
				if err := at.people(c).remove(ctx, args[0]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "%s is no more in %s\n", args[0], at.where(c)) })
			})
		},
	}
	invite := &cobra.Command{
		Use: "invite LOGIN", Short: "Make a link with which a person chooses a new password", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "invite user "+args[0], func(ctx context.Context, c *Client) error {
				i, err := at.people(c).invite(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, i, func(w io.Writer) { showInvitation(w, args[0], &i) })
			})
		},
	}
	forget := &cobra.Command{
		Use: "forget-factor LOGIN", Short: "Take away the second factor of a person who has lost it", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "forget the second factor of user "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.people(c).forget(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { fmt.Fprintf(w, "%s logs in without second factor now\n", p.Login) })
			})
		},
	}
	verb := func(name, short string, disabled bool) *cobra.Command {
		return &cobra.Command{
			Use: name + " LOGIN", Short: short, Args: one,
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.do(cmd, name+" user "+args[0], func(ctx context.Context, c *Client) error {
					p, err := at.people(c).update(ctx, args[0], control.UpdatePerson{Disabled: &disabled})
					if err != nil {
						return err
					}
					return a.show(cmd, p, func(w io.Writer) { fmt.Fprintf(w, "%s is %sd\n", p.Login, name) })
				})
			},
		}
	}
	return at.register(group("user", "People: who logs in, and as what", `  sallyway user create ada@example.com --role admin    # prints a link with which ada chooses a password
  sallyway user update ada@example.com --role auditor
  sallyway user disable ada@example.com                # logged out everywhere, clients revoked
  sallyway user create root@example.com --role owner --platform`,
		a.userCreate(&at), ls, show, a.userUpdate(&at), del, invite, forget,
		verb("disable", "Log a person out everywhere and revoke their clients", true), verb("enable", "Let a disabled person log in again", false)))
}

func userState(p control.PersonRecord) string {
	if p.Disabled {
		return "disabled"
	}
	return "active"
}

func loginBy(p control.PersonRecord) string {
	var how []string
	if p.Password {
		how = append(how, "password")
		if p.TOTP {
			how[0] += " and code"
		}
	}
	return strings.Join(append(how, p.Providers...), ", ")
}

func userRow(p control.PersonRecord) []any {
	return []any{p.Login, p.Name, p.Role, userState(p), loginBy(p), ago(p.LastLogin)}
}

func showInvitation(w io.Writer, login string, i *control.Invitation) {
	fmt.Fprintf(w, "Give %s this link; it works once, until %s:\n\n  %s\n", login, moment(&i.Expires), i.URL)
}

func (a *app) userCreate(at *reach) *cobra.Command {
	var req control.CreatePerson
	cmd := &cobra.Command{
		Use: "create LOGIN --role owner|admin|auditor|member", Short: "Let a person in, and print a link with which they choose a password", Args: one("the login"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Login = args[0]
			return a.do(cmd, "create user "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.people(c).create(ctx, req)
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) {
					fmt.Fprintf(w, "%s is %s of %s\n", p.Login, p.Role, at.where(c))
					if p.Invitation != nil {
						showInvitation(w, p.Login, p.Invitation)
					}
				})
			})
		},
	}
	cmd.Flags().StringVar(&req.Role, "role", "member", "owner, admin, auditor or member")
	cmd.Flags().StringVar(&req.Name, "name", "", "full name")
	cmd.Flags().StringVar(&req.Email, "email", "", "e-mail address")
	return cmd
}

func (a *app) userUpdate(at *reach) *cobra.Command {
	var role, name, email string
	cmd := &cobra.Command{
		Use: "update LOGIN [--role R] [--name N] [--email E]", Short: "Change a person, or their role", Args: one("the login"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var req control.UpdatePerson
			for flag, v := range map[string]struct {
				to   **string
				from *string
			}{"role": {&req.Role, &role}, "name": {&req.Name, &name}, "email": {&req.Email, &email}} {
				if cmd.Flags().Changed(flag) {
					*v.to = v.from
				}
			}
			if req == (control.UpdatePerson{}) {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update user "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.people(c).update(ctx, args[0], req)
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { fmt.Fprintf(w, "%s is %s of %s\n", p.Login, p.Role, at.where(c)) })
			})
		},
	}
	cmd.Flags().StringVar(&role, "role", "", "owner, admin, auditor or member")
	cmd.Flags().StringVar(&name, "name", "", "full name")
	cmd.Flags().StringVar(&email, "email", "", "e-mail address")
	return cmd
}

// clientEnrol is a client of the person who is logged in.
func (a *app) clientEnrol() *cobra.Command {
	var bare bool
	cmd := &cobra.Command{
		Use: "enrol NAME", Aliases: []string{"enroll"}, Short: "Make a client of your own, or a fresh token for it", Args: one("a name for this host"),
		Long: `Make a client of your own, or a fresh token for it, and print the command that connects it. It is bound to you: what you may reach, it reaches,
and it is revoked when your account is disabled.`,
		Example: `  sallyway client enrol laptop
  sallyway client enrol laptop --token | sudo sallyway connect --token-file -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "enrol client "+args[0], func(ctx context.Context, c *Client) error {
				mine, err := items(c.ListMyClients(ctx, c.org))
				if err != nil {
					return err
				}
				var n control.CreatedNode
				done := "created"
				if slices.ContainsFunc(mine, func(m control.NodeRecord) bool { return m.Name == args[0] }) {
					done = "has a fresh token"
					n, err = c.ReissueMyClientToken(ctx, c.org, args[0])
				} else {
					n, err = c.CreateMyClient(ctx, c.org, control.CreateNode{Name: args[0]})
				}
				if err != nil {
					return err
				}
				if err := holdToRoot(c, &n); err != nil {
					return err
				}
				if bare {
					_, err := fmt.Fprintln(cmd.OutOrStdout(), n.Token)
					return err
				}
				return a.show(cmd, n, func(w io.Writer) { created(w, clients, n, done) })
			})
		},
	}
	cmd.Flags().BoolVar(&bare, "token", false, "print the token alone, to pipe it into sallyway connect --token-file -")
	return cmd
}

// clientMine lists the clients and what they reach.
func (a *app) clientMine() *cobra.Command {
	return &cobra.Command{
		Use: "mine", Short: "List your own clients, and what they reach", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list own clients", func(ctx context.Context, c *Client) error {
				mine, err := items(c.ListMyClients(ctx, c.org))
				if err != nil {
					return err
				}
				reached, err := items(c.ListMyResources(ctx, c.org))
				if err != nil {
					return err
				}
				return a.show(cmd, struct {
					Clients   []control.NodeRecord `json:"clients"`
					Resources []control.MyResource `json:"resources"`
				}{mine, reached}, func(w io.Writer) {
					table(w, nodeHead(clients), mine, nodeRow(clients))
					fmt.Fprintln(w)
					table(w, "RESOURCE ADDRESS NAME BY", reached, func(r control.MyResource) []any { return []any{r.Name, r.Address, r.DNS, join(r.Clients)} })
				})
			})
		},
	}
}

func (a *app) provider() *cobra.Command {
	var at reach
	one := one("the provider's name")
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the providers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list providers", func(ctx context.Context, c *Client) error {
				items, err := at.providers(c).list(ctx)
				if err != nil {
					return err
				}
				return list(a, cmd, items, "no single sign-on; add it: sallyway provider create NAME --issuer URL --client-id ID --secret-file F", "NAME ISSUER RULES CREATED", func(p control.ProviderRecord) []any {
					return []any{p.Name, p.Issuer, rules(p), ago(&p.Created)}
				})
			})
		},
	}
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a provider", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show provider "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.providers(c).show(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { showProvider(w, p) })
			})
		},
	}
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Remove single sign-on; the people stay", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "delete provider "+args[0], func(ctx context.Context, c *Client) error {
				if err := at.providers(c).remove(ctx, args[0]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "provider %s deleted\n", args[0]) })
			})
		},
	}
	return at.register(group("provider", "Single sign-on by OpenID Connect", `  sallyway provider create staff --issuer https://id.example.com/realms/staff --client-id sallyway --secret-file secret.txt \
      --map netops=admin --map '*=member' --create`, a.providerCreate(&at), ls, show, a.providerUpdate(&at), del))
}

func rules(p control.ProviderRecord) string {
	var words []string
	for _, m := range p.Mapping {
		s := m.Group + "=" + m.Role
		if m.Org != "" {
			s += "@" + m.Org
		}
		words = append(words, s)
	}
	if p.Create {
		words = append(words, "makes accounts")
	}
	if p.LinkByEmail {
		words = append(words, "links by e-mail")
	}
	if p.Disabled {
		words = append(words, "disabled")
	}
	return strings.Join(words, ", ")
}

func showProvider(w io.Writer, p control.ProviderRecord) {
	fields(w, "name", p.Name, "issuer", p.Issuer, "client id", p.ClientID, "redirect URI", p.Redirect, "rules", rules(p), "created", moment(&p.Created))
	fmt.Fprintf(w, "Register the redirect URI at the provider, exactly as it is.\n")
}

// ruleFlags are the flags of a provider's rules.
type ruleFlags struct {
	mapping []string
	rules   control.ProviderRules
}

func (f *ruleFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.mapping, "map", nil, "GROUP=ROLE: users of the provider's GROUP (* is everybody) are ROLE; =ROLE@ORG with --platform; the first that fits counts")
	cmd.Flags().StringVar(&f.rules.Groups, "groups-claim", "", "the claim with the groups (default groups)")
	cmd.Flags().StringSliceVar(&f.rules.Scopes, "scope", nil, "ask for these scopes besides openid (default profile,email)")
	cmd.Flags().BoolVar(&f.rules.Create, "create", false, "who fits --map gets an account at the first login")
	cmd.Flags().BoolVar(&f.rules.LinkByEmail, "link-by-email", false, "take the account whose login is the verified e-mail address, at the first login")
}

func (f *ruleFlags) parse() (control.ProviderRules, error) {
	r := f.rules
	for _, m := range f.mapping {
		i := strings.LastIndex(m, "=")
		if i <= 0 {
			return r, daemon.Usagef("--map %.60q: want GROUP=ROLE, such as netops=admin", m)
		}
		role, org, _ := strings.Cut(m[i+1:], "@")
		r.Mapping = append(r.Mapping, control.GroupToRole{Group: m[:i], Role: role, Org: org})
	}
	return r, nil
}

func (a *app) providerCreate(at *reach) *cobra.Command {
	var req control.CreateProvider
	var file string
	var f ruleFlags
	cmd := &cobra.Command{
		Use: "create NAME --issuer URL --client-id ID [--secret-file F|-] [--map GROUP=ROLE]…", Short: "Add single sign-on", Args: one("the provider's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			var err error
			if req.ProviderRules, err = f.parse(); err != nil {
				return err
			}
			if file != "" {
				if req.Secret, err = readSecret(cmd.InOrStdin(), file); err != nil {
					return err
				}
			}
			return a.do(cmd, "create provider "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.providers(c).create(ctx, req)
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { showProvider(w, p) })
			})
		},
	}
	cmd.Flags().StringVar(&req.Issuer, "issuer", "", "the provider's URL, as its discovery document has it")
	cmd.Flags().StringVar(&req.ClientID, "client-id", "", "what the provider calls this platform")
	cmd.Flags().StringVar(&file, "secret-file", "", "file with the client's secret, - for standard input")
	f.register(cmd)
	return cmd
}

func (a *app) providerUpdate(at *reach) *cobra.Command {
	var id, file, state string
	var f ruleFlags
	cmd := &cobra.Command{
		Use: "update NAME [--client-id ID] [--secret-file F|-] [--state on|off] [--map GROUP=ROLE]…", Short: "Change a provider; with any rule, all rules are replaced", Args: one("the provider's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var req control.UpdateProvider
			if id != "" {
				req.ClientID = &id
			}
			if file != "" {
				secret, err := readSecret(cmd.InOrStdin(), file)
				if err != nil {
					return err
				}
				req.Secret = &secret
			}
			on, err := onOff("--state", state)
			if err != nil {
				return err
			}
			if on != nil {
				off := !*on
				req.Disabled = &off
			}
			for _, flag := range []string{"map", "groups-claim", "scope", "create", "link-by-email"} {
				if cmd.Flags().Changed(flag) && req.Rules == nil {
					r, err := f.parse()
					if err != nil {
						return err
					}
					req.Rules = &r
				}
			}
			if req == (control.UpdateProvider{}) {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update provider "+args[0], func(ctx context.Context, c *Client) error {
				p, err := at.providers(c).update(ctx, args[0], req)
				if err != nil {
					return err
				}
				return a.show(cmd, p, func(w io.Writer) { showProvider(w, p) })
			})
		},
	}
	cmd.Flags().StringVar(&id, "client-id", "", "what the provider calls this platform")
	cmd.Flags().StringVar(&file, "secret-file", "", "file with the client's new secret, - for standard input")
	cmd.Flags().StringVar(&state, "state", "", "on or off")
	f.register(cmd)
	return cmd
}
