package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"
)

// helperEnv makes this test binary act as a program instead of running tests.
const helperEnv = "DAEMON_TEST_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperEnv) {
	case "cmdline":
		os.Exit(cmdlineProgram())
	case "daemon":
		os.Exit(daemonProgram())
	}
	goleak.VerifyTestMain(m)
}

// daemonProgram is a daemon that ends at a signal, or ignores it with --stubborn.
func daemonProgram() int {
	spec := Spec{Name: "testd", Role: "test", Start: []string{"up"}}
	var opts Options
	var stubborn bool
	up := &cobra.Command{Use: "up", RunE: func(cmd *cobra.Command, _ []string) error {
		sh, err := Open(spec, &opts, cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		defer sh.Close()
		return sh.Run(cmd.Context(), func(ctx context.Context) error {
			sh.Ready("serving")
			fmt.Println("ready")
			<-ctx.Done()
			fmt.Println("stopping")
			if stubborn {
				select {}
			}
			return nil
		})
	}}
	up.Flags().BoolVar(&stubborn, "stubborn", false, "")
	opts.Register(up, spec)
	Bind(up)
	root := &cobra.Command{Use: spec.Name}
	root.AddCommand(up)
	root.AddCommand(Commands(spec)...)
	return Main(root)
}

// program starts this test binary as the daemon.
func program(t *testing.T, env []string, args ...string) (*exec.Cmd, *bufio.Scanner, *strings.Builder) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(append(os.Environ(), helperEnv+"=daemon"), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr := new(strings.Builder)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, bufio.NewScanner(out), stderr
}

func expectLine(t *testing.T, s *bufio.Scanner, want string, stderr fmt.Stringer) {
	t.Helper()
	if !s.Scan() || s.Text() != want {
		t.Fatalf("got %q, want %q; %v; %s", s.Text(), want, s.Err(), stderr)
	}
}

func TestSignals(t *testing.T) {
	t.Run("first drains", func(t *testing.T) {
		cmd, out, stderr := program(t, nil, "up", "--state", t.TempDir())
		expectLine(t, out, "ready", stderr)
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		expectLine(t, out, "stopping", stderr)
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, stderr)
		}
	})
	t.Run("second ends at once", func(t *testing.T) {
		cmd, out, stderr := program(t, nil, "up", "--stubborn", "--state", t.TempDir())
		expectLine(t, out, "ready", stderr)
		for _, want := range []string{"stopping", ""} {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if want != "" {
				expectLine(t, out, want, stderr)
			}
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != ExitDegraded {
			t.Fatalf("%v: %s", err, stderr)
		}
	})
}

func TestSystemdIsTold(t *testing.T) {
	path := t.TempDir() + "/n"
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd, out, stderr := program(t, []string{"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=20000"}, "up", "--state", t.TempDir())
	expectLine(t, out, "ready", stderr)
	var seen strings.Builder
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		for !strings.Contains(seen.String(), want) {
			if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			n, err := l.Read(buf)
			if err != nil {
				t.Fatalf("no %q in %q: %v", want, seen.String(), err)
			}
			seen.Write(buf[:n])
			seen.WriteByte('\n')
		}
	}
	expect("READY=1\nSTATUS=serving")
	expect("WATCHDOG=1\nWATCHDOG=1") // it goes on
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestKeyLogIsRefused(t *testing.T) {
	cmd, _, stderr := program(t, []string{"SSLKEYLOGFILE=/dev/null"}, "up", "--state", t.TempDir())
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != ExitUsage || !strings.Contains(stderr.String(), "SSLKEYLOGFILE") {
		t.Fatalf("%v: %s", err, stderr)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"upp"}, "unknown command"},
		{[]string{"up", "--listen-ipp", "x"}, `did you mean "--listen-ip"?`},
		{[]string{"up", "surplus"}, "surplus"},
		{[]string{"up", "--standby", "x"}, "standby"},
		{[]string{"group", "creat"}, `did you mean "create"?`},
	} {
		u := newUp(t)
		code, out := u.exec(t, "", tc.args...)
		if code != ExitUsage || !strings.Contains(out, tc.want) || !strings.Contains(out, "--help") || !strings.HasPrefix(out, "testd: ") || u.ran {
			t.Errorf("%q: exit %d: %s", tc.args, code, out)
		}
	}
	if code, out := newUp(t).exec(t, "", "group"); code != ExitOK || !strings.Contains(out, "create") {
		t.Errorf("group alone: exit %d: %s", code, out)
	}
}

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code int
		out  string
	}{
		{nil, ExitOK, ""},
		{errors.New("dial x: refused"), ExitDegraded, "prog: dial x: refused\n"},
		{Usagef("no token\nmake one\nor two"), ExitUsage, "prog: no token\n  make one\n  or two\n"},
		{fmt.Errorf("enrol: %w", Refusedf("token is spent")), ExitEnrolmentRefused, "prog: enrol: token is spent\n"},
		{Silent(ExitDegraded), ExitDegraded, ""},
		{&Error{Message: "no code"}, ExitDegraded, "prog: no code\n"},
		{&Error{Code: ExitUsage, Err: io.EOF}, ExitUsage, "prog: EOF\n"},
	} {
		var out strings.Builder
		root := &cobra.Command{Use: "prog", RunE: func(*cobra.Command, []string) error { return tc.err }}
		root.SetArgs([]string{})
		root.SetErr(&out)
		if code := run(context.Background(), root); code != tc.code || out.String() != tc.out {
			t.Errorf("%v: exit %d %q, want %d %q", tc.err, code, out.String(), tc.code, tc.out)
		}
	}
	if !errors.Is(Failf("a: %w", io.EOF), io.EOF) {
		t.Error("the cause is lost")
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out strings.Builder
	root := &cobra.Command{Use: "prog", RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Context().Err() }}
	root.SetArgs([]string{})
	root.SetErr(&out)
	if code := run(ctx, root); code != ExitDegraded || out.String() != "prog: interrupted\n" {
		t.Fatalf("exit %d: %q", code, out.String())
	}
}
