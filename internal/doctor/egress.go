package doctor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"

	"sallyway/internal/daemon"
	"sallyway/internal/egress"
)

// Egress is the row of a running daemon about the proxy that its TCP goes through, none where there is none: it is asked for the platform.
func Egress(ctx context.Context, d *egress.Dialer, platform string) []daemon.Check {
	return proxy(ctx, "egress proxy in use", d, platform)
}

// proxy is that row, and the one of the doctor's own look.
func proxy(ctx context.Context, check string, d *egress.Dialer, platform string) []daemon.Check {
	st := d.Status()
	if st == nil {
		return nil
	}
	row := daemon.Check{Check: check, Result: daemon.Pass}
	target := platformAddr(platform)
	if target == "" || !d.Uses(target) {
		row.Detail = fmt.Sprintf("%s (%s), not for the platform", st.Proxy, st.Source)
		if st.Error != "" {
			row.Result, row.Detail, row.Remedy = daemon.Fail, st.Error, st.Remedy
		}
		return []daemon.Check{row}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", target)
	if err != nil {
		row.Result, row.Detail, row.Remedy = daemon.Fail, err.Error(), egress.Remedy(err)
		if row.Remedy == "" {
			row.Remedy = "look again"
		}
		return []daemon.Check{row}
	}
	_ = c.Close() // nothing was said on it
	row.Detail = fmt.Sprintf("%s (%s) leads to %s", st.Proxy, st.Source, target)
	return []daemon.Check{row}
}

// platformAddr is the host and port of a platform's URL, "" where it has none.
func platformAddr(platform string) string {
	u, err := url.Parse(platform)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	return net.JoinHostPort(u.Hostname(), portOf(platform))
}

// named is an address that is dialled by the host's name, so that a proxy may resolve it.
type named struct {
	host string
	ip   netip.Addr // zero where the host does not know it
	d    *egress.Dialer
}

// lookupBy resolves a relay's host; an error is none where the proxy resolves it.
func lookupBy(ctx context.Context, d *egress.Dialer, host string, port uint16) (named, error) {
	n := named{host: host, d: d}
	addrs, err := lookup(ctx, host)
	if err == nil {
		n.ip = addrs[0]
	} else if d.Resolves(n.at(port)) {
		err = nil
	}
	return n, err
}

// at is host and port.
func (n named) at(port uint16) string { return net.JoinHostPort(n.host, fmt.Sprint(port)) }

// remedy says what to open for a port.
func (n named) remedy(udp bool, port uint16) string {
	switch at := n.at(port); {
	case udp && !n.ip.IsValid():
		return fmt.Sprintf("see that the name of the relay resolves on this host, and let UDP port %d out to it", port)
	case udp:
		return fmt.Sprintf("let UDP port %d out to %s (%v)", port, n.host, n.ip)
	case n.d.Uses(at):
		return fmt.Sprintf("have the proxy %s allow CONNECT to %s", n.d.Proxy(), at)
	}
	return fmt.Sprintf("let TCP port %d out to %s (%v)", port, n.host, n.ip)
}
