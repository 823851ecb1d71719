// Package admin is what an administrator types: the verbs of `sallyway` that speak to a platform, and the client of the admin API
// under them.
//
//	root := admin.Command()
//	os.Exit(daemon.Main(root))
//
// Every verb takes --org and --json. JSON on standard output is the API's own document, so that a script reads the same from the
// command and from the API. Exit codes: 0 done, 1 failed or "no", 2 wrong usage.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// defaultOrg is the organization that a platform makes at its first start.
const defaultOrg = "default"

// app is what the verbs share: the flags that all have.
type app struct {
	org    string
	shared bool // relays of the platform instead of an organization's
	json   bool
	poll   time.Duration    // of audit tail -f
	browse func(url string) // opens a browser; nil is the desktop's
}

// Command returns the root command with every verb for administrators.
func Command() *cobra.Command { return (&app{poll: auditPoll}).command() }

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "sallyway",
		Short: "Reach private resources, and say who may",
		Long: `Sallyway lets people and programs reach private resources while the private network opens no inbound port.

The usual way, where you are administrator:
  sallyway login --token-file admin.token            # platformd writes it at its first start
  sallyway relay create fra-1 --host relay.example   # prints the command for the relay's host
  sallyway gateway create office                     # same, for a host in the private network
  sallyway client create laptop                      # same, for who shall reach it
  sallyway resource create db --gateway office --address 10.0.3.7 --tcp 5432
  sallyway policy allow --client laptop --resource db
  sallyway status`,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.org, "org", "", `organization (default: the one of the login, else "default"; env SALLYWAY_ORG)`)
	flags.BoolVar(&a.json, "json", false, "print the API's JSON document")
	root.AddCommand(
		a.login(), a.logout(), a.organization(),
		a.node(relays), a.node(gateways), a.node(clients),
		a.resource(), a.policy(), a.group(),
		a.licence(),
		a.whoami(), a.user(), a.serviceAccount(), a.token(), a.provider(),
		a.status(), a.session(), a.flow(), a.audit(), a.webhook(), a.ca(), a.stun(), a.firewall(),
		daemon.VersionCommand(daemon.Spec{Name: "sallyway"}),
	)
	return root
}

// group makes a command that only holds others.
func group(use, short, example string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Example: example}
	c.AddCommand(verbs...)
	return c
}

// connect returns a client for the stored credential.
func (a *app) connect() (*Client, error) {
	cred, err := loadCredential()
	if err != nil {
		return nil, err
	}
	c, err := NewClient(cred.AdminCredential, a.organizationName(cred))
	if err != nil {
		return nil, daemon.Usagef("the stored login is damaged: %w\nlog in anew: sallyway login --url URL --token-file F", err)
	}
	return c, nil
}

func (a *app) organizationName(cred credential) string {
	switch {
	case a.shared:
		return identity.SharedOrg
	case a.org != "":
		return a.org
	case os.Getenv("SALLYWAY_ORG") != "":
		return os.Getenv("SALLYWAY_ORG")
	case cred.Org != "":
		return cred.Org
	}
	return defaultOrg
}

// do runs f with a client and words its error: doing is what was tried, such as "create gateway office".
func (a *app) do(cmd *cobra.Command, doing string, f func(ctx context.Context, c *Client) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	return explain(c, doing, f(cmd.Context(), c))
}

// explain words an error of the API as what, why and what to do. Errors that are worded already pass.
func explain(c *Client, doing string, err error) error {
	var worded *daemon.Error
	var p *link.Problem
	var e *link.Error
	switch {
	case err == nil, errors.As(err, &worded):
		return err
	case errors.As(err, &p):
		why, remedy := p.Error(), link.Remedy(p)
		if remedy == "" {
			remedy = remedyFor(c, doing, p)
		}
		remedy = withRequest(remedy, p)
		if p.Status == http.StatusBadRequest || p.Status == http.StatusUnprocessableEntity {
			return daemon.Usagef("%s: %s%s", doing, why, below(remedy))
		}
		return daemon.Failf("%s: %s%s", doing, why, below(remedy))
	case errors.As(err, &e):
		return daemon.Failf("%s: %s%s", doing, e.Reason, below(e.Remedy))
	case errors.Is(err, context.Canceled):
		return err
	}
	return daemon.Failf("%s: %w", doing, err)
}

// withRequest adds the id by which the platform's log and audit know a request that failed, for whoever reads these.
func withRequest(remedy string, p *link.Problem) string {
	if p.RequestID == "" {
		return remedy
	}
	return strings.TrimPrefix(remedy+"\nrequest "+p.RequestID, "\n")
}

func below(remedy string) string {
	if remedy == "" {
		return ""
	}
	return "\n" + remedy
}

// remedyFor says what to do about a refusal for which the platform names no remedy.
func remedyFor(c *Client, doing string, p *link.Problem) string {
	what := "OBJECT"
	if words := strings.Fields(doing); len(words) > 1 {
		what = words[1]
	}
	switch {
	case p.Code == control.CodeTokenExpired, p.Status == http.StatusUnauthorized:
		return "the stored login is not valid (any more); log in anew: sallyway login --url " + c.URL() + "\nor with a token: platformd admin token prints a fresh one, on the platform's host"
	case p.Status == http.StatusForbidden:
		return "log in with a token whose scope covers this, or ask who has one"
	case p.Status == http.StatusNotFound:
		return fmt.Sprintf("see what there is: sallyway --org %s %s list", c.org, what)
	case p.Status == http.StatusConflict:
		return fmt.Sprintf("see what is there: sallyway --org %s %s list", c.org, what)
	case p.Temporary():
		return "try again; if it stays so, see the log of platformd"
	}
	return ""
}

// show prints doc as JSON, or as text.
func (a *app) show(cmd *cobra.Command, doc any, text func(w io.Writer)) error {
	w := cmd.OutOrStdout()
	if a.json {
		return printJSON(w, doc)
	}
	text(w)
	return nil
}

func printJSON(w io.Writer, doc any) error {
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// list prints items as the API's list, or as a table with a line per item. None gives a hint on standard error.
func list[T any](a *app, cmd *cobra.Command, items []T, none, head string, row func(T) []any) error {
	if len(items) == 0 && !a.json {
		fmt.Fprintln(cmd.ErrOrStderr(), none)
		return nil
	}
	return a.show(cmd, control.List[T]{Items: items}, func(w io.Writer) { table(w, head, items, row) })
}

// table prints columns. head holds their names, separated by spaces.
func table[T any](w io.Writer, head string, items []T, row func(T) []any) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(strings.Fields(head), "\t"))
	for _, it := range items {
		cells := row(it)
		words := make([]string, len(cells))
		for i, c := range cells {
			if words[i] = printable(fmt.Sprint(c)); words[i] == "" {
				words[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(words, "\t"))
	}
	_ = tw.Flush() // text for a person: where it can not be written, nobody can be told
}

// fields prints name and value pairs, one a line; empty values are left out.
func fields(w io.Writer, pairs ...any) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if v := printable(fmt.Sprint(pairs[i+1])); v != "" {
			fmt.Fprintf(tw, "%s:\t%s\n", pairs[i], v)
		}
	}
	_ = tw.Flush() // as above
}

// printable takes control characters out: what others named must not steer the terminal. Lines become one.
func printable(s string) string {
	s = strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return '?'
		}
		return r
	}, s)
}

// ago writes how long ago t was, for tables.
func ago(t *time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	return span(time.Since(*t)) + " ago"
}

// span writes a duration with its largest unit.
func span(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(max(d, 0).Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// moment writes a time in full, for details.
func moment(t *time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

// join writes a list of things that have a text form.
func join[T any](items []T) string {
	s := make([]string, len(items))
	for i, it := range items {
		s[i] = fmt.Sprint(it)
	}
	return strings.Join(s, ", ")
}

// one is cobra's check for one argument with errors that name what is missing.
func one(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return fmt.Errorf("%s is missing: %s", what, cmd.UseLine())
		case len(args) > 1:
			return fmt.Errorf("%q is too much: %s", args[1], cmd.UseLine())
		}
		return nil
	}
}
