package deploy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"sallyway/client"
	"sallyway/gateway"
	"sallyway/internal/admin"
	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/telemetry/otlptest"
	"sallyway/license"
	"sallyway/platform/platformd"
	"sallyway/relay/relayd"
)

// patience is for everything that has to come: CI is loaded.
const patience = time.Minute

// running is a daemon in this process, as its own command line starts it.
type running struct {
	name  string
	state string
	log   *logBuffer
	stop  func()
}

// logBuffer takes what a daemon writes to standard error.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// lines are what was written, line by line.
func (l *logBuffer) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Split(strings.TrimSuffix(l.b.String(), "\n"), "\n")
}

// start runs a daemon until the test ends.
func start(t *testing.T, name string, cmd *cobra.Command, state string, args ...string) *running {
	t.Helper()
	r := &running{name: name, state: state, log: new(logBuffer)}
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(append(args, "--log-format", "json", "--log-level", "debug", "--metrics-listen", "127.0.0.1:0"))
	cmd.SetErr(r.log)
	cmd.SetOut(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cmd.ExecuteContext(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s ended with %v", name, err)
		}
	})
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, strings.Join(r.log.lines(), "\n"))
		}
	})
	return r
}

// metricsURL is where its metrics are, as its log says.
func (r *running) metricsURL(t *testing.T) string {
	t.Helper()
	for _, line := range r.log.lines() {
		var l struct{ Msg, Listen string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "metrics" {
			return "http://" + l.Listen
		}
	}
	t.Fatalf("%s does not say where its metrics are", r.name)
	return ""
}

// ready waits until the daemon says that it is.
func (r *running) ready(t *testing.T) *running {
	t.Helper()
	eventually(t, r.name+" is ready", func() error { return daemon.Dial(r.state).Get(t.Context(), "/readyz", nil) })
	return r
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not in time: %s: %v", what, err)
		}
	}
}

// sallyway runs the command of administrators, and decodes what it prints into out.
func sallyway(t *testing.T, out any, args ...string) {
	t.Helper()
	root := admin.Command()
	daemon.TraceCommands(root)
	var stdout, stderr bytes.Buffer
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	root.SetArgs(append(args, "--json"))
	root.SilenceErrors, root.SilenceUsage = true, true
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("sallyway %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	if out != nil {
		if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
			t.Fatalf("sallyway %s: %v\n%s", strings.Join(args, " "), err, &stdout)
		}
	}
}

// freePort is one that nothing listens on by TCP just now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// greeter is a resource: it says hello to whoever connects.
func greeter(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello\n") // who goes away does not hear it
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// connectProxy is an HTTP proxy for CONNECT.
func connectProxy(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { _ = c.Close() })()
				in := bufio.NewReader(c)
				req, err := http.ReadRequest(in)
				if err != nil || req.Method != http.MethodConnect {
					return
				}
				up, err := net.Dial("tcp", req.Host)
				if err != nil {
					return
				}
				defer up.Close()
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
				all.Go(func() { _, _ = io.Copy(up, in); _ = up.Close() })
				_, _ = io.Copy(c, up)
			})
		}
	})
	t.Cleanup(func() { cancel(); _ = l.Close(); all.Wait() })
	return l.Addr().String()
}

// site is every daemon there is, on loopback.
type site struct {
	collector *otlptest.Collector
	daemons   []*running // platformd, relayd, gatewayd, sallyway connect, sallyway-license
	forward   string     // where the client's forward to the resource listens
}

// startSite runs them with everything configured that has metrics of its own: PostgreSQL, a syslog receiver, a proxy.
func startSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{collector: otlptest.Start(t)}
	t.Setenv("SALLYWAY_CREDENTIALS", filepath.Join(dir, "credentials.json"))
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", s.collector.URL)
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
	add := func(name string, cmd *cobra.Command, args ...string) *running {
		state := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		flag := "--state"
		if strings.HasPrefix(name, "platformd") || strings.HasPrefix(name, "sallyway-license") {
			flag = "--data"
		}
		r := start(t, name, cmd, state, append(args, flag, state)...)
		s.daemons = append(s.daemons, r)
		return r
	}
	pg := backing.StartPostgres(t, false)
	platformPort := freePort(t)
	p := add("platformd", platformd.Command(), "serve", "--listen", "127.0.0.1:"+platformPort, "--advertise-url", "https://127.0.0.1:"+platformPort,
		"--database", pg.Database(t), "--audit-syslog", "udp://127.0.0.1:9", "--probe-relays", "private").ready(t)
	sallyway(t, nil, "login", "--url", "https://127.0.0.1:"+platformPort, "--token-file", filepath.Join(p.state, "admin.token"))
	token := func(args ...string) string {
		var made control.CreatedNode
		sallyway(t, &made, args...)
		file := filepath.Join(dir, fmt.Sprint(made.Name, ".token"))
		if err := os.WriteFile(file, []byte(made.Token), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	relayPort, forward, web := freePort(t), freePort(t), greeter(t)
	add("relayd", relayd.Command(), "start", "--token-file", token("relay", "create", "fra-1", "--host", "127.0.0.1", "--port", relayPort),
		"--listen-ip", "127.0.0.1", "--listen-port", relayPort, "--ssh-port", freePort(t), "--tls-port", freePort(t)).ready(t)
	add("gatewayd", gateway.Command(), "up", "--token-file", token("gateway", "create", "office"), "--tun", "off", "--dns", "off", "--routes", "off", "--direct", "off",
		"--allow", "127.0.0.1 "+web).ready(t)
	laptop := token("client", "create", "laptop")
	sallyway(t, nil, "resource", "create", "web", "--gateway", "office", "--address", "127.0.0.1", "--tcp", web)
	sallyway(t, nil, "policy", "allow", "--client", "laptop", "--resource", "web")
	add("sallyway connect", connectCommand(), "connect", "--token-file", laptop, "--tun", "off", "--direct", "off", "--forward", forward+"=web:"+web,
		"--egress-proxy", "http://"+connectProxy(t)).ready(t)
	add("sallyway-license", license.Command(), "serve", "--listen", "127.0.0.1:0").ready(t)
	s.forward = "127.0.0.1:" + forward
	return s
}

// connectCommand is the program sallyway with its daemon.
func connectCommand() *cobra.Command {
	root := &cobra.Command{Use: "sallyway"}
	root.AddCommand(client.Command())
	return root
}

// call connects to the resource through the client until it answers.
func (s *site) call(t *testing.T) {
	t.Helper()
	eventually(t, "the resource answers", func() error {
		c, err := net.DialTimeout("tcp", s.forward, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "hello\n" {
			return fmt.Errorf("%q, %w", line, err)
		}
		return nil
	})
}
