package bench

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"sallyway/internal/lab"
)

// wireguardOverhead is what WireGuard takes of a link's MTU over IPv6, in bytes; wg-quick counts it so.
const wireguardOverhead = 80

// startWireGuard runs wireguard-go on the client, on the hub, whose kernel forwards, and beside the private network. The
// hub sees everything: each tunnel ends there.
func startWireGuard(ctx context.Context, l *lab.Lab) (way, error) {
	if err := forwarding(l.Relay2); err != nil {
		return way{}, err
	}
	return wireguard(ctx, l, l.Relay2)
}

// startWireGuardDirect runs wireguard-go on the client and beside the private network, where the client calls it.
func startWireGuardDirect(ctx context.Context, l *lab.Lab) (way, error) {
	return wireguard(ctx, l, l.Gateway)
}

// wireguard runs wireguard-go on the hub, which may be the gateway's host, and on the other ends.
func wireguard(ctx context.Context, l *lab.Lab, hubHost *lab.Host) (way, error) {
	w := way{addr: lab.DBAddr, iperf: iperfPort, echo: echoPort, packets: true}
	program, err := l.Bin("wireguard-go")
	if err != nil {
		if program, err = lab.Program("wireguard-go"); err != nil {
			return w, errors.New("wireguard-go: not built: go build -o bin/wireguard-go golang.zx2c4.com/wireguard")
		}
	}
	wg, err := lab.Program("wg")
	if err != nil {
		return w, err
	}
	private := lab.DBAddr.String() + "/32"
	type end struct {
		host   *lab.Host
		addr   string
		key    *ecdh.PrivateKey
		routes []string
	}
	ends := []end{{hubHost, "10.77.1.1", nil, []string{private}}, {l.Gateway, "10.77.1.2", nil, nil}, {l.Client, "10.77.1.3", nil, []string{private}}}
	if hubHost == l.Gateway {
		ends = []end{{l.Gateway, "10.77.1.1", nil, nil}, ends[2]}
	}
	for i := range ends {
		if ends[i].key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return w, err
		}
	}
	b64 := base64.StdEncoding.EncodeToString
	hub := netip.AddrPortFrom(l.Addr(hubHost), wireguardHubPort)
	for i, e := range ends {
		conf := fmt.Sprintf("[Interface]\nPrivateKey = %s\n", b64(e.key.Bytes()))
		if i == 0 {
			conf += fmt.Sprintf("ListenPort = %d\n", hub.Port())
			for _, o := range ends[1:] {
				allowed := o.addr + "/32"
				if o.host == l.Gateway {
					allowed += ", " + private
				}
				conf += fmt.Sprintf("[Peer]\nPublicKey = %s\nAllowedIPs = %s\n", b64(o.key.PublicKey().Bytes()), allowed)
			}
		} else {
			conf += fmt.Sprintf("[Peer]\nPublicKey = %s\nEndpoint = %s\nAllowedIPs = 10.77.1.0/24, %s\nPersistentKeepalive = 5\n", b64(ends[0].key.PublicKey().Bytes()), hub, private)
		}
		dir, err := peerDir(e.host, "wireguard")
		if err != nil {
			return w, err
		}
		p, err := e.host.Start(lab.Spec{
			Name: "wireguard-go-" + e.host.Name, Args: []string{program, "-f", "wg0"},
			Env: []string{"WG_PROCESS_FOREGROUND=1", "LOG_LEVEL=error"}, Grace: 2 * time.Second,
		})
		if err != nil {
			return w, err
		}
		w.procs = append(w.procs, p)
		configure := func(ctx context.Context) error {
			file := filepath.Join(dir, "wg.conf")
			if err := writeAll(dir, map[string]string{"wg.conf": conf}); err != nil {
				return err
			}
			err := lab.Until(ctx, 20*time.Millisecond, func() error {
				_, err := e.host.Run(ctx, wg, "setconf", "wg0", file)
				return err
			})
			if err != nil {
				return err
			}
			if err := raise(e.host, "wg0", e.addr+"/24", l.MTU()-wireguardOverhead, e.routes...); err != nil {
				return fmt.Errorf("wg0 on %s: %w", e.host.Name, err)
			}
			return os.Remove(file)
		}
		if err := configure(ctx); err != nil {
			return w, err
		}
		if i == 0 {
			w.again = configure
		}
	}
	return w, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
