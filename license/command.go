package license

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/database"
)

// defaultMetrics is where health and metrics are served: for this host only.
const defaultMetrics = "127.0.0.1:9440"

// stateName is the folder below /var/lib/sallyway.
const stateName = "license"

// maxURLFile bounds a file with a URL, in bytes.
const maxURLFile = 16 << 10

func spec() daemon.Spec {
	return daemon.Spec{
		Name: "sallyway-license", StateName: stateName, Role: "license", Start: []string{"serve"}, StateFlag: "data", NoToken: true,
		StopTimeout: 30 * time.Second, RenderStatus: renderStatus,
	}
}

// Command is sallyway-license with its subcommands.
func Command() *cobra.Command {
	sp := spec()
	root := &cobra.Command{
		Use: sp.Name, Short: "The licence service: signs what customers' platforms may have",
		Long: `The licence service knows customers and signs what they may have: gateways, relays, clients, bandwidth, until when. Platforms verify that
offline, and go on without this service.

The usual way, on its host:
  sallyway-license serve                                             # makes its keys and its administrator's credential
  sallyway-license admin keys                                        # what platforms name with --licence-trust
  sallyway-license customer create acme --contact sales@example.com
  sallyway-license entitlement issue --customer acme --organization default --gateways 50 --clients 500 -o acme.licence
  sallyway-license key create --customer acme                        # for platforms that fetch: --licence-url, --licence-key-file`,
	}
	root.AddCommand(serveCommand(sp), adminCommand())
	root.AddCommand(verbs()...)
	root.AddCommand(daemon.Commands(sp)...)
	return root
}

// homeFlags say where the service keeps what it knows.
type homeFlags struct {
	home         Home
	databaseFile string
}

func (o *homeFlags) register(f *pflag.FlagSet) {
	f.StringVar(&o.home.Database, "database", "", "database URL: sqlite: (the default, in the data folder) or postgres://USER@HOST/DATABASE")
	f.StringVar(&o.databaseFile, "database-file", "", "file with the database URL (0600), for one with a password; libpq's PGPASSFILE works too")
	f.IntVar(&o.home.Connections, "database-connections", 0, "connections to PostgreSQL at most (0: 16)")
	f.StringVar(&o.home.Issuer, "issuer", "sallyway-license", "what licences call this service")
}

// resolve reads the URL where it stands in a file, and checks it.
func (o *homeFlags) resolve(cmd *cobra.Command) error {
	defer os.Unsetenv(daemon.EnvPrefix + "DATABASE") // child processes do not inherit it
	switch {
	case o.databaseFile == "":
	case o.home.Database != "":
		return daemon.Usagef("--database and --database-file are both given\nuse one of them")
	default:
		st, err := os.Stat(o.databaseFile)
		if err != nil {
			return daemon.Usagef("read the database URL: %w", err)
		}
		if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
			return daemon.Usagef("the file with the database URL can be read by other users\nrun chmod 600 %s", o.databaseFile)
		}
		if st.Size() > maxURLFile {
			return daemon.Usagef("%s holds no URL: it has %d bytes", o.databaseFile, st.Size())
		}
		b, err := os.ReadFile(o.databaseFile)
		if err != nil {
			return daemon.Usagef("read the database URL: %w", err)
		}
		o.home.Database = strings.TrimSpace(string(b))
	}
	if f := cmd.Flags().Lookup("database"); daemon.Source(f) == "flag" {
		if u, err := url.Parse(o.home.Database); err != nil || u.Query().Has("password") || hasPassword(u) {
			return daemon.Usagef("a password on the command line can be seen by other users\nwrite the URL to a file (chmod 600) and name it with --database-file")
		}
	}
	if err := o.home.database().Check(); err != nil {
		return daemon.Usagef("%w", err)
	}
	return nil
}

func hasPassword(u *url.URL) bool {
	_, in := u.User.Password()
	return in
}

func serveCommand(sp daemon.Spec) *cobra.Command {
	opts := &daemon.Options{MetricsListen: defaultMetrics}
	var where homeFlags
	var c Config
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the licence service in the foreground", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := where.resolve(cmd); err != nil {
				return err
			}
			c.Home = where.home
			return serve(cmd.Context(), sp, opts, c, cmd.ErrOrStderr())
		},
	}
	opts.Register(cmd, sp)
	f := cmd.Flags()
	f.StringVar(&c.Listen, "listen", ":4000", "HTTPS address (empty: off)")
	f.StringVar(&c.HTTPListen, "http-listen", "", "plain HTTP address, such as 127.0.0.1:4080, for a load balancer that ends TLS")
	f.StringVar(&c.URL, "advertise-url", "", "URL under which platforms and administrators reach the service")
	f.StringVar(&c.TLSCert, "tls-cert", "", "certificate chain (PEM) instead of one by an authority of the service's own")
	f.StringVar(&c.TLSKey, "tls-key", "", "key of --tls-cert (PEM)")
	where.register(f)
	daemon.Bind(cmd)
	return cmd
}

func serve(ctx context.Context, sp daemon.Spec, opts *daemon.Options, c Config, logTo io.Writer) error {
	sh, err := daemon.Open(sp, opts, logTo)
	if err != nil {
		return err
	}
	defer sh.Close()
	c.Data, c.Log, c.Metrics, c.Health = sh.State.Dir(), sh.Log, sh.Metrics, sh.Health.Set
	srv, err := Open(ctx, c)
	switch {
	case errors.Is(err, database.ErrUnavailable):
		return daemon.Failf("%w", err)
	case err != nil:
		return daemon.Usagef("%w", err)
	}
	sh.OnStatus = func(ctx context.Context) (any, error) { return srv.Status(ctx) }
	sh.OnDoctor = srv.checks
	return sh.Run(ctx, func(ctx context.Context) error {
		sh.Ready("serving " + srv.URL())
		return srv.Run(ctx)
	})
}

// Status is what `sallyway-license status` shows.
type Status struct {
	URL    string        `json:"url"`
	Pin    string        `json:"pin,omitempty"`
	Ready  bool          `json:"ready"`
	Reason string        `json:"reason,omitempty"`
	Counts Counts        `json:"counts"`
	Keys   []*SigningKey `json:"signing_keys"` // without the old ones
}

// Status tells how the service is.
func (s *Server) Status(ctx context.Context) (*Status, error) {
	out := &Status{URL: s.URL(), Pin: s.Pin(), Ready: true}
	if err := s.Sick(); err != nil {
		out.Ready, out.Reason = false, err.Error()
		return out, nil
	}
	var err error
	if out.Counts, err = s.Counts(ctx); err != nil {
		return nil, err
	}
	keys, err := s.SigningKeys(ctx)
	for _, k := range keys {
		if k.State != KeyOld {
			out.Keys = append(out.Keys, k)
		}
	}
	return out, err
}

func renderStatus(w io.Writer, doc json.RawMessage) error {
	var s Status
	if err := json.Unmarshal(doc, &s); err != nil {
		return err
	}
	ready := "ready"
	if !s.Ready {
		ready = "not ready: " + s.Reason
	}
	fmt.Fprintf(w, "licence service %s: %s\n", s.URL, ready)
	if s.Pin != "" {
		fmt.Fprintf(w, "pin of its certificate's authority: %s\n", s.Pin)
	}
	fmt.Fprintf(w, "%d customers; %d licences in force, %d taken back\n", s.Counts.Customers, s.Counts.Current, s.Counts.Revoked)
	for _, k := range s.Keys {
		fmt.Fprintf(w, "signing key %s (%s): %s\n", k.ID, k.State, k.Public)
	}
	return nil
}

// checks are what the doctor asks a running service.
func (s *Server) checks(ctx context.Context) []daemon.Check {
	db := daemon.Check{Check: "database", Result: daemon.Pass, Detail: "can be written"}
	if err := s.Writable(ctx); err != nil {
		db = daemon.Check{Check: "database", Result: daemon.Fail, Detail: err.Error(), Remedy: "see that the database runs, can be reached from here, and has room"}
	}
	key := daemon.Check{Check: "signing key", Result: daemon.Pass}
	known, err := s.SigningKeys(ctx)
	if err == nil {
		_, err = s.signer(known)
	}
	if err != nil {
		key.Result, key.Detail, key.Remedy = daemon.Fail, err.Error(), "licences that are out stay valid; nothing can be issued until the key is back"
	} else {
		key.Detail = known[0].ID + " signs"
	}
	log := daemon.Check{Check: "audit log", Result: daemon.Pass}
	if n, err := s.VerifyAudit(ctx); err != nil {
		log.Result, log.Detail, log.Remedy = daemon.Fail, err.Error(), "somebody changed the database: compare it with a backup"
	} else {
		log.Detail = fmt.Sprintf("%d entries, chain whole", n)
	}
	return []daemon.Check{db, key, log}
}

// adminOptions are what commands on the service's own host have in common.
type adminOptions struct{ where homeFlags }

// command adds the flags to a command, and runs it on the service that is there.
func (o *adminOptions) command(c *cobra.Command, run func(ctx context.Context, cmd *cobra.Command, s *Service, args []string) error) *cobra.Command {
	c.Flags().StringVar(&o.where.home.Data, "data", daemon.DefaultStateDir(stateName), "data folder of the service")
	o.where.register(c.Flags())
	c.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if err := o.where.resolve(cmd); err != nil {
			return err
		}
		s, err := o.where.home.Existing(cmd.Context())
		if err != nil {
			return daemon.Failf("%w", err)
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		if err := run(cmd.Context(), cmd, s, args); err != nil {
			return daemon.Failf("%w", err)
		}
		return nil
	}
	daemon.Bind(c)
	return c
}

func adminCommand() *cobra.Command {
	c := &cobra.Command{Use: "admin", Short: "Credentials, signing keys, backup and restore, on the service's own host"}
	c.AddCommand(tokenCommand(), keysCommand(), rotateCommand(), backupCommand(), restoreCommand())
	return c
}

func tokenCommand() *cobra.Command {
	o := &adminOptions{}
	var name string
	var life time.Duration
	var others bool
	c := o.command(&cobra.Command{Use: "token", Short: "Print a fresh credential of the administrator, for --credential", Args: cobra.NoArgs},
		func(ctx context.Context, cmd *cobra.Command, s *Service, _ []string) error {
			// Where the service is, and its pin, are in the first credential.
			var cred control.AdminCredential
			if b, err := os.ReadFile(filepath.Join(o.where.home.Data, adminFile)); err == nil {
				if err := json.Unmarshal(b, &cred); err != nil {
					return fmt.Errorf("%s is damaged: remove it and start the service again", adminFile)
				}
			}
			var err error
			if cred.Token, err = s.AdminToken(ctx, name, life, others); err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), cred)
		})
	c.Flags().StringVar(&name, "name", "sallyway-license admin token", "what the audit calls its user")
	c.Flags().DurationVar(&life, "expires", 0, "life, such as 720h (0: no end)")
	c.Flags().BoolVar(&others, "revoke-others", false, "revoke all tokens that exist")
	return c
}

func keysCommand() *cobra.Command {
	o := &adminOptions{}
	return o.command(&cobra.Command{
		Use: "keys", Short: "Print the public keys that platforms should trust: the one that signs and the next", Args: cobra.NoArgs,
		Long: `Print the public keys that platforms should trust, one on each line: the one that signs, and the one that will after the next rotation.
Give the output to platforms as a file: platformd serve --licence-trust FILE.`,
	}, func(ctx context.Context, cmd *cobra.Command, s *Service, _ []string) error {
		keys, err := s.SigningKeys(ctx)
		if err == nil {
			printKeys(cmd.OutOrStdout(), keys)
		}
		return err
	})
}

func printKeys(w io.Writer, keys []*SigningKey) {
	for _, k := range keys {
		if k.State != KeyOld {
			fmt.Fprintf(w, "%s # %s, %s\n", k.Public, k.ID, k.State)
		}
	}
}

func rotateCommand() *cobra.Command {
	o := &adminOptions{}
	var lost bool
	c := o.command(&cobra.Command{
		Use: "rotate-keys", Short: "Have the next key sign from now on, and make a new next one, also while the service runs", Args: cobra.NoArgs,
		Long: `Have the next key sign from now on, and make a new next one. Platforms that trust both notice nothing; give them the new list before the next
rotation. Licences that the old key signed stay valid as long as platforms trust that key, too.

Other services on the same database go on with the key that signs now; copy signing.key to them before the next rotation.
With --lost both keys are made anew, and every platform has to be told before it takes a new licence.`,
	}, func(ctx context.Context, cmd *cobra.Command, s *Service, _ []string) error {
		keys, err := s.RotateKeys(ctx, "host", lost)
		if err == nil {
			printKeys(cmd.OutOrStdout(), keys)
		}
		return err
	})
	c.Flags().BoolVar(&lost, "lost", false, "signing.key is lost: make both keys anew")
	return c
}

func backupCommand() *cobra.Command {
	o := &adminOptions{}
	return o.command(&cobra.Command{Use: "backup FILE", Short: "Write a consistent copy of the database to a new file, also while the service runs", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, cmd *cobra.Command, s *Service, args []string) error {
			file, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			if err := s.Backup(ctx, file); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "wrote %s\nTHE SIGNING KEYS ARE NOT IN IT: keep %s too, in another place\n", file, filepath.Join(o.where.home.Data, signingFile))
			return err
		})
}

func restoreCommand() *cobra.Command {
	o := &adminOptions{}
	c := &cobra.Command{Use: "restore FILE", Short: "Put a backup in the place of the database; the service must be stopped, a PostgreSQL empty", Args: cobra.ExactArgs(1)}
	o.command(c, nil)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := o.where.resolve(cmd); err != nil {
			return err
		}
		state, err := daemon.OpenState(o.where.home.Data, "sallyway-license", "data")
		if err != nil {
			return err
		}
		defer state.Close()
		old, err := o.where.home.Restore(cmd.Context(), args[0])
		if err != nil {
			return daemon.Failf("%w", err)
		}
		if old != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "the database from before is %s\n", old)
		}
		_, err = fmt.Fprintln(cmd.ErrOrStderr(), "restored; start the service")
		return err
	}
	return c
}

func printJSON(w io.Writer, doc any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(doc)
}
