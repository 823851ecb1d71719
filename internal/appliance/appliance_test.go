package appliance

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyway/gateway"
	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/console"
	"sallyway/internal/appliance/network"
	"sallyway/internal/appliance/seed"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/platform"
	"sallyway/relay"
	"sallyway/relay/leg"
	"sallyway/relay/relayd"
)

func parse(t *testing.T, doc string) *config.Config {
	t.Helper()
	c, err := config.Parse([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func ports(c *config.Config) string {
	var out []string
	for _, p := range openPorts(c) {
		out = append(out, p.String())
	}
	return strings.Join(out, " ")
}

// TestOpenPorts: a gateway opens none, and others what their daemons listen on.
func TestOpenPorts(t *testing.T) {
	for doc, want := range map[string]string{
		"role: gateway": "",
		"role: gateway\ngateway: {metrics-listen: '0.0.0.0:9465', direct: auto}": "",
		"role: gateway\nhealth-listen: ':9470'":                                  "9470/tcp",
		"role: relay":                                                            "5349/udp 5349/tcp 2222/tcp 8443/tcp 49152-65535/udp",
		"role: relay\nrelay: {listen_port: 3478, ssh-port: 0, min-port: 50000, max-port: 50010}": "3478/udp 3478/tcp 8443/tcp 50000-50010/udp",
		"role: platform": "443/tcp",
		"role: platform\nplatform: {listen: '', http-listen: ':8080'}":         "8080/tcp",
		"role: platform\nplatform: {http-listen: '127.0.0.1:8080'}":            "443/tcp",
		"role: platform\nplatform: {listen: '[::1]:443', http-listen: 'what'}": "",
		"role: all": "443/tcp 5349/udp 5349/tcp 2222/tcp 8443/tcp 49152-65535/udp",
	} {
		if got := ports(parse(t, doc)); got != want {
			t.Errorf("%s\nopens %q, want %q", doc, got, want)
		}
	}
}

func TestSettingsOfADaemon(t *testing.T) {
	c := parse(t, "role: gateway\nnetwork: {proxy: 'http://proxy.example:3128'}\ngateway: {allow: [10.0.0.0/8], dns: auto, log_level: debug}")
	gw := of(c.Role)
	if len(gw) != 1 || gw[0].name != "gatewayd" {
		t.Fatalf("a gateway runs %v", gw)
	}
	want := map[string]any{"allow": []any{"10.0.0.0/8"}, "dns": "auto", "log-level": "debug", "egress-proxy": "http://proxy.example:3128", "metrics-listen": "127.0.0.1:9465"}
	if got := gw[0].settings(c); !reflect.DeepEqual(got, want) {
		t.Errorf("settings %v, want %v", got, want)
	}
	if programs[2].defaults["dns"] != "off" || len(programs[2].defaults) != 1 {
		t.Errorf("the defaults have become %v", programs[2].defaults)
	}
	path := filepath.Join(t.TempDir(), "c.yaml")
	p := gw[0]
	p.jail.UID = os.Geteuid()
	for range 2 {
		if err := p.writeFile(path, c); err != nil {
			t.Fatal(err)
		}
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o400 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	var read map[string]any
	b, _ := os.ReadFile(path)
	if err := yaml.Unmarshal(b, &read); err != nil || !reflect.DeepEqual(read, want) {
		t.Errorf("written %v, %v", read, err)
	}
}

// TestSettingsAreFlags starts each daemon with the file that an appliance writes for it: it has to know every key.
func TestSettingsAreFlags(t *testing.T) {
	c := parse(t, "role: all\nnetwork: {proxy: 'http://proxy.example:3128'}")
	for _, p := range of(c.Role) {
		if p.role != config.Gateway {
			continue
		}
		path := filepath.Join(t.TempDir(), "c.yaml")
		p.jail.UID = os.Geteuid()
		if err := p.writeFile(path, c); err != nil {
			t.Fatal(err)
		}
		cmd := gateway.Command()
		cmd.SetArgs(append(slices.Clone(p.start), "--config", path, "--"+p.state, filepath.Join(t.TempDir(), "s")))
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(err.Error(), "not enrolled") { // so it got past its settings
			t.Errorf("%s: %v", p.name, err)
		}
	}
}

func TestKeepAndSaved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "appliance", "config.yaml")
	if f := saved(path); f.Config != nil || f.Err != nil {
		t.Errorf("nothing was kept: %+v", f)
	}
	c := parse(t, "role: relay\nhostname: fra\nrelay: {listen-port: 3478}")
	c.Token = "swe1.secret"
	if err := keep(path, c); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); strings.Contains(string(b), "secret") {
		t.Error("the token was kept")
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	f := saved(path)
	if f.Err != nil || f.Config == nil || f.Config.Hostname != "fra" || f.Config.Token != "" {
		t.Errorf("%+v", f)
	}
	if err := os.WriteFile(path, []byte("rol: x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f := saved(path); f.Err == nil {
		t.Error("a damaged file is a configuration")
	}
}

func raw(t *testing.T, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func text(rows ...[]console.Row) string {
	var s strings.Builder
	for _, part := range rows {
		for _, r := range part {
			s.WriteString(r.Name + "=" + r.Text + "\n")
		}
	}
	return s.String()
}

// TestStatusDocuments reads what the daemons themselves write: when one of them changes its document, this says so.
func TestStatusDocuments(t *testing.T) {
	node := agent.Status{Name: "office", Platform: "https://p.example", Connected: true}
	gw := raw(t, gateway.Status{
		Platform: node, Resources: []string{"db", "web"}, Health: []control.ResourceHealth{{Name: "db", Reason: "refused"}},
		Relays: []legs.Status{
			{Name: "fra-1", Host: "192.0.2.1", Up: true, Transport: leg.UDP, Stats: &leg.Stats{RTT: 12345 * time.Microsecond}}, {Name: "ams-2", Host: "192.0.2.2", Error: "no answer"},
		},
		Sessions: []gateway.SessionStatus{{Peer: identity.Node{Org: "default", Kind: identity.Client, ID: "c-a"}}},
	})
	rl := raw(t, relayd.Status{Platform: node, Listen: netip.MustParseAddrPort("0.0.0.0:5349"), Relay: &relay.Snapshot{Allocations: 7}})
	pf := raw(t, platform.Status{URL: "https://p.example", Ready: true, Organizations: []platform.OrgCounts{{Name: "default", Gateways: platform.Count{All: 3, Reachable: 2}}}})
	for i, tc := range []struct {
		doc  json.RawMessage
		want []string
	}{
		{pf, []string{"URL=https://p.example", "gateways 2/3"}},
		{rl, []string{"platform=https://p.example, connected", "serving on=0.0.0.0:5349", "7 allocations"}},
		{gw, []string{
			"path=relay fra-1 (192.0.2.1) by UDP", "RTT=12.35ms to fra-1", "path=relay ams-2 (192.0.2.2), down", "=no answer", "resources=db, web",
			"unreached=db: refused", "sessions=1",
		}},
	} {
		v := view{program: programs[i], answers: true, ready: true, status: supervise.Status{State: supervise.Ready}, doc: readStatus(tc.doc)}
		rows, live := v.rows()
		got := text(rows, live)
		for _, w := range tc.want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: %q is missing in\n%s", v.program.name, w, got)
			}
		}
	}
	if d := readStatus(json.RawMessage(`{"relays": 5, "platform": {"name": "x"}}`)); d.Platform.Name != "x" {
		t.Errorf("a field of another shape spoils the rest: %+v", d)
	}
	_ = readStatus(json.RawMessage(`not json`)) // must not panic
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte(`{"platform": {"name": "x"}, "relays": [{"up": true}], "last_rung": [null], "relay": null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, p := range programs {
			v := view{program: p, answers: true, doc: readStatus(b)}
			rows, live := v.rows()
			_ = console.Block{Rows: rows, Live: live}.String() // must not panic
			_ = v.lastError()
		}
	})
}

func TestLastError(t *testing.T) {
	lines := func(texts ...string) []supervise.Line {
		var out []supervise.Line
		for _, s := range texts {
			out = append(out, supervise.Line{Text: s})
		}
		return out
	}
	refused := view{
		program: programs[2], status: supervise.Status{State: supervise.Refused, Exit: "ended with exit code 3"},
		logs: lines("time=… level=INFO msg=x", "gatewayd: the platform refused the token: it was used before", "  make a new one: sallyway gateway token office"),
	}
	want := "gatewayd ended with exit code 3: the platform refused the token: it was used before\nmake a new one: sallyway gateway token office"
	if got := refused.lastError(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	away := view{program: programs[2], answers: true, status: supervise.Status{State: supervise.Ready}}
	away.doc.Platform.Error, away.doc.Platform.Remedy = "no route to host", "look at the cable"
	if got := away.lastError(); got != "platform: no route to host (look at the cable)" {
		t.Errorf("%q", got)
	}
	bad := view{program: programs[1], answers: true, status: supervise.Status{State: supervise.Ready}, reasons: map[string]string{"start": "starting", "disk": "full"}}
	if got := bad.lastError(); got != "disk: full" {
		t.Errorf("%q", got)
	}
	if got := (view{program: programs[0], status: supervise.Status{State: supervise.Ready}, answers: true}).lastError(); got != "" {
		t.Errorf("%q", got)
	}
}

func TestSilentForOnce(t *testing.T) {
	before := view{program: programs[0], answers: true, ready: true, status: supervise.Status{State: supervise.Ready, PID: 7}}
	before.doc.URL = "https://p.example"
	now := view{program: programs[0], status: supervise.Status{State: supervise.Ready, PID: 7}}.after(before)
	rows, _ := now.rows()
	want, _ := before.rows()
	if !reflect.DeepEqual(rows, want) || now.ready {
		t.Errorf("%v, want %v; ready %v", rows, want, now.ready)
	}
	restarted := view{program: programs[0], status: supervise.Status{State: supervise.Starting, PID: 8}}.after(before)
	if restarted.doc.URL != "" || restarted.answers {
		t.Errorf("%+v", restarted)
	}
}

func TestNetworkRows(t *testing.T) {
	s := network.Status{Links: []network.Link{
		{Name: "eth0", MAC: "52:54:00:12:34:56", Driver: "virtio_net", Carrier: true, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24")}, Source: "dhcp"},
		{Name: "eth1", MAC: "52:54:00:12:34:57"},
	}}
	got := text(networkRows(s))
	for _, w := range []string{"network=eth0 52:54:00:12:34:56 (virtio_net) 192.0.2.10/24 by dhcp", "eth1 52:54:00:12:34:57, no cable", "open ports=none"} {
		if !strings.Contains(got, w) {
			t.Errorf("%q is missing in\n%s", w, got)
		}
	}
	if got := text(networkRows(network.Status{})); !strings.Contains(got, "no NIC") {
		t.Error(got)
	}
	if got := addresses(s); len(got) != 1 || got[0] != "192.0.2.10" {
		t.Errorf("%q", got)
	}
}

func TestNetworkConfig(t *testing.T) {
	s := &service{result: config.Result{Config: parse(t, `
role: relay
hostname: fra
network:
  addresses: [192.0.2.10/24]
  routers: [192.0.2.1]
  dns: [192.0.2.53]
  interfaces: [{name: eth1, addresses: [10.0.0.1/8], routes: [{to: 172.16.0.0/12, via: 10.0.0.2}], mtu: 9000}]
`)}}
	got := s.networkConfig()
	if _, err := network.New(got); err != nil {
		t.Fatal(err)
	}
	if got.Hostname != "fra" || len(got.Interfaces) != 2 || got.Interfaces[0].Routes[0].Via.String() != "10.0.0.2" || got.Interfaces[1].Routers[0].String() != "192.0.2.1" || len(got.Ports) != 5 {
		t.Errorf("%+v", got)
	}
	if got := (&service{}).networkConfig(); len(got.Ports) != 0 || len(got.Interfaces) != 0 {
		t.Errorf("without a configuration: %+v", got)
	}
}

func TestMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meminfo")
	if err := os.WriteFile(path, []byte("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nbad\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if used, total := memory(path); used != 600<<10 || total != 1000<<10 {
		t.Errorf("%d of %d", used, total)
	}
	if used, total := memory("/nonexistent"); used != 0 || total != 0 {
		t.Errorf("%d of %d", used, total)
	}
}

// TestHealth: 200 only when every daemon says that it is ready, and nothing else is answered.
func TestHealth(t *testing.T) {
	ready := make(chan bool, 1)
	ready <- true
	d := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ok := <-ready
		ready <- ok
		if r.URL.Path != "/readyz" || !ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer d.Close()
	addr := strings.TrimPrefix(d.URL, "http://")
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = dead.Close()
	ask := func(h http.Handler, method, path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code
	}
	if got := ask(healthHandler([]string{addr}), "GET", "/healthz"); got != 200 {
		t.Errorf("all ready: %d", got)
	}
	if got := ask(healthHandler([]string{addr, dead.Addr().String()}), "GET", "/healthz"); got != 503 {
		t.Errorf("one does not answer: %d", got)
	}
	for path, want := range map[string]int{"/metrics": 404, "/readyz": 404, "/": 404} {
		if got := ask(healthHandler([]string{addr}), "GET", path); got != want {
			t.Errorf("%s: %d", path, got)
		}
	}
	<-ready
	ready <- false
	if got := ask(healthHandler([]string{addr}), "GET", "/healthz"); got != 503 {
		t.Errorf("not ready: %d", got)
	}
	if got := serveHealth([]string{"127.0.0.1:0"}); got != daemon.ExitUsage {
		t.Errorf("without daemons: exit code %d", got)
	}
}

func TestNotesAreShownOnce(t *testing.T) {
	var out strings.Builder
	c := console.New(&out, nil)
	n := &node{console: c}
	for range 3 {
		n.note("a")
	}
	for i := range 2 * maxNotes {
		n.note(strings.Repeat("b", i+1))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c.Close(ctx)
	if strings.Count(out.String(), "* a\n") != 1 || len(n.notes) != maxNotes {
		t.Errorf("%d notes, shown:\n%s", len(n.notes), out.String())
	}
}

func TestAlive(t *testing.T) {
	for name, tc := range map[string]struct {
		up   time.Duration
		beat int64
		want bool
	}{
		"just started":   {time.Second, 0, true},
		"repairs a disk": {20 * time.Minute, 0, true},
		"never came up":  {2 * time.Hour, 0, false},
		"goes round":     {time.Hour, 3590, true},
		"stands still":   {time.Hour, 3000, false},
	} {
		n := &node{started: time.Now().Add(-tc.up)}
		n.beat.Store(tc.beat)
		if err := n.alive(); (err == nil) != tc.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBlockDevices(t *testing.T) {
	sys := t.TempDir()
	for _, d := range []string{"vda", "vda1", "sr0", "loop0", "ram1"} {
		if err := os.MkdirAll(filepath.Join(sys, "class/block", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := blockDevices(sys); !slices.Equal(got, []string{"sr0", "vda", "vda1"}) {
		t.Errorf("%v", got)
	}
	dev := t.TempDir()
	before := present(sys, dev)
	var texts []string
	for _, name := range []string{"office", "factory"} {
		var iso bytes.Buffer
		if err := (seed.Seed{Role: "gateway", Token: "swe1.x", Hostname: name}).WriteISO(&iso); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dev, "sr0"), iso.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		texts = append(texts, present(sys, dev))
	}
	if before == texts[0] || texts[0] == texts[1] || texts[1] != present(sys, dev) {
		t.Errorf("without a seed %q, with one %q, with another %q", before, texts[0], texts[1])
	}
}
