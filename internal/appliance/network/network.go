// Package network owns the links of the appliance: it sets the packet filter, raises lo and every physical NIC, gives them
// addresses by DHCP (RFC 2131), router advertisements (RFC 4862, 8106), DHCPv6 (RFC 8415) or as configured, writes
// resolv.conf, sets the host name, and keeps the clock right.
//
// It fails closed: no link is raised before the packet filter is in place and has been read back; and where the filter is
// found changed later and cannot be set again, the links go down.
//
//	n, err := network.New(network.Config{Ports: firewall.Relay(), Log: log})
//	if err != nil {
//		return err
//	}
//	go func() { done <- n.Run(ctx) }()
//	<-n.Online()          // an address and a way out
//	n.Clock().Wait(ctx)   // certificates can be judged now
//
// It is meant for a process that has its network namespace for itself, as PID 1 of an appliance does.
package network

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyway/internal/appliance/network/clock"
	"sallyway/internal/appliance/network/firewall"
)

// Config is what is known of the network beforehand. The zero value is complete: DHCP and router advertisements on every
// physical NIC, no port open.
type Config struct {
	// Hostname overrides what DHCP says. Empty: that, or else DefaultHostname.
	Hostname string
	// Interfaces are those that are not left to DHCP and router advertisements.
	Interfaces []Interface
	// DNS and Search override what the network says, where not empty.
	DNS    []netip.Addr
	Search []string
	// NTP are time servers, names or addresses. They are asked instead of those that DHCP names. With neither, it is the
	// default pool.
	NTP []string
	// Ports are open to everybody; none for a gateway. SetPorts changes them.
	Ports []firewall.Port
	// ResolvConf is the path of resolv.conf. Empty: /etc/resolv.conf. It is replaced by renaming, its folder must be writable.
	ResolvConf string
	// SetClock steps or slews the machine's clock. Nil: it does. Tests have no business with it.
	Clock clock.Clock
	Log   *slog.Logger // nil: silent
}

// DefaultHostname is the host name where nobody says another.
const DefaultHostname = "sallyway"

// Interface configures one NIC. With Addresses of a family nobody is asked for one of that family.
type Interface struct {
	// Name is the kernel's, as in eth0. Name or MAC says which NIC it is; with neither it is the first one of the machine.
	Name string
	// MAC is the NIC's hardware address, as in 52:54:00:12:34:56.
	MAC string
	// Addresses are with their prefix lengths: 192.0.2.10/24.
	Addresses []netip.Prefix
	// Routers are the default routers, one for each family at most.
	Routers []netip.Addr
	// Routes are others.
	Routes []Route
	// MTU in bytes; 0: what DHCP or the router says, or the NIC's own.
	MTU int
	// Disabled leaves the NIC down.
	Disabled bool
}

// Route leads to a network by a router. Without Via the network is on the link itself.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// leastMTU is the least that we accept, the least of IPv6 (RFC 8200 section 5) and of Sallyway's paths. A smaller one from
// DHCP or a router is a mistake or an attack, and is ignored.
const leastMTU = 1280

// greatestMTU is that of jumbo frames with room.
const greatestMTU = 65535

// validate returns what is wrong, in words of the configuration.
func (c *Config) validate() error {
	if c.Hostname != "" && !isName(c.Hostname) {
		return fmt.Errorf("hostname %q: use letters, digits, dashes and dots", c.Hostname)
	}
	for _, s := range c.Search {
		if !isName(s) {
			return fmt.Errorf("search %q: not a domain name", s)
		}
	}
	for _, a := range c.DNS {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("dns %q: not a server's address", a)
		}
	}
	for _, s := range c.NTP {
		if _, err := netip.ParseAddr(s); err != nil && !isName(s) {
			return fmt.Errorf("ntp %q: neither an address nor a name", s)
		}
	}
	seen := map[string]bool{}
	for i := range c.Interfaces {
		f := &c.Interfaces[i]
		if err := f.validate(); err != nil {
			return err
		}
		key := cmp.Or(f.Name, f.MAC)
		if seen[key] {
			return fmt.Errorf("interface %s: configured twice", cmp.Or(key, "(the first)"))
		}
		seen[key] = true
	}
	return nil
}

func (f *Interface) validate() error {
	name := f.Name
	if name == "" {
		name = cmp.Or(f.MAC, "(the first)")
	}
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("interface %s: "+format, append([]any{name}, args...)...)
	}
	switch {
	case f.Name == "lo":
		return wrong("it needs no configuration")
	case len(f.Name) > 15 || strings.ContainsAny(f.Name, "/ \t\n"):
		return wrong("not a name of the kernel's (at most 15 characters)")
	case f.MTU != 0 && (f.MTU < leastMTU || f.MTU > greatestMTU):
		return wrong("mtu %d: from %d to %d", f.MTU, leastMTU, greatestMTU)
	}
	if f.MAC != "" {
		mac, err := net.ParseMAC(f.MAC)
		if err != nil || len(mac) != 6 {
			return wrong("mac %q: write it as 52:54:00:12:34:56", f.MAC)
		}
		f.MAC = mac.String()
	}
	for _, a := range f.Addresses {
		if !a.IsValid() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Addr().IsLoopback() {
			return wrong("address %q: write it as 192.0.2.10/24", a)
		}
	}
	var families [2]int
	for _, g := range f.Routers {
		if !g.IsValid() || g.IsUnspecified() || g.IsMulticast() || g.IsLoopback() {
			return wrong("router %q: not a router's address", g)
		}
		family := 0
		if g.Is6() {
			family = 1
		}
		if families[family]++; families[family] > 1 {
			return wrong("router %s: one of each family is enough", g)
		}
		if !slices.ContainsFunc(f.Addresses, func(a netip.Prefix) bool { return a.Addr().Is4() == g.Is4() }) {
			return wrong("router %s: there is no address of its family beside it", g)
		}
	}
	for _, r := range f.Routes {
		if !r.To.IsValid() || r.Via.IsValid() && r.Via.Is4() != r.To.Addr().Is4() {
			return wrong("route to %q via %q: write them as 10.0.0.0/8 and 192.0.2.1", r.To, r.Via)
		}
	}
	return nil
}

// isName says whether s is a host or domain name that can stand in a file of ours: letters, digits, dashes, dots (RFC 1123).
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '_' {
				return false
			}
		}
	}
	return true
}

// Status is a moment's view, for the console and for doctors. It holds no secrets.
type Status struct {
	Hostname string       `json:"hostname"`
	Online   bool         `json:"online"` // an address and a default route
	Links    []Link       `json:"links"`  // physical NICs, by name
	DNS      []netip.Addr `json:"dns,omitempty"`
	Search   []string     `json:"search,omitempty"`
	Ports    []string     `json:"ports,omitempty"` // open ones: "443/tcp"
	Clock    clock.Status `json:"clock"`
	Error    string       `json:"error,omitempty"` // the latest that is not over
}

// Link is a NIC of a Status.
type Link struct {
	Name      string         `json:"name"`
	MAC       string         `json:"mac"`
	Driver    string         `json:"driver,omitempty"`
	Carrier   bool           `json:"carrier"` // the cable is in
	MTU       int            `json:"mtu"`
	Addresses []netip.Prefix `json:"addresses,omitempty"` // without link-local ones
	Routers   []netip.Addr   `json:"routers,omitempty"`   // default ones
	// Source says where they are from: "static", "dhcp", "ra", "dhcpv6", joined by "+".
	Source string `json:"source,omitempty"`
	// Expires is when the DHCP lease ends; zero without one.
	Expires time.Time `json:"expires,omitzero"`
	// Error is why it has no addresses, in words for the console.
	Error string `json:"error,omitempty"`
}

// Network is the network of the appliance. Its methods may be called concurrently.
type Network struct {
	cfg    Config
	log    *slog.Logger
	clock  *clock.Keeper
	online chan struct{} // closed at the first address with a way out
	wake   chan struct{} // something has changed: settle

	mu     sync.Mutex // guards what follows
	ports  []firewall.Port
	nics   map[int]*nic // by the kernel's index
	status Status
	filter bool // the filter is set: links may be up
	errors map[string]string

	resolv []byte // what resolv.conf was given last; Run's alone
}

// New makes a Network, or says what is wrong in cfg. It changes nothing yet.
func New(cfg Config) (*Network, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = "/etc/resolv.conf"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	n := &Network{
		cfg: cfg, log: cfg.Log, ports: slices.Clone(cfg.Ports), nics: map[int]*nic{},
		online: make(chan struct{}), wake: make(chan struct{}, 1),
	}
	n.clock = clock.New(clock.Config{Clock: cfg.Clock, Servers: cfg.NTP, Log: cfg.Log})
	return n, nil
}

// Online is closed when the appliance has an address and a default route for the first time.
func (n *Network) Online() <-chan struct{} { return n.online }

// Clock is the keeper of the clock: whether it is right, and Wait.
func (n *Network) Clock() *clock.Keeper { return n.clock }

// SetPorts opens these ports, and no others, at once and in one transaction. On error the former rules stand.
func (n *Network) SetPorts(ports []firewall.Port) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.filter {
		if err := firewall.Apply(ports); err != nil {
			return err
		}
	}
	n.ports = slices.Clone(ports)
	return nil
}

// Status returns what is so now.
func (n *Network) Status() Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.status
	s.Links = nil
	for _, c := range n.nics {
		s.Links = append(s.Links, c.link())
	}
	slices.SortFunc(s.Links, func(a, b Link) int { return strings.Compare(a.Name, b.Name) })
	for _, p := range n.ports {
		s.Ports = append(s.Ports, p.String())
	}
	s.Clock = n.clock.Status()
	return s
}

// Run sets the packet filter and then looks after the links and the clock until ctx ends. It returns early when the filter
// cannot be set: with no link up then. At its end links and addresses stay as they are, for who shuts the machine down.
func (n *Network) Run(ctx context.Context) error {
	return n.run(ctx)
}
