package sallyway_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// module is the path that the imports of this repository begin with.
const module = "sallyway"

// layer says what the packages below a folder may not import from this repository. Changing this table is a design
// change: say why in the commit. Tests are free: they put real servers of every role into one process.
var layers = []struct {
	folder string
	never  []string // folders, with everything below them
	except []string // folders below those that are allowed all the same
}{
	// Mechanisms know no role and no session.
	{folder: "stun", never: roles},
	{folder: "tun", never: roles},
	{folder: "netstack", never: roles},
	// The direct socket is a mechanism of either end. It reads and writes in runs, as a relay and a leg do.
	{folder: "direct", never: roles, except: []string{"relay/udpio"}},
	// The session joins legs and knows neither end's daemon nor any server.
	{folder: "tunnel", never: []string{"gateway", "client", "platform", "relay", "bench", "cmd"}, except: relayContracts},
	// Roles meet on the wire.
	// A gateway that dials other gateways (site to site) is their client.
	{folder: "gateway", never: []string{"platform", "relay", "bench", "cmd"}, except: relayContracts},
	{folder: "client", never: []string{"gateway", "platform", "relay", "bench", "cmd"}, except: relayContracts},
	// What judges paths is a mechanism on probes alone.
	{folder: "tunnel/pathstate", never: append([]string{"tun", "netstack", "internal", "direct"}, roles...)},
	{folder: "relay", never: []string{"gateway", "client", "platform", "tunnel", "tun", "netstack", "bench", "cmd"}},
	{folder: "platform", never: []string{"gateway", "client", "relay", "tun", "netstack", "bench", "cmd"}, except: relayContracts},
	// The leg runs in gateways and clients: nothing of the relay's server comes with it.
	{folder: "relay/leg", never: []string{"relay"}, except: relayContracts},
	{folder: "relay/wire", never: []string{"relay"}, except: []string{"relay/wire"}},
	{folder: "relay/reverse", never: []string{"relay"}, except: relayContracts},
	{folder: "relay/udpio", never: []string{"relay"}, except: []string{"relay/udpio"}},
	// The contracts and the daemons' shell stand below everything.
	{folder: "internal/identity", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/policy", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/entitlement", never: append([]string{"stun", "tun", "netstack", "internal"}, roles...)},
	// The licence service knows the document alone: it and a platform meet on the wire.
	{folder: "license", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/control", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/auditfile", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/awsidentity", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/ssm", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/datagram", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	{folder: "internal/daemon", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	// Whoever dials or forwards asks it.
	{folder: "internal/addrspace", never: []string{""}},
	// Knows no table of anybody's.
	{folder: "internal/database", never: append([]string{"stun", "tun", "netstack", "internal"}, roles...)},
	// Whoever has something to tell uses it.
	{folder: "internal/telemetry", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	// Knows connections alone: whoever dials outward may use it.
	{folder: "internal/egress", never: append([]string{"stun", "tun", "netstack", "internal"}, roles...)},
	{folder: "internal/trial", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	// Who writes a seed and who reads it agree on the package alone.
	{folder: "internal/appliance/seed", never: []string{""}},
	// The appliance starts daemons as processes: which they are, its command says.
	{folder: "internal/appliance", never: append([]string{"stun", "tun", "netstack"}, roles...)},
	// The client of the admin API speaks of what the contracts speak of.
	{folder: "internal/platformapi", never: append([]string{"stun", "tun", "netstack", "internal/admin"}, roles...)},
	{folder: "internal/version", never: []string{""}},
	// Images hold programs that were built: they know them by their command lines.
	{folder: "images/oci", never: append([]string{"stun", "tun", "netstack", "internal"}, roles...)},
}

var (
	// roles are the packages above the mechanisms.
	roles = []string{"gateway", "client", "relay", "platform", "tunnel", "bench", "cmd"}
	// relayContracts are what the relay shares with those who talk to it: the leg, the wire format, batched UDP, the ends of the last rung.
	relayContracts = []string{"relay/leg", "relay/wire", "relay/udpio", "relay/reverse"}
)

// laboratory are the packages that play the world around the product: private hosts, peers, baselines.
var laboratory = []string{"internal/lab", "internal/backing", "e2e", "bench"}

// heavy are large dependencies and the folders whose packages may import them. One has one; more is a design change.
// Tests and the laboratory are free.
var heavy = map[string][]string{
	"gvisor.dev/gvisor":          {"netstack"},
	"golang.zx2c4.com/wireguard": {"tun"},
	// The appliance alone owns its links, so it sets addresses and routes itself; a gateway's binary has the library anyway.
	"github.com/vishvananda":              {"tun", "internal/appliance/network"},
	"github.com/google/nftables":          {"internal/appliance/network/firewall"},
	"filippo.io/age":                      {"internal/appliance/config"},
	"github.com/insomniacslk/dhcp":        {"internal/appliance/network"},
	"github.com/mdlayher/packet":          {"internal/appliance/network"},
	"github.com/quic-go/quic-go":          {"tunnel"},
	"github.com/quic-go/connect-ip-go":    {"tunnel"},
	"github.com/dunglas/httpsfv":          {"tunnel"},
	"github.com/yosida95/uritemplate":     {"tunnel"},
	"github.com/pion/turn":                {}, // tests and the laboratory only: the standard peer and the baseline
	"github.com/pion/dtls":                {"relay"},
	"github.com/pion/stun":                {"stun", "relay"},
	"modernc.org/sqlite":                  {"internal/database"},
	"github.com/pressly/goose":            {"internal/database"},
	"github.com/jackc/pgx":                {"internal/database"},
	"github.com/gomodule/redigo":          {"platform/replica"},
	"rsc.io/qr":                           {"platform/web"},
	"github.com/danielgtaylor/huma":       {"platform/api"},
	"golang.org/x/crypto/ssh":             {"relay/reverse", "relay/fallback", "platform/pki"},
	"github.com/go-jose/go-jose":          {"internal/identity", "internal/control", "internal/policy", "internal/entitlement", "platform"},
	"github.com/coreos/go-oidc":           {"platform/people/oidc"},
	"golang.org/x/oauth2":                 {"platform/people/oidc"},
	"golang.org/x/crypto/acme":            {"platform"},
	"golang.org/x/crypto/argon2":          {"platform/people"},
	"github.com/miekg/dns":                {"tunnel", "tun", "client", "gateway"},
	"github.com/coreos/go-systemd":        {"internal/daemon"},
	"github.com/spf13":                    {"images/appliance", "internal/daemon", "internal/admin", "internal/control/agent", "internal/appliance", "cmd", "gateway", "client", "relay", "platform", "license", "images/packages"},
	"go.yaml.in/yaml":                     {"internal/daemon", "gateway", "internal/appliance"},
	"github.com/prometheus/client_golang": {"internal/daemon", "gateway", "client", "relay", "platform", "license", "tunnel", "internal/control", "internal/telemetry"},
	"go.opentelemetry.io":                 {"internal/telemetry"},

	"github.com/google/go-containerregistry": {"images/oci"},
	"golang.org/x/crypto/x509roots":          {"images/oci"},
}

// file is one Go file and what it imports.
type file struct {
	path    string // slash-separated, from the root of the repository
	imports []string
}

// below says whether a slash-separated path is folder or lies in it. The empty folder holds everything.
func below(path, folder string) bool {
	return folder == "" || path == folder || strings.HasPrefix(path, folder+"/")
}

// breaches returns what is wrong with a file, one line each.
func breaches(f file) []string {
	folder := filepath.ToSlash(filepath.Dir(f.path))
	test := strings.HasSuffix(f.path, "_test.go")
	if test {
		return nil
	}
	free := contains(laboratory, folder)
	var found []string
	for _, imp := range f.imports {
		if inside, ok := strings.CutPrefix(imp, module+"/"); ok {
			for _, l := range layers {
				if below(folder, l.folder) && contains(l.never, inside) && !contains(l.except, inside) && !below(inside, l.folder) {
					found = append(found, fmt.Sprintf("%s: %s never imports %s", f.path, l.folder, imp))
				}
			}
			if below(inside, "cmd") {
				found = append(found, fmt.Sprintf("%s: nothing imports a command (%s)", f.path, imp))
			}
			continue
		}
		for dependency, importers := range heavy {
			if below(imp, dependency) && !contains(importers, folder) && !free {
				found = append(found, fmt.Sprintf("%s: %s is imported by %q alone", f.path, dependency, importers))
			}
		}
	}
	return found
}

// contains says whether path lies in one of folders.
func contains(folders []string, path string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return below(path, f) })
}

// sources parses the import clauses of every Go file of the repository.
func sources(t *testing.T) []file {
	t.Helper()
	var files []file
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != "." && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "node_modules") {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(name) != ".go" {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		f := file{path: filepath.ToSlash(path)}
		for _, spec := range parsed.Imports {
			imp, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			f.imports = append(f.imports, imp)
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestLayering(t *testing.T) {
	files := sources(t)
	if len(files) < 10 {
		t.Fatalf("only %d files found: the test looks in the wrong place", len(files))
	}
	for _, f := range files {
		for _, b := range breaches(f) {
			t.Error(b)
		}
	}
}

// TestLayeringTable shows that the table says no, and to what.
func TestLayeringTable(t *testing.T) {
	for _, tc := range []struct {
		path, imp string
		bad       bool
	}{
		{"stun/stun.go", "sallyway/relay/leg", true},
		{"stun/stun.go", "sallyway/internal/identity", false},
		{"netstack/a.go", "sallyway/gateway", true},
		{"direct/a.go", "sallyway/tunnel", true},
		{"direct/a.go", "sallyway/relay/leg", true},
		{"direct/a.go", "sallyway/relay/udpio", false},
		{"gateway/a.go", "sallyway/relay", true},
		{"gateway/sub/a.go", "sallyway/relay/admission", true},
		{"gateway/a.go", "sallyway/relay/leg", false},
		{"gateway/a.go", "sallyway/relay/legacy", true},
		{"gateway/a.go", "sallyway/gateway/dns", false},
		{"gateway/a.go", "sallyway/platform/api", true},
		{"client/a.go", "sallyway/relay", true},
		{"client/a_test.go", "sallyway/relay", false},
		{"platform/a.go", "sallyway/client", true},
		{"platform/a.go", "sallyway/tunnel", false},
		{"relay/a.go", "sallyway/relay/wire", false},
		{"relay/leg/a.go", "sallyway/relay", true},
		{"relay/leg/a.go", "sallyway/relay/wire", false},
		{"gateway/a.go", "sallyway/relay/reverse", false},
		{"gateway/a.go", "sallyway/relay/fallback", true},
		{"relay/reverse/a.go", "sallyway/relay/fallback", true},
		{"relay/fallback/a.go", "sallyway/relay/reverse", false},
		{"gateway/a.go", "golang.org/x/crypto/ssh", true},
		{"internal/version/a.go", "sallyway/internal/daemon", true},
		{"internal/lab/a.go", "sallyway/cmd/gatewayd", true},
		{"cmd/gatewayd/main.go", "sallyway/gateway", false},
		{"netstack/a.go", "gvisor.dev/gvisor/pkg/tcpip", false},
		{"tun/a.go", "gvisor.dev/gvisor/pkg/tcpip", true},
		{"relay/a.go", "github.com/pion/turn/v5", true},
		{"relay/a_test.go", "github.com/pion/turn/v5", false},
		{"bench/a.go", "github.com/pion/turn/v5", false},
		{"internal/lab/a.go", "github.com/quic-go/quic-go/http3", false},
		{"platform/api/a.go", "modernc.org/sqlite", true},
		{"internal/database/a.go", "modernc.org/sqlite", false},
		{"gateway/a.go", "github.com/quic-go/quic-go", true},
		{"tunnel/a.go", "github.com/quic-go/quic-go/http3", false},
	} {
		if got := breaches(file{path: tc.path, imports: []string{tc.imp}}); (len(got) > 0) != tc.bad {
			t.Errorf("%s importing %s: %q, want bad=%v", tc.path, tc.imp, got, tc.bad)
		}
	}
}
