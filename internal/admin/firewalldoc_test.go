package admin

import (
	"bytes"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// TestFirewallInDocs holds the rules by cloud in docs/install.md against what `sallyway firewall` says.
func TestFirewallInDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := strings.ReplaceAll(string(b), "\\\n", " ") // commands of several lines
	site := func(role identity.Kind) []firewallRule {
		s := &firewallSite{
			role: string(role), platform: endpoint{name: "platform", host: "203.0.113.7", port: httpsPort, addrs: []netip.Addr{netip.MustParseAddr("203.0.113.7")}},
			relays: []endpoint{{name: "relay ams-2", host: "198.51.100.8", port: stunPort, addrs: []netip.Addr{netip.MustParseAddr("198.51.100.8")}}},
		}
		return s.rules()
	}
	// What a relay lets in from everybody, and what a gateway is let out to: relayed ports are said to be an exception.
	serves, dials := map[policy.Proto][]string{}, map[policy.Proto][]string{}
	for _, r := range site(identity.Relay) {
		if r.Direction == "in" && r.LocalPorts != relayedPorts {
			serves[r.Proto] = append(serves[r.Proto], r.LocalPorts.String())
		}
	}
	for _, r := range site(identity.Gateway) {
		dials[r.Proto] = append(dials[r.Proto], r.RemotePorts.String())
	}

	command := func(pattern string) []string {
		t.Helper()
		m := regexp.MustCompile(pattern).FindStringSubmatch(doc)
		if m == nil {
			t.Fatalf("docs/install.md has no %s", pattern)
		}
		return m[1:]
	}
	same := func(what string, got, want []string) {
		t.Helper()
		slices.Sort(got)
		want = slices.Sorted(slices.Values(want))
		if !slices.Equal(got, want) {
			t.Errorf("docs/install.md, %s: %q, want %q", what, got, want)
		}
	}
	for direction, want := range map[string]map[policy.Proto][]string{"INGRESS": serves, "EGRESS": dials} {
		var all []string
		for p, ports := range want {
			for _, port := range ports {
				all = append(all, strings.ToLower(string(p))+":"+port)
			}
		}
		same("gcloud "+direction, strings.Split(command(`--direction=` + direction + ` .*--allow=(\S+)\n`)[0], ","), all)
	}
	for direction, want := range map[string]map[policy.Proto][]string{"Inbound": serves, "Outbound": dials} {
		for p, name := range map[policy.Proto]string{policy.UDP: "Udp", policy.TCP: "Tcp"} {
			same("az "+direction+" "+name, strings.Fields(command(`--direction ` + direction + ` .*--protocol ` + name + ` .*--destination-port-ranges (.*)\n`)[0]), want[p])
		}
	}

	var printed bytes.Buffer
	firewallNFT(&printed, site(identity.Gateway), "")
	var rules []string
	for line := range strings.Lines(printed.String()) {
		if !strings.HasPrefix(line, "#") {
			rule, _, _ := strings.Cut(strings.TrimSpace(line), " comment ")
			rules = append(rules, rule)
		}
	}
	var written []string
	for line := range strings.Lines(command(`(?s)# sallyway firewall --format nft\n(.*?)\s*# the resources`)[0] + "\n") {
		written = append(written, strings.TrimSpace(line))
	}
	same("nft", written, rules)
}
