package admin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// readSecret reads a file with one secret. Errors never repeat it.
func readSecret(stdin io.Reader, file string) (string, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", daemon.Usagef("read the secret: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxCredential+1))
	b = bytes.TrimSpace(b)
	if err != nil || len(b) == 0 || len(b) > maxCredential {
		return "", daemon.Usagef("read the secret from %s: it holds none", file)
	}
	return string(b), nil
}

// tokenFlags are what a token is made with.
type tokenFlags struct {
	scopes  []string
	expires time.Duration
}

func (f *tokenFlags) register(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringSliceVar(&f.scopes, "scope", nil, "OBJECT:VERB, such as relays:read, gateways:write, audit:read, *:read, * (default: all that its owner may do)")
	cmd.Flags().DurationVar(&f.expires, "expires", 0, "life, such as 720h (0: no end)")
	return cmd
}

func (f *tokenFlags) request(name string) control.CreateAPIToken {
	return control.CreateAPIToken{Name: name, Scopes: f.scopes, Life: int(f.expires / time.Second)}
}

// tokenMade shows a token, once.
func (a *app) tokenMade(cmd *cobra.Command, t control.CreatedAPIToken) error {
	return a.show(cmd, t, func(w io.Writer) {
		fmt.Fprintf(w, "token %s (%s), shown once:\n\n  %s\n\nuse it: sallyway login --url URL --token-file F, or in the header Authorization: Bearer TOKEN\n", t.Name, t.ID, t.Token)
	})
}

func (a *app) tokenList(cmd *cobra.Command, items []control.APIToken) error {
	return list(a, cmd, items, "no tokens", "ID NAME SCOPES STATE EXPIRES USED FROM", func(t control.APIToken) []any {
		state, expires := "active", ""
		switch {
		case t.Revoked != nil:
			state = "revoked"
		case t.Expires != nil && time.Now().After(*t.Expires):
			state = "expired"
		}
		if t.Expires != nil {
			expires = t.Expires.UTC().Format(time.DateOnly)
		}
		return []any{t.ID, t.Name, join(t.Scopes), state, expires, ago(t.LastUsed), t.Source}
	})
}

func (a *app) serviceAccount() *cobra.Command {
	var at reach
	one := one("the service account's name")
	var scopes []string
	create := &cobra.Command{
		Use: "create NAME --scope OBJECT:VERB…", Short: "Make a service account", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(scopes) == 0 {
				return daemon.Usagef("what may it do? name scopes: --scope relays:read,gateways:write (*:read reads everything, * may do everything)")
			}
			return a.do(cmd, "create service-account "+args[0], func(ctx context.Context, c *Client) error {
				s, err := at.accounts(c).create(ctx, control.CreateServiceAccount{Name: args[0], Scopes: scopes})
				if err != nil {
					return err
				}
				return a.show(cmd, s, func(w io.Writer) {
					fmt.Fprintf(w, "service account %s of %s created\na token for it: sallyway service-account token %[1]s --name WHAT-FOR\n", s.Name, at.where(c))
				})
			})
		},
	}
	create.Flags().StringSliceVar(&scopes, "scope", nil, "OBJECT:VERB, such as relays:read, gateways:write, audit:read, *:read, *")
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the service accounts", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list service-accounts", func(ctx context.Context, c *Client) error {
				items, err := at.accounts(c).list(ctx)
				if err != nil {
					return err
				}
				return list(a, cmd, items, "no service accounts; make one: sallyway service-account create NAME --scope *:read", "NAME SCOPES STATE CREATOR CREATED", func(s control.ServiceAccountRecord) []any {
					return []any{s.Name, join(s.Scopes), accountState(s), s.Creator, ago(&s.Created)}
				})
			})
		},
	}
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a service account", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show service-account "+args[0], func(ctx context.Context, c *Client) error {
				s, err := at.accounts(c).show(ctx, args[0])
				if err != nil {
					return err
				}
				return a.show(cmd, s, func(w io.Writer) {
					fields(w, "name", s.Name, "id", s.ID, "scopes", join(s.Scopes), "state", accountState(s), "creator", s.Creator, "created", moment(&s.Created))
				})
			})
		},
	}
	var newScopes []string
	var state string
	update := &cobra.Command{
		Use: "update NAME [--scope OBJECT:VERB…] [--state on|off]", Short: "Change what a service account may do", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			on, err := onOff("--state", state)
			if err != nil {
				return err
			}
			var req control.UpdateServiceAccount
			if on != nil {
				off := !*on
				req.Disabled = &off
			}
			if cmd.Flags().Changed("scope") {
				req.Scopes = &newScopes
			}
			if req == (control.UpdateServiceAccount{}) {
				return nothingToChange(cmd)
			}
			return a.do(cmd, "update service-account "+args[0], func(ctx context.Context, c *Client) error {
				s, err := at.accounts(c).update(ctx, args[0], req)
				if err != nil {
					return err
				}
				return a.show(cmd, s, func(w io.Writer) {
					fmt.Fprintf(w, "service account %s: %s, %s\n", s.Name, join(s.Scopes), accountState(s))
				})
			})
		},
	}
	update.Flags().StringSliceVar(&newScopes, "scope", nil, "all scopes from now on")
	update.Flags().StringVar(&state, "state", "", "on or off")
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a service account and its tokens", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "delete service-account "+args[0], func(ctx context.Context, c *Client) error {
				if err := at.accounts(c).remove(ctx, args[0]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "service account %s deleted\n", args[0]) })
			})
		},
	}
	cmd := at.register(group("service-account", "Programs that use the API, each with scopes of its own", `  sallyway service-account create terraform --scope gateways:write,gateways:read,resources:write,resources:read
  sallyway service-account token terraform --name ci --expires 2160h`,
		append([]*cobra.Command{create, ls, show, update, del}, a.accountTokens(&at)...)...))
	cmd.Aliases = []string{"sa"}
	return cmd
}

func accountState(s control.ServiceAccountRecord) string {
	if s.Disabled {
		return "disabled"
	}
	return "active"
}

// accountTokens are the verbs for a service account's tokens.
func (a *app) accountTokens(at *reach) []*cobra.Command {
	one := one("the service account's name")
	var f tokenFlags
	var name string
	create := f.register(&cobra.Command{
		Use: "token NAME", Short: "Make a token of a service account", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "create token of service-account "+args[0], func(ctx context.Context, c *Client) error {
				t, err := at.accounts(c).createToken(ctx, args[0], f.request(name))
				if err != nil {
					return err
				}
				return a.tokenMade(cmd, t)
			})
		},
	})
	create.Flags().StringVar(&name, "name", "token", "what it is for")
	ls := &cobra.Command{
		Use: "tokens NAME", Short: "List the tokens of a service account", Args: one,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "list tokens of service-account "+args[0], func(ctx context.Context, c *Client) error {
				tokens, err := items(at.accounts(c).tokens(ctx, args[0]))
				if err != nil {
					return err
				}
				return a.tokenList(cmd, tokens)
			})
		},
	}
	revoke := &cobra.Command{
		Use: "revoke NAME ID", Short: "Revoke a token of a service account", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "revoke token "+args[1], func(ctx context.Context, c *Client) error {
				if err := at.accounts(c).revokeToken(ctx, args[0], args[1]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "token %s revoked\n", args[1]) })
			})
		},
	}
	return []*cobra.Command{create, ls, revoke}
}

// token are API tokens: one's own, or (--of) those of an organization or of the platform that stand for nobody.
func (a *app) token() *cobra.Command {
	var of string
	var f tokenFlags
	create := f.register(&cobra.Command{
		Use: "create NAME", Short: "Make an API token", Args: one("what the token is for"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "create token "+args[0], func(ctx context.Context, c *Client) error {
				calls, err := tokensOf(c, of)
				if err != nil {
					return err
				}
				t, err := calls.create(ctx, f.request(args[0]))
				if err != nil {
					return err
				}
				return a.tokenMade(cmd, t)
			})
		},
	})
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the API tokens", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list tokens", func(ctx context.Context, c *Client) error {
				calls, err := tokensOf(c, of)
				if err != nil {
					return err
				}
				tokens, err := items(calls.list(ctx))
				if err != nil {
					return err
				}
				return a.tokenList(cmd, tokens)
			})
		},
	}
	revoke := &cobra.Command{
		Use: "revoke ID", Short: "Revoke an API token", Args: one("the token's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "revoke token "+args[0], func(ctx context.Context, c *Client) error {
				calls, err := tokensOf(c, of)
				if err != nil {
					return err
				}
				if err := calls.revoke(ctx, args[0]); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "token %s revoked\n", args[0]) })
			})
		},
	}
	cmd := group("token", "API tokens: your own, or those of an organization or the platform that stand for nobody", `  sallyway token create laptop-script --scope clients:read --expires 720h
  sallyway token create monitoring --of organization --scope '*:read'`, create, ls, revoke)
	cmd.PersistentFlags().StringVar(&of, "of", "me", "me, organization or platform")
	return cmd
}
