package bench

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"sallyway/internal/lab"
)

// Ports of the addresses that coturn relays from, beside those of the other hubs.
const (
	coturnLow  = 49200
	coturnHigh = 49900
)

// startCoturn starts coturn's server on the hub, and the two ends of the TURN stand-in.
func startCoturn(ctx context.Context, l *lab.Lab) (way, error) {
	program, err := lab.Program("turnserver")
	if err != nil {
		return way{}, err
	}
	dir, err := peerDir(l.Relay2, "coturn")
	if err != nil {
		return way{}, err
	}
	at := netip.AddrPortFrom(l.Addr(l.Relay2), coturnHubPort)
	conf := fmt.Sprintf(`listening-ip=%[1]s
relay-ip=%[1]s
listening-port=%[2]d
min-port=%[3]d
max-port=%[4]d
realm=%[5]s
lt-cred-mech
user=%[6]s:%[7]s
no-tls
no-dtls
no-tcp
no-cli
log-file=stdout
simple-log
pidfile=%[8]s
userdb=%[9]s
`, at.Addr(), at.Port(), coturnLow, coturnHigh, turnRealm, turnUser, turnSecret, filepath.Join(dir, "pid"), filepath.Join(dir, "turndb"))
	if err := writeAll(dir, map[string]string{"turnserver.conf": conf}); err != nil {
		return way{}, err
	}
	server, err := l.Relay2.Start(lab.Spec{Name: "coturn", Args: []string{program, "-c", filepath.Join(dir, "turnserver.conf")}, Grace: 2 * time.Second})
	if err != nil {
		return way{}, err
	}
	w, err := turnWay(ctx, l, "coturn", at, coturnPorts, turnEnd{l.Gateway, "agent"}, turnEnd{l.Client, "client"})
	w.procs = append([]*lab.Proc{server}, w.procs...)
	return w, err
}
