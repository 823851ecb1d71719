// Package doctor looks at a node's surroundings from its own host, whether or not its daemon runs: names, the platform and who answers for it,
// every relay by every rung, the size of packets, the NAT in front, and the kernel's buffers. Each row says what was found and, where that is
// not well, what to do.
//
//	spec.Checks = doctor.Network
package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
	"sallyway/stun"
)

// patience bounds one look at one thing; tests have less.
var patience = 3 * time.Second

// maxRelays bounds how many relays are looked at.
const maxRelays = 8

// Network returns the rows of a node by what its state folder knows of platform and relays.
func Network(ctx context.Context, stateDir string) []daemon.Check {
	c, err := agent.ReadCached(stateDir)
	if err != nil {
		return []daemon.Check{{
			Check: "enrolment", Result: daemon.Fail, Detail: err.Error(), Remedy: "enrol: `sallyway relay|gateway|client create NAME`, or `… token NAME`, prints the command for this host",
		}}
	}
	refs := relays(c.Config)
	d, err := egress.Recall(stateDir, os.Getenv)
	out := []daemon.Check{names(ctx, c, refs, d)}
	if err != nil {
		out = append(out, daemon.Check{Check: egressRow, Result: daemon.Fail, Detail: err.Error(), Remedy: "set it right where the daemon is started, or do without: --egress-proxy none"})
	} else {
		out = append(out, proxy(ctx, egressRow, d, c.Platform)...)
	}
	out = append(out, platform(ctx, c, d))
	// The relays are looked at beside each other: what does not answer takes its time.
	rows := make([][]daemon.Check, len(refs))
	var wg sync.WaitGroup
	for i := range refs {
		wg.Go(func() { rows[i] = relay(ctx, c.Node.Kind, &refs[i], d) })
	}
	wg.Wait()
	for _, r := range rows {
		out = append(out, r...)
	}
	if c.Node.Kind == identity.Client {
		out = append(out, nat(ctx, refs)...)
	}
	return append(out, buffers()...)
}

// relays are those that the node was told of, each once.
func relays(c *control.Config) []control.RelayRef {
	if c == nil {
		return nil
	}
	var out []control.RelayRef
	add := func(refs []control.RelayRef) {
		for _, r := range refs {
			if len(out) < maxRelays && !slices.ContainsFunc(out, func(o control.RelayRef) bool { return o.Node == r.Node }) {
				out = append(out, r)
			}
		}
	}
	if c.Gateway != nil {
		add(c.Gateway.Relays)
	}
	if c.Dialling != nil {
		for _, g := range c.Dialling.Gateways {
			add(g.Relays)
		}
	}
	return out
}

// lookup resolves a host, IPv4 first.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	slices.SortStableFunc(ips, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return ips, nil
}

// egressRow is the name of the row about the egress proxy.
const egressRow = "egress proxy"

// names is the row about DNS.
func names(ctx context.Context, c *agent.Cached, refs []control.RelayRef, d *egress.Dialer) daemon.Check {
	row := daemon.Check{Check: "DNS", Result: daemon.Pass}
	hosts := []string{}
	if u, err := url.Parse(c.Platform); err == nil {
		hosts = append(hosts, u.Hostname())
	}
	for _, r := range refs {
		hosts = append(hosts, r.Host)
	}
	if d.Host() != "" {
		hosts = append(hosts, d.Host())
	}
	var found, missing []string
	fatal := false
	for _, h := range hosts {
		if _, err := netip.ParseAddr(h); err == nil {
			continue
		}
		started := time.Now()
		if ips, err := lookup(ctx, h); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", h, err))
			fatal = fatal || h == d.Host() || !d.Resolves(net.JoinHostPort(h, "443"))
		} else {
			found = append(found, fmt.Sprintf("%s is %v, %v", h, ips[0], time.Since(started).Round(time.Millisecond)))
		}
	}
	row.Detail = strings.Join(append(found, missing...), "; ")
	if row.Detail == "" {
		row.Detail = "platform and relays have addresses, no name to resolve"
	}
	switch {
	case len(missing) > 0 && !fatal:
		row.Result, row.Remedy = daemon.Warn, "the proxy resolves these names for TCP; UDP needs them to resolve on this host"
	case len(missing) > 0:
		row.Result, row.Remedy = daemon.Fail, "see that the host's resolver works (resolvectl status, /etc/resolv.conf) and that the names are in DNS"
	}
	return row
}

// platform is the row about HTTPS to the platform: reached, by whom, and what its clock says.
func platform(ctx context.Context, c *agent.Cached, d *egress.Dialer) daemon.Check {
	row := daemon.Check{Check: "platform from here", Result: daemon.Fail}
	l, err := link.New(link.Config{URL: c.Platform, Pin: c.Pin, Timeout: patience, DialContext: d.DialContext})
	if err != nil {
		row.Detail, row.Remedy = err.Error(), "enrol the node anew"
		return row
	}
	defer l.Close()
	started := time.Now()
	err = l.Do(ctx, link.Request{Method: http.MethodGet, Path: "/healthz"}, nil)
	took := time.Since(started)
	_, foreign := errors.AsType[*link.PinError](err)
	_, answered := errors.AsType[*link.Problem](err)
	switch {
	case foreign:
		row.Detail = fmt.Sprintf("%s shows a certificate of another CA%s: TLS is opened on the way, or the platform has a new CA", c.Platform, shown(ctx, d, c.Platform))
		row.Remedy = "exempt the platform from TLS inspection; if its CA is new, enrol with a new token"
	case err != nil && !answered:
		row.Detail, row.Remedy = err.Error(), "let TCP port "+portOf(c.Platform)+" out to the platform"
		if e, ok := errors.AsType[*link.Error](err); ok && e.Remedy != "" {
			row.Remedy = e.Remedy
		}
		if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
			row.Detail += shown(ctx, d, c.Platform)
			row.Remedy = "exempt the platform from TLS inspection, or give this host the CA that its certificate is from"
		}
	default:
		off := l.ClockOffset()
		row.Result, row.Detail = daemon.Pass, fmt.Sprintf("%s answers in %v, clocks differ by %v", c.Platform, took.Round(time.Millisecond), off.Round(time.Second))
		if off.Abs() > time.Minute {
			row.Result, row.Remedy = daemon.Warn, fmt.Sprintf("set the clock (timedatectl set-ntp true): certificates are refused from %v on", identity.ClockSkew)
		}
	}
	return row
}

func portOf(u string) string {
	if p, err := url.Parse(u); err == nil && p.Port() != "" {
		return p.Port()
	}
	return "443"
}

// shown names the issuer of the certificate that a server shows, so that who opens TLS on the way has a name.
func shown(ctx context.Context, d *egress.Dialer, base string) string {
	u, err := url.Parse(base)
	if err != nil {
		return ""
	}
	issuer := ""
	_, _ = handshake(ctx, d, platformAddr(base), u.Hostname(), func(chain []*x509.Certificate) error {
		issuer = fmt.Sprintf(" (issued by %.80q)", chain[0].Issuer.String())
		return errSeen
	})
	return issuer
}

// errSeen ends a handshake that was only begun to see the certificate.
var errSeen = errors.New("seen")

// handshake does a TLS handshake in which judge alone decides about the chain, and returns that.
func handshake(ctx context.Context, d *egress.Dialer, addr, name string, judge func(chain []*x509.Certificate) error) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	var leaf *x509.Certificate
	c := tls.Client(nc, &tls.Config{
		ServerName: name, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, //nolint:gosec // VerifyConnection judges
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("no certificate was shown")
			}
			leaf = cs.PeerCertificates[0]
			return judge(cs.PeerCertificates)
		},
	})
	if err := c.HandshakeContext(ctx); err != nil {
		_ = nc.Close() // the handshake's error says more
		return nil, err
	}
	return leaf, c.Close()
}

// rung is a way to a relay and how it is looked at.
type rung struct {
	name string
	port uint16
	look func(context.Context) (string, error)
}

// relay are the rows about one relay, one for each rung.
func relay(ctx context.Context, kind identity.Kind, ref *control.RelayRef, d *egress.Dialer) []daemon.Check {
	host, err := lookupBy(ctx, d, ref.Host, ref.Port)
	if err != nil {
		return []daemon.Check{{
			Check: "relay " + ref.Name, Result: daemon.Fail, Detail: fmt.Sprintf("%s has no address: %v", ref.Host, err), Remedy: "see that its name is in DNS, or set another: sallyway relay update " + ref.Name + " --host HOST",
		}}
	}
	at := netip.AddrPortFrom(host.ip, ref.Port)
	tests := []rung{
		{"udp", ref.Port, func(ctx context.Context) (string, error) {
			if !host.ip.IsValid() {
				return "", errors.New("its name does not resolve on this host")
			}
			return binding(ctx, at)
		}},
		{"tls", ref.Port, func(ctx context.Context) (string, error) { return relayTLS(ctx, d, host.at(ref.Port), ref) }},
	}
	if port := ref.SSHPort; port != 0 && kind == identity.Gateway {
		tests = append(tests, rung{"ssh", port, func(ctx context.Context) (string, error) { return banner(ctx, d, host.at(port), port) }})
	}
	if port := ref.TLSPort; port != 0 && kind == identity.Client {
		tests = append(tests, rung{"tls on its own port", port, func(ctx context.Context) (string, error) { return relayTLS(ctx, d, host.at(port), ref) }})
	}
	rows := make([]daemon.Check, len(tests))
	var wg sync.WaitGroup
	for i, t := range tests {
		wg.Go(func() {
			row := daemon.Check{Check: fmt.Sprintf("relay %s by %s", ref.Name, t.name), Result: daemon.Pass}
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			detail, err := t.look(ctx)
			if row.Detail = detail; err != nil {
				row.Result, row.Detail = daemon.Warn, plainly(err)
				row.Remedy = host.remedy(t.name == "udp", t.port)
				if remedy := egress.Remedy(err); remedy != "" {
					row.Remedy = remedy
				}
				if e, ok := errors.AsType[*identityError](err); ok {
					row.Result, row.Remedy = daemon.Fail, e.remedy
				}
			}
			rows[i] = row
		})
	}
	wg.Wait()
	if rows[0].Result == daemon.Pass {
		return append(rows, mtu(ctx, ref.Name, at))
	}
	if !slices.ContainsFunc(rows, func(r daemon.Check) bool { return r.Result == daemon.Pass }) {
		for i := range rows {
			rows[i].Result = daemon.Fail
		}
	}
	return rows
}

// plainly words an error of the network for people.
func plainly(err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, stun.ErrNoAnswer):
		return fmt.Sprintf("no answer in %v: filtered on the way, or nobody is there", patience)
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused: nothing listens there"
	}
	return err.Error()
}

// binding asks a relay by STUN over UDP.
func binding(ctx context.Context, at netip.AddrPort) (string, error) {
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	b, err := stun.Reflexive(ctx, conn, at)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("answers in %.1f ms, sees this host as %v", float64(b.RTT.Microseconds())/1000, b.Reflexive), nil
}

// identityError says that somebody answers who is not the relay.
type identityError struct{ why, remedy string }

func (e *identityError) Error() string { return e.why }

// relayTLS does a TLS handshake with a relay and checks who it is.
func relayTLS(ctx context.Context, d *egress.Dialer, at string, ref *control.RelayRef) (string, error) {
	started := time.Now()
	leaf, err := handshake(ctx, d, at, ref.Node.ServerName(), func(chain []*x509.Certificate) error {
		roots, err := identity.DecodeCertificates([]byte(ref.Roots))
		if err != nil {
			return err
		}
		trust := identity.Trust{Roots: roots, Pins: ref.Pins}
		n, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
		if err == nil && n != ref.Node {
			err = fmt.Errorf("it is %v", n)
		}
		if err == nil {
			return nil
		}
		return &identityError{
			fmt.Sprintf("who answers is not relay %s: %v (its certificate is issued by %.80q)", ref.Name, err, chain[0].Issuer.String()),
			"exempt the relay from TLS inspection; if relayd was moved to another host, see that its name leads there",
		}
	})
	if err != nil {
		return "", err
	}
	took := time.Since(started)
	return fmt.Sprintf("handshake in %.1f ms, certificate until %s", float64(took.Microseconds())/1000, leaf.NotAfter.UTC().Format(time.RFC3339)), nil
}

// banner reads the first line of an SSH server (RFC 4253 §4.2).
func banner(ctx context.Context, d *egress.Dialer, at string, port uint16) (string, error) {
	c, err := d.DialContext(ctx, "tcp", at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetReadDeadline(deadline); err != nil {
		return "", err
	}
	b := make([]byte, 255)
	n, err := c.Read(b)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(b[:n]), "\r\n")
	if !strings.HasPrefix(line, "SSH-2.0-") {
		return "", &identityError{fmt.Sprintf("who answers speaks no SSH: %.40q", line), "something on the way answers in the relay's place: let TCP port " + strconv.Itoa(int(port)) + " through as it is"}
	}
	return "answers as " + line[:min(len(line), 60)], nil
}

// sizes of UDP payload that are tried: of Ethernet's MTU, of PPPoE's, of a tunnel in a tunnel, and the least that IPv6 allows.
var sizes = []int{1472, 1464, 1400, 1252}

// mtu is the row about the size of packets to a relay.
func mtu(ctx context.Context, name string, at netip.AddrPort) daemon.Check {
	const headers4, headers6 = 28, 48
	headers := headers6
	if at.Addr().Is4() {
		headers = headers4
	}
	row := daemon.Check{Check: "path MTU to " + name, Result: daemon.Pass}
	ctx, cancel := context.WithTimeout(ctx, 3*patience)
	defer cancel()
	got, err := stun.PathMTU(ctx, at, sizes)
	switch {
	case errors.Is(err, stun.ErrNoDF):
		row.Detail = "not measured: " + err.Error()
	case err != nil:
		row.Result, row.Detail, row.Remedy = daemon.Warn, err.Error(), "look again; packets of this size may be lost on the way"
	case got == 0:
		row.Result, row.Detail = daemon.Fail, fmt.Sprintf("packets of %d bytes do not reach it", sizes[len(sizes)-1]+headers)
		row.Remedy = "a link on the way carries less than 1280 bytes and drops what is larger: raise its MTU"
	case got < 1400:
		row.Result, row.Detail = daemon.Warn, fmt.Sprintf("at least %d bytes, less than %d", got+headers, 1400+headers)
		row.Remedy = "a link on the way has a small MTU: everything works, large transfers take more packets"
	default:
		row.Detail = fmt.Sprintf("at least %d bytes", got+headers)
	}
	return row
}

// nat is the row about the NAT in front.
func nat(ctx context.Context, refs []control.RelayRef) []daemon.Check {
	var servers []netip.AddrPort
	for _, r := range refs {
		if addrs, err := lookup(ctx, r.Host); err == nil {
			servers = append(servers, netip.AddrPortFrom(addrs[0], r.Port))
		}
	}
	if len(servers) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	row := daemon.Check{Check: "NAT", Result: daemon.Pass}
	d, err := stun.Discover(ctx, servers)
	if err != nil {
		row.Result, row.Detail, row.Remedy = daemon.Warn, "not known: "+plainly(err), "let UDP port 5349 out to the relays"
	} else {
		row.Detail = d.String()
	}
	return []daemon.Check{row}
}
