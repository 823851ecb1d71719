package platformd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/daemon"
	"sallyway/platform"
	"sallyway/platform/store"
)

// maxURL bounds a file with a URL, in bytes.
const maxURL = 16 << 10

// homeFlags say where the platform keeps what it knows. Commands beside the server have them, too.
type homeFlags struct {
	home         platform.Home
	databaseFile string
}

func (o *homeFlags) register(f *pflag.FlagSet) {
	h := &o.home
	f.StringVar(&h.Database, "database", "", "database URL: sqlite: (the default, in the data folder) or postgres://USER@HOST/DATABASE")
	f.StringVar(&o.databaseFile, "database-file", "", "file with the database URL (0600), for one with a password; libpq's PGPASSFILE works too")
	f.IntVar(&h.Connections, "database-connections", store.PostgresConnections, "connections to PostgreSQL at most")
	f.StringVar(&h.MasterKey, "master-key", "", "file with the master key (default master.key in the data folder); all replicas have the same")
	f.StringVar(&h.MasterKeyCommand, "master-key-command", "", "shell command that prints the master key, such as one that asks a KMS, instead of a file")
}

// resolve reads the URL where it is given and checks it.
func (o *homeFlags) resolve(cmd *cobra.Command) error {
	var err error
	if o.home.Database, err = secretURL(cmd, "database", o.home.Database, o.databaseFile); err != nil {
		return err
	}
	c := store.Config{URL: o.home.Database}
	if err := c.Check(); err != nil {
		return daemon.Usagef("%w", err)
	}
	return nil
}

// secretURL is a URL that may hold a password: from the file that FLAG-file names, from FLAG itself (which has none on the command line, where
// others see it), or the systemd credential of that name. The variable leaves the environment, so that child processes do not inherit it.
func secretURL(cmd *cobra.Command, name, value, file string) (string, error) {
	defer os.Unsetenv(daemon.EnvPrefix + strings.ToUpper(name))
	if value != "" && file != "" {
		return "", daemon.Usagef("--%s and --%s-file are both given\nuse one of them", name, name)
	}
	if f := cmd.Flags().Lookup(name); f != nil && daemon.Source(f) == "flag" && hasPassword(value) {
		return "", daemon.Usagef("a password on the command line can be seen by other users\nwrite the URL to a file (chmod 600) and name it with --%s-file, or use the environment variable %s%s",
			name, daemon.EnvPrefix, strings.ToUpper(name))
	}
	if value != "" {
		return value, nil
	}
	optional := false
	if file == "" {
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return "", nil
		}
		file, optional = filepath.Join(dir, name), true
	}
	f, err := os.Open(file)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", daemon.Usagef("read the %s URL: %w", name, err)
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && !optional && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return "", daemon.Usagef("the file with the %s URL can be read by other users\nrun chmod 600 %s", name, file)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxURL))
	if err != nil {
		return "", daemon.Usagef("read the %s URL: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// hasPassword says whether a URL holds one; when it can not be told it does.
func hasPassword(s string) bool {
	u, err := url.Parse(s)
	if err != nil {
		return strings.Contains(s, "@") || strings.Contains(s, "password")
	}
	_, in := u.User.Password()
	return in || u.Query().Has("password")
}

func rotateCommand() *cobra.Command {
	o := &adminOptions{}
	var next string
	var finish, data bool
	c := o.command(&cobra.Command{
		Use:   "rotate-master-key",
		Short: "Make a new master key, also while the platform runs",
		Long: `Make a new master key and wrap the keys of the database by it; the old file is kept beside the new one.

On PostgreSQL both keys open the database until every replica has the new file: copy it to all, then run this with --finish.
After a theft of the old key use --data-keys too, with all platforms stopped: it seals every secret anew.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			home := o.home()
			w := cmd.ErrOrStderr()
			switch {
			case finish && (data || next != ""):
				return daemon.Usagef("--finish goes alone")
			case finish:
				n, err := home.FinishRotation(cmd.Context())
				if err != nil {
					return daemon.Failf("%w", err)
				}
				_, err = fmt.Fprintf(w, "the database opens with this master key alone; %d other(s) before\n", n)
				return err
			case data:
				state, err := daemon.OpenState(o.data, "platformd", "data")
				if err != nil {
					return err
				}
				defer state.Close()
				if err := home.RenewDataKey(cmd.Context()); err != nil {
					return daemon.Failf("%w", err)
				}
				fmt.Fprintln(w, "every CA key and TURN key is sealed anew")
			}
			r, err := home.RotateMaster(cmd.Context(), next)
			if err != nil {
				return daemon.Failf("%w", err)
			}
			fmt.Fprintf(w, "the new master key is %s: back it up apart from the database\n", r.File)
			if r.Old != "" {
				fmt.Fprintf(w, "the old one is %s: backups from before need it, remove it when there are none\n", r.Old)
			}
			if r.Finish {
				fmt.Fprintln(w, "both open the database now; when every replica has the new one: platformd admin rotate-master-key --finish")
			}
			return nil
		},
	})
	c.Flags().StringVar(&next, "new-master-key", "", "file with the new key, instead of making one; name it in the platform's configuration next")
	c.Flags().BoolVar(&finish, "finish", false, "let only the present master key open the database")
	c.Flags().BoolVar(&data, "data-keys", false, "also seal every secret anew; every platform must be stopped")
	return c
}
