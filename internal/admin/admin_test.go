package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const apiToken = "api-token-5e63"

// exchange is what the fake platform expects and answers.
type exchange struct {
	method, path string // path with query
	body         string // JSON; empty: none
	status       int    // zero is 200
	answer       string // JSON
}

// fakeAPI plays exchanges in order and reports what differs.
type fakeAPI struct {
	t      *testing.T
	server *httptest.Server
	mu     sync.Mutex
	script []exchange
}

func newFakeAPI(t *testing.T, script ...exchange) *fakeAPI {
	t.Helper()
	f := &fakeAPI{t: t, script: script}
	f.server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(func() {
		f.server.Close()
		if len(f.script) > 0 {
			t.Errorf("%d requests were not made, first %+v", len(f.script), f.script[0])
		}
	})
	return f
}

func (f *fakeAPI) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.script) == 0 {
		f.t.Errorf("unexpected request %s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	x := f.script[0]
	f.script = f.script[1:]
	if got := r.Method + " " + r.URL.RequestURI(); got != x.method+" "+x.path {
		f.t.Errorf("request %s, want %s %s", got, x.method, x.path)
	}
	if got := r.Header.Get("Authorization"); got != "Bearer "+apiToken {
		f.t.Errorf("authorization %q", got)
	}
	b, _ := io.ReadAll(r.Body)
	if !sameJSON(string(b), x.body) {
		f.t.Errorf("%s %s: body %s, want %s", x.method, x.path, b, x.body)
	}
	w.Header().Set("Content-Type", "application/json")
	if x.status >= 400 {
		w.Header().Set("Content-Type", "application/problem+json")
	}
	if x.status != 0 {
		w.WriteHeader(x.status)
	}
	fmt.Fprint(w, x.answer)
}

func sameJSON(a, b string) bool {
	if a == "" || b == "" {
		return a == b
	}
	var x, y any
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		return false
	}
	p, _ := json.Marshal(x)
	q, _ := json.Marshal(y)
	return bytes.Equal(p, q)
}

// result is what a command left behind.
type result struct {
	code        int
	out, errors string
}

// sallyway runs the program's command with its shell, as main does.
func sallyway(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	root := Command()
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&out)
	root.SetErr(&errs)
	before := os.Args
	defer func() { os.Args = before }()
	os.Args = append([]string{"sallyway"}, args...)
	code := daemon.Main(root)
	return result{code, out.String(), errs.String()}
}

// loggedIn keeps a login for url in a fresh file.
func loggedIn(t *testing.T, url, org string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials.json")
	t.Setenv("SALLYWAY_CREDENTIALS", path)
	t.Setenv("SALLYWAY_ORG", "")
	b, _ := json.Marshal(credential{AdminCredential: control.AdminCredential{URL: url, Token: apiToken}, Org: org})
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

const (
	nodeJSON    = `{"id":"g-1","name":"office","kind":"gateway","state":"healthy","created":"2026-01-02T03:04:05Z","version":"v1","relays":["fra-1","ams-2"],"virtual":["100.112.0.1"],"problems":["clock differs"]}`
	relayJSON   = `{"id":"r-1","name":"fra-1","kind":"relay","state":"healthy","created":"2026-01-02T03:04:05Z","host":"relay.example","port":5349,"load":{"allocations":3,"bytes_per_second":1000}}`
	createdJSON = `{"id":"g-1","name":"office","kind":"gateway","state":"pending","created":"2026-01-02T03:04:05Z","token":"swe1.secret","command":"sudo gatewayd install --token-file - <<'END'\nswe1.secret\nEND","foreground":"sudo gatewayd up --token-file F","expires":"2026-01-02T04:04:05Z"}`
	resJSON     = `{"id":"x-1","name":"db","address":"10.0.3.7","tcp":["5432","8000-8100"],"icmp":true,"fqdn":"db.acme.sallyway.internal","gateways":[],"gateway_names":["office"],"disabled":false,"created":"2026-01-02T03:04:05Z","virtual":["100.112.0.9"]}`
	policyJSON  = `{"id":"p-1","name":"laptop-db","subject":"client:laptop","resource":"db","disabled":false,"created":"2026-01-02T03:04:05Z"}`
	groupJSON   = `{"name":"devs","members":["client:a","client:b"],"created":"2026-01-02T03:04:05Z"}`
	orgJSON     = `{"name":"acme","range":["100.112.0.0/12","fd00::/48"],"created":"2026-01-02T03:04:05Z"}`
	testedJSON  = `{"resource":"db","target":"tcp 10.0.3.7:5432","ok":true,"verdict":"reached by gateway office over fra-1 udp","started":"2026-01-02T03:04:05Z","ms":21.4,"gateways":[` +
		`{"gateway":"office","ok":true,"path":"fra-1 udp","rtt_ms":3.2,"verdict":"","done":true,"hops":[{"name":"rendezvous","to":"relay fra-1","state":"ok","ms":1.5,"detail":"a channel"},` +
		`{"name":"first-byte","to":"10.0.3.7:5432","state":"skipped","ms":300}]}]}`
	untestedJSON = `{"resource":"db","target":"tcp 10.0.3.7:5432","ok":false,"refused":true,"verdict":"no policy allows it","remedy":"sallyway policy allow --from platform --resource db","gateways":[],"started":"2026-01-02T03:04:05Z","ms":0.1}`
	statusJSON   = `{"organization":"acme","version":"v9","relays":[` + relayJSON + `],"gateways":[` + nodeJSON + `],"clients":[],"resources":1,"policies":2,"sessions":3}`
	sessionJSON  = `{"gateway":"office","peer":"laptop","key":"` + zeros + `","relay":"fra-1","since":"2026-01-02T03:04:05Z","flows":2,"sent_bytes":2048,"recv_bytes":5}`
	auditJSON    = `{"seq":7,"at":"2026-01-02T03:04:05Z","actor":"token:admin","action":"node.create","object":"gateway office","result":"ok","detail":{"b":1,"a":"x\u001b[31m"},"hash":"h"}`
	turnJSON     = `{"username":"u","password":"p","realm":"acme","uris":["turn:relay.example:5349?transport=udp"],"expires":"2026-01-02T04:04:05Z"}`
	zeros        = "0000000000000000000000000000000000000000000000000000000000000000"
)

func list1(item string) string { return `{"items":[` + item + `]}` }

// Every verb: the request that it makes, what it prints, and its exit code.
func TestVerbs(t *testing.T) {
	const base = "/api/v1/orgs/acme"
	tests := []struct {
		args   string // split at spaces
		script []exchange
		out    []string // parts of standard output
		errs   []string // parts of standard error
		code   int
	}{
		{
			args:   "organization create acme --range 100.96.0.0/12,fd00::/48",
			script: []exchange{{"POST", "/api/v1/orgs", `{"name":"acme","range":["100.96.0.0/12","fd00::/48"]}`, 201, orgJSON}},
			out:    []string{"organization acme created", "--org acme"},
		},
		{args: "organization list", script: []exchange{{"GET", "/api/v1/orgs?limit=200", "", 0, list1(orgJSON)}}, out: []string{"NAME", "acme", "100.112.0.0/12, fd00::/48"}},
		{args: "organization show", script: []exchange{{"GET", base, "", 0, orgJSON}}, out: []string{"2026-01-02 03:04:05 UTC"}},
		{
			args:   "organization update --direct off",
			script: []exchange{{"PATCH", base, `{"direct":false}`, 0, orgJSON}}, out: []string{"organization acme: direct paths off"},
		},
		{
			args:   "organization update acme --direct on --direct-private on",
			script: []exchange{{"PATCH", base, `{"direct":true,"direct_private":true}`, 0, strings.Replace(orgJSON, "{", `{"direct":{"on":true,"private":true},`, 1)}},
			out:    []string{"direct paths on, private addresses too"},
		},
		{args: "organization update", code: 2, errs: []string{"nothing to change"}},
		{args: "organization update --direct maybe", code: 2, errs: []string{"want on or off"}},
		{
			args: "organization delete acme", code: 1, errs: []string{"it has 2 gateways", "delete them first"},
			script: []exchange{{"DELETE", base, "", 409, `{"detail":"it has 2 gateways","code":"conflict","remedy":"delete them first"}`}},
		},
		{args: "organization delete acme", script: []exchange{{"DELETE", base, "", 204, ""}}, out: []string{"deleted"}},

		{
			args: "gateway create office", script: []exchange{{"POST", base + "/gateways", `{"name":"office"}`, 201, createdJSON}},
			out: []string{"gateway office created (g-1)", "sudo gatewayd install --token-file - <<'END'\nswe1.secret\nEND", "  sudo gatewayd up"},
		},
		{args: "gateway create", code: 2, errs: []string{"the gateway's name is missing"}},
		{args: "gateway create a b", code: 2, errs: []string{`"b" is too much`}},
		{args: "gateway list", script: []exchange{{"GET", base + "/gateways?limit=200", "", 0, list1(nodeJSON)}}, out: []string{"office", "healthy", "fra-1, ams-2", "clock differs"}},
		{args: "gateway list", script: []exchange{{"GET", base + "/gateways?limit=200", "", 0, `{"items":[]}`}}, errs: []string{"organization acme has no gateways", "sallyway gateway create NAME"}},
		{args: "gateway show office", script: []exchange{{"GET", base + "/gateways/office", "", 0, nodeJSON}}, out: []string{"100.112.0.1", "clock differs"}},
		{args: "gateway show a/b", script: []exchange{{"GET", base + "/gateways/a%2Fb", "", 404, `{"detail":"no gateway a/b","code":"not_found"}`}}, code: 1, errs: []string{"show gateway a/b: no gateway a/b", "sallyway --org acme gateway list"}},
		{args: "gateway update office --name hq", script: []exchange{{"PATCH", base + "/gateways/office", `{"name":"hq"}`, 0, nodeJSON}}, out: []string{"updated"}},
		{
			args: "gateway update office --pin-relay fra-1,ams-2 --exclude-relay= --region eu", out: []string{"updated"},
			script: []exchange{{"PATCH", base + "/gateways/office", `{"region":"eu","pin_relays":["fra-1","ams-2"],"exclude_relays":[]}`, 0, nodeJSON}},
		},
		{
			args: "gateway create office --region eu --prefer-relay fra-1", out: []string{"swe1.secret"},
			script: []exchange{{"POST", base + "/gateways", `{"name":"office","region":"eu","prefer_relays":["fra-1"]}`, 201, createdJSON}},
		},
		{
			args: "gateway explain office", out: []string{"fra-1", "active", "12 ms", "2 (1 active)", "kept: healthy", "ams-2 (shared)", "excluded for this gateway"},
			script: []exchange{{"GET", base + "/gateways/office/relays", "", 0, `{"gateway":"office","items":[
				{"relay":"fra-1","place":"active","state":"healthy","rtt":12000000,"gateways":2,"active":1,"load":0.5,"why":"kept: healthy"},
				{"relay":"ams-2","shared":true,"state":"healthy","gateways":1,"active":1,"load":0,"why":"excluded for this gateway"}]}`}},
		},
		{
			args: "gateway explain office", out: []string{"no relay that gateway office could have", "sallyway relay create"},
			script: []exchange{{"GET", base + "/gateways/office/relays", "", 0, `{"gateway":"office","items":[]}`}},
		},
		{args: "gateway create office --failure-domain x", code: 2, errs: []string{"unknown flag: --failure-domain"}},
		{args: "gateway update office", code: 2, errs: []string{"nothing to change"}},
		{args: "gateway delete office", script: []exchange{{"DELETE", base + "/gateways/office", "", 204, ""}}, out: []string{"gateway office deleted"}},
		{args: "gateway disable office", script: []exchange{{"POST", base + "/gateways/office/disable", "", 0, nodeJSON}}, out: []string{"disabled"}},
		{args: "gateway enable office", script: []exchange{{"POST", base + "/gateways/office/enable", "", 0, nodeJSON}}, out: []string{"enabled"}},
		{args: "gateway revoke office", script: []exchange{{"POST", base + "/gateways/office/revoke", "", 0, nodeJSON}}, out: []string{"revoked"}},
		{args: "gateway token office", script: []exchange{{"POST", base + "/gateways/office/token", "", 0, createdJSON}}, out: []string{"fresh token", "swe1.secret"}},
		{args: "client create laptop", script: []exchange{{"POST", base + "/clients", `{"name":"laptop"}`, 201, createdJSON}}, out: []string{"swe1.secret"}},
		{args: "client revoke laptop", script: []exchange{{"POST", base + "/clients/laptop/revoke", "", 0, nodeJSON}}, out: []string{"client laptop revoked"}},

		{args: "relay create fra-1", code: 2, errs: []string{"--host"}},
		{
			args: "relay create fra-1 --host relay.example --port 3478 --peer 192.0.2.7:9000", out: []string{"swe1.secret"},
			script: []exchange{{"POST", base + "/relays", `{"name":"fra-1","host":"relay.example","port":3478,"peers":["192.0.2.7:9000"]}`, 201, createdJSON}},
		},
		{args: "relay create fra-1 --host relay.example --peer nonsense", code: 2, errs: []string{"--peer"}},
		{args: "relay create fra-1 --host h --auth aws", code: 2, errs: []string{"which AWS identities may be it?"}},
		{args: "relay list", script: []exchange{{"GET", base + "/relays?limit=200", "", 0, list1(relayJSON)}}, out: []string{"relay.example:5349"}},
		{args: "relay show fra-1", script: []exchange{{"GET", base + "/relays/fra-1", "", 0, relayJSON}}, out: []string{"allocations 3, bytes_per_second 1000"}},
		{args: "relay update fra-1 --host new.example --port 5350 --peer=", script: []exchange{{"PATCH", base + "/relays/fra-1", `{"host":"new.example","port":5350,"peers":[]}`, 0, relayJSON}}, out: []string{"updated"}},
		{
			args: "relay create ams-1 --host h --region eu-west --failure-domain rack-7", out: []string{"swe1.secret"},
			script: []exchange{{"POST", base + "/relays", `{"name":"ams-1","host":"h","region":"eu-west","failure_domain":"rack-7"}`, 201, createdJSON}},
		},
		{args: "relay update fra-1 --failure-domain=", script: []exchange{{"PATCH", base + "/relays/fra-1", `{"failure_domain":""}`, 0, relayJSON}}, out: []string{"updated"}},
		{
			args: "relay show fra-1", out: []string{"not reached from outside by STUN 5349/udp", "at 203.0.113.7", "STUN 5349/udp no answer in 3s", "open 5349/udp"},
			script: []exchange{{"GET", base + "/relays/fra-1", "", 0, `{"name":"fra-1","kind":"relay","state":"degraded","problems":["open 5349/udp in the firewall of fra-1"],"outside":{"state":"partly","address":"203.0.113.7",
				"why":"not reached from outside by STUN 5349/udp (no answer in 3s)","checks":[{"name":"STUN 5349/udp","ok":false,"detail":"no answer in 3s"}]}}`}},
		},
		{args: "relay drain fra-1", script: []exchange{{"POST", base + "/relays/fra-1/drain", "", 0, relayJSON}}, out: []string{"draining"}},
		{
			args: "relay enable fra-1", out: []string{"relay fra-1 enabled\nit still drains", "systemctl start sallyway-relay"},
			script: []exchange{
				{"GET", base + "/relays/fra-1", "", 0, strings.Replace(relayJSON, "healthy", "draining", 1)}, {"POST", base + "/relays/fra-1/enable", "", 0, relayJSON},
			},
		},
		{
			args: "relay enable fra-1", out: []string{"relay fra-1 enabled\nit is not connected", "systemctl start sallyway-relay"},
			script: []exchange{
				{"GET", base + "/relays/fra-1", "", 0, strings.Replace(relayJSON, "healthy", "unreachable", 1)},
				{"POST", base + "/relays/fra-1/enable", "", 0, strings.Replace(relayJSON, "healthy", "unreachable", 1)},
			},
		},
		{args: "relay create eu-1 --shared --host eu.example", script: []exchange{{"POST", "/api/v1/shared/relays", `{"name":"eu-1","host":"eu.example"}`, 201, createdJSON}}, out: []string{"swe1.secret"}},
		{args: "--org platform.shared relay token eu-1", script: []exchange{{"POST", "/api/v1/shared/relays/eu-1/token", "", 201, createdJSON}}, out: []string{"swe1.secret"}},
		{args: "gateway list --shared", code: 2, errs: []string{"unknown flag: --shared"}},
		{args: "gateway drain office", code: 2, errs: []string{`unknown command "drain"`}},
		{args: "relay credential fra-1", code: 2, errs: []string{"--client"}},
		{args: "relay credential fra-1 --client laptop --ttl 25h", code: 2, errs: []string{"24h"}},
		{
			args: "relay credential fra-1 --client laptop --ttl 2h", script: []exchange{{"POST", base + "/relays/fra-1/credential", `{"client":"laptop","ttl":7200}`, 0, turnJSON}},
			out: []string{"turn:relay.example:5349?transport=udp", "password:"},
		},

		{
			args: "resource create db --gateway office,hq --address 10.0.3.7 --tcp 5432,8000-8100 --udp all --icmp --domain corp.example", out: []string{"db.acme.sallyway.internal", "policy allow"},
			script: []exchange{{"POST", base + "/resources", `{"name":"db","gateways":["office","hq"],"address":"10.0.3.7","tcp":["5432","8000-8100"],"udp":["all"],"icmp":true,"domains":["corp.example"]}`, 201, resJSON}},
		},
		{args: "resource create db --address 10.0.3.7 --tcp 1", code: 2, errs: []string{"--gateway"}},
		{args: "resource create db --gateway g --tcp 1", code: 2, errs: []string{"--address"}},
		{args: "resource create db --gateway g --address h", code: 2, errs: []string{"--tcp"}},
		{args: "resource create db --gateway g --address h --tcp 80-", code: 2, errs: []string{"--tcp", "80-"}},
		{
			args: "resource create db --gateway nope --address h --tcp 80", code: 2, errs: []string{`no gateway "nope"; body.gateways: unknown`, "sallyway gateway list"},
			script: []exchange{{
				"POST", base + "/resources", `{"name":"db","gateways":["nope"],"address":"h","tcp":["80"]}`, 422,
				`{"detail":"no gateway \"nope\"","errors":[{"message":"unknown","location":"body.gateways"}],"remedy":"sallyway gateway list"}`,
			}},
		},
		{args: "resource list", script: []exchange{{"GET", base + "/resources?limit=200", "", 0, list1(resJSON)}}, out: []string{"tcp 5432,8000-8100 icmp", "enabled"}},
		{args: "resource show db", script: []exchange{{"GET", base + "/resources/db", "", 0, resJSON}}, out: []string{"100.112.0.9"}},
		{args: "resource update db --tcp 22 --udp=", script: []exchange{{"PATCH", base + "/resources/db", `{"tcp":["22"],"udp":[]}`, 0, resJSON}}, out: []string{"updated"}},
		{args: "resource update db --icmp=false --gateway hq", script: []exchange{{"PATCH", base + "/resources/db", `{"icmp":false,"gateways":["hq"]}`, 0, resJSON}}, out: []string{"updated"}},
		{args: "resource disable db", script: []exchange{{"PATCH", base + "/resources/db", `{"disabled":true}`, 0, resJSON}}, out: []string{"disabled"}},
		{args: "resource enable db", script: []exchange{{"PATCH", base + "/resources/db", `{"disabled":false}`, 0, resJSON}}, out: []string{"enabled"}},
		{args: "resource delete db", script: []exchange{{"DELETE", base + "/resources/db", "", 204, ""}}, out: []string{"deleted"}},

		{args: "policy allow --client laptop --resource db", script: []exchange{{"POST", base + "/policies", `{"subject":"client:laptop","resource":"db"}`, 201, policyJSON}}, out: []string{"client:laptop may reach db (policy laptop-db)"}},
		{args: "policy allow --from gateway:hq --resource db --name site", script: []exchange{{"POST", base + "/policies", `{"name":"site","subject":"gateway:hq","resource":"db"}`, 201, policyJSON}}},
		{args: "policy allow --from platform --resource db", script: []exchange{{"POST", base + "/policies", `{"subject":"platform","resource":"db"}`, 201, policyJSON}}},
		{args: "policy allow --from platform:x --resource db", code: 2, errs: []string{"or platform"}},
		{
			args: "resource test db --gateway office --port 5432", out: []string{"by fra-1 udp", "rendezvous  relay fra-1    1.5  ok: a channel", "first-byte  10.0.3.7:5432  -    skipped", "reached by gateway office", "in 21 ms in all"},
			script: []exchange{{"POST", base + "/resources/db/test", `{"gateway":"office","port":5432}`, 0, testedJSON}},
		},
		{
			args: "resource test db", code: 1, errs: []string{"resource db is not reached from the platform: no policy allows it", "sallyway policy allow --from platform --resource db"},
			script: []exchange{{"POST", base + "/resources/db/test", `{}`, 0, untestedJSON}},
		},
		{args: "policy allow --group devs --resource db", script: []exchange{{"POST", base + "/policies", `{"subject":"group:devs","resource":"db"}`, 201, policyJSON}}},
		{args: "policy allow --from person:ada@example.com --resource db", script: []exchange{{"POST", base + "/policies", `{"subject":"person:ada@example.com","resource":"db"}`, 201, policyJSON}}},
		{args: "policy allow --resource db", code: 2, errs: []string{"who?"}},
		{args: "policy allow --client a --group b --resource db", code: 2, errs: []string{"one subject"}},
		{args: "policy allow --from hq --resource db", code: 2, errs: []string{`"hq" is not of the form`}},
		{args: "policy allow --client a", code: 2, errs: []string{"--resource"}},
		{args: "policy list", script: []exchange{{"GET", base + "/policies?limit=200", "", 0, list1(policyJSON)}}, out: []string{"laptop-db", "client:laptop"}},
		{args: "policy show laptop-db", script: []exchange{{"GET", base + "/policies/laptop-db", "", 0, policyJSON}}, out: []string{"client:laptop"}},
		{args: "policy disable laptop-db", script: []exchange{{"PATCH", base + "/policies/laptop-db", `{"disabled":true}`, 0, policyJSON}}, out: []string{"disabled"}},
		{args: "policy delete laptop-db", script: []exchange{{"DELETE", base + "/policies/laptop-db", "", 204, ""}}, out: []string{"deleted"}},
		{args: "policy explain --client laptop --resource db --tcp 5432", script: []exchange{{
			"POST", base + "/policies:explain", `{"subject":"client:laptop","resource":"db","proto":"tcp","port":5432}`, 0,
			`{"allowed":true,"rule":"laptop-db","reason":"rule allows","gateways":["office"]}`,
		}}, out: []string{"ALLOWED: client:laptop → db", "laptop-db", "office"}},
		{args: "policy explain --from gateway:hq --resource db --icmp", code: 1, script: []exchange{{
			"POST", base + "/policies:explain", `{"subject":"gateway:hq","resource":"db","proto":"icmp"}`, 0,
			`{"allowed":false,"rule":"default deny","reason":"no policy","remedy":"sallyway policy allow --from gateway:hq --resource db"}`,
		}}, out: []string{"DENIED", "default deny", "sallyway policy allow"}},
		{args: "policy explain --client a --resource db --tcp 1 --udp 2", code: 2},

		{args: "group create devs --member client:a,client:b", script: []exchange{{"POST", base + "/groups", `{"name":"devs","members":["client:a","client:b"]}`, 201, groupJSON}}, out: []string{"2 members"}},
		{args: "group create devs --member group:other", code: 2, errs: []string{"member"}},
		{args: "group list", script: []exchange{{"GET", base + "/groups?limit=200", "", 0, list1(groupJSON)}}, out: []string{"client:a, client:b"}},
		{args: "group show devs", script: []exchange{{"GET", base + "/groups/devs", "", 0, groupJSON}}, out: []string{"client:a"}},
		{args: "group update devs --add client:c,client:a --remove client:b", script: []exchange{
			{"GET", base + "/groups/devs", "", 0, groupJSON},
			{"PATCH", base + "/groups/devs", `{"members":["client:a","client:c"]}`, 0, groupJSON},
		}},
		{args: "group update devs --member=", script: []exchange{{"PATCH", base + "/groups/devs", `{"members":[]}`, 0, `{"name":"devs","members":[]}`}}, out: []string{"0 members"}},
		{args: "group delete devs", script: []exchange{{"DELETE", base + "/groups/devs", "", 204, ""}}, out: []string{"deleted"}},

		{args: "status", script: []exchange{{"GET", base + "/status", "", 0, statusJSON}}, out: []string{"1 resource, 2 policies, 3 sessions", "fra-1", "office", "no clients yet: sallyway client create NAME"}},
		{args: "session list", script: []exchange{{"GET", base + "/sessions?limit=200", "", 0, list1(sessionJSON)}}, out: []string{"laptop", "2.0 KiB", "5 B"}},
		{args: "session list --gateway hq", script: []exchange{{"GET", base + "/sessions?limit=200", "", 0, list1(sessionJSON)}}, errs: []string{"no session is open (gateways report every 10 s)\n"}},
		{args: "session kill laptop", script: []exchange{{"DELETE", base + "/sessions/laptop", "", 204, ""}}, out: []string{"end"}},
		{args: "audit tail", script: []exchange{{"GET", base + "/audit?limit=200", "", 0, list1(auditJSON)}}, out: []string{"node.create", "gateway office", "a=x?[31m b=1"}},
		{args: "audit verify", script: []exchange{{"GET", base + "/audit:verify", "", 0, `{"ok":true,"entries":7}`}}, out: []string{"whole: 7"}},
		{args: "audit verify", code: 1, script: []exchange{{"GET", base + "/audit:verify", "", 0, `{"ok":false,"entries":7,"problem":"entry 5 was changed"}`}}, out: []string{"BROKEN", "entry 5"}},
		{args: "--org other gateway list", script: []exchange{{"GET", "/api/v1/orgs/other/gateways?limit=200", "", 0, list1(nodeJSON)}}, out: []string{"office"}},

		{args: "staus", code: 2, errs: []string{`unknown command "staus"`, "status"}},
		{args: "relay lst", code: 2, errs: []string{`did you mean "list"?`}},
		{args: "relay list --jsn", code: 2, errs: []string{`--json`}},

		{
			args: "gateway list", code: 1, script: []exchange{{"GET", base + "/gateways?limit=200", "", 401, `{"detail":"the API token has expired","code":"token_expired"}`}},
			errs: []string{"list gateways: the API token has expired", "sallyway login --url http://127.0.0.1"},
		},
		{args: "gateway list", code: 1, script: []exchange{{"GET", base + "/gateways?limit=200", "", 403, `{"detail":"scope"}`}}, errs: []string{"scope"}},
		{args: "gateway list", code: 1, script: []exchange{{"GET", base + "/gateways?limit=200", "", 500, `nonsense`}}, errs: []string{"500", "platformd"}},
		{args: "gateway list", code: 1, script: []exchange{{"GET", base + "/gateways?limit=200", "", 200, `<html>`}}, errs: []string{"not the platform's JSON", "check that the URL"}},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			f := newFakeAPI(t, tt.script...)
			loggedIn(t, f.server.URL, "acme")
			r := sallyway(t, "", strings.Split(tt.args, " ")...)
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d\n%s", r.code, tt.code, r.errors)
			}
			for _, w := range tt.out {
				if !strings.Contains(r.out, w) {
					t.Errorf("output lacks %q:\n%s", w, r.out)
				}
			}
			for _, w := range tt.errs {
				if !strings.Contains(r.errors, w) {
					t.Errorf("error lacks %q:\n%s", w, r.errors)
				}
			}
			if strings.Contains(r.out+r.errors, apiToken) {
				t.Error("the API token is shown")
			}
			if strings.ContainsRune(r.out, 0x1b) {
				t.Error("output steers the terminal")
			}
		})
	}
}

// --json prints the API's document, whole, and nothing else on standard output.
func TestJSON(t *testing.T) {
	const base = "/api/v1/orgs/acme"
	tests := []struct {
		args  string
		x     exchange
		equal string // JSON
		code  int
	}{
		{"relay create fra-1 --host h --json", exchange{"POST", base + "/relays", `{"name":"fra-1","host":"h"}`, 201, createdJSON}, createdJSON, 0},
		{"gateway list --json", exchange{"GET", base + "/gateways?limit=200", "", 0, list1(nodeJSON)}, list1(nodeJSON), 0},
		{"gateway list --json", exchange{"GET", base + "/gateways?limit=200", "", 0, `{"items":[]}`}, `{"items":[]}`, 0},
		{"resource show db --json", exchange{"GET", base + "/resources/db", "", 0, resJSON}, resJSON, 0},
		{"policy explain --client a --resource db --json", exchange{"POST", base + "/policies:explain", `{"subject":"client:a","resource":"db"}`, 0, `{"allowed":false,"rule":"default deny","reason":"r"}`}, `{"allowed":false,"rule":"default deny","reason":"r"}`, 1},
		{"status --json", exchange{"GET", base + "/status", "", 0, statusJSON}, statusJSON, 0},
		{"audit verify --json", exchange{"GET", base + "/audit:verify", "", 0, `{"ok":true,"entries":7,"signed":5}`}, `{"ok":true,"entries":7,"signed":5}`, 0},
		{"client delete a --json", exchange{"DELETE", base + "/clients/a", "", 204, ""}, `{}`, 0},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			f := newFakeAPI(t, tt.x)
			loggedIn(t, f.server.URL, "acme")
			r := sallyway(t, "", strings.Fields(tt.args)...)
			if r.code != tt.code || r.errors != "" {
				t.Errorf("exit code %d, errors %q", r.code, r.errors)
			}
			if !sameJSON(r.out, tt.equal) {
				t.Errorf("printed %s\nwant %s", r.out, tt.equal)
			}
		})
	}
}

func TestPages(t *testing.T) {
	f := newFakeAPI(t,
		exchange{"GET", "/api/v1/orgs/acme/clients?limit=200", "", 0, `{"items":[{"name":"a"}],"next_cursor":"c/1"}`},
		exchange{"GET", "/api/v1/orgs/acme/clients?cursor=c%2F1&limit=200", "", 0, `{"items":[{"name":"b"}]}`},
	)
	loggedIn(t, f.server.URL, "acme")
	if r := sallyway(t, "", "client", "list"); r.code != 0 || !strings.Contains(r.out, "\na ") || !strings.Contains(r.out, "\nb ") {
		t.Errorf("%+v", r)
	}
}

// TestAuditExport: what the platform sends goes to standard output or to a file as it is, and a file is whole or not there.
func TestAuditExport(t *testing.T) {
	lines := `{"type":"chain","format":1}` + "\n" + `{"type":"entry","seq":1,"detail":{"n":9007199254740993}}` + "\n"
	get := exchange{"GET", "/api/v1/orgs/acme/audit:export", "", 0, lines}
	f := newFakeAPI(t, get, get)
	loggedIn(t, f.server.URL, "acme")
	if r := sallyway(t, "", "audit", "export"); r.code != 0 || r.out != lines {
		t.Errorf("exit code %d, %q", r.code, r.out)
	}
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	r := sallyway(t, "", "audit", "export", "-o", file)
	b, err := os.ReadFile(file)
	if r.code != 0 || r.out != "" || err != nil || string(b) != lines {
		t.Errorf("exit code %d, %q in the file, %v", r.code, b, err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("others may read the file: %v %v", st, err)
	}
}

// `audit tail -f` prints what comes, once, and ends without an error when it is interrupted.
func TestAuditFollow(t *testing.T) {
	entry := func(seq int) string {
		return fmt.Sprintf(`{"seq":%d,"at":"2026-01-02T03:04:05Z","action":"action-%d"}`, seq, seq)
	}
	f := newFakeAPI(t,
		exchange{"GET", "/api/v1/orgs/acme/audit?limit=200", "", 0, list1(entry(1))},
		exchange{"GET", "/api/v1/orgs/acme/audit?limit=200", "", 0, list1(entry(1))},
		exchange{"GET", "/api/v1/orgs/acme/audit?limit=200", "", 0, `{"items":[` + entry(1) + `,` + entry(2) + `]}`},
	)
	c, err := NewClient(control.AdminCredential{URL: f.server.URL, Token: apiToken}, "acme")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &stopper{word: "action-2", stop: cancel}
	cmd := &cobra.Command{}
	cmd.SetContext(ctx)
	cmd.SetOut(out)
	a := &app{poll: time.Millisecond}
	if err := a.follow(cmd, &auditReader{c: c}, nil); err != nil {
		t.Error(err)
	}
	if got := out.String(); strings.Count(got, "action-1") != 1 || strings.Count(got, "action-2") != 1 {
		t.Errorf("printed\n%s", got)
	}
}

// stopper is an output that calls stop once word was written.
type stopper struct {
	bytes.Buffer
	word string
	stop func()
}

func (s *stopper) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte(s.word)) {
		s.stop()
	}
	return s.Buffer.Write(b)
}

func TestNotLoggedIn(t *testing.T) {
	t.Setenv("SALLYWAY_CREDENTIALS", filepath.Join(t.TempDir(), "none.json"))
	r := sallyway(t, "", "gateway", "list")
	if r.code != 2 || !strings.Contains(r.errors, "not logged in") || !strings.Contains(r.errors, "sallyway login --token-file") {
		t.Errorf("%+v", r)
	}
}

func TestUnreachable(t *testing.T) {
	s := httptest.NewServer(nil)
	s.Close()
	loggedIn(t, s.URL, "acme")
	r := sallyway(t, "", "gateway", "list")
	if r.code != 1 || !strings.Contains(r.errors, "refuses the connection") || !strings.Contains(r.errors, "check that platformd runs") {
		t.Errorf("%+v", r)
	}
}

func TestCompletion(t *testing.T) {
	f := newFakeAPI(t, exchange{"GET", "/api/v1/orgs/acme/relays?limit=200", "", 0, list1(relayJSON)})
	loggedIn(t, f.server.URL, "acme")
	if r := sallyway(t, "", "__complete", "relay", "show", ""); r.code != 0 || !strings.HasPrefix(r.out, "fra-1\n") {
		t.Errorf("%+v", r)
	}
}

// Every verb says what it does, and every group shows examples.
func TestHelp(t *testing.T) {
	root := Command()
	for _, c := range root.Commands() {
		if c.Short == "" {
			t.Errorf("%s has no short help", c.Name())
		}
		if c.HasSubCommands() && c.Example == "" {
			t.Errorf("%s has no examples", c.Name())
		}
		for _, sub := range c.Commands() {
			if sub.Short == "" || (sub.RunE == nil && sub.Run == nil) {
				t.Errorf("%s has no help or does nothing", sub.CommandPath())
			}
			if r := sallyway(t, "", c.Name(), sub.Name(), "--help"); r.code != 0 || !strings.Contains(r.out, "Usage:") {
				t.Errorf("help of %s: %+v", sub.CommandPath(), r)
			}
		}
	}
}
