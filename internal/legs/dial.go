package legs

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
)

// dial makes one attempt: the transports race, each behind the one before by delay, or when that has failed. The first leg wins.
func (r *relay) dial(ctx context.Context, transports []leg.Transport, delay time.Duration) (*leg.Leg, error) {
	ctx, cancel := context.WithTimeout(ctx, AttemptTimeout)
	defer cancel()
	r.mu.Lock()
	ref := r.ref
	r.mu.Unlock()
	var addrs []netip.AddrPort
	if r.k.cfg.Dial == nil { // else TLS may need none, and does not wait for them
		var err error
		if addrs, err = r.k.Addrs(ctx, ref, ref.Port); err != nil {
			return nil, err
		}
	}
	trust, err := RelayTrust(ref)
	if err != nil {
		return nil, err
	}
	defer time.AfterFunc(LastStagger, r.missed).Stop()
	type result struct {
		l   *leg.Leg
		err error
	}
	results := make(chan result, len(transports))
	var before chan struct{} // closed when the transport before has failed
	for i, t := range transports {
		failed, turn := make(chan struct{}), before
		before = failed
		go func() {
			if i > 0 && !stagger(ctx, time.Duration(i)*delay, turn) {
				results <- result{nil, nil}
				return
			}
			addrs, dial, err := addrs, dialFunc(nil), error(nil)
			if r.k.cfg.Dial != nil {
				addrs, dial, err = r.k.way(ctx, ref, t)
			}
			if err != nil {
				close(failed)
				results <- result{nil, err}
				return
			}
			l, err := leg.Dial(ctx, leg.Config{
				Relay: ref.Node, Addrs: addrs, Transport: t, Control: r.k.cfg.Control, Dial: dial, Keepalive: r.k.cfg.Keepalive, Logger: r.k.cfg.Logger, Metrics: r.k.cfg.Metrics,
				Verify: r.k.verifier(trust),
				Credentials: func() (string, string) {
					r.mu.Lock()
					defer r.mu.Unlock()
					return r.ref.Username, r.ref.Password
				},
				OnRendezvous: r.onRendezvous(),
				OnDoubt:      func(bool) { poke(r.doubts) },
			})
			if err != nil {
				close(failed)
				err = fmt.Errorf("%s over %s: %w", ref.Name, t, err)
			}
			results <- result{l, err}
		}()
	}
	var won *leg.Leg
	var errs []error
	for range transports {
		res := <-results
		switch {
		case res.l != nil && won == nil:
			won = res.l
			cancel() // the others give up
		case res.l != nil:
			_ = res.l.Close()
		case res.err != nil:
			errs = append(errs, res.err)
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, errors.Join(errs...)
}

func (r *relay) onRendezvous() func(identity.Node, netip.AddrPort, *leg.Channel) {
	if r.k.cfg.OnRendezvous == nil {
		return nil
	}
	n := r.node
	return func(peer identity.Node, _ netip.AddrPort, ch *leg.Channel) { r.k.cfg.OnRendezvous(n, peer, ch) }
}

// Addrs finds the addresses of a port of a relay, IPv4 first.
func (k *Keeper) Addrs(ctx context.Context, ref control.RelayRef, port uint16) ([]netip.AddrPort, error) {
	return Addrs(ctx, k.cfg.Resolver, ref, port)
}

// Addrs finds the addresses of a port of a relay, IPv4 first.
func Addrs(ctx context.Context, resolver *net.Resolver, ref control.RelayRef, port uint16) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddr(ref.Host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), port)}, nil
	}
	addrs, err := resolver.LookupNetIP(ctx, "ip", ref.Host)
	if err != nil {
		return nil, fmt.Errorf("address of relay %s: %w", ref.Name, err)
	}
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	out := make([]netip.AddrPort, len(addrs))
	for i, a := range addrs {
		out[i] = netip.AddrPortFrom(a.Unmap(), port)
	}
	return out, nil
}

// dialFunc opens a connection (see net.Dialer.DialContext).
type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// Way is how a TCP port of a relay is dialled: its addresses and, where Config.Dial is set, a function that dials its host in place of the
// address. That is then one, and unspecified where the host is a name.
func (k *Keeper) Way(ctx context.Context, ref control.RelayRef, port uint16) ([]netip.AddrPort, dialFunc, error) {
	if k.cfg.Dial == nil {
		addrs, err := k.Addrs(ctx, ref, port)
		return addrs, nil, err
	}
	at := netip.IPv4Unspecified()
	if a, err := netip.ParseAddr(ref.Host); err == nil {
		at = a.Unmap()
	}
	target := net.JoinHostPort(ref.Host, strconv.Itoa(int(port)))
	return []netip.AddrPort{netip.AddrPortFrom(at, port)}, func(ctx context.Context, network, _ string) (net.Conn, error) {
		return k.cfg.Dial(ctx, network, target)
	}, nil
}

// way is Way for a leg.
func (k *Keeper) way(ctx context.Context, ref control.RelayRef, t leg.Transport) ([]netip.AddrPort, dialFunc, error) {
	if t == leg.TLS {
		return k.Way(ctx, ref, ref.Port)
	}
	addrs, err := k.Addrs(ctx, ref, ref.Port)
	return addrs, nil, err
}

// verifier checks a relay's certificate. Where a proxy may be on the way, it says what may have happened.
func (k *Keeper) verifier(trust *identity.Trust) func(chain []*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
		if err != nil && k.cfg.Dial != nil && len(chain) > 0 {
			err = fmt.Errorf("%w; the certificate is issued by %.80q: if the egress proxy opens TLS, exempt the relay from that", err, chain[0].Issuer.String())
		}
		return err
	}
}

// stagger waits, not longer than until now is closed, and reports whether ctx is still alive.
func stagger(ctx context.Context, d time.Duration, now <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-now:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// sleep waits and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool { return stagger(ctx, d, nil) }
