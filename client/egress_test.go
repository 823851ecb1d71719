package client

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/egress"
)

// parseEgress runs a command with the flags about the proxy.
func parseEgress(t *testing.T, args ...string) (*egress.Dialer, string, error) {
	t.Helper()
	var e EgressFlags
	cmd := &cobra.Command{Use: "test", SilenceErrors: true, SilenceUsage: true, RunE: func(cmd *cobra.Command, _ []string) error { return e.Parse(cmd) }}
	e.Register(cmd)
	daemon.Bind(cmd)
	cmd.SetArgs(args)
	var out strings.Builder
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err := cmd.Execute()
	return e.Dialer(), out.String(), err
}

// TestEgressFlags: the flag beats Sallyway's variable, that the file, that the usual environment; a password may stand where nobody else reads.
func TestEgressFlags(t *testing.T) {
	for _, name := range []string{"HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"} {
		t.Setenv(name, "")
		t.Setenv(strings.ToLower(name), "")
	}
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "settings.yaml")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const secret = "swordfish"
	open := "http://ida:" + secret + "@p:1"
	for _, tc := range []struct {
		name  string
		env   map[string]string
		args  []string
		proxy string
		bad   bool
	}{
		{name: "nothing"},
		{name: "environment", env: map[string]string{"https_proxy": "http://p:1"}, proxy: "http://p:1"},
		{name: "its password", env: map[string]string{"https_proxy": open}, proxy: "http://p:1"},
		{name: "Sallyway's own", env: map[string]string{"https_proxy": "http://p:1", "SALLYWAY_EGRESS_PROXY": "http://ida:" + secret + "@q:1"}, proxy: "http://q:1"},
		{name: "the file", env: map[string]string{"https_proxy": "http://p:1"}, args: []string{"--config", file("egress-proxy: socks5h://q:1\n")}, proxy: "socks5h://q:1"},
		{name: "the flag", env: map[string]string{"SALLYWAY_EGRESS_PROXY": "http://p:1"}, args: []string{"--egress-proxy", "http://q:1"}, proxy: "http://q:1"},
		{name: "none", env: map[string]string{"https_proxy": "http://p:1"}, args: []string{"--egress-proxy=none"}},
		{name: "a password in the flag", args: []string{"--egress-proxy", open}, bad: true},
		{name: "a password in the file", args: []string{"--config", file("egress_proxy: " + open + "\n")}, bad: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, value := range tc.env {
				t.Setenv(name, value)
			}
			d, out, err := parseEgress(t, tc.args...)
			if tc.bad {
				if err == nil || daemon.ExitCode(err) != daemon.ExitUsage || !strings.Contains(err.Error(), "--egress-proxy-credentials") || strings.Contains(err.Error()+out, secret) {
					t.Errorf("%v %s", err, out)
				}
				return
			}
			if err != nil || d.Proxy() != tc.proxy || strings.Contains(out, secret) {
				t.Errorf("%q, %v, want %q", d.Proxy(), err, tc.proxy)
			}
		})
	}
}

// TestEgressStatusLine: what stands in the status about the proxy, and nothing where there is none.
func TestEgressStatusLine(t *testing.T) {
	for want, st := range map[string]*egress.Status{
		"": nil,
		"proxy      http://p:1 (HTTPS_PROXY), not used yet\n": {Proxy: "http://p:1", Source: "HTTPS_PROXY"},
		"3 connections, 1 failed\n":                           {Proxy: "http://p:1", Since: time.Now(), Connections: 3, Failures: 1},
		": wrong password\nremedy     another one\n":          {Proxy: "http://p:1", Since: time.Now(), Error: "wrong password", Remedy: "another one"},
	} {
		var out strings.Builder
		RenderEgress(&out, st)
		if !strings.HasSuffix(out.String(), want) || (st == nil) != (out.String() == "") {
			t.Errorf("%q, want %q", out.String(), want)
		}
	}
	if RelayDial(nil) != nil || RelayDial(new(egress.Dialer)) != nil {
		t.Error("legs dial by name where there is no proxy")
	}
	d, err := egress.New(egress.Config{URL: "http://p:1"})
	if err != nil || RelayDial(d) == nil {
		t.Errorf("legs do not dial by the proxy: %v", err)
	}
}

// TestEgressMetrics: what was opened and what was not is counted, and a proxy that nobody has tried, or that does not answer, is not usable.
func TestEgressMetrics(t *testing.T) {
	d, err := egress.New(egress.Config{URL: "http://" + strings.Repeat("x", 64) + ".test"}) // a name that no resolver is even asked for
	if err != nil {
		t.Fatal(err)
	}
	values := func() map[string]float64 {
		t.Helper()
		r := prometheus.NewRegistry()
		r.MustRegister(egressMetrics(d)...)
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]float64{}
		for _, f := range families {
			m := f.GetMetric()[0]
			out[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
		return out
	}
	if got := values(); len(got) != 3 || got["sallyway_egress_proxy_usable"] != 0 || got["sallyway_egress_failures_total"] != 0 {
		t.Errorf("before the first try: %v", got)
	}
	if _, err := d.DialContext(t.Context(), "tcp", "192.0.2.1:1"); err == nil {
		t.Fatal("it connects")
	}
	if got := values(); got["sallyway_egress_proxy_usable"] != 0 || got["sallyway_egress_failures_total"] != 1 || got["sallyway_egress_connections_total"] != 0 {
		t.Errorf("after a failure: %v", got)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = bufio.NewReader(c).ReadString('\n')
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\n\r\n")) // the other end notices
			c.Close()
		}
		ended <- err
	}()
	if d, err = egress.New(egress.Config{URL: "http://" + l.Addr().String()}); err != nil {
		t.Fatal(err)
	}
	c, err := d.DialContext(t.Context(), "tcp", "192.0.2.1:1")
	if err != nil {
		t.Fatal(err, <-ended)
	}
	c.Close()
	if got := values(); got["sallyway_egress_proxy_usable"] != 1 || got["sallyway_egress_connections_total"] != 1 {
		t.Errorf("after a success: %v", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
