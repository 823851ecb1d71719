package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/platformapi"
)

// credential is what a login keeps.
type credential struct {
	control.AdminCredential
	Org string `json:"org,omitempty"` // default organization
}

// maxCredential bounds a credential file in bytes.
const maxCredential = 64 << 10

// credentialPath is where the login is kept: SALLYWAY_CREDENTIALS, or below the XDG configuration folder.
func credentialPath() (string, error) {
	if p := os.Getenv("SALLYWAY_CREDENTIALS"); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", daemon.Usagef("no place for the login: %w\nname one with SALLYWAY_CREDENTIALS", err)
	}
	return filepath.Join(dir, "sallyway", "credentials.json"), nil
}

func loadCredential() (credential, error) {
	var c credential
	path, err := credentialPath()
	if err != nil {
		return c, err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, notLoggedIn()
	}
	if err != nil {
		return c, daemon.Usagef("read the login: %w", err)
	}
	if err := json.Unmarshal(b, &c); err != nil || c.URL == "" || c.Token == "" {
		return c, daemon.Usagef("the login in %s is damaged\nlog in anew: sallyway login --url URL --token-file F", path)
	}
	return c, nil
}

// notLoggedIn tells the exact line where the platform's token is on this host, else its shape.
func notLoggedIn() error {
	local := filepath.Join(daemon.DefaultStateDir("platformd"), "admin.token")
	if _, err := os.Stat(local); err == nil {
		return daemon.Usagef("not logged in\nrun: sallyway login --token-file %s", local)
	}
	return daemon.Usagef("not logged in\nrun: sallyway login --token-file admin.token\nplatformd writes admin.token into its data folder at its first start; it carries URL, CA pin and token (a bare token needs --url, and --ca-pin where the platform made its own certificate)\nthis host's own connection needs no login: sallyway connect status, gatewayd status, relayd status")
}

func (a *app) login() *cobra.Command {
	var url, file, pin string
	var device, browser bool
	cmd := &cobra.Command{
		Use:   "login --url URL [--device|--browser] | --token-file F|- [--ca-pin P]",
		Short: "Log in to a platform, and keep the credential for the other verbs",
		Long: `Log in to a platform, and keep the credential for the other verbs.

With a URL alone a person logs in: by the browser of this host where there is one, else with a code that is typed into a browser anywhere
(--device). The credential speaks for that person for 30 days; sallyway logout ends it.

With --token-file a token is kept. F is the admin.token that platformd writes at its first start (it carries URL, CA pin and token), or holds an API token
alone; then --url says where the platform is, and --ca-pin how to know it where its certificate is its own.
The credential is kept in your configuration folder, readable for you alone; SALLYWAY_CREDENTIALS names another file.`,
		Example: `  sallyway login --url https://platform.example
  sallyway login --token-file /var/lib/sallyway/platformd/admin.token
  ssh platform.example sudo cat /var/lib/sallyway/platformd/admin.token | sallyway login --token-file -
  sallyway login --url https://platform.example --token-file token.txt --org acme`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return a.logInPerson(cmd, control.AdminCredential{URL: url, Pin: pin}, device, browser)
			}
			c, err := readToken(cmd.InOrStdin(), file)
			if err != nil {
				return err
			}
			if url != "" {
				c.URL = url
			}
			if pin != "" {
				c.Pin = pin
			}
			if c.URL == "" {
				return daemon.Usagef("the token does not say where the platform is\nadd --url https://PLATFORM")
			}
			return a.logIn(cmd, c)
		},
	}
	cmd.Flags().StringVar(&url, "url", "", "the platform's URL (default: as the token file says)")
	cmd.Flags().StringVar(&file, "token-file", "", "file with the token, - for standard input")
	cmd.Flags().BoolVar(&device, "device", false, "log in with a code, in a browser of another host")
	cmd.Flags().BoolVar(&browser, "browser", false, "log in with the browser of this host")
	cmd.Flags().StringVar(&pin, "ca-pin", "", "SHA-256 of the key of the platform's CA, in hexadecimal (default: as the token file says)")
	return cmd
}

// logInPerson logs a person in where the URL, or the last login, says.
func (a *app) logInPerson(cmd *cobra.Command, cred control.AdminCredential, device, browser bool) error {
	if device && browser {
		return daemon.Usagef("--device or --browser: not both")
	}
	if cred.URL == "" {
		old, err := loadCredential()
		if err != nil {
			return daemon.Usagef("where is the platform? sallyway login --url https://PLATFORM, or with a token: sallyway login --token-file F (- is standard input)")
		}
		cred.URL = old.URL
		if cred.Pin == "" {
			cred.Pin = old.Pin
		}
	}
	how := ""
	switch {
	case device:
		how = "device"
	case browser:
		how = "browser"
	}
	cred, err := a.signIn(cmd, cred, how)
	if err != nil {
		return err
	}
	return a.logIn(cmd, cred)
}

// readToken reads admin.token or a bare API token. Errors never repeat it.
func readToken(stdin io.Reader, file string) (control.AdminCredential, error) {
	var c control.AdminCredential
	in, name := stdin, "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if errors.Is(err, fs.ErrPermission) {
			return c, daemon.Usagef("read the token: %w\nas root: sudo cat %s | sallyway login --token-file -", err, file)
		}
		if err != nil {
			return c, daemon.Usagef("read the token: %w", err)
		}
		defer f.Close()
		in, name = f, file
	}
	b, err := io.ReadAll(io.LimitReader(in, maxCredential+1))
	if err != nil || len(b) > maxCredential {
		return c, daemon.Usagef("read the token from %s: it is no token file", name)
	}
	b = bytes.TrimSpace(b)
	if bytes.HasPrefix(b, []byte("{")) {
		if err := json.Unmarshal(b, &c); err != nil || c.Token == "" {
			return c, daemon.Usagef("%s is damaged: it is neither an admin.token nor a token\ncopy it whole", name)
		}
		return c, nil
	}
	c.Token = string(b)
	switch {
	case c.Token == "" || strings.ContainsAny(c.Token, " \t\r\n\x00"):
		return c, daemon.Usagef("%s holds no token: want one word, or the platform's admin.token", name)
	case isEnrolment(c.Token):
		return c, daemon.Usagef("%s holds an enrolment token, which is for a node\nto log in, take the platform's admin.token or an API token", name)
	}
	return c, nil
}

func isEnrolment(s string) bool {
	_, err := control.ParseToken(s)
	return err == nil
}

// logIn tries the credential before it keeps it.
func (a *app) logIn(cmd *cobra.Command, cred control.AdminCredential) error {
	c, err := NewClient(cred, defaultOrg)
	if err != nil {
		return daemon.Usagef("log in: %w", err)
	}
	defer c.Close()
	if c.Plain() {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s is plain HTTP: whoever listens on the way can use the token\n", cred.URL)
	}
	orgs, err := platformapi.Collect(c.AllOrganizations(cmd.Context()))
	if err != nil {
		var p *link.Problem
		if errors.As(err, &p) && p.Status == 401 {
			return daemon.Failf("log in: the platform does not take this token: %s\na fresh one: platformd admin token, on the platform's host", p.Error())
		}
		return explain(c, "log in", err)
	}
	kept := credential{AdminCredential: cred, Org: a.org}
	if a.org != "" && !hasOrg(orgs, a.org) {
		return daemon.Usagef("log in: the platform has no organization %q that this token may see\nthere are: %s", a.org, join(names(orgs)))
	}
	if a.org == "" && len(orgs) == 1 {
		kept.Org = orgs[0].Name
	}
	path, err := credentialPath()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return daemon.Failf("keep the login: %w\nname another file with SALLYWAY_CREDENTIALS", err)
	}
	b, err := json.MarshalIndent(kept, "", "  ")
	if err != nil {
		return err
	}
	if err := daemon.WriteFile(path, append(b, '\n'), 0o600); err != nil {
		return daemon.Failf("keep the login: %w\nname another file with SALLYWAY_CREDENTIALS", err)
	}
	org := a.organizationName(kept)
	return a.show(cmd, struct {
		URL string `json:"url"`
		Org string `json:"org"`
	}{cred.URL, org}, func(w io.Writer) {
		fmt.Fprintf(w, "Logged in to %s, organization %s.\n", cred.URL, org)
	})
}

func names(orgs []control.Organization) []string {
	var s []string
	for _, o := range orgs {
		s = append(s, o.Name)
	}
	return s
}

func hasOrg(orgs []control.Organization, name string) bool {
	for _, o := range orgs {
		if o.Name == name {
			return true
		}
	}
	return false
}

func (a *app) logout() *cobra.Command {
	return &cobra.Command{
		Use:   "logout",
		Short: "Forget the credential",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := credentialPath()
			if err != nil {
				return err
			}
			a.endToken(cmd)
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return daemon.Failf("log out: %w", err)
			}
			return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintln(w, "Logged out.") })
		},
	}
}

// personToken is how the token of a person's login begins.
const personToken = "swu1."

// endToken revokes the token of a person's login. The login is forgotten here all the same when the platform can not be reached.
func (a *app) endToken(cmd *cobra.Command) {
	cred, err := loadCredential()
	if err != nil || !strings.HasPrefix(cred.Token, personToken) {
		return
	}
	c, err := NewClient(cred.AdminCredential, defaultOrg)
	if err != nil {
		return
	}
	defer c.Close()
	if err := c.ForgetToken(cmd.Context()); err != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: the token was not revoked at the platform: %v\nrevoke it in the browser, under your account; it expires by itself\n", err)
	}
}

func (a *app) organization() *cobra.Command {
	var ranges []string
	var offline bool
	var rootFile string
	var life time.Duration
	create := &cobra.Command{
		Use: "create NAME", Short: "Make an organization with a PKI of its own", Args: one("the organization's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			prefixes, err := parseAll(ranges, "--range", parsePrefix)
			if err != nil {
				return err
			}
			return a.do(cmd, "create organization "+args[0], func(ctx context.Context, c *Client) error {
				if offline {
					if rootFile == "" {
						rootFile = args[0] + "-root.key"
					}
					return a.offlineOrganization(ctx, cmd, c, control.CreateOrganization{Name: args[0], Range: prefixes}, rootFile, life)
				}
				o, err := c.CreateOrganization(ctx, control.CreateOrganization{Name: args[0], Range: prefixes})
				if err != nil {
					return err
				}
				return a.show(cmd, o, func(w io.Writer) {
					fmt.Fprintf(w, "organization %s created, virtual addresses %s\nuse it with --org %[1]s\n", o.Name, join(o.Range))
				})
			})
		},
	}
	create.Flags().BoolVar(&offline, "offline-root", false, "make the root here and keep its key in a file: the platform gets CAs that it signed, and nodes follow no other root")
	create.Flags().StringVar(&rootFile, "root-key", "", "that file, which must not exist yet (default NAME-root.key)")
	create.Flags().DurationVar(&life, "life", signedLife, "how long the CAs that an offline root signs are valid")
	create.Flags().StringSliceVar(&ranges, "range", nil, "range of virtual addresses, IPv4 and IPv6 (default: 100.112.0.0/12 and a ULA)")
	ls := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the organizations", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "list organizations", func(ctx context.Context, c *Client) error {
				orgs, err := platformapi.Collect(c.AllOrganizations(ctx))
				if err != nil {
					return err
				}
				return list(a, cmd, orgs, "no organizations", "NAME RANGE CREATED", func(o control.Organization) []any {
					return []any{o.Name, join(o.Range), ago(&o.Created)}
				})
			})
		},
	}
	show := &cobra.Command{
		Use: "show [NAME]", Short: "Show an organization", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "show organization", func(ctx context.Context, c *Client) error {
				if len(args) > 0 {
					c.org = args[0]
				}
				o, err := c.ShowOrganization(ctx, c.org)
				if err != nil {
					return err
				}
				return a.show(cmd, o, func(w io.Writer) {
					fields(w, "name", o.Name, "virtual addresses", join(o.Range), "region", o.Region, "shared relays of", regionsWord(o.RelayRegions), "direct paths", directWord(o.Direct), "platform may dial gateways", onWord(o.PlatformDial), "created", moment(&o.Created))
				})
			})
		},
	}
	var direct, directPrivate, platformDial string
	var regions []string
	update := &cobra.Command{
		Use: "update [NAME]", Short: "Change what an organization allows", Args: cobra.MaximumNArgs(1),
		Long: `Change what an organization allows. Nodes hear of it at once.

--direct on lets sessions leave the relay for a direct UDP path between client and gateway where NATs and firewalls let them; off keeps
every packet on relays, and takes open sessions back to them. The two ends then tell each other their public addresses, and with
--direct-private on those of their interfaces, too.

--platform-dial off keeps the platform from opening sessions to gateways itself, for tests of resources and webhooks to private addresses;
else it may, where a policy allows it (sallyway policy allow --from platform --resource R).

--regions keeps the organization's traffic on shared relays of these regions; its own relays stand where it put them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			on, err := onOff("--direct", direct)
			if err != nil {
				return err
			}
			private, err := onOff("--direct-private", directPrivate)
			if err != nil {
				return err
			}
			dial, err := onOff("--platform-dial", platformDial)
			if err != nil {
				return err
			}
			u := control.UpdateOrganization{Direct: on, DirectPrivate: private, PlatformDial: dial}
			if cmd.Flags().Changed("regions") {
				list := named(regions)
				if list == nil {
					list = []string{} // null would mean no change
				}
				u.RelayRegions = &list
			}
			if on == nil && private == nil && dial == nil && u.RelayRegions == nil {
				return daemon.Usagef("nothing to change: give --direct, --direct-private, --platform-dial or --regions")
			}
			return a.do(cmd, "update organization", func(ctx context.Context, c *Client) error {
				if len(args) > 0 {
					c.org = args[0]
				}
				o, err := c.UpdateOrganization(ctx, c.org, u)
				if err != nil {
					return err
				}
				return a.show(cmd, o, func(w io.Writer) {
					fmt.Fprintf(w, "organization %s: direct paths %s, the platform may dial gateways: %s, shared relays of %s\n", o.Name, directWord(o.Direct), onWord(o.PlatformDial), regionsWord(o.RelayRegions))
				})
			})
		},
	}
	update.Flags().StringSliceVar(&regions, "regions", nil, "regions whose shared relays its nodes may use, such as eu-central,eu-west (empty: all)")
	update.Flags().StringVar(&direct, "direct", "", "paths between client and gateway without a relay: on or off")
	update.Flags().StringVar(&directPrivate, "direct-private", "", "tell each other private addresses for that: on or off")
	update.Flags().StringVar(&platformDial, "platform-dial", "", "the platform opens sessions to gateways where a policy allows it: on or off")
	del := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete an empty organization and its keys", Args: one("the organization's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(cmd, "delete organization "+args[0], func(ctx context.Context, c *Client) error {
				c.org = args[0]
				if err := c.DeleteOrganization(ctx, c.org); err != nil {
					return err
				}
				return a.show(cmd, struct{}{}, func(w io.Writer) { fmt.Fprintf(w, "organization %s deleted\n", args[0]) })
			})
		},
	}
	c := group("organization", "Tenants: each with nodes, policies and a PKI of its own", `  sallyway organization create acme
  sallyway --org acme gateway create office`, create, ls, show, update, del)
	c.Aliases = []string{"org"}
	return c
}

// onOff reads a flag that is on or off; nil where it was not given.
func onOff(flag, s string) (*bool, error) {
	switch s {
	case "":
		return nil, nil
	case "on", "off":
		on := s == "on"
		return &on, nil
	}
	return nil, daemon.Usagef("%s %.20q: want on or off", flag, s)
}

func onWord(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func directWord(d control.Direct) string {
	switch {
	case d.On && d.Private:
		return "on, private addresses too"
	case d.On:
		return "on"
	}
	return "off"
}
