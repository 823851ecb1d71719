package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"sort"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// MachineState is what a lab must not change on the machine it runs on.
type MachineState struct {
	Resolv   string // resolv.conf, hashed
	Links    string
	Routes   string // all tables, both families
	Rules    string
	Firewall string // nftables, which holds iptables' rules too
	Netns    string // named namespaces
	Sysctl   string // forwarding
}

// ReadMachineState reads the state of the machine, which is the network namespace of the process. The parts are texts that
// are equal when the state is; counters and lifetimes are left out.
func ReadMachineState() (MachineState, error) {
	var s MachineState
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !os.IsNotExist(err) {
		return s, err
	}
	target, _ := os.Readlink("/etc/resolv.conf") // not a link: empty
	sum := sha256.Sum256(resolv)
	s.Resolv = target + " " + hex.EncodeToString(sum[:])

	links, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("links: %w", err)
	}
	var lines []string
	for _, l := range links {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("%s %s mtu %d flags %v master %d", a.Name, l.Type(), a.MTU, a.Flags, a.MasterIndex))
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return s, fmt.Errorf("addresses: %w", err)
		}
		for _, ad := range addrs {
			lines = append(lines, a.Name+" "+ad.IPNet.String())
		}
	}
	s.Links = sorted(lines)

	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: 0}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return s, fmt.Errorf("routes: %w", err)
	}
	lines = nil
	for _, r := range routes {
		lines = append(lines, r.String())
	}
	s.Routes = sorted(lines)

	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return s, fmt.Errorf("rules: %w", err)
	}
	lines = nil
	for _, r := range rules {
		lines = append(lines, r.String())
	}
	s.Rules = sorted(lines)

	if s.Firewall, err = firewall(); err != nil {
		return s, fmt.Errorf("firewall: %w", err)
	}
	names, err := os.ReadDir("/run/netns")
	if err != nil && !os.IsNotExist(err) {
		return s, err
	}
	for _, n := range names {
		s.Netns += n.Name() + "\n"
	}
	for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/sys/net/core/rmem_max", "/proc/sys/net/core/wmem_max"} {
		b, err := os.ReadFile(path)
		if err != nil && !os.IsNotExist(err) {
			return s, err
		}
		s.Sysctl += path + "=" + string(b)
	}
	return s, nil
}

// firewall lists tables, chains and rules.
func firewall() (string, error) {
	c, err := nftables.New()
	if err != nil {
		return "", err
	}
	tables, err := c.ListTables()
	if err != nil {
		return "", err
	}
	chains, err := c.ListChains()
	if err != nil {
		return "", err
	}
	var lines []string
	for _, t := range tables {
		lines = append(lines, fmt.Sprintf("table %d %s", t.Family, t.Name))
	}
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return "", err
		}
		lines = append(lines, fmt.Sprintf("chain %d %s %s: %d rules", ch.Table.Family, ch.Table.Name, ch.Name, len(rules)))
		for _, r := range rules {
			lines = append(lines, fmt.Sprintf("rule %s %s %d: %d expressions", ch.Table.Name, ch.Name, r.Handle, len(r.Exprs)))
		}
	}
	return sorted(lines), nil
}

func sorted(lines []string) string {
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// Diff says what is not the same, and is empty when nothing is.
func (s MachineState) Diff(after MachineState) string {
	var b strings.Builder
	for _, p := range []struct{ name, before, after string }{
		{"resolv.conf", s.Resolv, after.Resolv},
		{"links", s.Links, after.Links},
		{"routes", s.Routes, after.Routes},
		{"rules", s.Rules, after.Rules},
		{"firewall", s.Firewall, after.Firewall},
		{"namespaces", s.Netns, after.Netns},
		{"sysctl", s.Sysctl, after.Sysctl},
	} {
		if p.before != p.after {
			fmt.Fprintf(&b, "%s before:\n%s\nafter:\n%s\n", p.name, p.before, p.after)
		}
	}
	return b.String()
}
