package license

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/version"
)

// remote is what the verbs share that speak to a service, on its host or elsewhere.
type remote struct {
	credential string
	json       bool
	customer   string
}

func verbs() []*cobra.Command {
	return []*cobra.Command{customerVerbs(), keyVerbs(), entitlementVerbs()}
}

// verb makes a command that speaks to the service. It is bound to the environment when it has all its flags.
func (o *remote) verb(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: args}
	c.Flags().StringVar(&o.credential, "credential", filepath.Join(daemon.DefaultStateDir(stateName), adminFile), "file with the administrator's credential")
	c.Flags().BoolVar(&o.json, "json", false, "print JSON")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		l, err := o.connect()
		if err != nil {
			return err
		}
		defer l.link.Close()
		return explain(use, run(cmd.Context(), cmd, l, args))
	}
	return c
}

// remoteService speaks to a service.
type remoteService struct {
	link  *link.Link
	token string
}

func (o *remote) connect() (*remoteService, error) {
	b, err := os.ReadFile(o.credential)
	if err != nil {
		return nil, daemon.Usagef("credential: %w\nname the file with --credential: admin.token in the service's data folder, or what `sallyway-license admin token` prints", err)
	}
	var c control.AdminCredential
	if err := json.Unmarshal(b, &c); err != nil || c.URL == "" || c.Token == "" {
		return nil, daemon.Usagef("%s is no credential of a licence service", o.credential)
	}
	l, err := link.New(link.Config{URL: c.URL, Pin: c.Pin, UserAgent: "sallyway-license/" + version.Get().Version})
	if err != nil {
		return nil, daemon.Usagef("%w", err)
	}
	return &remoteService{l, c.Token}, nil
}

func (c *remoteService) do(ctx context.Context, method, path string, in, out any) error {
	return c.link.Do(ctx, link.Request{Method: method, Path: path, Bearer: c.token, JSON: in}, out)
}

// explain words an error of the service as what and what to do.
func explain(doing string, err error) error {
	doing, _, _ = strings.Cut(doing, " ")
	var worded *daemon.Error
	var p *link.Problem
	var e *link.Error
	switch {
	case err == nil, errors.As(err, &worded), errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &p):
		if r := link.Remedy(p); r != "" {
			return daemon.Failf("%s: %w\n%s", doing, err, r)
		}
	case errors.As(err, &e):
		return daemon.Failf("%s: %s\n%s", doing, e.Reason, e.Remedy)
	}
	return daemon.Failf("%s: %w", doing, err)
}

func customersPath(parts ...string) string {
	p := "/api/v1/customers"
	for _, s := range parts {
		p += "/" + url.PathEscape(s)
	}
	return p
}

// show prints doc as JSON, or as a table of rows.
func (o *remote) show(cmd *cobra.Command, doc any, head string, rows ...[]any) error {
	if o.json {
		return printJSON(cmd.OutOrStdout(), doc)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(head, " ", "\t"))
	for _, r := range rows {
		for i, v := range r {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, v)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func day(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "never"
	}
	return t.Format(time.DateOnly)
}

func group(use, short string, cs ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: use, Short: short}
	for _, c := range cs {
		daemon.Bind(c)
		g.AddCommand(c)
	}
	return g
}

func customerVerbs() *cobra.Command {
	o := new(remote)
	var contact string
	create := o.verb("create NAME", "Make a customer", cobra.ExactArgs(1), func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error {
		var out Customer
		if err := l.do(ctx, http.MethodPost, customersPath(), Customer{Name: args[0], Contact: contact}, &out); err != nil {
			return err
		}
		return o.show(cmd, out, "CUSTOMER CONTACT", []any{out.Name, out.Contact})
	})
	create.Flags().StringVar(&contact, "contact", "", "whom the customer asks for more; stands in every licence")
	return group("customer", "Customers", create, o.verb("list", "List customers", cobra.NoArgs, func(ctx context.Context, cmd *cobra.Command, l *remoteService, _ []string) error {
		var out list[Customer]
		if err := l.do(ctx, http.MethodGet, customersPath(), nil, &out); err != nil {
			return err
		}
		var rows [][]any
		for _, c := range out.Items {
			rows = append(rows, []any{c.Name, day(&c.Created), c.Contact})
		}
		return o.show(cmd, out, "CUSTOMER CREATED CONTACT", rows...)
	}))
}

func (o *remote) ofCustomer(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&o.customer, "customer", "", "customer")
	if err := c.MarkFlagRequired("customer"); err != nil {
		panic(err) // it was just made
	}
	return c
}

func keyVerbs() *cobra.Command {
	o := new(remote)
	var name string
	create := o.ofCustomer(o.verb("create", "Make a licence key, by which a customer's platforms fetch; it is printed once", cobra.NoArgs,
		func(ctx context.Context, cmd *cobra.Command, l *remoteService, _ []string) error {
			var out LicenceKey
			if err := l.do(ctx, http.MethodPost, customersPath(o.customer, "keys"), map[string]string{"name": name}, &out); err != nil {
				return err
			}
			if o.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "write it to a file (chmod 600) on the platform's host, and name that with --licence-key-file:")
			_, err := fmt.Fprintln(cmd.OutOrStdout(), out.Key)
			return err
		}))
	create.Flags().StringVar(&name, "name", "", "where it is used")
	return group("key", "Licence keys", create,
		o.ofCustomer(o.verb("list", "List licence keys", cobra.NoArgs, func(ctx context.Context, cmd *cobra.Command, l *remoteService, _ []string) error {
			var out list[LicenceKey]
			if err := l.do(ctx, http.MethodGet, customersPath(o.customer, "keys"), nil, &out); err != nil {
				return err
			}
			var rows [][]any
			for _, k := range out.Items {
				rows = append(rows, []any{k.ID, day(&k.Created), day(k.Used), day(k.Revoked), k.Name})
			}
			return o.show(cmd, out, "ID CREATED USED REVOKED NAME", rows...)
		})),
		o.ofCustomer(o.verb("revoke ID", "Revoke a licence key", cobra.ExactArgs(1), func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error {
			if err := l.do(ctx, http.MethodDelete, customersPath(o.customer, "keys", args[0]), nil, nil); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.ErrOrStderr(), "revoked; platforms that fetched by it keep what they have")
			return err
		})))
}

// when reads a day (its end, UTC) or a moment.
func when(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t.AddDate(0, 0, 1).Add(-time.Second), nil
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return time.Now().Add(d).UTC(), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, daemon.Usagef("%q is no day (2027-12-31), moment (2027-12-31T12:00:00Z) or time from now (8760h)", s)
	}
	return t, nil
}

func (o *remote) showIssued(cmd *cobra.Command, file string, e *Issued) error {
	if file != "" {
		if err := os.WriteFile(file, []byte(e.Licence+"\n"), 0o644); err != nil {
			return daemon.Failf("%w", err)
		}
	}
	switch {
	case o.json:
		return printJSON(cmd.OutOrStdout(), e)
	case file == "":
		_, err := fmt.Fprintln(cmd.OutOrStdout(), e.Licence)
		return err
	}
	_, err := fmt.Fprintf(cmd.ErrOrStderr(), "licence %s, serial %d, until %s, is in %s; where the platform is: sallyway --org %s licence install %s\n",
		e.ID, e.Serial, e.Expires.Format(time.DateOnly), file, e.Organization, filepath.Base(file))
	return err
}

func issueVerb(o *remote) *cobra.Command {
	var req IssueRequest
	var gateways, relays, clients, bandwidth int64
	var expires, from, file string
	c := o.ofCustomer(o.verb("issue", "Sign what an organization may have, in the place of what it had; prints the licence", cobra.NoArgs, func(ctx context.Context, cmd *cobra.Command, l *remoteService, _ []string) error {
		for flag, to := range map[string]struct {
			value *int64
			limit **int64
		}{"gateways": {&gateways, &req.Limits.Gateways}, "relays": {&relays, &req.Limits.Relays}, "clients": {&clients, &req.Limits.Clients}, "bandwidth": {&bandwidth, &req.Limits.Bandwidth}} {
			if cmd.Flags().Changed(flag) {
				*to.limit = to.value
			}
		}
		for s, to := range map[*string]**time.Time{&expires: &req.Expires, &from: &req.NotBefore} {
			t, err := when(*s)
			if err != nil {
				return err
			}
			if !t.IsZero() {
				*to = &t
			}
		}
		var out Issued
		if err := l.do(ctx, http.MethodPost, customersPath(o.customer, "entitlements"), req, &out); err != nil {
			return err
		}
		return o.showIssued(cmd, file, &out)
	}))
	f := c.Flags()
	f.StringVar(&req.Organization, "organization", "default", "organization of the customer's platform")
	f.StringVar(&req.Platform, "platform", "", "installation that it is bound to, as `sallyway licence show` there says (default: any)")
	f.Int64Var(&gateways, "gateways", 0, "gateways at most (not given: no limit)")
	f.Int64Var(&relays, "relays", 0, "relays at most (not given: no limit)")
	f.Int64Var(&clients, "clients", 0, "clients at most (not given: no limit)")
	f.Int64Var(&bandwidth, "bandwidth", 0, "bytes per second through each relay (not given: no limit)")
	f.StringSliceVar(&req.Features, "feature", nil, "feature that it includes")
	f.StringVar(&from, "not-before", "", "when it begins (default: now)")
	f.StringVar(&expires, "expires", "", "when it ends: 2027-12-31, or a time from now such as 8760h (default: in a year)")
	f.StringVarP(&file, "output", "o", "", "write the licence to this file")
	return c
}

func entitlementVerbs() *cobra.Command {
	o := new(remote)
	var history bool
	listVerb := o.ofCustomer(o.verb("list", "List what a customer has", cobra.NoArgs, func(ctx context.Context, cmd *cobra.Command, l *remoteService, _ []string) error {
		path := customersPath(o.customer, "entitlements")
		if history {
			path += "?history=true"
		}
		var out list[*Issued]
		if err := l.do(ctx, http.MethodGet, path, nil, &out); err != nil {
			return err
		}
		var rows [][]any
		for _, e := range out.Items {
			rows = append(rows, []any{e.ID, e.Serial, e.State, e.Organization, dash(e.Platform), limitText(e.Limits.Gateways), limitText(e.Limits.Relays), limitText(e.Limits.Clients), day(&e.Expires)})
		}
		return o.show(cmd, out, "ID SERIAL STATE ORGANIZATION PLATFORM GATEWAYS RELAYS CLIENTS EXPIRES", rows...)
	}))
	listVerb.Flags().BoolVar(&history, "history", false, "also what was replaced")
	var file, expires, reason string
	show := o.verb("show ID", "Print a licence", cobra.ExactArgs(1), func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error {
		var out Issued
		if err := l.do(ctx, http.MethodGet, "/api/v1/entitlements/"+url.PathEscape(args[0]), nil, &out); err != nil {
			return err
		}
		return o.showIssued(cmd, file, &out)
	})
	renew := o.verb("renew ID", "Issue the same again; prints the licence", cobra.ExactArgs(1), func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error {
		t, err := when(expires)
		if err != nil {
			return err
		}
		var out Issued
		if err := l.do(ctx, http.MethodPost, "/api/v1/entitlements/"+url.PathEscape(args[0])+"/renew", map[string]time.Time{"expires": t}, &out); err != nil {
			return err
		}
		return o.showIssued(cmd, file, &out)
	})
	renew.Flags().StringVar(&expires, "expires", "", "when it ends (default: a year after the old one)")
	revoke := o.verb("revoke ID", "Take a licence back: prints one that ends it, which platforms fetch", cobra.ExactArgs(1), func(ctx context.Context, cmd *cobra.Command, l *remoteService, args []string) error {
		var out Issued
		if err := l.do(ctx, http.MethodPost, "/api/v1/entitlements/"+url.PathEscape(args[0])+"/revoke", map[string]string{"reason": reason}, &out); err != nil {
			return err
		}
		return o.showIssued(cmd, file, &out)
	})
	revoke.Flags().StringVar(&reason, "reason", "", "why; the customer sees it")
	for _, c := range []*cobra.Command{show, renew, revoke} {
		c.Flags().StringVarP(&file, "output", "o", "", "write the licence to this file")
	}
	return group("entitlement", "What customers may have", issueVerb(o), listVerb, show, renew, revoke)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func limitText(n *int64) string {
	if n == nil {
		return "-"
	}
	return fmt.Sprint(*n)
}
