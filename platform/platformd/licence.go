package platformd

import (
	"context"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/daemon"
	"sallyway/platform"
)

// licenceFlags say whose licences count and where they come from.
type licenceFlags struct {
	cfg     platform.LicenceConfig
	keyFile string
}

func (o *licenceFlags) register(f *pflag.FlagSet) {
	c := &o.cfg
	f.StringSliceVar(&c.Trust, "licence-trust", nil, "key of an issuer of licences (ed25519:…), or a file with one on each line; without any, nothing is limited")
	f.StringVar(&c.File, "licence-file", "", "file with licences, one on each line; each is for the organization that it names")
	f.StringVar(&c.URL, "licence-url", "", "URL of a licence service that is asked once a day for what is new; without an answer what is here stays in force")
	f.StringVar(&o.keyFile, "licence-key-file", "", "file with the licence key for that service (0600)")
	f.StringVar(&c.Pin, "licence-pin", "", "key hash of the CA of that service's certificate (default: the system's roots vouch)")
}

// licenceChecks are the doctor's rows of organizations that have a licence.
func licenceChecks(ctx context.Context, srv *platform.Server) []daemon.Check {
	all, err := srv.Registry().Licences(ctx)
	if err != nil {
		return []daemon.Check{{Check: "licence", Result: daemon.Fail, Detail: err.Error(), Remedy: "see database"}}
	}
	var out []daemon.Check
	for _, org := range slices.Sorted(maps.Keys(all)) {
		c := daemon.Check{Check: "licence " + org, Result: daemon.Pass, Detail: "valid"}
		l := all[org]
		if l.Entitlement != nil {
			c.Detail += " until " + l.Entitlement.Expires.Format(time.DateOnly)
		}
		if l.Problem != "" {
			c.Result, c.Detail, c.Remedy = daemon.Warn, l.Problem, "what runs goes on; sallyway --org "+org+" licence show says more"
		}
		out = append(out, c)
	}
	return out
}

// resolve reads the licence key.
func (o *licenceFlags) resolve(_ *cobra.Command) error {
	if o.keyFile == "" {
		return nil
	}
	st, err := os.Stat(o.keyFile)
	if err != nil {
		return daemon.Usagef("licence key: %w", err)
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return daemon.Usagef("the file with the licence key can be read by other users\nrun chmod 600 %s", o.keyFile)
	}
	if st.Size() > maxURL {
		return daemon.Usagef("%s is no licence key: it has %d bytes", o.keyFile, st.Size())
	}
	b, err := os.ReadFile(o.keyFile)
	if err != nil {
		return daemon.Usagef("licence key: %w", err)
	}
	o.cfg.Key = strings.TrimSpace(string(b))
	return nil
}
