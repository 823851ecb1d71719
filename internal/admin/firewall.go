package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// Ports of a relay besides stunPort, and those from which a host without connection tracking must let answers in.
const (
	reverseSSHPort = 2222 // gateways, where 5349 is blocked
	reverseTLSPort = 8443 // clients, where 5349 is blocked
	httpsPort      = 443
)

var (
	// ephemeral are the local ports of outgoing flows: what Linux picks (32768–60999) and what RFC 6335 §6 names.
	ephemeral = policy.PortRange{First: 32768, Last: 65535}
	// relayedPorts are where a relay receives from configured peers.
	relayedPorts = policy.PortRange{First: 49152, Last: 65535}
)

// firewallRule lets packets of one kind pass one host: from its LocalPorts to the remote's RemotePorts, or the other way.
type firewallRule struct {
	Direction   string           `json:"direction"` // out or in
	Proto       policy.Proto     `json:"proto"`
	Remote      []netip.Prefix   `json:"remote"` // whole Internet: 0.0.0.0/0 and ::/0
	Host        string           `json:"host,omitempty"`
	RemotePorts policy.PortRange `json:"remote_ports"`
	LocalPorts  policy.PortRange `json:"local_ports"`
	Why         string           `json:"why"`
}

var anywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// firewallSite is what the rules are made of.
type firewallSite struct {
	role      string // gateway, client or relay
	stateless bool
	platform  endpoint
	relays    []endpoint
}

// endpoint is a host that is dialled.
type endpoint struct {
	name  string
	host  string
	addrs []netip.Addr
	port  uint16
}

func (a *app) firewall() *cobra.Command {
	var role, format, chain string
	var stateless bool
	cmd := &cobra.Command{
		Use: "firewall [--for gateway|client|relay]", Short: "Print the firewall rules that a host needs, with the relays' current addresses", Args: cobra.NoArgs,
		Long: `Print the firewall rules that a host needs, with the relays' current addresses. With connection tracking a gateway or client needs nothing inbound; --stateless
adds the rules for answers, for firewalls without it. A relay whose change of address is announced (relay update --host NEW --from DATE) is listed with both.

Our own nodes need a relay's port 5349 only. 2222 and 8443 are the ways around a network that blocks it, 49152-65535/udp of a relay is for configured peers.
Names are resolved here and now: where a relay has a DNS name, run this again when its address changes.`,
		Example: `  sallyway firewall                                  # as a table, for a gateway's host
  sallyway firewall --for client --format nft        # rules for a chain of nftables
  sallyway firewall --format iptables --chain FORWARD
  sallyway firewall --format aws --stateless         # entries of a network ACL; without --stateless rules of a security group`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{string(identity.Gateway), string(identity.Client), string(identity.Relay)}, role) {
				return daemon.Usagef("--for %.20q: want gateway, client or relay", role)
			}
			if a.json {
				format = "json"
			}
			render, ok := firewallFormats[format]
			if !ok {
				return daemon.Usagef("--format %.20q: want %s", format, strings.Join(sortedKeys(firewallFormats), ", "))
			}
			if !validChain(chain) {
				return daemon.Usagef("--chain %.40q is not the name of a chain", chain)
			}
			return a.do(cmd, "list firewall rules", func(ctx context.Context, c *Client) error {
				site, err := a.firewallSite(ctx, c, role, stateless)
				if err != nil {
					return err
				}
				rules := site.rules()
				if format == "json" {
					a.json = true
					return a.show(cmd, rules, nil)
				}
				render(cmd.OutOrStdout(), rules, chain)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&role, "for", string(identity.Gateway), "whose host: gateway, client or relay")
	cmd.Flags().StringVar(&format, "format", "table", "table, nft, iptables, aws or json")
	cmd.Flags().StringVar(&chain, "chain", "", "chain of iptables' rules (default: OUTPUT and INPUT)")
	cmd.Flags().BoolVar(&stateless, "stateless", false, "with rules for answers, for firewalls without connection tracking")
	return cmd
}

// firewallFormats render rules.
var firewallFormats = map[string]func(w io.Writer, rules []firewallRule, chain string){
	"table": firewallTable, "nft": firewallNFT, "iptables": firewallIPTables, "aws": firewallAWS, "json": nil,
}

func validChain(s string) bool {
	return len(s) <= 28 && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-") == "" && !strings.HasPrefix(s, "-")
}

// firewallSite asks for the relays, those of the platform too where this administrator sees them, and resolves their names.
func (a *app) firewallSite(ctx context.Context, c *Client, role string, stateless bool) (*firewallSite, error) {
	s := &firewallSite{role: role, stateless: stateless}
	u, err := url.Parse(c.URL())
	if err != nil {
		return nil, err
	}
	s.platform = endpoint{name: "platform", host: u.Hostname(), port: httpsPort}
	if p, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
		s.platform.port = uint16(p)
	}
	if s.platform.addrs, err = resolveAll(ctx, s.platform.host); err != nil {
		return nil, daemon.Failf("the platform's address: %w", err)
	}
	nodes, err := relays.of(c).list(ctx)
	if err != nil {
		return nil, err
	}
	if !a.shared {
		shared, err := relays.of(c.in(identity.SharedOrg)).list(ctx)
		if err == nil { // else not for this administrator's eyes
			nodes = append(nodes, shared...)
		}
	}
	for _, n := range nodes {
		hosts := []endpoint{{name: "relay " + n.Name, host: n.Host, port: cmp.Or(n.Port, stunPort)}}
		if n.NextHost != "" {
			hosts = append(hosts, endpoint{name: fmt.Sprintf("relay %s from %s on", n.Name, n.NextFrom.UTC().Format(time.RFC3339)), host: n.NextHost, port: hosts[0].port})
		}
		for i, h := range hosts {
			if h.addrs, err = resolveAll(ctx, h.host); err != nil {
				if i > 0 {
					continue // a name that is to come need not be there yet
				}
				return nil, daemon.Failf("the address of relay %s: %w\nset another: sallyway relay update %[1]s --host HOST", n.Name, err)
			}
			s.relays = append(s.relays, h)
		}
	}
	return s, nil
}

// resolveAll returns the addresses of a host, IPv4 first.
func resolveAll(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	if len(ips) == 0 {
		return nil, errors.New("no address")
	}
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	return ips, nil
}

// rules are what the host needs.
func (s *firewallSite) rules() []firewallRule {
	var out []firewallRule
	add := func(direction string, p policy.Proto, e endpoint, remote, local policy.PortRange, why string) {
		r := firewallRule{Direction: direction, Proto: p, Host: e.host, RemotePorts: remote, LocalPorts: local, Why: why}
		if e.addrs == nil {
			r.Remote = anywhere
		}
		for _, ip := range e.addrs {
			r.Remote = append(r.Remote, netip.PrefixFrom(ip, ip.BitLen()))
		}
		out = append(out, r)
	}
	// dials is a flow that this host opens, serves one that it takes.
	dials := func(p policy.Proto, e endpoint, port uint16, why string) {
		at := policy.PortRange{First: port, Last: port}
		add("out", p, e, at, ephemeral, why)
		if s.stateless {
			add("in", p, e, at, ephemeral, "answers: "+why)
		}
	}
	serves := func(p policy.Proto, ports policy.PortRange, why string) {
		from := policy.PortRange{First: 1024, Last: 65535} // a NAT may pick any
		add("in", p, endpoint{}, from, ports, why)
		if s.stateless {
			add("out", p, endpoint{}, from, ports, "answers: "+why)
		}
	}
	one := func(p uint16) policy.PortRange { return policy.PortRange{First: p, Last: p} }
	dials(policy.TCP, s.platform, s.platform.port, "platform: enrolment, configuration, certificates")
	if s.role == string(identity.Relay) {
		serves(policy.UDP, one(stunPort), "gateways and clients")
		serves(policy.TCP, one(stunPort), "gateways and clients where UDP is blocked")
		serves(policy.TCP, one(reverseSSHPort), "gateways where 5349 is blocked")
		serves(policy.TCP, one(reverseTLSPort), "clients and the platform where 5349 is blocked")
		serves(policy.UDP, relayedPorts, "configured peers; leave it out where there are none")
		return out
	}
	for _, r := range s.relays {
		dials(policy.UDP, r, r.port, r.name)
		dials(policy.TCP, r, r.port, r.name+", where UDP is blocked")
		if s.role == string(identity.Gateway) {
			dials(policy.TCP, r, reverseSSHPort, r.name+", where 5349 is blocked")
		} else {
			dials(policy.TCP, r, reverseTLSPort, r.name+", where 5349 is blocked")
		}
	}
	return out
}

func firewallTable(w io.Writer, rules []firewallRule, _ string) {
	table(w, "DIRECTION PROTO REMOTE REMOTE-PORTS LOCAL-PORTS WHY", rules, func(r firewallRule) []any {
		return []any{r.Direction, r.Proto, remoteWords(r), r.RemotePorts, r.LocalPorts, r.Why}
	})
}

func remoteWords(r firewallRule) string {
	if r.Host == "" {
		return "any"
	}
	addrs := make([]string, len(r.Remote))
	for i, p := range r.Remote {
		addrs[i] = p.Addr().String()
	}
	if words := strings.Join(addrs, ","); words != r.Host {
		return r.Host + " (" + words + ")"
	}
	return r.Host
}

// families splits a rule's remotes by family; one that is the whole Internet has no entry to name.
func families(r firewallRule) map[int][]netip.Prefix {
	out := map[int][]netip.Prefix{}
	for _, p := range r.Remote {
		family := 4
		if p.Addr().Is6() {
			family = 6
		}
		out[family] = append(out[family], p)
	}
	return out
}

// firewallNFT writes statements for a chain, since a verdict of one chain of nftables does not overrule another's.
func firewallNFT(w io.Writer, rules []firewallRule, _ string) {
	for _, direction := range []string{"out", "in"} {
		first := true
		for _, r := range rules {
			if r.Direction != direction {
				continue
			}
			if first {
				fmt.Fprintf(w, "# for the chain of what goes %s: hook %s of this host, or forward of a router\n", direction, map[string]string{"out": "output", "in": "input"}[direction])
				first = false
			}
			there, here := "daddr", "saddr"
			remote, local := "dport", "sport"
			if direction == "in" {
				there, remote, local = here, local, remote
			}
			ports := fmt.Sprintf("%s %s %s %s %s %s", r.Proto, remote, r.RemotePorts, r.Proto, local, r.LocalPorts)
			verdict := fmt.Sprintf("accept comment %q", clipComment("sallyway: "+plain(r.Why)))
			if r.Host == "" {
				fmt.Fprintf(w, "%s %s\n", ports, verdict)
				continue
			}
			byFamily := families(r)
			for _, f := range []int{4, 6} {
				if len(byFamily[f]) > 0 {
					fmt.Fprintf(w, "%s %s { %s } %s %s\n", map[int]string{4: "ip", 6: "ip6"}[f], there, addrsOf(byFamily[f]), ports, verdict)
				}
			}
		}
	}
}

// clipComment keeps a comment within nftables' 128 bytes.
func clipComment(s string) string { return s[:min(len(s), 120)] }

func addrsOf(ps []netip.Prefix) string {
	words := make([]string, len(ps))
	for i, p := range ps {
		words[i] = p.Addr().String()
	}
	return strings.Join(words, ", ")
}

func firewallIPTables(w io.Writer, rules []firewallRule, chain string) {
	for _, r := range rules {
		into, there, remote, local := "OUTPUT", "-d", "--dport", "--sport"
		if r.Direction == "in" {
			into, there, remote, local = "INPUT", "-s", local, remote
		}
		into = cmp.Or(chain, into)
		byFamily := families(r)
		for _, f := range []int{4, 6} {
			for _, p := range byFamily[f] {
				to := there + " " + p.Addr().String() + " "
				if r.Host == "" {
					to = ""
				}
				fmt.Fprintf(w, "%s -A %s -p %s %s%s %s %s %s -m comment --comment %q -j ACCEPT\n", map[int]string{4: "iptables", 6: "ip6tables"}[f], into, r.Proto, to,
					remote, colon(r.RemotePorts), local, colon(r.LocalPorts), "sallyway: "+plain(r.Why))
			}
		}
	}
}

// colon is iptables' form of a range of ports.
func colon(p policy.PortRange) string {
	if p.First == p.Last {
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d:%d", p.First, p.Last)
}

// firewallAWS writes commands of the AWS CLI. Where a rule has an answer beside it (--stateless), they are for a network ACL, which keeps no
// state; else for a security group, which does.
func firewallAWS(w io.Writer, rules []firewallRule, _ string) {
	acl := slices.ContainsFunc(rules, func(r firewallRule) bool { return strings.HasPrefix(r.Why, "answers: ") })
	number := 100
	for _, r := range rules {
		// What decides is the port at the destination.
		ports := r.RemotePorts
		if r.Direction == "in" {
			ports = r.LocalPorts
		}
		for _, p := range r.Remote {
			cidr, ranges := "--cidr-block", "IpRanges=[{CidrIp="
			if p.Addr().Is6() {
				cidr, ranges = "--ipv6-cidr-block", "Ipv6Ranges=[{CidrIpv6="
			}
			if acl {
				way := map[string]string{"out": "--egress", "in": "--ingress"}[r.Direction]
				fmt.Fprintf(w, "aws ec2 create-network-acl-entry --network-acl-id \"$ACL\" %s --rule-number %d --rule-action allow --protocol %s --port-range From=%d,To=%d %s %v # %s\n",
					way, number, r.Proto, ports.First, ports.Last, cidr, p, plain(r.Why))
				number++
				continue
			}
			way := map[string]string{"out": "egress", "in": "ingress"}[r.Direction]
			fmt.Fprintf(w, "aws ec2 authorize-security-group-%s --group-id \"$SG\" --ip-permissions 'IpProtocol=%s,FromPort=%d,ToPort=%d,%s%v,Description=\"%s\"}]'\n",
				way, r.Proto, ports.First, ports.Last, ranges, p, plain("sallyway: "+r.Why))
		}
	}
}

// plain keeps a comment to characters that mean nothing to a shell or to nftables, and that AWS takes in a description.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x80 && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" ._-:/#@+=,", r)) {
			return r
		}
		return ' '
	}, s)
}
