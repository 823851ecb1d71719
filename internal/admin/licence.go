package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/entitlement"
)

// maxLicence bounds what is read as a licence, in bytes.
const maxLicence = entitlement.MaxDocument

func (a *app) licence() *cobra.Command {
	show := &cobra.Command{
		Use: "show", Short: "Show what the organization's licence allows, and how much of it there is", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "show licence", func(ctx context.Context, c *Client) error {
				l, err := c.ShowLicence(ctx, c.org)
				if err != nil {
					return err
				}
				return a.show(cmd, l, func(w io.Writer) { renderLicence(w, &l) })
			})
		},
	}
	install := &cobra.Command{
		Use: "install FILE", Short: "Install a licence; - reads standard input", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := readLicence(args[0], cmd.InOrStdin())
			if err != nil {
				return daemon.Usagef("%w", err)
			}
			return a.do(cmd, "install licence", func(ctx context.Context, c *Client) error {
				l, err := c.InstallLicence(ctx, c.org, control.InstallLicence{Licence: text, Source: "sallyway licence install"})
				if err != nil {
					return err
				}
				return a.show(cmd, l, func(w io.Writer) { renderLicence(w, &l) })
			})
		},
	}
	remove := &cobra.Command{
		Use: "remove", Short: "Remove the organization's licence: nothing is limited then", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "remove licence", func(ctx context.Context, c *Client) error {
				if err := c.RemoveLicence(ctx, c.org); err != nil {
					return err
				}
				_, err := fmt.Fprintln(cmd.ErrOrStderr(), "the licence is removed: nothing is limited")
				return err
			})
		},
	}
	return group("licence", "What the organization's licence allows", `  sallyway licence show
  sallyway licence install acme.licence`, show, install, remove)
}

func readLicence(file string, stdin io.Reader) (string, error) {
	r := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxLicence+1))
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(b))
	if len(text) > maxLicence || strings.ContainsAny(text, " \t\n") || strings.Count(text, ".") != 2 {
		return "", errors.New("this is no licence: one is a single line of three parts with dots between them")
	}
	return text, nil
}

// renderLicence writes a licence for people.
func renderLicence(w io.Writer, l *control.Licence) {
	fmt.Fprintf(w, "state         %s\n", l.State)
	if l.Problem != "" {
		fmt.Fprintf(w, "problem       %s\n", l.Problem)
	}
	if e := l.Entitlement; e != nil {
		fmt.Fprintf(w, "licence       %s, serial %d, by %s for %s\n", e.ID, e.Serial, e.Issuer, e.Customer)
		fmt.Fprintf(w, "valid         %s to %s\n", e.NotBefore.Format(time.DateOnly), e.Expires.Format(time.DateOnly))
		if len(e.Features) > 0 {
			fmt.Fprintf(w, "features      %s\n", strings.Join(e.Features, ", "))
		}
		if b := e.Limits.Bandwidth; b != nil {
			fmt.Fprintf(w, "bandwidth     %d bytes/s through each relay\n", *b)
		}
	}
	if l.Source != "" {
		fmt.Fprintf(w, "came from     %s, %s\n", l.Source, l.Installed.Format(time.DateOnly))
	}
	for _, u := range l.Use {
		limit := "no limit"
		if u.Limit != nil {
			limit = fmt.Sprintf("of %d", *u.Limit)
		}
		fmt.Fprintf(w, "%-13s %d %s\n", u.What, u.Used, limit)
	}
	fmt.Fprintf(w, "installation  %s\n", l.Installation)
}
