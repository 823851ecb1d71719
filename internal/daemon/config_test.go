package daemon

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// up is a program with one start command that records what it was given.
type up struct {
	root   *cobra.Command
	listen string
	tun    string
	count  int
	names  []string
	allow  []allowRule
	token  Secret
	ran    bool
	source string
}

type allowRule struct {
	CIDR  string   `yaml:"cidr"`
	Ports []string `yaml:"ports"`
}

func newUp(t *testing.T) *up {
	t.Helper()
	u := &up{root: &cobra.Command{Use: "testd"}}
	var tf TokenFlags
	cmd := &cobra.Command{Use: "up", Args: cobra.NoArgs}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		u.ran = true
		u.source = Source(cmd.Flags().Lookup("listen-ip"))
		log, err := NewLogger(cmd.ErrOrStderr(), "", "")
		if err != nil {
			return err
		}
		u.token, err = tf.Read(cmd, log)
		return err
	}
	cmd.Flags().StringVar(&u.listen, "listen-ip", "default", "")
	cmd.Flags().StringVar(&u.tun, "tun", "auto", "")
	cmd.Flags().IntVar(&u.count, "standby", 1, "")
	cmd.Flags().StringSliceVar(&u.names, "name", nil, "")
	tf.Register(cmd.Flags())
	Bind(cmd).FileKey("allow", &u.allow)
	other := &cobra.Command{Use: "other", RunE: func(*cobra.Command, []string) error { return nil }}
	other.Flags().String("only-there", "", "")
	Bind(other)
	group := &cobra.Command{Use: "group"}
	group.AddCommand(&cobra.Command{Use: "create", RunE: func(*cobra.Command, []string) error { return nil }})
	u.root.AddCommand(cmd, other, group)
	return u
}

// exec runs the program and returns exit code and standard error.
func (u *up) exec(t *testing.T, stdin string, args ...string) (int, string) {
	t.Helper()
	var stderr bytes.Buffer
	u.root.SetArgs(args)
	u.root.SetIn(strings.NewReader(stdin))
	u.root.SetErr(&stderr)
	u.root.SetOut(&stderr)
	code := run(context.Background(), u.root)
	return code, stderr.String()
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPrecedence(t *testing.T) {
	file := writeFile(t, "listen_ip: file\n")
	for _, tc := range []struct {
		name, env    string
		args         []string
		want, source string
	}{
		{"default", "", nil, "default", ""},
		{"file", "", []string{"--config", file}, "file", "file"},
		{"env over file", "env", []string{"--config", file}, "env", "env"},
		{"flag over env", "env", []string{"--config", file, "--listen-ip", "flag"}, "flag", "flag"},
		{"flag with the default's value", "env", []string{"--listen-ip", "default"}, "default", "flag"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.env != "" {
				t.Setenv("SALLYWAY_LISTEN_IP", tc.env)
			}
			u := newUp(t)
			if code, out := u.exec(t, "", append([]string{"up"}, tc.args...)...); code != ExitOK {
				t.Fatalf("exit %d: %s", code, out)
			}
			if u.listen != tc.want || u.source != tc.source {
				t.Fatalf("got %q from %q, want %q from %q", u.listen, u.source, tc.want, tc.source)
			}
		})
	}
}

func TestConfigFromEnvironment(t *testing.T) {
	t.Setenv("SALLYWAY_CONFIG", writeFile(t, "standby: 2\n"))
	t.Setenv("SALLYWAY_NAME", "a, b")
	u := newUp(t)
	if code, out := u.exec(t, "", "up"); code != ExitOK {
		t.Fatalf("exit %d: %s", code, out)
	}
	if u.count != 2 || !slices.Equal(u.names, []string{"a", "b"}) {
		t.Fatalf("got %d %q", u.count, u.names)
	}
}

func TestConfigFile(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       string // in the error; empty means it is accepted
		check      func(u *up) bool
	}{
		{"all", "tun: off\nstandby: 0\nname: [x, y]\nallow:\n  - cidr: 10.0.0.0/8\n    ports: [\"443\"]\n", "", func(u *up) bool {
			return u.tun == "off" && u.count == 0 && slices.Equal(u.names, []string{"x", "y"}) && len(u.allow) == 1 && u.allow[0].CIDR == "10.0.0.0/8"
		}},
		{"empty", "# nothing\n", "", func(u *up) bool { return u.tun == "auto" && u.allow == nil }},
		{"another command's key", "only-there: 1\n", "", func(u *up) bool { return u.ran }},
		{"list in one line", "name: a,b\n", "", func(u *up) bool { return slices.Equal(u.names, []string{"a", "b"}) }},
		{"typo", "\nlisten-ipp: 1\n", `config.yaml:2: unknown key "listen-ipp" (did you mean "listen-ip"?)`, nil},
		{"typo of a file key", "alow: []\n", `did you mean "allow"?`, nil},
		{"unknown", "qwertyuiop: 1\n", `unknown key "qwertyuiop"` + "\n", nil},
		{"not for files", "config: x\n", `unknown key "config"`, nil},
		{"nested typo", "allow:\n  - cidr: 10.0.0.0/8\n    prots: [1]\n", `unknown key "prots" (did you mean "ports"?)`, nil},
		{"twice", "tun: on\ntun: off\n", "second time", nil},
		{"twice by spelling", "listen-ip: a\nlisten_ip: b\n", "second time", nil},
		{"not a number", "standby: many\n", `config.yaml:1: standby: "many" is not a valid int`, nil},
		{"list for one value", "tun: [a]\n", "takes one value", nil},
		{"map for one value", "tun: {a: b}\n", "takes a plain value", nil},
		{"no value", "tun:\n", "has no value", nil},
		{"not a mapping", "- a\n", "want keys and values", nil},
		{"two documents", "tun: on\n---\ntun: off\n", "more than one", nil},
		{"not yaml", "tun: [\n", "config.yaml", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := newUp(t)
			code, out := u.exec(t, "", "up", "--config", writeFile(t, tc.text))
			if tc.want == "" {
				if code != ExitOK || !tc.check(u) {
					t.Fatalf("exit %d, %+v: %s", code, u, out)
				}
				return
			}
			if code != ExitUsage || !strings.Contains(out, tc.want) || u.ran {
				t.Fatalf("exit %d, ran %v: %q lacks %q", code, u.ran, out, tc.want)
			}
		})
	}
}

func TestBadEnvironment(t *testing.T) {
	t.Setenv("SALLYWAY_STANDBY", "x")
	u := newUp(t)
	if code, out := u.exec(t, "", "up"); code != ExitUsage || !strings.Contains(out, "SALLYWAY_STANDBY") {
		t.Fatalf("exit %d: %s", code, out)
	}
}

func TestRequiredFlagFromFile(t *testing.T) {
	u := newUp(t)
	cmd, _, err := u.root.Find([]string{"up"})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.MarkFlagRequired("tun"); err != nil {
		t.Fatal(err)
	}
	if code, out := u.exec(t, "", "up"); code != ExitUsage || !strings.Contains(out, "tun") {
		t.Fatalf("without: exit %d: %s", code, out)
	}
	if code, out := u.exec(t, "", "up", "--config", writeFile(t, "tun: on\n")); code != ExitOK {
		t.Fatalf("with: exit %d: %s", code, out)
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{"", "a: b\n", "a: [b, c]\n", "a: &x {b: c}\nd: *x\n", "- a\n", "a: b\na: c\n", "---\n---\n", "? [a]\n: b\n", "a: *x\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		keys, err := parseConfig("f", []byte(s))
		if err != nil {
			if ExitCode(err) != ExitUsage {
				t.Fatalf("error %v is no usage error", err)
			}
			return
		}
		for k, n := range keys {
			if n == nil {
				t.Fatalf("key %q without node", k)
			}
			var rules []allowRule
			_ = decodeStrict(n, &rules) // must not panic; most inputs are no rules
		}
	})
}

func TestDidYouMean(t *testing.T) {
	names := []string{"state", "tun", "token-file", "token"}
	for got, want := range map[string]string{"stat": "state", "tokenfile": "token-file", "TUN": "tun", "zzz": "", "token-": "token", "toke": "token"} {
		s := didYouMean(got, names)
		if (want == "") != (s == "") || !strings.Contains(s, want) {
			t.Errorf("%q: %q, want %q", got, s, want)
		}
	}
}

func TestElsewhere(t *testing.T) {
	t.Setenv("SALLYWAY_STANDBY", "2")
	for _, tc := range []struct {
		name    string
		values  map[string]string
		err     error
		code    int
		said    string
		listen  string
		standby int
	}{
		{"last before the default", map[string]string{"listen_ip": "there", "tun": "off", "name": "a, b", "standby": "7"}, nil, 0, "", "there", 2},
		{"command line wins", map[string]string{"tun": "off"}, nil, 0, "", "default", 2},
		{"unknown", map[string]string{"listen-pi": "hush"}, nil, 2, `unknown setting "listen-pi" (did you mean "listen-ip"?)`, "", 0},
		{"what is no setting", map[string]string{"config": "hush"}, nil, 2, `unknown setting "config"`, "", 0},
		{"place fails", nil, errors.New("store away"), 2, "store away", "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := newUp(t)
			start, _, err := u.root.Find([]string{"up"})
			if err != nil {
				t.Fatal(err)
			}
			start.PreRunE = nil
			Bind(start).Elsewhere(func(context.Context) (string, map[string]string, error) {
				if u.tun != "on" {
					t.Error("the place is asked before flags are set")
				}
				return "the store", tc.values, tc.err
			})
			code, said := u.exec(t, "", "up", "--tun", "on", "--token", "x")
			if code != tc.code || !strings.Contains(said, tc.said) || strings.Contains(said, "hush") {
				t.Fatalf("exit %d, said %q; want %d with %q", code, said, tc.code, tc.said)
			}
			if code == 0 && (u.listen != tc.listen || u.count != tc.standby || u.tun != "on") {
				t.Errorf("listen %q, standby %d, tun %q", u.listen, u.count, u.tun)
			}
		})
	}
}
