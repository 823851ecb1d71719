package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
)

var testSpec = Spec{
	Name: "testd", Role: "test", Start: []string{"up"},
	RenderStatus: func(w io.Writer, doc json.RawMessage) error {
		_, err := fmt.Fprintf(w, "rendered %s", bytes.TrimSpace(doc))
		return err
	},
	Checks: func(context.Context, string) []Check {
		return []Check{{Check: "offline", Result: Pass, Detail: "fine"}}
	},
}

// start opens a shell on dir and runs it until the test ends; stop ends it and returns Run's error.
func start(t *testing.T, dir string, prepare func(*Shell)) (sh *Shell, stop func() error) {
	t.Helper()
	opts := &Options{State: dir, MetricsListen: "127.0.0.1:0"}
	sh, err := Open(testSpec, opts, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(sh)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- sh.Run(ctx, func(ctx context.Context) error {
			close(ready)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-ready
	var result error
	stopped := false
	stop = func() error {
		if !stopped {
			stopped = true
			cancel()
			result = errors.Join(<-done, sh.Close())
		}
		return result
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return sh, stop
}

// command runs one of Commands on dir.
func command(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	root := &cobra.Command{Use: "testd"}
	root.AddCommand(Commands(testSpec)...)
	root.AddCommand(DrainCommand(testSpec))
	var out, errs bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&errs)
	if dir != "" {
		args = append(args, "--state", dir)
	}
	root.SetArgs(args)
	code = run(context.Background(), root)
	return code, out.String(), errs.String()
}

func TestShell(t *testing.T) {
	drained := make(chan struct{}, 1)
	dir := t.TempDir()
	sh, stop := start(t, dir, func(sh *Shell) {
		sh.OnStatus = func(context.Context) (any, error) { return map[string]int{"flows": 3}, nil }
		sh.OnDoctor = func(context.Context) []Check {
			return []Check{{Check: "online", Result: Warn, Detail: "so-so", Remedy: "do this"}}
		}
		sh.OnDrain = func(context.Context) error { drained <- struct{}{}; return nil }
		sh.Handle("POST /own", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var n int
			if err := json.NewDecoder(r.Body).Decode(&n); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			writeJSON(w, http.StatusOK, n+1)
		}))
	})
	fi, err := os.Stat(filepath.Join(dir, controlSocket))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v %v", fi.Mode(), err)
	}

	if code, out, _ := command(t, dir, "status"); code != ExitOK || !strings.HasPrefix(out, "rendered {") {
		t.Fatalf("status: %d %q", code, out)
	}
	var doc struct{ Flows int }
	if code, out, _ := command(t, dir, "status", "--json"); code != ExitOK || json.Unmarshal([]byte(out), &doc) != nil || doc.Flows != 3 {
		t.Fatalf("status --json: %d %q", code, out)
	}
	code, out, _ := command(t, dir, "doctor")
	for _, want := range []string{"state folder", "offline", "running", "so-so", "online: do this"} {
		if !strings.Contains(out, want) {
			t.Fatalf("doctor: %d, %q lacks %q", code, out, want)
		}
	}
	if code != ExitOK {
		t.Fatalf("doctor with warnings: exit %d", code)
	}
	var n int
	if err := Dial(dir).Post(t.Context(), "/own", 41, &n); err != nil || n != 42 {
		t.Fatalf("own handler: %d %v", n, err)
	}
	var answer *AnswerError
	if err := Dial(dir).Get(t.Context(), "/none", nil); !errors.As(err, &answer) || answer.Status != http.StatusNotFound {
		t.Fatalf("unknown path: %v", err)
	}

	if code, out, errs := command(t, dir, "healthcheck"); code != ExitDegraded || out != "" || !strings.Contains(errs, "starting") {
		t.Fatalf("healthcheck before ready: %d %q %q", code, out, errs)
	}
	if code, out, _ := command(t, dir, "healthcheck", "--json"); code != ExitDegraded || !strings.Contains(out, `"ready": false`) {
		t.Fatalf("healthcheck --json before ready: %d %q", code, out)
	}
	sh.Ready("serving")
	if code, out, _ := command(t, dir, "healthcheck"); code != ExitOK || out != "ready\n" {
		t.Fatalf("healthcheck: %d %q", code, out)
	}
	sh.Health.Set("relay", errors.New("no leg"))
	if code, _, errs := command(t, dir, "healthcheck"); code != ExitDegraded || !strings.Contains(errs, "no leg") {
		t.Fatalf("healthcheck degraded: %d %q", code, errs)
	}
	sh.Health.Set("relay", nil)

	if code, _, errs := command(t, dir, "drain"); code != ExitOK {
		t.Fatalf("drain: %d %s", code, errs)
	}
	<-drained
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if sh.Health.Readiness().Ready {
		t.Fatal("ready after the end")
	}
	if _, err := os.Stat(filepath.Join(dir, controlSocket)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("socket after the end: %v", err)
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	for _, verb := range []string{"status", "healthcheck", "drain"} {
		if code, _, errs := command(t, dir, verb); code != ExitDegraded || !strings.Contains(errs, "testd up") || !strings.Contains(errs, dir) {
			t.Errorf("%s: %d %q", verb, code, errs)
		}
	}
	if code, _, errs := command(t, dir, "down"); code != ExitOK || !strings.Contains(errs, "not running") {
		t.Errorf("down: %d %q", code, errs)
	}
	if code, out, _ := command(t, dir, "doctor"); code != ExitOK || !strings.Contains(out, "not running") {
		t.Errorf("doctor: %d %q", code, out)
	}
	var checks []Check
	if code, out, _ := command(t, dir, "doctor", "--json"); code != ExitOK || json.Unmarshal([]byte(out), &checks) != nil || len(checks) != 3 {
		t.Errorf("doctor --json: %d %q", code, out)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if code, out, _ := command(t, dir, "doctor"); code != ExitDegraded || !strings.Contains(out, "FAIL") {
		t.Errorf("doctor with a failure: %d %q", code, out)
	}
}

func TestDrainRefused(t *testing.T) {
	dir := t.TempDir()
	start(t, dir, nil)
	if code, _, errs := command(t, dir, "drain"); code != ExitDegraded || !strings.Contains(errs, "cannot be drained") {
		t.Fatalf("%d %q", code, errs)
	}
}

// TestDown stops a real process through its socket.
func TestDown(t *testing.T) {
	dir := t.TempDir()
	cmd, out, stderr := program(t, nil, "up", "--state", dir)
	expectLine(t, out, "ready", stderr)
	if code, _, errs := command(t, dir, "down"); code != ExitOK || !strings.Contains(errs, "stopped") {
		t.Fatalf("down: %d %s", code, errs)
	}
	if err := cmd.Wait(); err != nil { // exit code 0, so that Restart=on-failure leaves it down
		t.Fatalf("%v: %s", err, stderr)
	}
}

// TestKilledDaemon shows that a socket and a lock left by a dead daemon are in nobody's way.
func TestKilledDaemon(t *testing.T) {
	dir := t.TempDir()
	cmd, out, stderr := program(t, nil, "up", "--state", dir)
	expectLine(t, out, "ready", stderr)
	second, _, stderr2 := program(t, nil, "up", "--state", dir)
	var exit *exec.ExitError
	if err := second.Wait(); !errors.As(err, &exit) || exit.ExitCode() != ExitUsage || !strings.Contains(stderr2.String(), fmt.Sprint("pid ", cmd.Process.Pid)) {
		t.Fatalf("second daemon: %v: %s", err, stderr2)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if _, err := os.Stat(filepath.Join(dir, controlSocket)); err != nil {
		t.Fatalf("no stale socket to test with: %v", err)
	}
	if code, _, errs := command(t, dir, "status"); code != ExitDegraded || !strings.Contains(errs, "not running") {
		t.Fatalf("status on a stale socket: %d %q", code, errs)
	}
	start(t, dir, nil)
	if code, _, errs := command(t, dir, "status"); code != ExitOK {
		t.Fatalf("status: %d %q", code, errs)
	}
}

func TestLongStatePath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30), strings.Repeat("er", 50))
	_, stop := start(t, dir, nil)
	if code, _, errs := command(t, dir, "status"); code != ExitOK {
		t.Fatalf("status: %d %q", code, errs)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, controlSocket)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("socket after the end: %v", err)
	}
}

// TestForeignUserIsRefused opens the socket's mode, so that the peer's credentials alone decide.
func TestForeignUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	dir, err := os.MkdirTemp("", "sallyway-daemon")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	start(t, dir, nil)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Join(dir, controlSocket), 0o666)); err != nil {
		t.Fatal(err)
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(dir, "prog") // where another user can read it
	if err := os.WriteFile(prog, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]int{0: ExitOK, 65534: ExitDegraded} {
		cmd := exec.Command(prog, "status", "--state", dir)
		cmd.Dir = "/"
		cmd.Env = []string{helperEnv + "=daemon", "HOME=/nonexistent", "PATH=/usr/bin:/bin"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, _ := cmd.CombinedOutput() // the exit code is looked at
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("uid %d: exit %d, want %d: %s", uid, code, want, out)
		}
	}
}

func TestMetrics(t *testing.T) {
	var stuck atomic.Bool
	sh, stop := start(t, t.TempDir(), func(sh *Shell) {
		sh.Alive = func() error {
			if stuck.Load() {
				return errors.New("stuck")
			}
			return nil
		}
	})
	base := "http://" + sh.MetricsAddr().String()
	get := func(path, host string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		req.Close = true
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	for _, path := range []string{"/readyz", "/healthz"} {
		if code, body := get(path, ""); code != 503 || !strings.Contains(body, "starting") {
			t.Fatalf("%s: %d %q", path, code, body)
		}
	}
	if code, body := get("/livez", ""); code != 200 || !strings.Contains(body, `"live": true`) {
		t.Fatalf("livez before it is ready: %d %q", code, body)
	}
	sh.Ready("")
	for _, path := range []string{"/readyz", "/healthz"} {
		if code, _ := get(path, ""); code != 200 {
			t.Fatalf("%s when ready: %d", path, code)
		}
	}
	sh.Health.Set("database", errors.New("the disk is full"))
	if code, body := get("/healthz", ""); code != 503 || !strings.Contains(body, "the disk is full") {
		t.Fatalf("healthz with a condition: %d %q", code, body)
	}
	if code, _ := get("/livez", ""); code != 200 {
		t.Fatalf("livez with a condition: %d", code)
	}
	stuck.Store(true)
	if code, body := get("/livez", ""); code != 503 || !strings.Contains(body, "stuck") {
		t.Fatalf("livez of a daemon that does not work: %d %q", code, body)
	}
	code, body := get("/metrics", "localhost:1")
	for _, want := range []string{`sallyway_build_info{`, "go_goroutines", "process_resident_memory_bytes"} {
		if code != 200 || !strings.Contains(body, want) {
			t.Fatalf("metrics: %d, no %q", code, want)
		}
	}
	if code, body := get("/metrics", "evil.example:80"); code != http.StatusMisdirectedRequest || strings.Contains(body, "go_") {
		t.Fatalf("rebound name: %d %q", code, body)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", sh.MetricsAddr().String()); err == nil {
		c.Close()
		t.Fatal("metrics are served after the end")
	}
}

func TestMetricsAddressTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	_, err = Open(testSpec, &Options{State: dir, MetricsListen: l.Addr().String()}, io.Discard)
	if ExitCode(err) != ExitUsage || !strings.Contains(err.Error(), "--metrics-listen") {
		t.Fatalf("%v", err)
	}
	if held, err := locked(dir); held || err != nil {
		t.Fatalf("the lock is kept: %v %v", held, err)
	}
}

func TestCheckHost(t *testing.T) {
	h := CheckHost(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), "metrics.example")
	for host, want := range map[string]int{
		"127.0.0.1": 200, "127.0.0.1:9": 200, "[::1]:9": 200, "[::1]": 200, "LOCALHOST:9": 200, "metrics.example:9": 200, "10.0.0.1": 200,
		"": 421, "evil.example": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example:80": 421, "metrics.example.evil:9": 421,
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Host = host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		}
	}
}

func TestRunReturnsBodyError(t *testing.T) {
	sh, err := Open(testSpec, &Options{State: t.TempDir()}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	defer sh.Close()
	if err := sh.Run(t.Context(), func(context.Context) error { return io.ErrUnexpectedEOF }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	err = sh.Run(ctx, func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("drain: %w", io.ErrNoProgress) })
	if !errors.Is(err, io.ErrNoProgress) {
		t.Fatalf("an error while stopping is lost: %v", err)
	}
}

func TestStateFlag(t *testing.T) {
	spec := Spec{Name: "platformd", Role: "platform", Start: []string{"serve"}, StateFlag: "data"}
	var opts Options
	serve := &cobra.Command{Use: "serve", RunE: func(cmd *cobra.Command, _ []string) error {
		sh, err := Open(spec, &opts, io.Discard)
		if err != nil {
			return err
		}
		return sh.Close()
	}}
	opts.Register(serve, spec)
	Bind(serve)
	root := &cobra.Command{Use: "platformd"}
	root.AddCommand(serve)
	root.AddCommand(Commands(spec)...)
	var errs bytes.Buffer
	root.SetErr(&errs)
	dir := t.TempDir()
	held, err := OpenState(dir, "platformd", "data")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for _, verb := range []string{"serve", "status"} {
		errs.Reset()
		root.SetArgs([]string{verb, "--data", dir})
		if code := run(t.Context(), root); code == ExitOK || !strings.Contains(errs.String(), "--data") {
			t.Fatalf("%s: %d %s", verb, code, &errs)
		}
	}
}

func TestBadLogFlags(t *testing.T) {
	for _, o := range []Options{{LogLevel: "loud"}, {LogFormat: "xml"}} {
		o.State = t.TempDir()
		if _, err := Open(testSpec, &o, io.Discard); ExitCode(err) != ExitUsage {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestVersionCommand(t *testing.T) {
	if code, out, _ := command(t, "", "version"); code != ExitOK || !strings.HasPrefix(out, "testd ") {
		t.Fatalf("%d %q", code, out)
	}
	var v map[string]string
	if code, out, _ := command(t, "", "version", "--json"); code != ExitOK || json.Unmarshal([]byte(out), &v) != nil || v["version"] == "" {
		t.Fatalf("%d %q", code, out)
	}
}

// TestMetricsThatFail serves what can be gathered: a database that is away must not take the alarm of that with it.
func TestMetricsThatFail(t *testing.T) {
	broken := prometheus.NewDesc("testd_broken", "Is not to be had.", []string{"org"}, nil)
	sh, _ := start(t, t.TempDir(), func(sh *Shell) {
		counter := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "testd_things_total", Help: `Says "things", and \.`, ConstLabels: prometheus.Labels{"b": "x"}}, []string{"a"})
		sh.Metrics.MustRegister(failing{broken}, counter, prometheus.NewCounterFunc(
			prometheus.CounterOpts{Name: "testd_more_total", Help: "More.", ConstLabels: prometheus.Labels{"reason": "a"}}, func() float64 { return 1 }), prometheus.NewCounterFunc(
			prometheus.CounterOpts{Name: "testd_more_total", Help: "More.", ConstLabels: prometheus.Labels{"reason": "b"}}, func() float64 { return 1 }))
	})
	res, err := http.Get("http://" + sh.MetricsAddr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 || !strings.Contains(string(b), "testd_more_total") || strings.Contains(string(b), "testd_broken") {
		t.Errorf("%d %v\n%s", res.StatusCode, err, b)
	}
	var names []MetricName
	if err := Dial(sh.State.Dir()).Get(t.Context(), "/metrics/names", &names); err != nil {
		t.Fatal(err)
	}
	by := make(map[string]MetricName)
	for _, n := range names {
		by[n.Name] = n
	}
	for _, want := range []MetricName{
		{"testd_things_total", `Says "things", and \.`, []string{"a", "b"}},
		{"testd_more_total", "More.", []string{"reason"}},
		{"testd_broken", "Is not to be had.", []string{"org"}},
		{"go_goroutines", by["go_goroutines"].Help, nil},
		{"sallyway_build_info", by["sallyway_build_info"].Help, []string{"commit", "daemon", "version"}},
	} {
		if !reflect.DeepEqual(by[want.Name], want) {
			t.Errorf("%+v, want %+v", by[want.Name], want)
		}
	}
}

// failing is a collector that cannot collect.
type failing struct{ d *prometheus.Desc }

func (f failing) Describe(ch chan<- *prometheus.Desc) { ch <- f.d }

func (f failing) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(f.d, errors.New("the database is away"))
}
