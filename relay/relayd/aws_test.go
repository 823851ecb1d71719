package relayd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/awsidentity"
	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/platform/awsauth/ststest"
	"sallyway/platform/pki"
	"sallyway/platform/platformd"
	"sallyway/relay/relayd"
)

// TestMain is relayd or platformd where a test started this program as one.
func TestMain(m *testing.M) {
	switch os.Getenv("RELAYD_TEST_AS") {
	case "relayd":
		os.Exit(daemon.Main(relayd.Command()))
	case "platformd":
		os.Exit(daemon.Main(platformd.Command()))
	default:
		os.Exit(m.Run())
	}
}

const (
	accessKey = "AKIDEXAMPLE12345"
	account   = "123456789012"
	good      = "arn:aws:sts::" + account + ":assumed-role/relay-fra/i-0123"
	other     = "arn:aws:sts::" + account + ":assumed-role/web/i-0123"
)

// output is what a process writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// process is a daemon in a process of its own.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  output
	done chan error
}

func run(t *testing.T, as string, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(os.Args[0], args...), done: make(chan error, 1)}
	p.cmd.Env = append([]string{"RELAYD_TEST_AS=" + as, "HOME=" + t.TempDir(), "AWS_EC2_METADATA_DISABLED=true", "PATH=" + os.Getenv("PATH")}, env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("%s %v:\n%s", as, args, p.out.String())
		}
	})
	return p
}

// stop ends the process and returns its exit code.
func (p *process) stop() int {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	}
	return p.wait()
}

func (p *process) wait() int {
	select {
	case err := <-p.done:
		p.done <- err
	case <-time.After(60 * time.Second):
		_ = p.cmd.Process.Kill() // as above
		p.t.Error("the process did not end")
		<-p.done
		p.done <- nil
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) says(text string) {
	p.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !strings.Contains(p.out.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("does not say %q", text)
		}
	}
}

// TestAWSEnrolment enrols a relay by its host's AWS identity: platform and relay are processes, STS checks signatures.
func TestAWSEnrolment(t *testing.T) {
	sts := ststest.Start(t)
	sts.Set(accessKey, ststest.User{Secret: "planted-secret", Token: "session", ARN: good})
	data, state := t.TempDir(), t.TempDir()
	cfg := sts.Config()
	serve := run(t, "platformd", nil, "serve", "--data", data, "--listen", "127.0.0.1:0", "--metrics-listen=",
		"--aws-region", cfg.Region, "--aws-sts-endpoint", cfg.Endpoint, "--aws-sts-ca", cfg.CAFile)
	serve.says("platform serves")
	var admin control.AdminCredential
	b, err := os.ReadFile(filepath.Join(data, "admin.token"))
	if err != nil || json.Unmarshal(b, &admin) != nil {
		t.Fatal(err)
	}
	l, err := link.New(link.Config{URL: admin.URL, Pin: admin.Pin})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	call := func(method, path string, in, out any) error {
		return l.Do(t.Context(), link.Request{Method: method, Path: "/api/v1" + path, Bearer: admin.Token, JSON: in}, out)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rule := &control.AWSRule{Accounts: []string{account}, Principals: []string{"arn:aws:iam::" + account + ":role/relay-*"}}
	var made control.CreatedNode
	must(call("POST", "/orgs/default/relays", control.CreateNode{Name: "fra-1", Host: "127.0.0.1", Authentication: control.AuthAWS, AWS: rule}, &made))
	if made.Token != "" || made.Authentication != control.AuthAWS || !strings.Contains(made.Command, "relayd install -- --auth aws --platform "+admin.URL) {
		t.Errorf("%+v", made)
	}

	env := []string{"AWS_ACCESS_KEY_ID=" + accessKey, "AWS_SECRET_ACCESS_KEY=planted-secret", "AWS_SESSION_TOKEN=session"}
	flags := append(strings.Fields(made.Foreground)[1:], "--state", state, "--listen-ip", "127.0.0.1", "--listen-port", "0", "--ssh-port", "0", "--tls-port", "0", "--metrics-listen=")
	start := func(env []string) *process { return run(t, "relayd", env, flags...) }
	refused := func(env []string, says string) {
		t.Helper()
		p := start(env)
		if code := p.wait(); code != daemon.ExitEnrolmentRefused || !strings.Contains(p.out.String(), says) {
			t.Errorf("exit %d, want %d with %q", code, daemon.ExitEnrolmentRefused, says)
		}
	}
	refused(nil, "no AWS credentials on this host")
	refused(append(env[:1:1], "AWS_SECRET_ACCESS_KEY=wrong", env[2]), "SignatureDoesNotMatch")
	sts.Set(accessKey, ststest.User{Secret: "planted-secret", Token: "session", ARN: other})
	refused(env, "role/web of account")
	sts.Set(accessKey, ststest.User{Secret: "planted-secret", Token: "session", ARN: good})

	p := start(env)
	p.says("Relay server started successfully")
	p.stop()
	p = start(env)
	p.says("the platform takes this host's AWS identity")
	p.says("Relay server started successfully")
	p.stop()
	// Another host of the same identity takes its place, and it takes it back: by itself, as nobody hands a token over. So it follows the roots that it
	// knows: a platform can not give it others by refusing its key.
	second := t.TempDir()
	flags[slices.Index(flags, "--state")+1] = second
	p = start(env)
	p.says("Relay server started successfully")
	p.stop()
	flags[slices.Index(flags, "--state")+1] = state
	p = start(env)
	p.says("enrolling anew")
	p.says("Relay server started successfully")
	p.stop()
	var node map[string]any
	b, err = os.ReadFile(filepath.Join(second, "node.json"))
	must(errors.Join(err, json.Unmarshal(b, &node)))
	stranger, err := pki.NewRoot("default", time.Now())
	must(err)
	node["trust"].(map[string]any)["roots"] = string(identity.EncodeCertificates(stranger.Certificate))
	b, err = json.Marshal(node)
	must(errors.Join(err, os.WriteFile(filepath.Join(second, "node.json"), b, 0o600)))
	flags[slices.Index(flags, "--state")+1] = second
	refused(env, "do not follow")
	flags[slices.Index(flags, "--state")+1] = state
	p = start(env)
	p.says("Relay server started successfully")
	p.stop()
	// Again at every start: who may has changed meanwhile.
	must(call("PATCH", "/orgs/default/relays/fra-1", control.UpdateNode{AWS: &control.AWSRule{Accounts: []string{"999999999999"}}}, nil))
	refused(env, "role/relay-fra of account "+account)
	must(call("PATCH", "/orgs/default/relays/fra-1", control.UpdateNode{AWS: rule}, nil))

	t.Run("replays", func(t *testing.T) { replays(t, l, env) })

	var page control.List[control.AuditEntry]
	must(call("GET", "/orgs/default/audit?limit=200", nil, &page))
	seen := make(map[string]bool)
	for _, e := range page.Items {
		seen[fmt.Sprint(e.Action, " ", e.Result, " ", e.Detail["reason"], e.Detail["aws"])] = true
	}
	for _, want := range []string{"node.enrol ok <nil>" + good, "node.enrol refused aws_refused<nil>", "node.enrol refused aws_bad<nil>", "node.enrol refused aws_nonce<nil>", "node.check ok <nil>" + good, "node.check refused aws_refused<nil>"} {
		if !seen[want] {
			t.Errorf("not in the audit: %s\n%v", want, seen)
		}
	}
	// A node that enrols by token takes no AWS identity.
	token := control.AuthToken
	must(call("PATCH", "/orgs/default/relays/fra-1", control.UpdateNode{Authentication: &token}, nil))
	refused(env, "no such relay that enrols by AWS")
	if strings.Contains(serve.out.String(), "planted-secret") || strings.Contains(p.out.String(), "planted-secret") {
		t.Error("a log tells the secret")
	}
}

// replays tries what was signed for something else.
func replays(t *testing.T, l *link.Link, env []string) {
	find := awsidentity.Config{Getenv: func(k string) string {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, k+"="); ok {
				return v
			}
		}
		return ""
	}}
	creds, err := awsidentity.Find(t.Context(), find)
	if err != nil {
		t.Fatal(err)
	}
	challenge := func(name string) (c control.AWSChallenge) {
		req := control.AWSChallengeRequest{Org: "default", Kind: identity.Relay, Name: name}
		if err := l.Do(t.Context(), link.Request{Method: "POST", Path: "/api/v1/enroll/aws/challenge", JSON: req}, &c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	// enrol signs headers for a challenge, as change has them, and sends them for node.
	enrol := func(c control.AWSChallenge, node identity.Node, change func(h map[string]string)) (control.AWSEnrolRequest, error) {
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := identity.Request(key, node)
		if err != nil {
			t.Fatal(err)
		}
		h := map[string]string{
			control.AWSNonceHeader: c.Nonce, control.AWSPlatformHeader: l.URL(), control.AWSNodeHeader: node.String(), control.AWSKeyHeader: identity.HashKey(key.Public()).String(),
		}
		if change != nil {
			change(h)
		}
		req := control.AWSEnrolRequest{Node: node, CSR: string(csr)}
		if req.Signed, err = creds.Sign(c.Endpoint, c.Region, h, time.Now()); err != nil {
			t.Fatal(err)
		}
		return req, l.Do(context.Background(), link.Request{Method: http.MethodPost, Path: "/api/v1/enroll/aws", JSON: req}, new(control.EnrolResponse))
	}
	expect := func(err error, code string) {
		t.Helper()
		var p *link.Problem
		if p, _ = err.(*link.Problem); p == nil || p.Code != code {
			t.Errorf("%v, want %s", err, code)
		}
	}
	c := challenge("fra-1")
	req, err := enrol(c, c.Node, nil)
	if err != nil {
		t.Fatal(err)
	}
	expect(l.Do(t.Context(), link.Request{Method: "POST", Path: "/api/v1/enroll/aws", JSON: req}, new(control.EnrolResponse)), control.CodeAWSNonce) // replayed
	c = challenge("fra-1")
	_, err = enrol(c, c.Node, func(h map[string]string) { h[control.AWSPlatformHeader] = "https://another.example" })
	expect(err, control.CodeWrongAudience)
	_, err = enrol(c, c.Node, func(h map[string]string) { h[control.AWSKeyHeader] = identity.KeyHash{}.String() })
	expect(err, control.CodeAWSBad) // signed for another key
	_, err = enrol(c, c.Node, nil)
	expect(err, control.CodeAWSNonce) // the failed try has spent it
	c = challenge("fra-1")
	_, err = enrol(c, c.Node, func(h map[string]string) { h[control.AWSNonceHeader] = strings.Replace(c.Nonce, ".", ".x", 1) })
	expect(err, control.CodeAWSNonce)
	nobody := challenge("nobody")
	_, err = enrol(c, nobody.Node, nil)
	expect(err, control.CodeAWSNonce) // of another node
	_, err = enrol(nobody, nobody.Node, nil)
	expect(err, control.CodeAWSRefused)
	if again := challenge("nobody"); again.Node != nobody.Node {
		t.Error("a node that does not exist looks different each time")
	}
}
