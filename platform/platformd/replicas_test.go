package platformd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/backing"
	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// asDaemon in the environment makes the test's program platformd itself, so that a test can kill it.
const asDaemon = "PLATFORMD_UNDER_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		os.Exit(daemon.Main(Command()))
	}
	os.Exit(m.Run())
}

// Bars of the test. A node is to be back within 5 s, which is printed and not asserted: the machines that tests run on are loaded.
const (
	comeBack = 15 * time.Second
	patience = time.Minute // for everything that is no bar
)

// replicaProcess is a platformd of its own.
type replicaProcess struct {
	dir, addr string
	args      []string
	cmd       *exec.Cmd
	log       string
}

func (p *replicaProcess) start(t *testing.T) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(exe, p.args...)
	cmd.Env = append(os.Environ(), asDaemon+"=1")
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.cmd = cmd
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // asks whether it is ready, no more
	until(t, p.addr+" is ready", func() bool {
		resp, err := client.Get("https://" + p.addr + "/readyz")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// kill ends the process without a word.
func (p *replicaProcess) kill() {
	if p.cmd != nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait() // killed is how it ends
		p.cmd = nil
	}
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// administrator talks to the platform by the balancer, with a connection for each request.
type administrator struct {
	control.AdminCredential
	client *http.Client
}

func (a *administrator) do(ctx context.Context, method, path string, in, out any) (int, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return 0, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.URL+"/api/v1"+path, body)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+a.Token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode/100 != 2 {
		return resp.StatusCode, fmt.Errorf("%s %s: %d %s", method, path, resp.StatusCode, b)
	}
	if out == nil {
		return resp.StatusCode, nil
	}
	return resp.StatusCode, json.Unmarshal(b, out)
}

// must repeats a request until a platform answers it.
func (a *administrator) must(t *testing.T, method, path string, in, out any) {
	t.Helper()
	until(t, method+" "+path, func() bool {
		status, err := a.do(t.Context(), method, path, in, out)
		if err != nil && status != 0 && status/100 == 4 {
			t.Fatal(err)
		}
		return err == nil
	})
}

// TestReplicasAreKilled kills each of three platforms behind a balancer, one after the other, while nodes are connected and an administrator
// writes: every node is told of the next change soon, what was answered is there, and a token that is spent at that moment is spent once.
func TestReplicasAreKilled(t *testing.T) {
	pg, rd, lb := backing.StartPostgres(t, false), backing.StartRedis(t), backing.StartBalancer(t)
	url, dir := pg.Database(t), t.TempDir()
	ps := make([]*replicaProcess, 3)
	var addrs []string
	for i := range ps {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p := &replicaProcess{dir: filepath.Join(dir, fmt.Sprint(i)), addr: l.Addr().String(), log: filepath.Join(dir, fmt.Sprint("log-", i))}
		p.args = []string{
			"serve", "--data", p.dir, "--listen", p.addr, "--metrics-listen=", "--database", url, "--redis", rd.URL(),
			"--advertise-url", "https://" + lb.Addr(), "--master-key", filepath.Join(dir, "master.key"),
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		ps[i], addrs = p, append(addrs, p.addr)
		t.Cleanup(func() {
			p.kill()
			if t.Failed() {
				b, _ := os.ReadFile(p.log)
				t.Logf("log of %s:\n%s", p.addr, b)
			}
		})
		p.start(t)
	}
	lb.Use(addrs...)
	admin := &administrator{client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // what is certified is not this test's matter
	}}}
	b, err := os.ReadFile(filepath.Join(ps[0].dir, "admin.token"))
	if err == nil {
		err = json.Unmarshal(b, &admin.AdminCredential)
	}
	if err != nil {
		t.Fatal(err)
	}

	nodes := connect(t, admin)
	ctx, stop := context.WithCancel(t.Context())
	var written sync.WaitGroup
	var names []string // that were answered; the writer's until it has ended
	written.Add(1)
	go func() {
		defer written.Done()
		for i := 0; ctx.Err() == nil; i++ {
			name := fmt.Sprint("w-", i)
			for ctx.Err() == nil {
				status, err := admin.do(ctx, "POST", "/orgs/default/clients", control.CreateNode{Name: name}, nil)
				// Taken: an earlier try was carried out, and the answer lost.
				if err == nil || status == http.StatusConflict {
					names = append(names, name)
					break
				}
			}
		}
	}()
	for i, p := range ps {
		var spent chan int
		if i == 1 {
			spent = spendAtOnce(t, admin)
		}
		began := time.Now()
		p.kill()
		took := nodes.told(t, admin, fmt.Sprint("after-", i), began)
		t.Logf("platform %d killed: every one of %d nodes had the next change after %v (bar 5 s)", i, len(nodes.agents), took.Round(time.Millisecond))
		if took > comeBack {
			t.Errorf("nodes were away for %v, limit %v", took, comeBack)
		}
		if spent != nil {
			if n := <-spent; n != 1 {
				t.Errorf("a token was spent %d times", n)
			}
		}
		p.start(t)
	}
	stop()
	written.Wait()
	have := make(map[string]bool)
	for cursor := ""; ; {
		var list control.List[control.NodeRecord]
		admin.must(t, "GET", "/orgs/default/clients?limit=1000&cursor="+cursor, nil, &list)
		for _, n := range list.Items {
			have[n.Name] = true
		}
		if cursor = list.NextCursor; cursor == "" {
			break
		}
	}
	for _, n := range names {
		if !have[n] {
			t.Errorf("%s was answered, and is not there", n)
		}
	}
	t.Logf("%d writes were answered, all are there", len(names))
	var v control.AuditVerification
	admin.must(t, "GET", "/orgs/default/audit:verify", nil, &v)
	if !v.OK {
		t.Errorf("audit: %s", v.Problem)
	}
}

// fleet is nodes that are connected.
type fleet struct {
	agents []*agent.Agent
	mu     sync.Mutex
	seen   map[string]map[string]bool // resources that each node was told of, by the client's name; guarded by mu
}

// connect makes and runs nodes: a gateway, and clients that may use what it serves.
func connect(t *testing.T, admin *administrator) *fleet {
	t.Helper()
	f := &fleet{seen: make(map[string]map[string]bool)}
	ctx, stop := context.WithCancel(context.Background())
	var run sync.WaitGroup
	t.Cleanup(func() { stop(); run.Wait() })
	add := func(kind identity.Kind, name string) {
		var made control.CreatedNode
		admin.must(t, "POST", "/orgs/default/"+string(kind)+"s", control.CreateNode{Name: name}, &made)
		a, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: kind, Token: made.Token, Version: "test", Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		f.agents = append(f.agents, a)
		f.seen[name] = make(map[string]bool)
		a.OnConfig(func(c *control.Config) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if c.Dialling != nil {
				for _, r := range c.Dialling.Resources {
					f.seen[name][r.Resource.Name] = true
				}
			}
		})
		run.Add(1)
		go func() { defer run.Done(); _ = a.Run(ctx) }() // ends with ctx
	}
	add(identity.Gateway, "gw")
	members := []string{}
	for i := range 20 {
		name := fmt.Sprint("c-", i)
		add(identity.Client, name)
		members = append(members, "client:"+name)
	}
	admin.must(t, "POST", "/orgs/default/groups", control.CreateGroup{Name: "all", Members: members}, nil)
	f.told(t, admin, "first", time.Now())
	return f
}

// told makes a resource that every client may use, and waits until all have been told. It returns how long that was after began.
func (f *fleet) told(t *testing.T, admin *administrator, resource string, began time.Time) time.Duration {
	t.Helper()
	admin.must(t, "POST", "/orgs/default/resources", control.CreateResource{Name: resource, Address: "10.0.0.1", ICMP: true, Gateways: []string{"gw"}}, nil)
	admin.must(t, "POST", "/orgs/default/policies", control.CreatePolicy{Name: resource, Subject: "group:all", Resource: resource}, nil)
	until(t, "every client is told of "+resource, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		for name, seen := range f.seen {
			if name != "gw" && !seen[resource] {
				return false
			}
		}
		return true
	})
	return time.Since(began)
}

// spendAtOnce has many hosts enrol by one token, and tells how many could.
func spendAtOnce(t *testing.T, admin *administrator) chan int {
	t.Helper()
	var made control.CreatedNode
	admin.must(t, "POST", "/orgs/default/clients", control.CreateNode{Name: "raced"}, &made)
	const hosts = 12
	var spent atomic.Int32
	var wg sync.WaitGroup
	for range hosts {
		dir := t.TempDir()
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := agent.Open(t.Context(), agent.Config{StateDir: dir, Kind: identity.Client, Token: made.Token, Version: "test", Logger: slog.New(slog.DiscardHandler)})
			var refused *agent.EnrolmentRefusedError
			switch {
			case err == nil:
				spent.Add(1)
			case !errors.As(err, &refused):
				t.Errorf("enrolment: %v", err)
			}
		}()
	}
	out := make(chan int, 1)
	go func() { wg.Wait(); out <- int(spent.Load()) }()
	return out
}
