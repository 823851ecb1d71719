package daemon

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestWarnUnknown(t *testing.T) {
	var o Options
	start := &cobra.Command{Use: "start"}
	o.Register(start, Spec{Name: "testd"})
	start.Flags().String("listen-ip", "", "")
	b := Bind(start)
	b.FileKey("peers", new([]string))
	other := &cobra.Command{Use: "other"}
	other.Flags().Bool("json", false, "")
	other.Flags().String("deadline", "", "")
	root := &cobra.Command{Use: "testd"}
	root.AddCommand(start, other)
	for env, want := range map[string]string{
		"SALLYWAY_LISTEN_IP=192.0.2.1":   "",
		"SALLYWAY_LISTNE_IP=192.0.2.1":   "name=SALLYWAY_LISTNE_IP did_you_mean=SALLYWAY_LISTEN_IP",
		"SALLYWAY_LISTENIP=192.0.2.1":    "name=SALLYWAY_LISTENIP did_you_mean=SALLYWAY_LISTEN_IP",
		"SALLYWAY_LISTEN-IP=192.0.2.1":   "name=SALLYWAY_LISTEN-IP did_you_mean=SALLYWAY_LISTEN_IP",
		"Sallyway_Listen_IP=192.0.2.1":   "name=Sallyway_Listen_IP did_you_mean=SALLYWAY_LISTEN_IP",
		"SALLYWAY_TOKEN=x":               "",
		"SALLYWAY_TOKENS=secret":         "name=SALLYWAY_TOKENS did_you_mean=SALLYWAY_TOKEN",
		"SALLYWAY_TOKENFILE=secret":      "name=SALLYWAY_TOKENFILE did_you_mean=SALLYWAY_TOKEN_FILE",
		"SALLYWAY_DEADLINE=1s":           "",
		"SALLYWAY_CONFIG=x":              "",
		"SALLYWAY_NO_GSO=1":              "",
		"SALLYWAY_NOGSO=1":               "name=SALLYWAY_NOGSO did_you_mean=SALLYWAY_NO_GSO",
		"SALLYWAY_ORG=acme":              "",
		"SALLYWAY_JSON=1":                "name=SALLYWAY_JSON",  // a flag of the command line alone
		"SALLYWAY_PEERS=x":               "name=SALLYWAY_PEERS", // a key of the file alone
		"SALLYWAY_SOMETHING_ELSE=secret": "name=SALLYWAY_SOMETHING_ELSE",
		"SALLYWAY_":                      "name=SALLYWAY_",
		"SALLY=1":                        "",
		"PATH=/bin":                      "",
	} {
		var out bytes.Buffer
		warnUnknown(slog.New(slog.NewTextHandler(&out, nil)), start, []string{"HOME=/", env, "SALLYWAY_STATE=/x"})
		line := strings.TrimSpace(out.String())
		if (want == "") != (line == "") || !strings.HasSuffix(line, want) || strings.Contains(line, "secret") {
			t.Errorf("%s: %q, want %q at its end", env, line, want)
		}
	}
}

// A daemon says so when it starts.
func TestOpenWarnsOfUnknownVariables(t *testing.T) {
	t.Setenv("SALLYWAY_LOGLEVEL", "debug")
	var o Options
	start := &cobra.Command{Use: "start"}
	o.Register(start, Spec{Name: "testd"})
	o.State, o.MetricsListen = t.TempDir(), ""
	var out bytes.Buffer
	sh, err := Open(Spec{Name: "testd"}, &o, &out)
	if err != nil {
		t.Fatal(err)
	}
	defer sh.Close()
	if !strings.Contains(out.String(), "name=SALLYWAY_LOGLEVEL did_you_mean=SALLYWAY_LOG_LEVEL") {
		t.Errorf("%q", out.String())
	}
}
