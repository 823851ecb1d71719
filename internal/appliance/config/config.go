// Package config is what an appliance is told: what it reads from the sources that a machine can be given a configuration by, in the
// order in which they are asked.
//
// A configuration is a YAML document (JSON is YAML):
//
//	role: gateway                # gateway, relay, platform, all; the token says it where this is missing
//	token: …                     # what `sallyway gateway|relay create NAME` printed
//	hostname: office
//	gateway: {allow: [10.0.3.0/24 5432], standby: 1}     # flags of `gatewayd up`; relay: and platform: alike
//	network: {…}                 # see internal/appliance/network; nothing means DHCP and router advertisements
//	admin-key: age1…             # of a platform: who can read the credential that the console shows, encrypted for this key
//	health-listen: :9470         # answers GET /healthz for a load balancer; nothing means no port
//
// Keys that nobody knows are errors. On a NoCloud or config drive the same stands in user-data under the key sallyway:, beside
// cloud-init's hostname:.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// maxDocument bounds a configuration, in bytes. A real one has a few KiB.
const maxDocument = 256 << 10

// Role is what an appliance does.
type Role string

// The roles. All is a platform, a relay and a gateway on one host; the appliance enrols the two at the platform by itself.
const (
	Gateway  Role = "gateway"
	Relay    Role = "relay"
	Platform Role = "platform"
	All      Role = "all"
)

// Roles are all roles, in the order that texts name them.
var Roles = []Role{Gateway, Relay, Platform, All}

// Has says whether a host of this role runs the daemon of the other.
func (r Role) Has(other Role) bool { return r == other || r == All }

// Config is a configuration. It is a value that nobody changes once it has been parsed.
type Config struct {
	Role     Role
	Token    daemon.Secret // of the gateway or relay; "" where the node is enrolled, or for a platform
	Hostname string        // "" is the node's name, else sallyway
	// Daemons are the flags of each daemon as keys of its file, by role. The daemon itself checks them.
	Daemons map[Role]map[string]any
	Network Network
	Update  Update
	// AdminKey is a public key of age for which a platform's first credential is encrypted; "" for nobody.
	AdminKey string
	// HealthListen is where the health of the daemons is answered by HTTP; "" is nowhere.
	HealthListen string
}

// Network is the machine's place in the network. The zero value is DHCP and router advertisements on every NIC.
type Network struct {
	// Addresses and Routers are for the first NIC; empty means DHCP. Machines with several NICs name them in Interfaces.
	Addresses []netip.Prefix `yaml:"addresses,omitempty"`
	Routers   []netip.Addr   `yaml:"routers,omitempty"`
	DNS       []netip.Addr   `yaml:"dns,omitempty"`
	Search    []string       `yaml:"search,omitempty"`
	NTP       []string       `yaml:"ntp,omitempty"`   // names or addresses
	Proxy     string         `yaml:"proxy,omitempty"` // URL of the proxy that outgoing connections have to take
	// Interfaces are NICs that are not left to DHCP and router advertisements.
	Interfaces []Interface `yaml:"interfaces,omitempty"`
}

// IsZero says that nothing is set.
func (n Network) IsZero() bool { return reflect.ValueOf(n).IsZero() }

// Interface is one NIC, by its name or its MAC.
type Interface struct {
	Name      string         `yaml:"name,omitempty"`
	MAC       string         `yaml:"mac,omitempty"`
	Addresses []netip.Prefix `yaml:"addresses,omitempty"` // empty is DHCP
	Routers   []netip.Addr   `yaml:"routers,omitempty"`
	Routes    []Route        `yaml:"routes,omitempty"`
	MTU       int            `yaml:"mtu,omitempty"`      // bytes; 0: what the network says
	Disabled  bool           `yaml:"disabled,omitempty"` // leaves it down
}

// Route leads to a network by a router, or, without one, on the link itself.
type Route struct {
	To  netip.Prefix `yaml:"to"`
	Via netip.Addr   `yaml:"via,omitempty"`
}

// Update is how the appliance gets new versions of itself. The zero value is: by nobody.
type Update struct {
	// URL is that of a signed manifest, which is looked at every so often; "" means never.
	URL string `yaml:"url,omitempty"`
	// Every is how often, 0 means once a day.
	Every time.Duration `yaml:"every,omitempty"`
	// Keys are public keys for the signature, besides those that the program was built with.
	Keys []string `yaml:"keys,omitempty"`
}

// IsZero says that nothing is set.
func (u Update) IsZero() bool { return u.URL == "" && u.Every == 0 && len(u.Keys) == 0 }

// document is the YAML form.
type document struct {
	Role         Role           `yaml:"role"`
	Token        string         `yaml:"token,omitempty"`
	Hostname     string         `yaml:"hostname,omitempty"`
	Gateway      map[string]any `yaml:"gateway,omitempty"`
	Relay        map[string]any `yaml:"relay,omitempty"`
	Platform     map[string]any `yaml:"platform,omitempty"`
	Network      Network        `yaml:"network,omitempty"`
	Update       Update         `yaml:"update,omitempty"`
	AdminKey     string         `yaml:"admin-key,omitempty"`
	HealthListen string         `yaml:"health-listen,omitempty"`
}

// ErrEmpty says that a document holds no configuration.
var ErrEmpty = errors.New("holds no configuration")

// Parse reads a configuration. Errors name the key and never a value that could be secret; a document that is empty is ErrEmpty.
func Parse(b []byte) (*Config, error) {
	if len(b) > maxDocument {
		return nil, fmt.Errorf("the configuration is larger than %d bytes", maxDocument)
	}
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, ErrEmpty
	} else if err != nil {
		return nil, quiet(err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, errors.New("the configuration has more than one YAML document")
	}
	return parseNode(&doc)
}

// parseNode reads a configuration from a document or the value of a key.
func parseNode(n *yaml.Node) (*Config, error) {
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		n = n.Content[0]
	}
	if n.Kind == 0 || n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil, ErrEmpty
	}
	if n.Kind == yaml.MappingNode && len(n.Content) == 0 {
		return nil, ErrEmpty
	}
	var d document
	if err := daemon.DecodeStrict(n, &d); err != nil {
		return nil, quiet(err)
	}
	c := &Config{
		Role: d.Role, Token: daemon.Secret(strings.TrimSpace(d.Token)), Hostname: d.Hostname, Network: d.Network, Update: d.Update, AdminKey: d.AdminKey, HealthListen: d.HealthListen,
		Daemons: map[Role]map[string]any{Gateway: d.Gateway, Relay: d.Relay, Platform: d.Platform},
	}
	return c, c.validate()
}

// quoted is what YAML's errors show of a document.
var quoted = regexp.MustCompile("`[^`]*`")

// quiet removes the values that YAML quotes in its errors: one could be a token.
func quiet(err error) error {
	return errors.New(quoted.ReplaceAllString(strings.TrimPrefix(err.Error(), "yaml: "), "a value"))
}

// hostnames is a host name as RFC 1123 section 2.1 has it, in one or more labels.
var hostnames = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)

func (c *Config) validate() error {
	if c.Token != "" {
		t, err := control.ParseToken(c.Token.Reveal())
		if err != nil {
			return fmt.Errorf("token: %w", err)
		}
		kind, known := map[identity.Kind]Role{identity.Gateway: Gateway, identity.Relay: Relay}[t.Node.Kind]
		switch {
		case !known:
			return fmt.Errorf("token: it is for a %s, and an appliance is a gateway or a relay\nmake one with `sallyway gateway create NAME` or `sallyway relay create NAME --host ADDRESS`", t.Node.Kind)
		case c.Role == "":
			c.Role = kind
		case c.Role == Platform || c.Role == All:
			return fmt.Errorf("token: role %s needs none, and this one is for the %s %q\nleave it out, or make the role %s", c.Role, kind, t.Name, kind)
		case c.Role != kind:
			return fmt.Errorf("token: it is for the %s %q, and the role is %s", kind, t.Name, c.Role)
		}
		if c.Hostname == "" && hostnames.MatchString(t.Name) && len(t.Name) <= maxHostname {
			c.Hostname = t.Name
		}
	}
	if c.Role == "" {
		return errors.New("role: is missing, and there is no token that says it\nwrite role: gateway, relay, platform or all")
	}
	if !slices.Contains(Roles, c.Role) {
		var names []string
		for _, r := range Roles {
			names = append(names, string(r))
		}
		return fmt.Errorf("role: unknown role %.20q%s\nthere are %s", string(c.Role), daemon.DidYouMean(string(c.Role), names), strings.Join(names, ", "))
	}
	if c.Hostname != "" && (len(c.Hostname) > maxHostname || !hostnames.MatchString(c.Hostname)) {
		return fmt.Errorf("hostname: %.70q is no host name: letters, digits and dashes, in labels of up to 63, in all up to %d", c.Hostname, maxHostname)
	}
	if c.HealthListen != "" {
		if _, err := c.HealthAddr(); err != nil {
			return err
		}
	}
	if c.AdminKey != "" {
		if _, err := adminKey(c.AdminKey); err != nil {
			return err
		}
		if !c.Role.Has(Platform) {
			return fmt.Errorf("admin-key: is for a platform, and the role is %s\nleave it out", c.Role)
		}
	}
	for _, r := range []Role{Gateway, Relay, Platform} {
		if len(c.Daemons[r]) == 0 {
			continue
		}
		if !c.Role.Has(r) {
			return fmt.Errorf("%s: has settings, and the role is %s\nleave them out, or change the role", r, c.Role)
		}
		for key := range c.Daemons[r] {
			switch name := strings.ReplaceAll(key, "_", "-"); name {
			case "state", "data", "config", "token-file", "token", "log-format":
				return fmt.Errorf("%s: %s: the appliance sets this itself\nleave it out", r, name)
			}
		}
	}
	return nil
}

// maxHostname is what Linux keeps (__NEW_UTS_LEN).
const maxHostname = 64

// HealthAddr is HealthListen as an address; without a host it is every address.
func (c *Config) HealthAddr() (netip.AddrPort, error) {
	host, port, found := strings.Cut(c.HealthListen, ":")
	if i := strings.LastIndex(c.HealthListen, ":"); found && strings.HasPrefix(host, "[") {
		host, port = c.HealthListen[:i], c.HealthListen[i+1:]
	}
	addr := netip.IPv6Unspecified()
	if host != "" {
		var err error
		if addr, err = netip.ParseAddr(strings.Trim(host, "[]")); err != nil {
			return netip.AddrPort{}, fmt.Errorf("health-listen: %.60q is no address and port, such as :9470", c.HealthListen)
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("health-listen: %.60q is no address and port, such as :9470", c.HealthListen)
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// Save writes the configuration without its token, for the state partition. Parse reads it back.
func (c *Config) Save() ([]byte, error) {
	d := document{
		Role: c.Role, Hostname: c.Hostname, Gateway: c.Daemons[Gateway], Relay: c.Daemons[Relay], Platform: c.Daemons[Platform],
		Network: c.Network, Update: c.Update, AdminKey: c.AdminKey, HealthListen: c.HealthListen,
	}
	return yaml.Marshal(d)
}
