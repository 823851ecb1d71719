package admin

import (
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/policy"
)

// TestFirewall prints rules of a real platform's relays in every format.
func TestFirewall(t *testing.T) {
	srv, do := realPlatform(t)
	do(0, "login --token-file "+srv.AdminFile())
	do(0, "relay create fra-1 --host 192.0.2.1")
	do(0, "relay create ams-2 --host 2001:db8::2 --port 5350")
	do(0, "relay create eu-1 --shared --host 198.51.100.7")
	next := time.Now().Add(48 * time.Hour).UTC().Format(time.RFC3339)
	do(2, "relay update fra-1 --from "+next, "--host")
	do(2, "relay update fra-1 --host 192.0.2.9 --from tomorrow", "2027-01-31")
	do(0, "relay update fra-1 --host 192.0.2.9 --from "+next, "updated")
	do(0, "relay show fra-1", "192.0.2.1:5349 (192.0.2.9 from")

	var rules []firewallRule
	if err := json.Unmarshal([]byte(do(0, "firewall --format json")), &rules); err != nil {
		t.Fatal(err)
	}
	has := func(direction string, p policy.Proto, to string, port uint16) {
		t.Helper()
		for _, r := range rules {
			if r.Direction == direction && r.Proto == p && r.RemotePorts.Contains(port) {
				for _, pre := range r.Remote {
					if pre.Contains(netip.MustParseAddr(to)) {
						return
					}
				}
			}
		}
		t.Errorf("no rule for %s %s %s port %d", direction, p, to, port)
	}
	for _, relay := range []string{"192.0.2.1", "192.0.2.9", "198.51.100.7"} {
		has("out", policy.UDP, relay, 5349)
		has("out", policy.TCP, relay, 5349)
		has("out", policy.TCP, relay, 2222)
	}
	has("out", policy.UDP, "2001:db8::2", 5350)
	has("out", policy.TCP, "127.0.0.1", netip.MustParseAddrPort(strings.TrimPrefix(srv.URL(), "https://")).Port())
	for _, r := range rules {
		if r.Direction != "out" {
			t.Errorf("with connection tracking there is a rule %+v", r)
		}
	}
	do(0, "firewall --for client", "8443", "relay fra-1 from 20")
	do(0, "firewall --stateless", "answers: relay ams-2")
	do(0, "firewall --format iptables --chain FORWARD", "iptables -A FORWARD -p udp -d 192.0.2.9 --dport 5349 --sport 32768:65535 -m comment", "ip6tables -A FORWARD -p udp -d 2001:db8::2 --dport 5350")
	do(0, "firewall --format aws", "authorize-security-group-egress", "IpRanges=[{CidrIp=192.0.2.1/32", "Ipv6Ranges=[{CidrIpv6=2001:db8::2/128")
	do(0, "firewall --format aws --stateless", "create-network-acl-entry", "--ingress")
	do(0, "firewall --for relay", "49152-65535", "2222", "any")
	do(2, "firewall --for nobody", "gateway, client or relay")
	do(2, "firewall --format xml", "iptables")
	do(2, "firewall --format iptables --chain x;y", "chain")
	for _, what := range []string{"gateway", "client --stateless", "relay --stateless"} {
		checkNFT(t, do(0, "firewall --format nft --for "+what))
	}
	// Taken back, then in force when its time has come.
	do(0, "relay update fra-1 --host 192.0.2.1", "updated")
	if out := do(0, "firewall --format nft"); strings.Contains(out, "192.0.2.9") {
		t.Errorf("a change that was taken back is still listed:\n%s", out)
	}
}

// checkNFT has nft itself parse statements, without loading them.
func checkNFT(t *testing.T, statements string) {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		nft = "/usr/sbin/nft"
	}
	if _, err := os.Stat(nft); err != nil || os.Geteuid() != 0 {
		return // the text is checked elsewhere
	}
	f := filepath.Join(t.TempDir(), "rules")
	table := "table inet sallyway_test {\nchain c {\ntype filter hook output priority 0; policy accept;\n" + statements + "}\n}\n"
	if err := os.WriteFile(f, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(nft, "--check", "--file", f).CombinedOutput(); err != nil {
		t.Errorf("nft does not take\n%s\n%v: %s", table, err, out)
	}
}

// A platform that lies about names can not smuggle anything into a shell.
func TestFirewallComments(t *testing.T) {
	evil := firewallRule{
		Direction: "out", Proto: policy.UDP, Host: "192.0.2.1", Remote: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")},
		RemotePorts: policy.PortRange{First: 1, Last: 1}, LocalPorts: ephemeral, Why: "relay $(reboot) `x` \"; ' \n & | > < \\ {",
	}
	for name, f := range firewallFormats {
		if f == nil || name == "table" {
			continue
		}
		var b strings.Builder
		f(&b, []firewallRule{evil}, "")
		_, comment, _ := strings.Cut(b.String(), "sallyway: ")
		if i := strings.IndexAny(comment, "$`;&|><\\'"); name != "aws" && i >= 0 || strings.Contains(b.String(), "$(") || strings.Contains(b.String(), "`") {
			t.Errorf("%s: %q", name, b.String())
		}
	}
}
