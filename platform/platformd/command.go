// Package platformd is the command line of the platform daemon.
package platformd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/ssm"
	"sallyway/platform"
	"sallyway/platform/api"
	"sallyway/platform/audit"
	"sallyway/platform/awsauth"
	"sallyway/platform/flowlog"
	"sallyway/platform/replica"
	"sallyway/platform/store"
	"sallyway/platform/syslog"
)

// defaultMetrics is where health and /metrics are served: for this host only.
const defaultMetrics = "127.0.0.1:9430"

// gcPercent trades a little CPU for a small idle footprint: the platform's load is light.
const gcPercent = 50

func spec() daemon.Spec {
	return daemon.Spec{
		Name: "platformd", Role: "platform", Start: []string{"serve"}, NoToken: true,
		Capabilities: []string{"CAP_NET_BIND_SERVICE"}, StopTimeout: 30 * time.Second,
		RenderStatus: renderStatus,
	}
}

// Command is platformd with its subcommands.
func Command() *cobra.Command {
	sp := spec()
	root := &cobra.Command{Use: sp.Name, Short: "The control plane: who may reach what, certificates, relays, audit"}
	root.AddCommand(serveCommand(sp), adminCommand())
	root.AddCommand(daemon.Commands(sp)...)
	// The folder is called data here: it is the platform's database, not a daemon's scratch state. --state means the same.
	root.SetGlobalNormalizationFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "state" {
			name = "data"
		}
		return pflag.NormalizedName(name)
	})
	return root
}

// serveOptions are the flags of serve.
type serveOptions struct {
	daemon   daemon.Options
	platform platform.Config
	home     homeFlags
	licence  licenceFlags
	// redisFile is a file with the URL.
	redisFile string
	// syslog are the receivers of the audit chains.
	syslog []string
	// parameters is the path of settings in a parameter store.
	parameters string
	store      ssm.Config
}

func serveCommand(sp daemon.Spec) *cobra.Command {
	o := &serveOptions{daemon: daemon.Options{MetricsListen: defaultMetrics}}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the platform in the foreground",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.resolve(cmd); err != nil {
				return err
			}
			return o.run(cmd.Context(), sp, cmd.ErrOrStderr())
		},
	}
	o.daemon.Register(cmd, sp)
	f, c := cmd.Flags(), &o.platform
	f.StringVar(&c.Listen, "listen", ":443", "HTTPS address (empty: off)")
	f.StringVar(&c.HTTPListen, "http-listen", "", "plain HTTP address, such as 127.0.0.1:8080, for a load balancer that ends TLS")
	f.StringVar(&c.AdvertiseURL, "advertise-url", "", "URL under which nodes and administrators reach the platform")
	f.StringVar(&c.TLSCert, "tls-cert", "", "certificate chain (PEM) instead of one by the platform's own CA; append a private authority's certificate")
	f.StringVar(&c.TLSKey, "tls-key", "", "key of --tls-cert (PEM)")
	f.StringSliceVar(&c.ACME.Domains, "acme-domain", nil, "names of the platform to obtain certificates for by ACME, whose terms you accept by this; the authority connects to port 443 of each")
	f.StringVar(&c.ACME.Email, "acme-email", "", "address that the ACME authority may write to")
	f.StringVar(&c.ACME.Directory, "acme-directory", "", "directory URL of the ACME authority (default Let's Encrypt)")
	f.StringVar(&c.ACME.CAFile, "acme-ca", "", "authorities (PEM) of that directory's certificate (default: the system's)")
	f.DurationVar(&c.DocumentLife, "snapshot-life", 24*time.Hour, "how long policy snapshots and grants hold while the platform is away")
	f.DurationVar(&c.CredentialLife, "relay-credential-life", 0, "how long nodes' credentials for relays hold while the platform is there, renewed at half of it, such as 2h; during an outage they hold as long as the node's certificate (0: always so long)")
	f.DurationVar(&c.LeafLife, "leaf-life", control.LeafLife, "how long nodes' certificates hold while the platform is away, renewed at half of it")
	f.DurationVar(&c.KeyRotation, "turn-key-rotation", 24*time.Hour, "age at which relays get new TURN keys")
	f.DurationVar(&c.DrainDelay, "drain-delay", 0, "how long to say not ready before the listeners close at a stop, for a balancer that asks (0: 2s with PostgreSQL, else none; below 0: none)")
	f.StringVar(&c.Region, "region", "", "name of this deployment's region, such as eu-central: kept at the first start, another one is refused later")
	f.Var((*probeMode)(&c.ProbeRelays), "probe-relays", "relays that are tried from outside: auto (those with a public address), off, private (all)")
	f.DurationVar(&c.TokenLife, "token-life", control.TokenLife, "how long enrolment tokens work")
	f.IntVar(&c.APIRate, "api-rate", api.DefaultRate, "requests a second that one caller of the API has (a token, a session, a node); 0 is no limit")
	f.StringVar(&c.AWS.Region, "aws-region", awsauth.DefaultRegion, "region to which nodes that enrol by AWS sign")
	f.StringVar(&c.AWS.Endpoint, "aws-sts-endpoint", "", "URL of the STS that is asked for their identity, the only one (default: the region's public one)")
	f.StringVar(&c.AWS.CAFile, "aws-sts-ca", "", "authorities (PEM) of that STS's certificate (default: the system's)")
	f.StringSliceVar(&o.syslog, "audit-syslog", nil, "syslog receivers of all audit logs: tls://HOST:6514[?ca=FILE], tcp://HOST:601, udp://HOST:514")
	f.DurationVar(&c.FlowLog, "flow-log-retention", flowlog.DefaultRetention, "how long flows are kept")
	f.IntVar(&c.FlowLogRows, "flow-log-rows", flowlog.DefaultRows, "how many flows of one organization are kept at most")
	o.home.register(f)
	o.licence.register(f)
	f.StringVar(&c.Redis, "redis", "", "URL of the Redis that platforms on one PostgreSQL talk through: redis://HOST:6379/0")
	f.StringVar(&o.redisFile, "redis-file", "", "file with the Redis URL (0600), for one with a password")
	f.StringVar(&o.parameters, "config-ssm", "", "path in AWS Systems Manager's Parameter Store below which parameters have the names of these flags, such as /sallyway/eu; flags, environment and file win")
	f.StringVar(&o.store.Region, "config-ssm-region", "", "region of that parameter store (default AWS_REGION)")
	f.StringVar(&o.store.Endpoint, "config-ssm-endpoint", "", "URL of that parameter store (default: the region's public one)")
	f.StringVar(&o.store.CAFile, "config-ssm-ca", "", "authorities (PEM) of that parameter store's certificate (default: the system's)")
	daemon.Bind(cmd).Elsewhere(func(ctx context.Context) (string, map[string]string, error) {
		if o.parameters == "" {
			return "", nil, nil
		}
		values, err := ssm.Read(ctx, o.parameters, o.store)
		return "parameter store, " + o.parameters, values, err
	})
	return cmd
}

// resolve reads what may stand in files.
func (o *serveOptions) resolve(cmd *cobra.Command) (err error) {
	if err := o.home.resolve(cmd); err != nil {
		return err
	}
	if err := o.licence.resolve(cmd); err != nil {
		return err
	}
	for _, to := range o.syslog {
		t, err := syslog.Parse(to)
		if err != nil {
			return daemon.Usagef("--audit-syslog: %w", err)
		}
		o.platform.AuditSyslog = append(o.platform.AuditSyslog, t)
	}
	if o.platform.Redis, err = secretURL(cmd, "redis", o.platform.Redis, o.redisFile); err != nil || o.platform.Redis == "" {
		return err
	}
	if err := replica.CheckURL(o.platform.Redis); err != nil {
		return daemon.Usagef("%w", err)
	}
	return nil
}

// check refuses what makes no sense.
func (o *serveOptions) check() error {
	const shortest = time.Minute
	if o.platform.DocumentLife < shortest || o.platform.DocumentLife > 30*24*time.Hour {
		return daemon.Usagef("--snapshot-life %v is not between 1m and 720h", o.platform.DocumentLife)
	}
	const shortestCredential, longestCredential, longestLeaf = 10 * time.Second, 24 * time.Hour, 7 * 24 * time.Hour
	if l := o.platform.CredentialLife; l != 0 && (l < shortestCredential || l > longestCredential) {
		return daemon.Usagef("--relay-credential-life %v is not between 10s and 24h, or 0", l)
	}
	if l := o.platform.LeafLife; l < shortestCredential || l > longestLeaf {
		return daemon.Usagef("--leaf-life %v is not between 10s and 168h", l)
	}
	if o.platform.TokenLife < time.Second || o.platform.TokenLife > 24*time.Hour {
		return daemon.Usagef("--token-life %v is not between 1s and 24h", o.platform.TokenLife)
	}
	if o.platform.APIRate < 0 {
		return daemon.Usagef("--api-rate %d is below 0", o.platform.APIRate)
	}
	if o.platform.FlowLog < shortest || o.platform.FlowLogRows < 1 {
		return daemon.Usagef("--flow-log-retention %v is shorter than 1m, or --flow-log-rows %d below 1: an organization that wants none turns it off (sallyway flow log off)", o.platform.FlowLog, o.platform.FlowLogRows)
	}
	if o.platform.KeyRotation < shortest {
		return daemon.Usagef("--turn-key-rotation %v is shorter than 1m", o.platform.KeyRotation)
	}
	return nil
}

func (o *serveOptions) run(ctx context.Context, sp daemon.Spec, logTo io.Writer) error {
	if err := o.check(); err != nil {
		return err
	}
	if o.platform.APIRate == 0 {
		o.platform.APIRate = -1 // Config has its default at 0
	}
	daemon.Tune(daemon.Tuning{GCPercent: gcPercent})
	sh, err := daemon.Open(sp, &o.daemon, logTo)
	if err != nil {
		return err
	}
	defer sh.Close()
	c := o.platform
	c.Licence = o.licence.cfg
	c.Data, c.Log, c.Metrics, c.Health, c.Tracer = sh.State.Dir(), sh.Log, sh.Metrics, sh.Health.Set, sh.Tracer()
	h := o.home.home
	c.Database, c.Connections, c.MasterKey, c.MasterKeyCommand = h.Database, h.Connections, h.MasterKey, h.MasterKeyCommand
	srv, err := platform.Open(ctx, c)
	switch {
	case errors.Is(err, store.ErrUnavailable) && !(store.Config{URL: c.Database}).Replicated():
		return daemon.Failf("%w\nmake room on the disk of %s and see that this user can write there", err, c.Data)
	case errors.Is(err, store.ErrUnavailable):
		return daemon.Failf("%w", err)
	case err != nil:
		return daemon.Usagef("%w", err)
	}
	sh.OnStatus = func(ctx context.Context) (any, error) { return srv.Status(ctx) }
	sh.OnDoctor = func(ctx context.Context) []daemon.Check { return checks(ctx, srv) }
	debug.FreeOSMemory() // what the first start needed (keys, migrations) is not needed again
	return sh.Run(ctx, func(ctx context.Context) error {
		sh.Ready("serving " + srv.URL())
		return srv.Run(ctx)
	})
}

// checks are what the doctor asks a running platform.
func checks(ctx context.Context, srv *platform.Server) []daemon.Check {
	db := daemon.Check{Check: "database", Result: daemon.Pass, Detail: "can be written"}
	if err := srv.Registry().Store.Writable(ctx); err != nil {
		remedy := "make room on the disk of the data folder, and see that it can be written"
		if srv.Replicas() != nil {
			remedy = "see that PostgreSQL runs, can be reached from here, and has room"
		}
		db = daemon.Check{Check: "database", Result: daemon.Fail, Detail: err.Error(), Remedy: remedy}
	}
	out := []daemon.Check{db, {Check: "URL", Result: daemon.Pass, Detail: srv.URL()}}
	if r := srv.Replicas(); r != nil {
		c := daemon.Check{Check: "replicas", Result: daemon.Pass, Detail: fmt.Sprintf("%d live", len(r.Replicas))}
		if r.Redis == replica.Away {
			c.Result, c.Detail = daemon.Warn, c.Detail+"; Redis is away, so they tell each other things a few seconds later"
			c.Remedy = "see that Redis runs and can be reached from here"
		}
		out = append(out, c)
	}
	out = append(out, licenceChecks(ctx, srv)...)
	sinks, err := srv.Syslog(ctx)
	if err != nil {
		return append(out, daemon.Check{Check: "syslog", Result: daemon.Fail, Detail: err.Error(), Remedy: "see database"})
	}
	for _, s := range sinks {
		c := daemon.Check{Check: "audit to " + s.Target, Result: daemon.Pass, Detail: "sent"}
		if !s.Failed.IsZero() {
			c.Result, c.Detail = daemon.Warn, fmt.Sprintf("%d entries wait since %s: %s", s.Backlog, s.Failed.Local().Format(time.DateTime), s.Problem)
			c.Remedy = "see that the receiver runs and can be reached from here; nothing is lost meanwhile"
		}
		out = append(out, c)
	}
	names, err := srv.Registry().OrgNames(ctx)
	if err != nil {
		return append(out, daemon.Check{Check: "audit", Result: daemon.Fail, Detail: err.Error(), Remedy: "see database"})
	}
	for _, org := range names {
		c := daemon.Check{Check: "audit " + org, Result: daemon.Pass}
		v, err := audit.Verify(ctx, srv.Registry().Store, org)
		switch {
		case err != nil:
			c.Result, c.Detail, c.Remedy = daemon.Fail, err.Error(), "see database"
		case !v.OK:
			c.Result, c.Detail, c.Remedy = daemon.Fail, v.Problem, "somebody changed the database: compare it with a backup (platformd admin restore keeps the old one)"
		default:
			c.Detail = fmt.Sprintf("%d entries, chain whole", v.Entries)
		}
		if org == identity.SharedOrg {
			c.Check = "audit of the platform"
		}
		out = append(out, c)
	}
	return out
}

func renderStatus(w io.Writer, doc json.RawMessage) error {
	var s platform.Status
	if err := json.Unmarshal(doc, &s); err != nil {
		return err
	}
	ready := "ready"
	if !s.Ready {
		ready = "not ready"
	}
	fmt.Fprintf(w, "platform %s: %s\n", s.URL, ready)
	if s.Region != "" {
		fmt.Fprintf(w, "region %s\n", s.Region)
	}
	for name, why := range s.Conditions {
		fmt.Fprintf(w, "  %s: %s\n", name, why)
	}
	if r := s.Replicas; r != nil {
		for i, k := range r.Replicas {
			note := ""
			if i == 0 {
				note = ", this one"
				if r.Redis != "" {
					note += ", Redis " + r.Redis
				}
			}
			fmt.Fprintf(w, "replica %s at %s: %d control streams%s\n", k.ID, k.Address, k.Streams, note)
		}
	}
	for _, t := range s.Syslog {
		if t.Failed.IsZero() {
			fmt.Fprintf(w, "audit to %s: %d entries wait\n", t.Target, t.Backlog)
		} else {
			fmt.Fprintf(w, "audit to %s: FAILING since %s, %d entries wait: %s\n", t.Target, t.Failed.Local().Format(time.DateTime), t.Backlog, t.Problem)
		}
	}
	for _, o := range s.Organizations {
		fmt.Fprintf(w, "organization %s: relays %d/%d, gateways %d/%d, clients %d/%d reachable; %d resources, %d policies, %d sessions\n", o.Name,
			o.Relays.Reachable, o.Relays.All, o.Gateways.Reachable, o.Gateways.All, o.Clients.Reachable, o.Clients.All, o.Resources, o.Policies, o.Sessions)
	}
	return nil
}

// adminOptions are the flags of admin's commands.
type adminOptions struct {
	data  string
	where homeFlags
	token platform.TokenRequest
}

// home is where the platform keeps what it knows.
func (o *adminOptions) home() platform.Home {
	h := o.where.home
	h.Data = o.data
	return h
}

func (o *adminOptions) command(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&o.data, "data", daemon.DefaultStateDir("platformd"), "data folder of the platform")
	o.where.register(c.Flags())
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := o.where.resolve(cmd); err != nil {
			return err
		}
		return run(cmd, args)
	}
	daemon.Bind(c)
	return c
}

func adminCommand() *cobra.Command {
	c := &cobra.Command{Use: "admin", Short: "Credentials, backup and restore, on the platform's own host"}
	c.AddCommand(tokenCommand(), backupCommand(), restoreCommand(), migrateCommand(), rotateCommand())
	return c
}

func tokenCommand() *cobra.Command {
	o := &adminOptions{}
	c := o.command(&cobra.Command{
		Use:   "token",
		Short: "Print a fresh credential for `sallyway login --token-file -`",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cred, err := o.home().AdminToken(cmd.Context(), o.token)
			if err != nil {
				return daemon.Failf("%w", err)
			}
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			return enc.Encode(cred)
		},
	})
	f := c.Flags()
	f.StringVar(&o.token.Name, "name", "platformd admin token", "what the audit calls its user")
	f.StringVar(&o.token.Org, "org", "", "one organization only")
	f.BoolVar(&o.token.ReadOnly, "read-only", false, "may only read")
	f.DurationVar(&o.token.Life, "expires", 0, "life, such as 720h (0: no end)")
	f.BoolVar(&o.token.RevokeOthers, "revoke-others", false, "revoke the tokens of the same reach that exist")
	return c
}

func backupCommand() *cobra.Command {
	o := &adminOptions{}
	return o.command(&cobra.Command{
		Use:   "backup FILE",
		Short: "Write a consistent copy of the database to a new file, also while the platform runs",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			if err := o.home().Backup(cmd.Context(), file); err != nil {
				return daemon.Failf("%w", err)
			}
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "wrote %s\nTHE MASTER KEY IS NOT IN IT, and without that the backup is worth nothing: keep %s too, in another place\n", file, o.home().MasterKeyName())
			return err
		},
	})
}

func restoreCommand() *cobra.Command {
	o := &adminOptions{}
	var in platform.RestoreRegion
	c := o.command(&cobra.Command{
		Use:   "restore FILE",
		Short: "Put a backup in the place of the database; the platform must be stopped, a PostgreSQL empty",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := daemon.OpenState(o.data, "platformd", "data")
			if err != nil {
				return err
			}
			defer state.Close()
			old, err := o.home().RestoreIn(cmd.Context(), args[0], in)
			if err != nil {
				return daemon.Failf("%w", err)
			}
			if old != "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "the database from before is %s\n", old)
			}
			_, err = fmt.Fprintln(cmd.ErrOrStderr(), "restored; start the platform")
			return err
		},
	})
	c.Flags().StringVar(&in.Region, "region", "", "region of this deployment (default: that of the database that is there); a backup of another one is refused")
	c.Flags().BoolVar(&in.Other, "other-region", false, "take a backup of another region, too: its organizations belong to this one from then on")
	return c
}

func migrateCommand() *cobra.Command {
	o := &adminOptions{}
	return o.command(&cobra.Command{
		Use:   "migrate",
		Short: "Bring the database up to date (serve does so by itself)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := daemon.OpenState(o.data, "platformd", "data")
			if err != nil {
				return err
			}
			defer state.Close()
			v, err := o.home().Migrate(cmd.Context())
			if err != nil {
				return daemon.Failf("%w", err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "schema %d\n", v)
			return err
		},
	})
}
