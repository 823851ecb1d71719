package appliance

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/machine"
	"sallyway/internal/appliance/network/firewall"
)

// program is a daemon of an appliance.
type program struct {
	role  config.Role
	name  string   // gatewayd, and its folder below the state folder
	start []string // words that run it
	state string   // flag of its state folder
	jail  machine.Jail
	stop  time.Duration // how long it may take to end
	// health is where the daemon itself answers /readyz, on this host alone.
	health string
	// defaults are settings that differ on an appliance.
	defaults map[string]any
	ports    func(settings map[string]any) []firewall.Port
}

// The users of the daemons. Their numbers are part of the state partition: they stay the same in every version.
const (
	gatewayUID  = 901
	relayUID    = 902
	platformUID = 903
	healthUID   = 904
)

// programs are the daemons by the order in which they start: a platform before the nodes that enrol there.
var programs = []program{
	{
		role: config.Platform, name: "platformd", start: []string{"serve"}, state: "data", stop: 30 * time.Second, health: "127.0.0.1:9430",
		jail: machine.Jail{UID: platformUID, Caps: []int{unix.CAP_NET_BIND_SERVICE}}, ports: platformPorts,
	},
	{
		role: config.Relay, name: "relayd", start: []string{"start"}, state: "state", stop: 45 * time.Second, health: "127.0.0.1:9466",
		jail: machine.Jail{UID: relayUID, Caps: []int{unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_ADMIN}}, ports: relayPorts,
	},
	{
		role: config.Gateway, name: "gatewayd", start: []string{"up"}, state: "state", stop: 45 * time.Second, health: "127.0.0.1:9465",
		jail:     machine.Jail{UID: gatewayUID, Caps: []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}},
		defaults: map[string]any{"dns": "off"}, // nobody works on this host, and its resolv.conf is the appliance's
		ports:    func(map[string]any) []firewall.Port { return nil },
	},
}

// of returns the programs of a role.
func of(role config.Role) []program {
	var out []program
	for _, p := range programs {
		if role.Has(p.role) {
			out = append(out, p)
		}
	}
	return out
}

// settings are the keys of the program's configuration file.
func (p program) settings(c *config.Config) map[string]any {
	out := maps.Clone(p.defaults)
	if out == nil {
		out = make(map[string]any)
	}
	for k, v := range c.Daemons[p.role] {
		out[strings.ReplaceAll(k, "_", "-")] = v
	}
	if c.Network.Proxy != "" && p.role != config.Platform && out["egress-proxy"] == nil {
		out["egress-proxy"] = c.Network.Proxy
	}
	if out["metrics-listen"] == nil {
		out["metrics-listen"] = p.health
	}
	return out
}

// healthAddr is where the daemon answers for its health on this host; "" where it was told not to.
func (p program) healthAddr(c *config.Config) string {
	s, _ := p.settings(c)["metrics-listen"].(string) // anything else is refused by the daemon
	return s
}

// writeFile writes the program's configuration file, readable for the program alone.
func (p program) writeFile(path string, c *config.Config) error {
	b, err := yaml.Marshal(p.settings(c))
	if err != nil {
		return fmt.Errorf("settings of %s: %w", p.name, err)
	}
	return secretFile(path, b, p.jail.UID)
}

// secretFile writes a file for one user alone.
func secretFile(path string, b []byte, uid int) error {
	_ = os.Remove(path) // it may be another user's
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if own := f.Chown(uid, uid); err == nil {
		err = own
	}
	if end := f.Close(); err == nil {
		err = end
	}
	return err
}

// portOf is the port number that a setting says; a value that is none leaves the default, and the daemon refuses it.
func portOf(settings map[string]any, key string, def uint16) uint16 {
	n, err := strconv.ParseUint(fmt.Sprint(settings[key]), 10, 16)
	if settings[key] == nil || err != nil {
		return def
	}
	return uint16(n)
}

func relayPorts(s map[string]any) []firewall.Port {
	var out []firewall.Port
	add := func(proto firewall.Protocol, first, last uint16) {
		if first != 0 && last >= first {
			out = append(out, firewall.Port{Protocol: proto, First: first, Last: last})
		}
	}
	turn := portOf(s, "listen-port", 5349)
	add(firewall.UDP, turn, turn)
	add(firewall.TCP, turn, turn)
	ssh, tls := portOf(s, "ssh-port", 2222), portOf(s, "tls-port", 8443)
	add(firewall.TCP, ssh, ssh)
	add(firewall.TCP, tls, tls)
	add(firewall.UDP, portOf(s, "min-port", 49152), portOf(s, "max-port", 65535))
	return out
}

func platformPorts(s map[string]any) []firewall.Port {
	var out []firewall.Port
	for key, def := range map[string]string{"listen": ":443", "http-listen": ""} {
		addr := def
		if v, ok := s[key].(string); ok {
			addr = v
		}
		i := strings.LastIndex(addr, ":")
		if i < 0 {
			continue
		}
		if a, err := netip.ParseAddr(strings.Trim(addr[:i], "[]")); err == nil && a.IsLoopback() {
			continue
		}
		if n, err := strconv.ParseUint(addr[i+1:], 10, 16); err == nil && n > 0 {
			out = append(out, firewall.Port{Protocol: firewall.TCP, First: uint16(n), Last: uint16(n)})
		}
	}
	slices.SortFunc(out, func(a, b firewall.Port) int { return int(a.First) - int(b.First) })
	return out
}

// openPorts are what the packet filter lets in for a configuration.
func openPorts(c *config.Config) []firewall.Port {
	var out []firewall.Port
	for _, p := range of(c.Role) {
		out = append(out, p.ports(p.settings(c))...)
	}
	if a, err := c.HealthAddr(); c.HealthListen != "" && err == nil {
		out = append(out, firewall.Port{Protocol: firewall.TCP, First: a.Port(), Last: a.Port()})
	}
	return out
}

// Folders of process 1 in memory.
const (
	runFolder   = "/run/sallyway"
	stateFolder = "/state"
)

// folder is the program's state.
func (p program) folder() string { return filepath.Join(stateFolder, p.name) }
