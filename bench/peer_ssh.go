package bench

import (
	"context"
	"fmt"
	"net/netip"

	"sallyway/internal/lab"
)

// startSSH runs an sshd on the hub, `ssh -R` beside the private network and `ssh -L` on the client. The hub sees
// everything: the two ends' encryption ends there.
func startSSH(ctx context.Context, l *lab.Lab) (way, error) {
	w := way{addr: loopback, behind: lab.WebAddr, iperf: sshIperfPort, echo: sshEchoPort}
	ssh, err := lab.Program("ssh")
	if err != nil {
		return w, err
	}
	hub := netip.AddrPortFrom(l.Addr(l.Relay2), sshHubPort)
	sshd, err := l.Relay2.SSHD(ctx, hub, fmt.Sprintf("[%s]:%d", hub.Addr(), hub.Port()))
	if err != nil {
		return w, err
	}
	w.procs = append(w.procs, sshd.Proc)
	args := func(more ...string) []string {
		return append([]string{
			ssh, "-N", "-F", "none", "-i", sshd.Key, "-p", fmt.Sprint(hub.Port()), "-o", "UserKnownHostsFile=" + sshd.KnownHosts,
			"-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes",
			"-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=5",
		}, append(more, "root@"+hub.Addr().String())...)
	}
	remote, local := "-R", "-L"
	forward := func(port uint16, to string) string { return fmt.Sprintf("127.0.0.1:%d:%s", port, to) }
	ends, err := startAll(
		hostSpec{l.Gateway, lab.Spec{Name: "ssh-agent", Args: args(
			remote, forward(sshIperfPort, fmt.Sprintf("%s:%d", lab.WebAddr, iperfPort)),
			remote, forward(sshEchoPort, fmt.Sprintf("%s:%d", lab.WebAddr, echoPort)),
		)}},
		hostSpec{l.Client, lab.Spec{Name: "ssh-client", Args: args(
			local, forward(sshIperfPort, fmt.Sprintf("127.0.0.1:%d", sshIperfPort)),
			local, forward(sshEchoPort, fmt.Sprintf("127.0.0.1:%d", sshEchoPort)),
		)}},
	)
	w.procs = append(w.procs, ends...)
	return w, err
}
