// Package deploy_test holds what operators take from this folder against the daemons as they are: rules, dashboard and the list of metrics in
// docs/observability.md name nothing that is not there, and logs, health and traces are as that page says.
package deploy_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyway/internal/daemon"
	"sallyway/internal/telemetry/otlptest"
)

var update = flag.Bool("update", false, "write the list of metrics in docs/observability.md anew")

const (
	alertsFile    = "prometheus/alerts.yaml"
	dashboardFile = "grafana/sallyway.json"
	docsFile      = "../docs/observability.md"
	troublesFile  = "../docs/troubleshooting.md"
)

// TestDaemons runs everything once and looks at it from all sides.
func TestDaemons(t *testing.T) {
	s := startSite(t)
	s.call(t)
	names := make(map[string][]string) // metric → daemons that have it
	about := make(map[string]daemon.MetricName)
	for _, d := range s.daemons {
		var all []daemon.MetricName
		if err := daemon.Dial(d.state).Get(t.Context(), "/metrics/names", &all); err != nil {
			t.Fatal(err)
		}
		for _, m := range all {
			names[m.Name] = append(names[m.Name], d.name)
			about[m.Name] = m
		}
	}
	t.Run("names", func(t *testing.T) { checkNames(t, names) })
	t.Run("documentation", func(t *testing.T) { checkDocs(t, names, about) })
	t.Run("health", func(t *testing.T) { checkHealth(t, s) })
	t.Run("traces", func(t *testing.T) { checkTraces(t, s) })
	t.Run("metrics by OTLP", func(t *testing.T) { checkOTLP(t, s) })
	for _, d := range slices.Backward(s.daemons) {
		d.stop()
	}
	t.Run("logs", func(t *testing.T) { checkLogs(t, s) })
}

// metricWord is a metric's name in a query: what begins as ours, or as a Go program's.
var metricWord = regexp.MustCompile(`\b(?:sallyway|go|process)_[a-z0-9_]+\b`)

// queries are every expression of the rules and the dashboard, by where it stands.
func queries(t *testing.T) map[string]string {
	t.Helper()
	out := make(map[string]string)
	for _, r := range readRules(t) {
		out["rule "+r.Alert] = r.Expr
	}
	for where, expr := range readDashboard(t) {
		out["dashboard, "+where] = expr
	}
	if len(out) < 40 {
		t.Fatalf("only %d queries found: the test looks in the wrong place", len(out))
	}
	return out
}

// checkNames wants every metric that a rule or a panel asks for to exist.
func checkNames(t *testing.T, names map[string][]string) {
	for where, expr := range queries(t) {
		for _, name := range metricWord.FindAllString(expr, -1) {
			found := names[name] != nil
			for _, part := range []string{"_bucket", "_sum", "_count"} { // of histograms
				base, is := strings.CutSuffix(name, part)
				found = found || is && names[base] != nil
			}
			if !found {
				t.Errorf("%s: no daemon has %s", where, name)
			}
		}
	}
}

// rule is an alert.
type rule struct {
	Alert       string
	Expr        string
	For         string
	Labels      map[string]string
	Annotations map[string]string
}

func readRules(t *testing.T) []rule {
	t.Helper()
	b, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Groups []struct {
			Name  string
			Rules []rule
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(string(b)))
	dec.KnownFields(true)
	if err := dec.Decode(&doc); err != nil {
		t.Fatal(err)
	}
	var all []rule
	for _, g := range doc.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// TestRules wants every alert to say what is, what to do and where more stands, and promtool to take the rules and their own tests.
func TestRules(t *testing.T) {
	b, err := os.ReadFile(troublesFile)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, r := range readRules(t) {
		if seen[r.Alert] {
			t.Errorf("%s stands there twice", r.Alert)
		}
		seen[r.Alert] = true
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s has no severity, summary or description", r.Alert)
		}
		if want := "docs/troubleshooting.md#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s leads to %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
		}
		if !strings.Contains(string(b), "\n### "+r.Alert+"\n") {
			t.Errorf("%s is not in %s", r.Alert, troublesFile)
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^### (Sallyway[A-Za-z]+)$`).FindAllStringSubmatch(string(b), -1) {
		if !seen[m[1]] {
			t.Errorf("%s has %s, which is no alert", troublesFile, m[1])
		}
	}
	promtool(t, "check", "rules", alertsFile)
	promtool(t, "test", "rules", "prometheus/alerts_test.yaml")
	promtool(t, "check", "config", "prometheus/prometheus.yml")
}

// promtool runs Prometheus' own tool, and returns what it printed.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	exe, err := exec.LookPath("promtool")
	if err != nil {
		t.Fatalf("%v\nbuild/prerequisites.sh installs it", err)
	}
	if out, err := exec.CommandContext(t.Context(), exe, args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// datasource says from where a panel takes its values.
type datasource struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

// panel is a picture of the dashboard; only what is named here may be in it.
type panel struct {
	ID          int            `json:"id"`
	Title       string         `json:"title"`
	Type        string         `json:"type"`
	Description string         `json:"description"`
	Collapsed   bool           `json:"collapsed"`
	Datasource  *datasource    `json:"datasource"`
	GridPos     grid           `json:"gridPos"`
	FieldConfig map[string]any `json:"fieldConfig"`
	Options     map[string]any `json:"options"`
	Panels      []panel        `json:"panels"`
	Targets     []struct {
		Expr         string     `json:"expr"`
		LegendFormat string     `json:"legendFormat"`
		RefID        string     `json:"refId"`
		Datasource   datasource `json:"datasource"`
	} `json:"targets"`
}

type grid struct {
	X int `json:"x"`
	Y int `json:"y"`
	W int `json:"w"`
	H int `json:"h"`
}

type dashboard struct {
	Title         string            `json:"title"`
	UID           string            `json:"uid"`
	Tags          []string          `json:"tags"`
	Timezone      string            `json:"timezone"`
	SchemaVersion int               `json:"schemaVersion"`
	Version       int               `json:"version"`
	Editable      bool              `json:"editable"`
	Refresh       string            `json:"refresh"`
	Time          map[string]string `json:"time"`
	Annotations   map[string]any    `json:"annotations"`
	Templating    struct {
		List []map[string]any `json:"list"`
	} `json:"templating"`
	Panels []panel `json:"panels"`
}

// readDashboard returns the dashboard's queries by their place, with its variables filled in.
func readDashboard(t *testing.T) map[string]string {
	t.Helper()
	f, err := os.Open(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	var d dashboard
	if err := dec.Decode(&d); err != nil {
		t.Fatal(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Errorf("%s: something follows the document: %v", dashboardFile, err)
	}
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 30 {
		t.Errorf("%s: no title, uid or version", dashboardFile)
	}
	out := make(map[string]string)
	ids := make(map[int]bool)
	for i, p := range d.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: id or title", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H || a.X+a.W > 24 {
				t.Errorf("panels %q and %q lie over each other", p.Title, q.Title)
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || p.Datasource == nil || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q has no query, or a data source of its own", p.Title)
		}
		for _, q := range p.Targets {
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q has a data source of its own", p.Title)
			}
			out[fmt.Sprintf("%s %s", p.Title, q.RefID)] = strings.NewReplacer("$__rate_interval", "5m", "$org", ".*").Replace(q.Expr)
		}
	}
	return out
}

// TestDashboard has Prometheus' own parser read every query.
func TestDashboard(t *testing.T) {
	type recording struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	var rs []recording
	for _, expr := range readDashboard(t) {
		if strings.Contains(expr, "$") {
			t.Errorf("a variable that is not known: %s", expr)
		}
		rs = append(rs, recording{fmt.Sprintf("dashboard:%d", len(rs)), expr})
	}
	b, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": rs}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "queries.yaml")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}

// Marks of the list in the documentation.
const (
	listBegin = "<!-- metrics: go test ./deploy -run TestDaemons -update -->\n"
	listEnd   = "<!-- end of metrics -->\n"
)

// checkDocs holds the list of metrics in the documentation against the daemons.
func checkDocs(t *testing.T, names map[string][]string, about map[string]daemon.MetricName) {
	var b strings.Builder
	b.WriteString("| metric | of | what |\n|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(about)) {
		if !strings.HasPrefix(name, "sallyway_") {
			continue
		}
		m := about[name]
		labels := ""
		if len(m.Labels) > 0 {
			labels = "{" + strings.Join(m.Labels, ",") + "}"
		}
		of := strings.Join(names[name], ", ")
		if len(names[name]) == 5 {
			of = "all"
		}
		fmt.Fprintf(&b, "| `%s%s` | %s | %s |\n", name, labels, of, strings.ReplaceAll(m.Help, "|", "\\|"))
	}
	text, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(text), listBegin)
	list, after, ok2 := strings.Cut(rest, listEnd)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no list of metrics between its marks", docsFile)
	}
	if list == b.String() {
		return
	}
	if *update {
		if err := os.WriteFile(docsFile, []byte(before+listBegin+b.String()+listEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, want := strings.Split(list, "\n"), strings.Split(b.String(), "\n")
	for _, l := range want {
		if !slices.Contains(have, l) {
			t.Errorf("%s lacks: %s", docsFile, l)
		}
	}
	for _, l := range have {
		if !slices.Contains(want, l) {
			t.Errorf("%s has: %s", docsFile, l)
		}
	}
	t.Error("write the list anew: go test ./deploy -run TestDaemons -update")
}

// checkHealth asks every daemon as a balancer does.
func checkHealth(t *testing.T, s *site) {
	for _, d := range s.daemons {
		for _, path := range []string{"/livez", "/readyz", "/healthz", "/metrics"} {
			res, err := http.Get(d.metricsURL(t) + path)
			if err != nil {
				t.Error(err)
				continue
			}
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if res.StatusCode != http.StatusOK {
				t.Errorf("%s %s: %d %s", d.name, path, res.StatusCode, b)
			}
		}
	}
}

// checkTraces follows a connection from the client to the resource, and commands of an administrator to the platform, its database and the gateway.
func checkTraces(t *testing.T, s *site) {
	c := s.collector
	flow := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == "flow tcp" && s.Service == "sallyway" && s.Failed == "" })[0]
	serve := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == "serve tcp" && s.Parent == flow.ID })[0]
	if serve.Service != "gatewayd" || serve.Trace != flow.Trace || !strings.Contains(serve.Attributes["sallyway.peer"], "client") {
		t.Errorf("the gateway's span %+v", serve)
	}
	for _, name := range []string{"policy", "dial"} {
		if got := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == name && s.Parent == serve.ID })[0]; got.Trace != flow.Trace {
			t.Errorf("%+v", got)
		}
	}
	sallyway(t, nil, "gateway", "list")
	list := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == "sallyway gateway list" })[0]
	request := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Parent == list.ID })[0]
	if request.Service != "platformd" || request.Name != "GET /api/v1/orgs/{org}/gateways" || request.Trace != list.Trace {
		t.Errorf("the platform's span %+v", request)
	}
	c.Wait(t, 1, func(s otlptest.Span) bool { return s.Parent == request.ID && s.Name == "database view" })

	// The platform is a client of the gateway, too.
	sallyway(t, nil, "policy", "allow", "--from", "platform", "--resource", "web")
	sallyway(t, nil, "resource", "test", "web")
	test := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Name == "sallyway resource test" && s.Parent == "" })[0]
	asked := c.Wait(t, 1, func(s otlptest.Span) bool { return s.Parent == test.ID })[0]
	if asked.Service != "platformd" || asked.Attributes["sallyway.org"] != "default" {
		t.Errorf("the platform's span %+v", asked)
	}
	got := c.Wait(t, 1, func(s otlptest.Span) bool {
		return s.Trace == test.Trace && s.Service == "gatewayd" && s.Name == "serve tcp"
	})[0]
	if got.Parent == "" || got.Failed != "" || !strings.Contains(got.Attributes["sallyway.peer"], "platform") {
		t.Errorf("the gateway's span %+v", got)
	}
}

// checkOTLP wants the collector to get the metrics that a scrape would.
func checkOTLP(t *testing.T, s *site) {
	eventually(t, "metrics of every daemon", func() error {
		have := s.collector.Metrics()
		for _, name := range []string{"sallyway_platform_ready", "sallyway_relay_allocations", "sallyway_gateway_flows_total", "sallyway_path_active", "sallyway_license_entitlements", "go_goroutines"} {
			if have[name] == nil {
				return fmt.Errorf("no %s", name)
			}
		}
		return nil
	})
}

// logKey is how keys of lines are written.
var logKey = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// checkLogs wants every line that a daemon wrote from its start to its end to be JSON with time, level and message, and its keys to be names.
func checkLogs(t *testing.T, s *site) {
	for _, d := range s.daemons {
		lines := d.log.lines()
		if len(lines) < 3 {
			t.Errorf("%s wrote %d lines", d.name, len(lines))
		}
		for _, line := range lines {
			var l map[string]any
			if err := json.Unmarshal([]byte(line), &l); err != nil {
				t.Errorf("%s: %v: %s", d.name, err, line)
				continue
			}
			at, _ := l["time"].(string)
			_, err := time.Parse(time.RFC3339Nano, at)
			msg, _ := l["msg"].(string)
			level, _ := l["level"].(string)
			if err != nil || msg == "" || !slices.Contains([]string{"DEBUG", "INFO", "WARN", "ERROR"}, level) {
				t.Errorf("%s: no time, level or message: %s", d.name, line)
			}
			for k := range l {
				if !logKey.MatchString(k) {
					t.Errorf("%s: key %q: %s", d.name, k, line)
				}
			}
		}
	}
}
