package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/stun"
)

// look is what was found of a relay.
type look struct {
	addr    netip.Addr
	why     string // it was not tried; then nothing else is set
	unnamed error  // its name has no address
	checks  []check
	rtt     time.Duration
	at      time.Time // when it began: what is found later may be older than it seems
}

// check is one port.
type check struct {
	kind     string // STUN, TLS, SSH: what a firewall would let through or not
	name     string
	port     string // such as 5349/udp
	detail   string
	err      error
	forgiven bool // fails everywhere: not the relay's fault
}

// impostor says that somebody answers who is not the relay.
type impostor struct{ error }

// look resolves a relay's name once, chooses an address that may be tried, and tries its ports there. What fails is tried once more.
func (p *Prober) look(ctx context.Context, t *registry.RelayTarget) look {
	var l look
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(t.Host); err == nil {
		addrs = []netip.Addr{a}
	} else {
		named, cancel := context.WithTimeout(ctx, p.cfg.patience)
		addrs, err = p.cfg.Resolver.LookupNetIP(named, "ip", t.Host)
		cancel()
		if err == nil && len(addrs) == 0 {
			err = errors.New("it has no address")
		}
		if err != nil {
			l.unnamed = err
			return l
		}
	}
	var refused string
	for _, a := range addrs {
		a = a.Unmap()
		if what := p.cfg.Mode.refused(a); what != "" {
			refused = what
			continue
		}
		// IPv4 first: a platform without IPv6 says nothing about a relay that has both.
		if !l.addr.IsValid() || (a.Is4() && !l.addr.Is4()) {
			l.addr = a
		}
	}
	if !l.addr.IsValid() {
		l.why = refused + " address"
		return l
	}
	l.checks = p.ports(t)
	p.try(ctx, t, &l)
	if slices.ContainsFunc(l.checks, func(c check) bool { return c.err != nil }) {
		select {
		case <-ctx.Done():
			return l
		case <-time.After(p.cfg.again):
		}
		p.try(ctx, t, &l)
	}
	return l
}

// The kinds of check.
const (
	kindSTUN = "STUN over UDP"
	kindTLS  = "TLS"
	kindSSH  = "SSH"
)

func (p *Prober) ports(t *registry.RelayTarget) []check {
	tcp := func(port uint16) string { return strconv.Itoa(int(port)) + "/tcp" }
	out := []check{
		{kind: kindSTUN, name: "STUN", port: strconv.Itoa(int(t.Port)) + "/udp"},
		{kind: fmt.Sprintf("%s on %d", kindTLS, t.Port), name: "TLS", port: tcp(t.Port)},
	}
	if t.TLSPort != 0 {
		out = append(out, check{kind: fmt.Sprintf("%s on %d", kindTLS, t.TLSPort), name: "TLS", port: tcp(t.TLSPort)})
	}
	if t.SSHPort != 0 {
		out = append(out, check{kind: kindSSH, name: "SSH", port: tcp(t.SSHPort)})
	}
	for i := range out {
		out[i].err = errors.New("not tried")
	}
	return out
}

// try tries the ports that have not answered yet, side by side.
func (p *Prober) try(ctx context.Context, t *registry.RelayTarget, l *look) {
	var wg sync.WaitGroup
	for i := range l.checks {
		c := &l.checks[i]
		if c.err == nil {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, p.cfg.patience)
			defer cancel()
			number, _, _ := strings.Cut(c.port, "/")
			port, _ := strconv.ParseUint(number, 10, 16) // made from a uint16
			at := netip.AddrPortFrom(l.addr, uint16(port))
			if c.err = p.cfg.gate(at); c.err != nil {
				c.detail = p.plainly(c.err)
				return
			}
			switch c.name {
			case "STUN":
				var rtt time.Duration
				if rtt, c.err = binding(ctx, at); c.err == nil {
					l.rtt, c.detail = rtt, fmt.Sprintf("answers in %.1f ms", rtt.Seconds()*1000)
				}
			case "TLS":
				c.detail, c.err = handshake(ctx, at, t)
			case "SSH":
				c.detail, c.err = banner(ctx, at)
			}
			if c.err != nil {
				c.detail = p.plainly(c.err)
			}
		})
	}
	wg.Wait()
}

// dial connects to an address that was judged; nothing is resolved any more.
func dial(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at.String())
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

// binding asks a relay by STUN over UDP.
func binding(ctx context.Context, at netip.AddrPort) (time.Duration, error) {
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	b, err := stun.Reflexive(ctx, conn, at)
	return b.RTT, err
}

// handshake does a TLS handshake with a relay and checks who it is.
func handshake(ctx context.Context, at netip.AddrPort, t *registry.RelayTarget) (string, error) {
	nc, err := dial(ctx, at)
	if err != nil {
		return "", err
	}
	started := time.Now()
	c := tls.Client(nc, &tls.Config{
		ServerName: t.Node.ServerName(), MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, //nolint:gosec // VerifyConnection judges
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return impostor{errors.New("who answers shows no certificate")}
			}
			trust := identity.Trust{Roots: t.Roots, Pins: t.Pins}
			n, err := trust.Verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth)
			if err == nil && n != t.Node {
				err = fmt.Errorf("it is %v", n)
			}
			if err != nil {
				return impostor{fmt.Errorf("who answers is not the relay: %w", err)}
			}
			return nil
		},
	})
	if err := c.HandshakeContext(ctx); err != nil {
		_ = nc.Close() // the handshake's error says more
		return "", err
	}
	return fmt.Sprintf("handshake in %.1f ms", time.Since(started).Seconds()*1000), c.Close()
}

// maxBanner is the longest first line of an SSH server (RFC 4253 §4.2).
const maxBanner = 255

// banner reads the first line of an SSH server. It is shown to nobody.
func banner(ctx context.Context, at netip.AddrPort) (string, error) {
	c, err := dial(ctx, at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b := make([]byte, maxBanner)
	n, err := c.Read(b)
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(string(b[:n]), "SSH-2.0-") {
		return "", impostor{errors.New("who answers speaks no SSH")}
	}
	return "answers", nil
}

// plainly words an error for people. Nothing of what an answer held is in it.
func (p *Prober) plainly(err error) string {
	if e, ok := errors.AsType[impostor](err); ok {
		return e.Error()
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, stun.ErrNoAnswer), isTimeout(err):
		return fmt.Sprintf("no answer in %v", p.cfg.patience)
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused: nothing listens there"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "no route"
	}
	return "breaks off"
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// outcome is what is shown of a look.
func (l *look) outcome(t *registry.RelayTarget) control.Outside {
	o := control.Outside{At: l.at, RTT: l.rtt}
	switch {
	case l.why != "":
		o.State, o.Why = control.OutsideNotProbed, l.why
		return o
	case l.unnamed != nil:
		o.State, o.Why = control.OutsideUnreached, fmt.Sprintf("not reached from outside: the name %s has no address", t.Host)
		o.Remedy = "see that the name is in DNS, or give the relay another host"
		return o
	}
	o.Address = &l.addr
	var failed []string
	good, other, closed := 0, false, []string{}
	for _, c := range l.checks {
		detail := c.detail
		if c.forgiven {
			detail += " (no relay does: taken for the platform's own network)"
		}
		o.Checks = append(o.Checks, control.OutsideCheck{Name: c.name + " " + c.port, OK: c.err == nil, Detail: detail})
		switch {
		case c.err == nil:
			good++
		case c.forgiven:
		default:
			failed, closed = append(failed, fmt.Sprintf("%s %s (%s)", c.name, c.port, c.detail)), append(closed, c.port)
			if _, ok := errors.AsType[impostor](c.err); ok {
				other = true
			}
		}
	}
	switch {
	case len(failed) == 0 && good == 0:
		o.State, o.Why = control.OutsideNotProbed, "the platform's own network lets no look out"
		return o
	case len(failed) == 0:
		o.State = control.OutsideReached
		return o
	case good == 0:
		o.State, o.Why = control.OutsideUnreached, fmt.Sprintf("not reached from outside at %v: %s", l.addr, strings.Join(failed, ", "))
	default:
		o.State, o.Why = control.OutsidePartly, fmt.Sprintf("not reached from outside by %s", strings.Join(failed, ", "))
	}
	o.Remedy = fmt.Sprintf("open %s in the firewall of %s", strings.Join(closed, ", "), t.Name)
	if other {
		o.Remedy = fmt.Sprintf("see that %s leads to the relay's own host, past nothing that ends TLS", t.Host)
	}
	return o
}
