//go:build linux

// Package backing starts the real servers that a platform with replicas needs, for tests: PostgreSQL and Redis from Debian's packages, each in a
// folder of its own, ended with the test.
//
//	pg := backing.StartPostgres(t)
//	url := pg.Database(t)
package backing

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// Limits of the servers' lives. They are long: the machines that tests run on are loaded.
const (
	startTimeout = time.Minute
	stopTimeout  = 20 * time.Second
	retry        = 20 * time.Millisecond
)

// program finds a program; a test skips where it is missing, which CI does not accept.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := lab.Program(name)
	var missing *lab.MissingError
	if errors.As(err, &missing) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// unprivileged is the user that servers run as when the test is root: PostgreSQL refuses to run as root. nil is the test's own.
func unprivileged(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// folder makes a folder for a server. Its path is short, because the server's socket lies in it.
func folder(t testing.TB, name string, as *syscall.Credential) string {
	t.Helper()
	dir, err := os.MkdirTemp("", name+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if as != nil {
		if err := os.Chown(dir, int(as.Uid), int(as.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// server is a process that listens on a socket.
type server struct {
	args   []string
	as     *syscall.Credential
	log    string
	socket string
	stop   syscall.Signal

	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// start starts the process and waits until it listens.
func (s *server) start(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(s.args[0], s.args[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, filepath.Dir(s.socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as, Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.cmd, s.done = cmd, make(chan struct{})
	go func() { _ = cmd.Wait(); close(s.done) }() // how it ended stands in its log
	for end := time.Now().Add(startTimeout); ; {
		c, err := net.Dial("unix", s.socket)
		if err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-s.done:
			b, _ := os.ReadFile(s.log)
			t.Fatalf("%s ended: %s", s.args[0], b)
		case <-time.After(retry):
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not listen: %v", s.args[0], err)
		}
	}
}

// end stops the process with a signal, and waits.
func (s *server) end(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-s.done:
	case <-time.After(stopTimeout):
		t.Errorf("%s did not stop", s.args[0])
		_ = s.cmd.Process.Kill()
		<-s.done
	}
	s.cmd = nil
}

// Postgres is a PostgreSQL server.
type Postgres struct {
	server
	dir, psql string
	count     atomic.Int32
}

// StartPostgres makes a server that answers on a socket only, and ends it with the test. It promises nothing over a crash of the machine: it
// does not wait for the disk, except with durable.
func StartPostgres(t testing.TB, durable bool) *Postgres {
	t.Helper()
	initdb, postgres, psql := program(t, "initdb"), program(t, "postgres"), program(t, "psql")
	as := unprivileged(t)
	dir := folder(t, "pg", as)
	data := filepath.Join(dir, "data")
	cmd := exec.Command(initdb, "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
	cmd.SysProcAttr, cmd.Dir = &syscall.SysProcAttr{Credential: as}, dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	p := &Postgres{dir: dir, psql: psql, server: server{
		args: []string{postgres, "-D", data, "-k", dir, "-h", "", "-c", "shared_buffers=32MB", "-c", fmt.Sprintf("fsync=%t", durable)},
		as:   as, log: filepath.Join(dir, "log"), socket: filepath.Join(dir, ".s.PGSQL.5432"), stop: syscall.SIGINT, // a fast shutdown
	}}
	p.Start(t)
	t.Cleanup(func() { p.Stop(t) })
	return p
}

// Start starts the server again after Stop or Kill.
func (p *Postgres) Start(t testing.TB) {
	t.Helper()
	p.start(t)
	for end := time.Now().Add(startTimeout); ; time.Sleep(retry) { // it listens before it lets anybody in
		out, err := p.command("postgres", "SELECT 1").CombinedOutput()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("PostgreSQL: %v\n%s", err, out)
		}
	}
}

// Stop stops the server: its clients are cut off.
func (p *Postgres) Stop(t testing.TB) { t.Helper(); p.end(t, p.stop) }

// PID is the server's process, whose children serve its clients.
func (p *Postgres) PID() int { return p.cmd.Process.Pid }

// URL names a database of the server.
func (p *Postgres) URL(database string) string {
	return fmt.Sprintf("postgres://postgres@/%s?host=%s", database, p.dir)
}

func (p *Postgres) command(database, sql string) *exec.Cmd {
	return exec.Command(p.psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", p.dir, "-U", "postgres", "-At", "-c", sql, database)
}

// SQL runs a statement as the server's administrator, and returns what it answers.
func (p *Postgres) SQL(t testing.TB, database, sql string) string {
	t.Helper()
	out, err := p.command(database, sql).CombinedOutput()
	if err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	return string(out)
}

// Database makes an empty database and returns its URL.
func (p *Postgres) Database(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("test_%d", p.count.Add(1))
	p.SQL(t, "postgres", "CREATE DATABASE "+name)
	return p.URL(name)
}

// Redis is a Redis server.
type Redis struct{ server }

// StartRedis makes a server that answers on a socket only, and ends it with the test.
func StartRedis(t testing.TB) *Redis {
	t.Helper()
	path := program(t, "redis-server")
	as := unprivileged(t)
	dir := folder(t, "redis", as)
	r := &Redis{server{
		args: []string{path, "--port", "0", "--unixsocket", filepath.Join(dir, "s"), "--dir", dir, "--save", "", "--appendonly", "no"},
		as:   as, log: filepath.Join(dir, "log"), socket: filepath.Join(dir, "s"), stop: syscall.SIGTERM,
	}}
	r.start(t)
	t.Cleanup(func() { r.Stop(t) })
	return r
}

// Start starts the server again after Stop. What it knew is gone.
func (r *Redis) Start(t testing.TB) { t.Helper(); r.start(t) }

// Stop stops the server: its clients are cut off.
func (r *Redis) Stop(t testing.TB) { t.Helper(); r.end(t, r.stop) }

// URL names the server.
func (r *Redis) URL() string { return "unix://" + r.socket }
