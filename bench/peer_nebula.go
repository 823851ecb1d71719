package bench

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"sallyway/internal/lab"
)

// startNebula runs Nebula with a lighthouse and relay on the hub, and another on the first relay's host. Its two ends are encrypted to each other. Only addresses
// at the router are told and tried, so that no other peer's tunnel carries it.
func startNebula(ctx context.Context, l *lab.Lab) (way, error) {
	w := way{addr: lab.SSHAddr, iperf: iperfPort, echo: echoPort, packets: true}
	nebula, err := lab.Program("nebula")
	if err != nil {
		return w, err
	}
	cert, err := lab.Program("nebula-cert")
	if err != nil {
		return w, err
	}
	ca, err := peerDir(l.Relay2, "nebula-ca")
	if err != nil {
		return w, err
	}
	if _, err := l.Relay2.Run(ctx, cert, "ca", "-name", "bench", "-out-crt", filepath.Join(ca, "ca.crt"), "-out-key", filepath.Join(ca, "ca.key")); err != nil {
		return w, err
	}
	const hubIP, gatewayIP, secondIP = "10.77.2.1", "10.77.2.2", "10.77.2.4"
	private := lab.SSHAddr.String() + "/32"
	relay := fmt.Sprintf("lighthouse:\n  am_lighthouse: true\nrelay:\n  am_relay: true\n  use_relays: false\nlisten:\n  host: 0.0.0.0\n  port: %d\n", nebulaHubPort)
	end := fmt.Sprintf(`static_host_map:
  "%[1]s": ["%[2]s:%[5]d"]
  "%[3]s": ["%[4]s:%[5]d"]
lighthouse:
  am_lighthouse: false
  interval: 5
  hosts: ["%[1]s", "%[3]s"]
  local_allow_list:
    "203.0.113.0/24": true
  remote_allow_list:
    "203.0.113.0/24": true
relay:
  use_relays: true
  relays: ["%[1]s", "%[3]s"]
listen:
  host: 0.0.0.0
  port: 0
`, hubIP, l.Addr(l.Relay2), secondIP, l.Addr(l.Relay1), nebulaHubPort)
	route := fmt.Sprintf("  unsafe_routes:\n    - route: %s\n      via: %s\n", private, gatewayIP)
	for _, n := range []struct {
		host                 *lab.Host
		ip, subnets, conf, t string
	}{{l.Relay2, hubIP, "", relay, ""}, {l.Relay1, secondIP, "", relay, ""}, {l.Gateway, gatewayIP, private, end, ""}, {l.Client, "10.77.2.3", "", end, route}} {
		dir, err := peerDir(n.host, "nebula")
		if err != nil {
			return w, err
		}
		sign := []string{
			cert, "sign", "-name", n.host.Name, "-ip", n.ip + "/24", "-ca-crt", filepath.Join(ca, "ca.crt"), "-ca-key", filepath.Join(ca, "ca.key"),
			"-out-crt", filepath.Join(dir, "node.crt"), "-out-key", filepath.Join(dir, "node.key"),
		}
		if n.subnets != "" {
			sign = append(sign, "-subnets", n.subnets)
		}
		if _, err := n.host.Run(ctx, sign...); err != nil {
			return w, err
		}
		conf := fmt.Sprintf("pki:\n  ca: %s\n  cert: %s\n  key: %s\n", filepath.Join(ca, "ca.crt"), filepath.Join(dir, "node.crt"), filepath.Join(dir, "node.key")) + n.conf +
			"punchy:\n  punch: true\ntun:\n  dev: nebula0\n  mtu: 1300\n" + n.t +
			"logging:\n  level: warning\n  format: text\n" +
			"firewall:\n  outbound:\n    - {port: any, proto: any, host: any}\n  inbound:\n    - {port: any, proto: any, host: any}\n"
		if err := writeAll(dir, map[string]string{"config.yml": conf}); err != nil {
			return w, err
		}
		p, err := n.host.Start(lab.Spec{Name: "nebula-" + n.host.Name, Args: []string{nebula, "-config", filepath.Join(dir, "config.yml")}, Grace: 2 * time.Second})
		if err != nil {
			return w, err
		}
		w.procs = append(w.procs, p)
	}
	return w, nil
}
