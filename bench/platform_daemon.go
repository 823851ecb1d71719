package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/internal/lab"
)

// holder keeps what the servers of package backing give back at the end. They are made for tests, so it plays the part of one.
type holder struct {
	testing.TB // nil: what is not below is not called
	undo       []func()
	postgres   *backing.Postgres
	failed     error
}

// Helper does nothing.
func (h *holder) Helper() {}

// Cleanup has f called by release.
func (h *holder) Cleanup(f func()) { h.undo = append(h.undo, f) }

// Error keeps what went wrong.
func (h *holder) Error(args ...any) {
	h.failed = errors.Join(h.failed, errors.New(fmt.Sprint(args...)))
}

// Errorf is Error with a format.
func (h *holder) Errorf(format string, args ...any) {
	h.failed = errors.Join(h.failed, fmt.Errorf(format, args...))
}

// Fatal, Fatalf and Skip end what try runs.
func (h *holder) Fatal(args ...any)                 { h.Error(args...); panic(h) }
func (h *holder) Fatalf(format string, args ...any) { h.Errorf(format, args...); panic(h) }
func (h *holder) Skip(args ...any)                  { h.Error(args...); panic(h) }

// try runs f, which calls the methods above.
func (h *holder) try(f func()) (err error) {
	defer func() {
		if p := recover(); p != nil && p != any(h) {
			panic(p)
		}
		err, h.failed = h.failed, nil
	}()
	f()
	return nil
}

func (h *holder) release() {
	_ = h.try(func() {
		for len(h.undo) > 0 {
			last := h.undo[len(h.undo)-1]
			h.undo = h.undo[:len(h.undo)-1]
			last()
		}
	}) // the result is there: what stays behind lies in the folder for temporary files
}

// database makes an empty one: "" is SQLite's file in the data folder. PostgreSQL waits for the disk, as SQLite does.
func (h *holder) database(store string) (url string, err error) {
	if store == SQLite {
		return "", nil
	}
	err = h.try(func() {
		if h.postgres == nil {
			h.postgres = backing.StartPostgres(h, true)
		}
		url = h.postgres.Database(h)
	})
	return url, err
}

// controlPlane is a platformd with a folder of its own.
type controlPlane struct {
	bin, dir string
	args     []string
	env      []string
	metrics  string // address
	cred     control.AdminCredential
	postgres *backing.Postgres // nil on SQLite
	cmd      *exec.Cmd
	done     chan struct{}
}

// newPlatform starts a platform on an empty database.
func (m *platformMeasure) newPlatform(ctx context.Context, store string) (*controlPlane, error) {
	database, err := m.hold.database(store)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "bench-platform-")
	if err != nil {
		return nil, err
	}
	var ports [2]string
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		ports[i] = l.Addr().String()
		if err := l.Close(); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	p := &controlPlane{
		bin: filepath.Join(m.cfg.Bin, "platformd"), dir: dir, metrics: ports[1], env: m.cfg.Env,
		args: []string{"serve", "--data", filepath.Join(dir, "data"), "--listen", ports[0], "--advertise-url", "https://" + ports[0], "--metrics-listen", ports[1], "--api-rate", "0"},
	}
	if database != "" {
		p.postgres = m.hold.postgres
		p.args = append(p.args, "--database", database)
	}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(err, p.close())
	}
	b, err := os.ReadFile(filepath.Join(dir, "data", "admin.token"))
	if err == nil {
		err = json.Unmarshal(b, &p.cred)
	}
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// Limits of the platform's life.
const (
	platformStart = time.Minute
	platformStop  = 40 * time.Second
)

// start starts it and waits until it is ready.
func (p *controlPlane) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(p.bin, p.args...) // it is ended by stop, not by ctx
	cmd.Stdout, cmd.Stderr = log, log
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "SALLYWAY_") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	cmd.Env = append(cmd.Env, p.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	p.cmd, p.done = cmd, done
	go func() { _ = cmd.Wait(); close(done) }() // how it ended stands in its log
	ctx, cancel := context.WithTimeout(ctx, platformStart)
	defer cancel()
	return lab.Until(ctx, 2*time.Millisecond, func() error {
		select {
		case <-done:
			cancel()
			b, _ := os.ReadFile(log.Name())
			return fmt.Errorf("platformd ended: %s", b[max(0, len(b)-1000):])
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.metrics+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("platformd is not ready: %s", resp.Status)
		}
		return nil
	})
}

// stop ends it: kindly with SIGTERM.
func (p *controlPlane) stop(sig syscall.Signal) error {
	if p.cmd == nil {
		return nil
	}
	_ = p.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-p.done:
	case <-time.After(platformStop):
		_ = p.cmd.Process.Kill()
		<-p.done
		return errors.New("platformd did not end in time")
	}
	p.cmd = nil
	return nil
}

func (p *controlPlane) close() error {
	return errors.Join(p.stop(syscall.SIGTERM), os.RemoveAll(p.dir))
}

// link is a way to it, as nodes and the admin command have. from is the address that it comes from, 127.0.0.1 when empty.
func (p *controlPlane) link(from net.IP) (*link.Link, error) {
	d := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	if from != nil {
		d.LocalAddr = &net.TCPAddr{IP: from}
	}
	return link.New(link.Config{URL: p.cred.URL, Pin: p.cred.Pin, UserAgent: "sallyway-bench", DialContext: d.DialContext, Timeout: time.Minute})
}

// admin sends a request to the API as its administrator, and again when it is told to wait.
func (p *controlPlane) admin(ctx context.Context, l *link.Link, method, path string, in, out any) error {
	for {
		err := l.Do(ctx, link.Request{Method: method, Path: "/api/v1" + path, Bearer: p.cred.Token, JSON: in}, out)
		var busy *link.Problem
		if !errors.As(err, &busy) || busy.Status != http.StatusTooManyRequests {
			return err
		}
		wait(ctx, time.Second)
	}
}

// memory is what the process has in memory now and had at most, in bytes.
func (p *controlPlane) memory() (now, most int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		key, v, _ := strings.Cut(s.Text(), ":")
		kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64) // other lines have no number
		switch key {
		case "VmRSS":
			now = kib << 10
		case "VmHWM":
			most = kib << 10
		}
	}
	return now, most
}

// forgetPeak has the most of memory begin anew.
func (p *controlPlane) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}

// spent is what platform, database and this process have used so far.
func (p *controlPlane) spent() (s Spent) {
	if u, err := lab.ReadUsage(p.cmd.Process.Pid); err == nil {
		s.Platform = u.CPU.Seconds()
	}
	if u, err := lab.ReadUsage(os.Getpid()); err == nil {
		s.Load = u.CPU.Seconds()
	}
	if p.postgres != nil {
		if d, err := treeCPU(p.postgres.PID()); err == nil {
			s.Database = d.Seconds()
		}
	}
	return s
}

// parallel runs f for 0 to n-1, some at once, each worker with a way of its own to the platform, until one fails.
func (p *controlPlane) parallel(ctx context.Context, n int, f func(ctx context.Context, l *link.Link, i int) error) error {
	const workers = 32
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(workers, n) {
		wg.Go(func() {
			l, err := p.link(nil)
			if err != nil {
				cancel(err)
				return
			}
			defer l.Close()
			for i := range next {
				if err := f(ctx, l, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// tls is the configuration of a browser that trusts the platform's own authority.
func (p *controlPlane) tls() (*tls.Config, error) {
	c, err := tls.Dial("tcp", strings.TrimPrefix(p.cred.URL, "https://"), &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // the pin is checked below
	if err != nil {
		return nil, err
	}
	defer c.Close()
	roots := x509.NewCertPool()
	found := false
	for _, cert := range c.ConnectionState().PeerCertificates {
		if cert.IsCA && identity.CertificateKeyHash(cert).String() == p.cred.Pin {
			roots.AddCert(cert)
			found = true
		}
	}
	if !found {
		return nil, errors.New("the platform does not show the authority that its administrator's credential names")
	}
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}, nil
}
