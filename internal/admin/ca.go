package admin

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/platform/pki"
)

// signedLife is how long what the owner of an offline root signs is valid unless told otherwise: whoever takes the platform over has no use of
// its CAs after that.
const signedLife = 365 * 24 * time.Hour

func (a *app) ca() *cobra.Command {
	cmd := group("ca", "The organization's certificate authorities, and how new ones follow them", `  sallyway ca list
  sallyway ca rotate --kind gateway --plan     # what would happen, when, and which nodes have not heard yet
  sallyway ca rotate --kind root               # a new root, and a new CA of every kind below it
  sallyway ca sign --root-key acme-root.key    # with the key of an offline root: what the platform asks for`,
		a.caList(), a.caRotate(), a.caSign())
	cmd.PersistentFlags().BoolVar(&a.shared, "shared", false, "those of relays of the platform, which organizations share")
	return cmd
}

func (a *app) caList() *cobra.Command {
	var old bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the CAs, newest of a kind first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list CAs", func(ctx context.Context, c *Client) error {
				cas, err := items(authorities(c).list(ctx))
				if err != nil {
					return err
				}
				shown := []control.AuthorityRecord{}
				for _, r := range cas {
					if old || r.State != control.AuthorityGone {
						shown = append(shown, r)
					}
				}
				return list(a, cmd, shown, "no CAs", "KIND GENERATION STATE UNTIL ENDS KEY", func(r control.AuthorityRecord) []any {
					state := string(r.State)
					if r.Offline {
						state += ", key offline"
					}
					return []any{r.Kind, r.Generation, state, moment(&r.Until), moment(&r.NotAfter), clipKey(r.Key)}
				})
			})
		},
	}
	cmd.Flags().BoolVar(&old, "gone", false, "those that are gone, too")
	return cmd
}

func clipKey(s string) string { return s[:min(16, len(s))] }

func (a *app) caRotate() *cobra.Command {
	var req control.RotateAuthority
	var finish, abort bool
	var keyFile, newKeyFile string
	var life time.Duration
	cmd := &cobra.Command{
		Use: "rotate --kind gateway|client|relay|site|policy|platform|ssh|root [--plan]", Short: "Have a CA followed by a new one", Args: cobra.NoArgs,
		Long: `Have a CA followed by a new one. The platform makes it and tells every node to accept both; when all have heard (or hold no certificate any
more that they could show), it issues; and when the last certificate by the former one has ended, that one is forgotten and its key erased. No session
ends for it. --plan says what would happen and when, and which nodes have not heard yet, also while a rotation runs.

--finish takes the next step at once: nodes that have not heard refuse others until they have. After the theft of a CA's key: rotate, finish,
finish; nodes then renew what the CA that is gone issued within a minute.
--abort takes back a next CA that issues nothing yet.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case finish && abort:
				return daemon.Usagef("--finish and --abort do not go together")
			case finish:
				req.Action = control.RotationFinish
			case abort:
				req.Action = control.RotationAbort
			}
			if (keyFile == "") != (newKeyFile == "") || (keyFile != "" && req.Kind != control.AuthorityRoot) {
				return daemon.Usagef("--root-key FILE (that of the present root) and --new-root-key FILE (that is written) go together, with --kind root")
			}
			return a.do(cmd, "rotate the "+req.Kind+" CA", func(ctx context.Context, c *Client) (err error) {
				var next *rootKey
				if keyFile != "" && !req.Plan {
					if next, err = nextRoot(ctx, c, keyFile, newKeyFile); err != nil {
						return err
					}
					req.Root = next.certificate()
				}
				plan, err := authorities(c).rotate(ctx, req)
				if err != nil {
					if next != nil {
						err = unusedKey(newKeyFile, err)
					}
					return err
				}
				if next != nil {
					if _, err := next.sign(ctx, c, life); err != nil {
						return fmt.Errorf("the next root is in place, and what it is to sign is not: run `sallyway --org %s ca sign --root-key %s`: %w", c.org, newKeyFile, err)
					}
					if plan, err = authorities(c).rotate(ctx, control.RotateAuthority{Kind: req.Kind, Plan: true}); err != nil {
						return err
					}
				}
				return a.show(cmd, plan, func(w io.Writer) { showPlan(w, plan) })
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Kind, "kind", "", "which CA: root, ssh, or the kind of leaf that it issues")
	f.BoolVar(&req.Plan, "plan", false, "only say what would happen")
	f.BoolVar(&finish, "finish", false, "take the next step now, without waiting")
	f.BoolVar(&abort, "abort", false, "take back a next CA that issues nothing yet")
	f.StringVar(&keyFile, "root-key", "", "file with the key of an offline root")
	f.StringVar(&newKeyFile, "new-root-key", "", "file that the key of the next offline root is written to")
	f.DurationVar(&life, "life", signedLife, "how long what an offline root signs is valid")
	_ = cmd.MarkFlagRequired("kind") // the flag is there
	return cmd
}

func showPlan(w io.Writer, p control.RotationPlan) {
	for i, s := range p.Steps {
		mark := " "
		if s.Done {
			mark = "✓"
		}
		when := "when that has happened"
		switch {
		case s.Done && s.Latest.IsZero():
			when = ""
		case s.Done:
			when = "since " + moment(&s.Latest)
		case !s.Latest.IsZero():
			when = "by " + moment(&s.Latest)
		}
		fmt.Fprintf(w, "%s %d. %s\n", mark, i+1, s.What)
		if when != "" {
			fmt.Fprintf(w, "     %s\n", when)
		}
	}
	if len(p.Unheard) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%d nodes have not heard of it. A step waits for each until its certificate has ended:\n", len(p.Unheard))
	table(w, "NODE KIND LAST-SEEN WAITED-FOR-UNTIL", p.Unheard, func(u control.Unheard) []any {
		return []any{u.Name, u.Node.Kind, ago(&u.LastSeen), moment(&u.Until)}
	})
}

func (a *app) caSign() *cobra.Command {
	var keyFile string
	var life time.Duration
	cmd := &cobra.Command{
		Use: "sign --root-key FILE", Short: "Sign the CAs that the platform asks for, with the key of an offline root", Args: cobra.NoArgs,
		Long: `Sign the CAs that the platform asks for, with the key of an offline root. The key is read here and sent nowhere. What is signed is a CA for one
kind of leaf, below the organization's names alone, for as long as --life says.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if keyFile == "" {
				return daemon.Usagef("where is the key of the root? add --root-key FILE")
			}
			root, err := loadRootKey(keyFile)
			if err != nil {
				return err
			}
			return a.do(cmd, "sign CAs", func(ctx context.Context, c *Client) error {
				signed, err := root.sign(ctx, c, life)
				if err != nil {
					return err
				}
				return list(a, cmd, signed, "nothing is asked for", "KIND GENERATION STATE ENDS KEY", func(r control.AuthorityRecord) []any {
					return []any{r.Kind, r.Generation, r.State, moment(&r.NotAfter), clipKey(r.Key)}
				})
			})
		},
	}
	cmd.Flags().StringVar(&keyFile, "root-key", "", "file with the root's key and certificate, as `organization create --offline-root` wrote it")
	cmd.Flags().DurationVar(&life, "life", signedLife, "how long what is signed is valid")
	return cmd
}

// offlineOrganization makes an organization whose root's key stays in a file here.
func (a *app) offlineOrganization(ctx context.Context, cmd *cobra.Command, c *Client, req control.CreateOrganization, file string, life time.Duration) error {
	root, err := pki.NewRoot(req.Name, time.Now())
	if err != nil {
		return err
	}
	key := &rootKey{root}
	if err := key.write(file); err != nil {
		return err
	}
	req.Root = key.certificate()
	o, err := c.CreateOrganization(ctx, req)
	if err != nil {
		return unusedKey(file, err)
	}
	in := c.in(o.Name)
	if err := rememberRoot(in, identity.CertificateKeyHash(root.Certificate)); err != nil {
		return err
	}
	if _, err := key.sign(ctx, in, life); err != nil {
		return fmt.Errorf("the organization is there, and its CAs are not signed: run `sallyway --org %s ca sign --root-key %s`: %w", o.Name, file, err)
	}
	return a.show(cmd, o, func(w io.Writer) {
		fmt.Fprintf(w, `organization %s created, virtual addresses %s
The key of its root is in %s and nowhere else: take it off this host, and keep a copy. Without it no CA of the organization can be followed by another.
root: %s
Tokens that are made from here carry that hash, and nodes hold the platform to it. Those made elsewhere do not: give nodes --root-pin then.
`, o.Name, join(o.Range), file, identity.CertificateKeyHash(root.Certificate))
	})
}
