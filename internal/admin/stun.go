package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/stun"
)

// stunPort is a relay's port for STUN and TURN unless configured otherwise.
const stunPort = 5349

// stunAnswer is the JSON of `sallyway stun`.
type stunAnswer struct {
	Local    netip.AddrPort   `json:"local"`
	NAT      stun.NAT         `json:"nat"`
	Bindings []stunBinding    `json:"bindings"`
	Silent   []netip.AddrPort `json:"silent,omitempty"`
}

type stunBinding struct {
	Server    netip.AddrPort `json:"server"`
	Reflexive netip.AddrPort `json:"reflexive"`
	RTT       float64        `json:"rtt_ms"`
}

func (a *app) stun() *cobra.Command {
	return &cobra.Command{
		Use: "stun RELAY [RELAY2]", Short: "Show this host's address as relays see it, and what kind of NAT is in between",
		Long: `Show this host's address as relays see it, and what kind of NAT is in between. One relay tells the address; two tell
whether the NAT gives every destination the same one. RELAY is HOST[:PORT], or the name of a relay of the organization.`,
		Example: `  sallyway stun relay.example relay2.example:5349
  sallyway stun fra-1 ams-2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || len(args) > 4 {
				return fmt.Errorf("name one relay, or two (four at most): %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var servers []netip.AddrPort
			for _, arg := range args {
				s, err := a.relayAddress(cmd.Context(), arg)
				if err != nil {
					return err
				}
				servers = append(servers, s)
			}
			d, err := stun.Discover(cmd.Context(), servers)
			if err != nil {
				return daemon.Failf("ask %s: %w\ncheck that the relay runs and that UDP to its port gets out of this network", strings.Join(args, ", "), err)
			}
			ans := stunAnswer{Local: d.Local, NAT: d.NAT, Silent: d.Silent}
			for _, b := range d.Bindings {
				ans.Bindings = append(ans.Bindings, stunBinding{b.Server, b.Reflexive, float64(b.RTT.Microseconds()) / 1000})
			}
			return a.show(cmd, ans, func(w io.Writer) {
				table(w, "RELAY REFLEXIVE RTT", ans.Bindings, func(b stunBinding) []any {
					return []any{b.Server, b.Reflexive, fmt.Sprintf("%.1f ms", b.RTT)}
				})
				fields(w, "local", ans.Local, "nat mapping", ans.NAT, "silent", join(ans.Silent))
			})
		},
	}
}

// relayAddress finds a relay by its address, or by its name on the platform.
func (a *app) relayAddress(ctx context.Context, arg string) (netip.AddrPort, error) {
	host, port := arg, uint16(stunPort)
	if h, p, err := net.SplitHostPort(arg); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return netip.AddrPort{}, daemon.Usagef("%q: %q is not a port", arg, p)
		}
		host, port = h, uint16(n)
	} else if identity.ValidLabel(arg) {
		// A bare word: a relay's name where somebody is logged in and there is such a relay, else a host.
		if c, err := a.connect(); err == nil {
			defer c.Close()
			n, err := relays.of(c).show(ctx, arg)
			if err == nil && n.Host != "" {
				host = n.Host
				if n.Port != 0 {
					port = n.Port
				}
			}
		}
	}
	host = strings.Trim(host, "[]")
	if ip, err := netip.ParseAddr(host); err == nil {
		return netip.AddrPortFrom(ip.Unmap(), port), nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(ips) == 0 {
		var dns *net.DNSError
		why := "no address"
		if errors.As(err, &dns) {
			why = dns.Err
		}
		return netip.AddrPort{}, daemon.Failf("%s: neither a relay of the organization nor a name that resolves: %s\nsee the relays: sallyway relay list", arg, why)
	}
	for _, ip := range ips { // IPv4 first: relays hand out IPv4 unless they have none
		if ip.Unmap().Is4() {
			return netip.AddrPortFrom(ip.Unmap(), port), nil
		}
	}
	return netip.AddrPortFrom(ips[0], port), nil
}
