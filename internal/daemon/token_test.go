package daemon

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// planted is a secret that no output may hold.
const planted = "sw1-planted-secret"

func TestTokenSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("  from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	creds := t.TempDir()
	if err := os.WriteFile(filepath.Join(creds, "token"), []byte("from-credential\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, stdin string
		env         map[string]string
		args        []string
		want        string
		warns       bool
	}{
		{name: "none"},
		{name: "file", args: []string{"--token-file", file}, want: "from-file"},
		{name: "stdin", stdin: "from-stdin\n", args: []string{"--token-file", "-"}, want: "from-stdin"},
		{name: "argument", args: []string{"--token", "from-argv"}, want: "from-argv", warns: true},
		{name: "environment", env: map[string]string{"SALLYWAY_TOKEN": "from-env"}, want: "from-env"},
		{name: "environment names file", env: map[string]string{"SALLYWAY_TOKEN_FILE": file}, want: "from-file"},
		{name: "credential", env: map[string]string{"CREDENTIALS_DIRECTORY": creds}, want: "from-credential"},
		{name: "flag beats environment", env: map[string]string{"SALLYWAY_TOKEN": "from-env"}, args: []string{"--token-file", file}, want: "from-file"},
		{name: "environment beats credential", env: map[string]string{"SALLYWAY_TOKEN": "from-env", "CREDENTIALS_DIRECTORY": creds}, want: "from-env"},
		{name: "no credential in folder", env: map[string]string{"CREDENTIALS_DIRECTORY": t.TempDir()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			u := newUp(t)
			code, out := u.exec(t, tc.stdin, append([]string{"up"}, tc.args...)...)
			if code != ExitOK || u.token.Reveal() != tc.want {
				t.Fatalf("exit %d, token %q, want %q: %s", code, u.token.Reveal(), tc.want, out)
			}
			if got := strings.Contains(out, "level=WARN"); got != tc.warns {
				t.Fatalf("warned %v, want %v: %s", got, tc.warns, out)
			}
			if os.Getenv("SALLYWAY_TOKEN") != "" {
				t.Fatal("SALLYWAY_TOKEN is still in the environment")
			}
		})
	}
}

func TestTokenErrors(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("a"), maxToken+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, stdin string
		args        []string
		want        string
	}{
		{"both", "", []string{"--token", planted, "--token-file", "-"}, "both"},
		{"empty", "\n", []string{"--token-file", "-"}, "empty"},
		{"two words", planted + " x", []string{"--token-file", "-"}, "more than one word"},
		{"missing file", "", []string{"--token-file", filepath.Join(dir, "none")}, "no such file"},
		{"too large", "", []string{"--token-file", big}, "larger than"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out := newUp(t).exec(t, tc.stdin, append([]string{"up"}, tc.args...)...)
			if code != ExitUsage || !strings.Contains(out, tc.want) || strings.Contains(out, planted) {
				t.Fatalf("exit %d: %q, want %q and no secret", code, out, tc.want)
			}
		})
	}
}

func TestOpenTokenFileWarns(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(planted), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	code, out := newUp(t).exec(t, "", "up", "--token-file", file)
	if code != ExitOK || !strings.Contains(out, "chmod 600") || strings.Contains(out, planted) {
		t.Fatalf("exit %d: %s", code, out)
	}
}

func TestSecretNeverShows(t *testing.T) {
	s := Secret(planted)
	var out strings.Builder
	for _, verb := range []string{"%s", "%v", "%+v", "%#v", "%q", "%x", "%X", "%d", "%t", "%10s"} {
		fmt.Fprintf(&out, verb+verb+"\n", s, struct{ S Secret }{s})
	}
	for _, format := range []string{"text", "json"} {
		log, err := NewLogger(&out, "debug", format)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("m", "x", s, "struct", struct{ S Secret }{s}, "token", planted, "node-password", []byte(planted), "Authorization", planted)
	}
	j, err := json.Marshal(map[string]any{"a": s, "b": []Secret{s}})
	if err != nil {
		t.Fatal(err)
	}
	y, err := yaml.Marshal(map[string]any{"a": s})
	if err != nil {
		t.Fatal(err)
	}
	text := out.String() + string(j) + string(y)
	if hex := fmt.Sprintf("%x", planted); strings.Contains(text, planted) || strings.Contains(strings.ToLower(text), hex) {
		t.Fatalf("the secret shows:\n%s", text)
	}
	if !strings.Contains(text, redacted) {
		t.Fatal("nothing is marked as redacted")
	}
	if s.Reveal() != planted || Secret("").String() != "" {
		t.Fatal("Reveal or the empty secret is wrong")
	}
}

func TestTokenFlagHelpHidesValue(t *testing.T) {
	t.Setenv("SALLYWAY_TOKEN", planted)
	if _, out := newUp(t).exec(t, "", "up", "--help"); strings.Contains(out, planted) {
		t.Fatalf("help shows the token: %s", out)
	}
}

// TestArgvIsWiped runs this test binary as a program whose arguments hold a token.
func TestArgvIsWiped(t *testing.T) {
	for _, args := range [][]string{{"up", "--token", planted, "--listen-ip", "x"}, {"up", "--token=" + planted}} {
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), helperEnv+"=cmdline")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if strings.Contains(string(out), planted) {
			t.Fatalf("/proc/self/cmdline holds the token: %q", out)
		}
		for _, want := range []string{"cmdline=", "up", "xxxxxxxx", "token ok"} {
			if !strings.Contains(string(out), want) {
				t.Fatalf("%q lacks %q", out, want)
			}
		}
	}
}

// cmdlineProgram prints its own command line as other processes see it, and whether the token came through.
func cmdlineProgram() int {
	var tf TokenFlags
	root := &cobra.Command{Use: "prog"}
	cmd := &cobra.Command{Use: "up", RunE: func(cmd *cobra.Command, _ []string) error {
		log, err := NewLogger(cmd.ErrOrStderr(), "", "")
		if err != nil {
			return err
		}
		token, err := tf.Read(cmd, log)
		if err != nil {
			return err
		}
		b, err := os.ReadFile("/proc/self/cmdline")
		if err != nil {
			return err
		}
		fmt.Printf("cmdline=%q\n", b)
		if token.Reveal() == planted {
			fmt.Println("token ok")
		}
		return nil
	}}
	cmd.Flags().String("listen-ip", "", "")
	tf.Register(cmd.Flags())
	Bind(cmd)
	root.AddCommand(cmd)
	return Main(root)
}
