package browser

import (
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/lab"
)

const (
	webPort  = 80
	echoPort = 7000
)

// TestJourney goes the whole way in the browser: from a platform that nobody has used to a session that is ended by a button. The daemons
// are the real ones, and started by the commands that the pages show.
func TestJourney(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	platformd, err := l.StartPlatform(within(t, time.Minute), "--probe-relays", "private")
	check(t, err)
	t.Cleanup(func() { showLogs(t, l) })
	line, err := platformd.Log.Wait(within(t, 30*time.Second), 0, `setup_code`)
	check(t, err)
	code := regexp.MustCompile(`setup_code"?[=:] ?"?([a-z0-9-]+)`).FindStringSubmatch(line.Text)
	if code == nil {
		t.Fatalf("no setup code in %q", line.Text)
	}
	b := start(t, l.Platform, l.PlatformURL())

	// First run makes the owner.
	b.open("/")
	b.fill("Setup code", code[1])
	b.fill("Login", owner)
	b.fill("Your name", "Ada Lovelace")
	b.fill("Password", password)
	b.fill("Password again", password)
	b.turn("Make the account")
	b.sees(step, "First steps")

	// A relay, by the command that the page shows. The page turns by itself.
	b.turn("Create Relay")
	b.fill("Name", "fra-1")
	b.fill("Host address", l.Addr(l.Relay1).String())
	b.turn("Create Relay")
	b.sees(step, "Waiting for fra-1 to connect")
	b.shoot("journey-1-waiting")
	deploy(t, b, l.Relay1, "relayd start")
	b.arrives("fra-1")
	b.shoot("journey-2-connected")

	// A gateway.
	b.turn("create a gateway")
	b.fill("Name", "office")
	b.turn("Create Gateway")
	b.sees(step, "Waiting for office to connect")
	deploy(t, b, l.Gateway, "gatewayd up")
	b.arrives("office")

	// What is to be reached.
	web, err := l.Private.Web(at(lab.WebAddr, webPort), "<h1>Hello from the private network</h1>\n")
	check(t, err)
	_, err = l.Private.Echo(at(lab.WebAddr, echoPort))
	check(t, err)
	b.turn("create a resource")
	b.fill("Name", "web")
	b.fill("Address, as the gateway sees it", lab.WebAddr.String())
	b.fill("TCP ports", "80,7000")
	b.tick("office")
	b.turn("Create Resource")
	b.sees(step, "Resource web is there")

	// A client.
	b.open("/orgs/default/networking/clients/new")
	b.fill("Name", "laptop")
	b.turn("Create Client")
	b.sees(step, "Waiting for laptop to connect")
	deploy(t, b, l.Client, "sallyway connect")
	b.arrives("laptop")

	// No, because; then yes, by which rule.
	b.open("/orgs/default/policies/explain")
	b.fill("Who", "laptop")
	b.fill("Resource", "web")
	b.turn("Explain")
	if got := b.text("#answer .answer"); got != "No" {
		t.Errorf("without a policy the answer is %q", got)
	}
	b.shoot("journey-3-explained-no")
	b.turn("Allow it")
	b.turn("Create Policy")
	b.sees(step, "client:laptop may reach web")
	b.turn("Explain")
	if got := b.text("#answer .answer"); got != "Yes, by rule client-laptop-web" {
		t.Errorf("with a policy the answer is %q", got)
	}
	b.shoot("journey-4-explained-yes")

	// The platform itself goes there, once a policy names it; the page shows each hop.
	b.open("/orgs/default/resources/web")
	b.click("Test")
	b.sees(step, "Not allowed")
	b.shoot("journey-4-tested-no")
	b.turn("Let the platform reach it")
	b.turn("Create Policy")
	b.sees(step, "platform may reach web")
	b.open("/orgs/default/resources/web")
	b.click("Test")
	b.sees(step, "Reached in")
	for _, want := range []string{"over fra-1 udp", "Session with the gateway", "Connection to the resource"} {
		b.sees(step, want)
	}
	b.shoot("journey-4-tested-yes")
	if state := b.text("main .title-line h1"); state != "web" {
		t.Errorf("the page is now that of %q", state)
	}
	b.open("/orgs/default/resources/web/test")
	b.shoot("journey-4-test-page")

	// A live session, and its end.
	ctx := within(t, time.Minute)
	check(t, lab.Until(ctx, 50*time.Millisecond, func() error {
		r, err := l.Client.Run(ctx, "curl", "-sS", "--max-time", "5", web.URL("/"))
		if err == nil && !strings.Contains(r.Stdout, "Hello") {
			err = errors.New("another page")
		}
		return err
	}))
	conn, err := l.Client.Dial(ctx, "tcp", at(lab.WebAddr, echoPort))
	check(t, err)
	defer conn.Close()
	check(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	_, err = conn.Write([]byte("still here"))
	check(t, err)
	buf := make([]byte, 10)
	_, err = io.ReadFull(conn, buf)
	check(t, err)
	b.open("/orgs/default/sessions")
	b.sees(step, "laptop")
	b.until(step, "the session's way", `document.querySelector("main").innerText.includes("fra-1")`)
	b.shoot("journey-5-session")
	b.click("End")
	b.turn("End sessions")
	b.sees(step, "The sessions of laptop that began until now are ended")
	if n, err := conn.Read(buf); err == nil {
		t.Errorf("the ended session still carries: %q", buf[:n])
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection of the ended session is still open after a minute")
	}
	b.shoot("journey-6-ended")

	// All of it stands in the audit log, and can be taken away.
	b.open("/orgs/default/audit")
	b.fill("Search the audit log", "session.end")
	b.turn("Search")
	if rows := eval[int](b, `document.querySelectorAll("main tbody tr").length`); rows != 1 {
		t.Errorf("%d entries of an ended session", rows)
	}
	for _, want := range []string{"person:" + owner, "laptop", "Done"} {
		b.sees(step, want)
	}
	b.shoot("journey-7-audit")
	exported := eval[string](b, `document.querySelector("main a[href*='format=jsonl']").href`)
	eval[bool](b, `fetch(`+quote(exported)+`).then((r) => r.text()).then((x) => { window.exported = x; }), true`)
	b.until(step, "the export", `window.exported`)
	lines := strings.Split(strings.TrimSpace(eval[string](b, `window.exported`)), "\n")
	var entry control.AuditEntry
	if err := json.Unmarshal([]byte(lines[0]), &entry); err != nil || len(lines) != 1 || entry.Action != "session.end" {
		t.Errorf("the export is %q", lines)
	}
	for _, c := range b.bad() {
		t.Error(c)
	}
}

// arrives waits until the deploy page says by itself that its node is connected and healthy.
func (b *browser) arrives(name string) {
	b.t.Helper()
	b.sees(time.Minute, name+" is connected")
	b.sees(time.Minute, "Healthy")
}

// deploy runs the foreground command of the page on a host, as a person would paste it into a shell there.
func deploy(t *testing.T, b *browser, h *lab.Host, begins string) {
	t.Helper()
	command := strings.TrimPrefix(b.text("#cmd-foreground"), "sudo ")
	if !strings.HasPrefix(command, begins+" --token-file - <<< '") {
		t.Fatalf("the foreground command is %.60q…", command)
	}
	if production := b.text("#cmd-production"); production == "" || production == command {
		t.Errorf("the production command is %.60q…", production)
	}
	bin := filepath.Dir(binary(t, "relayd"))
	name, _, _ := strings.Cut(begins, " ")
	_, err := h.Start(lab.Spec{
		Name: name, Args: []string{"/bin/bash", "-c", command},
		Env: []string{"PATH=" + bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SALLYWAY_STATE=" + h.Path("state-"+name)},
	})
	check(t, err)
}

// binary is the path of a program under test.
func binary(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("SALLYWAY_BIN")
	if dir == "" {
		root, err := lab.SourceRoot()
		check(t, err)
		dir = filepath.Join(root, "bin")
	}
	return filepath.Join(dir, name)
}

func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

// showLogs shows the ends of the daemons' logs of a test that failed.
func showLogs(t *testing.T, l *lab.Lab) {
	if !t.Failed() {
		return
	}
	logs, _ := filepath.Glob(filepath.Join(l.Dir(), "*", "*.log")) // the pattern is good
	for _, path := range logs {
		if b, err := os.ReadFile(path); err == nil && !strings.Contains(path, "chromium") {
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			t.Logf("%s:\n%s", filepath.Base(path), strings.Join(lines[max(0, len(lines)-12):], "\n"))
		}
	}
}
