package admin

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"sallyway/internal/auditfile"
	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/identity"
	"sallyway/platform"
)

// realPlatform runs a platform until the test ends. do runs a command line against it, wants an exit code and parts of what is printed, and
// returns the standard output.
func realPlatform(t *testing.T) (srv *platform.Server, do func(code int, line string, want ...string) string) {
	t.Helper()
	srv, err := platform.Open(t.Context(), platform.Config{Data: t.TempDir(), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("platform: %v", err)
		}
	})
	t.Setenv("SALLYWAY_CREDENTIALS", filepath.Join(t.TempDir(), "credentials.json"))
	t.Setenv("SALLYWAY_ORG", "")
	return srv, func(code int, line string, want ...string) string {
		t.Helper()
		r := sallyway(t, "", strings.Fields(line)...)
		if r.code != code {
			t.Fatalf("sallyway %s: exit code %d, want %d\n%s%s", line, r.code, code, r.out, r.errors)
		}
		for _, w := range want {
			if !strings.Contains(r.out+r.errors, w) {
				t.Errorf("sallyway %s lacks %q:\n%s%s", line, w, r.out, r.errors)
			}
		}
		return r.out
	}
}

// Every verb against the real platform, in process: what it makes, what it answers, and what it refuses.
func TestRealPlatform(t *testing.T) {
	srv, do := realPlatform(t)
	do(0, "login --token-file "+srv.AdminFile(), "Logged in to "+srv.URL(), "organization default")
	do(2, "login --token-file "+srv.AdminFile()+" --org nope", "there are: default")
	do(0, "organization create acme", "organization acme created")
	do(1, "organization create acme", "acme")
	do(0, "organization list", "acme", "default")
	do(0, "--org acme organization show", "acme")
	do(0, "organization delete acme", "deleted")
	do(1, "--org acme gateway list", "acme")

	do(0, "relay list", "organization default has no relays")
	do(0, "relay create fra-1 --host 192.0.2.1 --port 5349 --peer 198.18.0.9:9000", "relay fra-1 created", "relayd install", "<<")
	do(1, "relay create fra-1 --host 192.0.2.2", "fra-1")
	do(2, "relay create Bad_Name --host 192.0.2.2", "Bad_Name")
	do(0, "relay update fra-1 --host 192.0.2.7 --peer=", "updated")
	do(0, "relay show fra-1", "192.0.2.7:5349", "pending")
	var gw control.CreatedNode
	if err := json.Unmarshal([]byte(do(0, "gateway create office --json")), &gw); err != nil || gw.Name != "office" || gw.ID == "" || !strings.Contains(gw.Command, gw.Token) {
		t.Fatalf("created %+v, %v", gw, err)
	}
	do(0, "gateway create hq", "gatewayd install")
	do(0, "client create laptop", "sallyway connect")
	do(0, "gateway update hq --name branch", "branch updated")
	do(0, "gateway token branch", "fresh token")
	do(0, "client list", "laptop", "pending")
	do(1, "client show nobody", "nobody", "list")
	do(0, "relay create eu-1 --shared --host 192.0.2.3", "relayd")
	do(0, "relay list --shared", "eu-1")
	do(0, "relay delete eu-1 --shared", "deleted")

	do(0, "resource create db --gateway office,branch --address 10.0.3.7 --tcp 5432,8000-8100 --icmp", "db.default.sallyway.internal", "policy allow")
	do(1, "resource create db --gateway office --address 10.0.3.8 --tcp 1", "db")
	for _, bad := range []string{"--gateway nope --address 10.0.3.8", "--gateway office --address 10.0.3.8/99"} {
		if r := sallyway(t, "", strings.Fields("resource create bad --tcp 1 "+bad)...); r.code == 0 || r.errors == "" {
			t.Errorf("resource create %s: %+v", bad, r)
		}
	}
	do(0, "resource list", "tcp 5432,8000-8100 icmp", "office, branch")
	do(0, "resource update db --udp 53 --icmp=false", "updated")
	do(0, "resource show db", "udp 53", "enabled")
	if strings.Contains(do(0, "resource show db"), "icmp") {
		t.Error("resource update --icmp=false left ICMP on")
	}
	do(0, "resource update db --udp=", "updated")

	do(1, "policy explain --client laptop --resource db --tcp 5432", "DENIED", "default deny")
	do(0, "policy allow --client laptop --resource db", "client:laptop may reach db")
	do(0, "policy explain --client laptop --resource db --tcp 5432", "ALLOWED", "office")
	do(1, "policy explain --client laptop --resource db --udp 53", "DENIED")
	do(0, "resource disable db", "disabled")
	do(1, "policy explain --client laptop --resource db --tcp 5432", "disabled")
	do(0, "resource enable db", "enabled")
	var policies control.List[control.PolicyRecord]
	if err := json.Unmarshal([]byte(do(0, "policy list --json")), &policies); err != nil || len(policies.Items) != 1 {
		t.Fatalf("policies %+v, %v", policies, err)
	}
	name := policies.Items[0].Name
	do(0, "policy show "+name, "client:laptop")
	do(0, "policy disable "+name, "disabled")
	do(1, "policy explain --client laptop --resource db --tcp 5432", "DENIED")
	do(0, "policy enable "+name, "enabled")
	do(0, "policy delete "+name, "deleted")

	do(0, "group create devs --member client:laptop", "1 member")
	do(0, "group update devs --add gateway:branch", "2 members")
	do(0, "group list", "client:laptop", "gateway:branch")
	do(0, "policy allow --group devs --resource db --name devs-db", "devs-db")
	do(0, "policy explain --from gateway:branch --resource db --tcp 8050", "ALLOWED")
	do(0, "group update devs --remove client:laptop", "1 member")
	do(1, "policy explain --client laptop --resource db --tcp 5432", "DENIED")
	do(0, "group show devs", "gateway:branch")
	do(0, "group delete devs", "deleted")

	// A node that enrols shows in the status, and the relay's credential works for enrolled relays.
	a, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: gw.Token})
	if err != nil || a.Name() != "office" {
		t.Fatalf("enrol with the token from the command: %v", err)
	}
	do(0, "status", "fra-1", "office", "laptop", "1 resource")
	var st control.OrgStatus
	if err := json.Unmarshal([]byte(do(0, "status --json")), &st); err != nil || len(st.Gateways) != 2 || st.Organization != "default" {
		t.Errorf("status %+v, %v", st, err)
	}
	do(0, "relay credential fra-1 --client laptop --ttl 30m", "username", "password", "turn")
	do(0, "session list", "no session is open")
	do(0, "session kill laptop", "laptop")
	do(1, "session kill nobody", "nobody")

	do(0, "client disable laptop", "disabled")
	do(0, "client show laptop", "disabled")
	do(0, "client enable laptop", "enabled")
	do(0, "client revoke laptop", "revoked")
	do(0, "gateway revoke office", "revoked")
	do(0, "gateway show office", "revoked")
	do(0, "relay drain fra-1", "draining")
	do(0, "relay disable fra-1", "disabled")
	do(0, "client delete laptop", "deleted")
	do(0, "resource delete db", "deleted")

	do(0, "audit tail -n 3", "client")
	do(0, "audit verify", "whole")
	export := do(0, "audit export")
	var last int64
	for line := range strings.Lines(export) {
		var e auditfile.Entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("exported line %s: %v", line, err)
		}
		if e.Type == auditfile.TypeEntry {
			if e.Seq != last+1 || e.Hash == "" {
				t.Fatalf("exported line %s after %d", line, last)
			}
			last = e.Seq
		}
	}
	if last < 20 || strings.Contains(export, gw.Token) {
		t.Errorf("%d entries exported", last)
	}
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	do(0, "audit export -o "+file)
	do(0, "audit verify "+file, "is whole", "FILE'S OWN WORD")
	do(1, "audit verify "+file+" --root-pin "+strings.Repeat("0", 64), "NOT GOOD, line 1")
	do(0, "logout")
	do(2, "status", "not logged in")
}

// TestAnswerLost has the answer to a request lost on the way back: it is sent again, and what it makes is made once.
func TestAnswerLost(t *testing.T) {
	srv, do := realPlatform(t)
	var lost atomic.Int32
	to, err := url.Parse(srv.URL())
	if err != nil {
		t.Fatal(err)
	}
	back := httputil.NewSingleHostReverseProxy(to)
	trust := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // the platform's own CA; what is tested is the way through here
	t.Cleanup(trust.CloseIdleConnections)
	back.Transport = trust
	back.ModifyResponse = func(r *http.Response) error {
		if m := r.Request.Method; (m == http.MethodPost || m == http.MethodPatch || m == http.MethodDelete) && lost.Add(1)%2 == 1 {
			return errors.New("lost")
		}
		return nil
	}
	back.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	proxy := httptest.NewServer(back)
	t.Cleanup(proxy.Close)
	do(0, "login --token-file "+srv.AdminFile()+" --url "+proxy.URL)
	var made control.CreatedNode
	if err := json.Unmarshal([]byte(do(0, "gateway create office --json")), &made); err != nil || made.Token == "" {
		t.Fatalf("%+v, %v", made, err)
	}
	do(0, "gateway update office --name branch", "branch updated")
	do(0, "client create laptop", "sallyway connect")
	do(0, "client delete laptop", "deleted")
	if n := lost.Load(); n < 8 {
		t.Errorf("%d answers came by, each of the four was to be lost once", n)
	}
	count := make(map[string]int)
	for line := range strings.Lines(do(0, "audit tail -n 100 --json")) {
		var e control.AuditEntry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		count[e.Action]++
	}
	if count["node.create"] != 2 || count["node.update"] != 1 || count["node.delete"] != 1 {
		t.Errorf("done: %v", count)
	}
	if strings.Count(do(0, "gateway list"), "branch") != 1 {
		t.Error("not one gateway")
	}
}
