package dialler

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/platform/view"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/stun"
	"sallyway/tunnel"
)

// Timing of attempts.
const (
	// stagger is from the attempt by one way to that by the next, unless it fails before.
	stagger = 800 * time.Millisecond
	// attemptTimeout bounds an attempt by one way: rendezvous and handshake among it.
	attemptTimeout = 6 * time.Second
	// bindingTimeout bounds the question for the time to a relay and back: three requests.
	bindingTimeout = 2 * time.Second
	// denialGrace is how long a gateway's no is taken for a policy that has not come to it yet, and denialRetry the pause between tries.
	denialGrace = 2 * time.Second
	denialRetry = 200 * time.Millisecond
)

// way is a rung to a gateway by one of its relays.
type way struct {
	ref  control.RelayRef
	rung leg.Transport
}

// String is as sessions' paths are named: fra-1 udp.
func (w way) String() string { return w.ref.Name + " " + string(w.rung) }

// ways are all of them in the order in which they are tried: of each relay UDP and TLS, then TLS on the relays' other port.
func ways(refs []control.RelayRef) []way {
	var out []way
	for _, ref := range refs {
		out = append(out, way{ref, leg.UDP}, way{ref, leg.TLS})
	}
	for _, ref := range refs {
		if ref.TLSPort != 0 {
			out = append(out, way{ref, legs.LastTLS})
		}
	}
	return out
}

// session is a session with a gateway and what carries it.
type session struct {
	t     *tunnel.Session
	way   way
	until time.Time // when the certificate ends that it was opened with
	under func()    // closes what carries it
	count func()    // counts it out
}

// over reports whether the session can not be used any more.
func (s *session) over() bool {
	select {
	case <-s.t.Done():
		return true
	default:
		return false
	}
}

func (s *session) close(why string) {
	_ = s.t.Close(why) // it is over either way
	s.under()
	s.count()
}

// stepError is why a step of an attempt failed.
type stepError struct {
	way  way
	step string
	err  error
}

// Error implements error.
func (e *stepError) Error() string { return e.way.String() + ": " + e.err.Error() }

// Unwrap returns the cause.
func (e *stepError) Unwrap() error { return e.err }

// session opens a session with a gateway by the first way that leads there. watch takes the steps of each attempt; nil is nobody, and then nothing
// is measured that a session does not need.
func (d *Dialler) session(ctx context.Context, v *view.View, g view.RouteGateway, watch func(way) *trace) (*session, error) {
	if err := d.room(v.Org.Name); err != nil {
		return nil, err
	}
	count := func() { d.leave(v.Org.Name) }
	s, err := d.climb(ctx, v, g, watch)
	if err != nil {
		count()
		d.metrics.opened.WithLabelValues("none").Inc()
		return nil, err
	}
	s.count = count
	d.metrics.opened.WithLabelValues(string(s.way.rung)).Inc()
	d.log.Info("session open", "gateway", g.Node, "path", s.way.String())
	return s, nil
}

// room counts a session in, unless there are too many.
func (d *Dialler) room(org string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return net.ErrClosed
	case d.total >= MaxSessions:
		return fmt.Errorf("the platform has %d sessions with gateways, which is as many as it opens: try again in a minute", d.total)
	case d.open[org] >= MaxOrgSessions:
		return fmt.Errorf("the platform has %d sessions with gateways of organization %s, which is as many as it opens: try again in a minute", d.open[org], org)
	}
	d.total++
	d.open[org]++
	return nil
}

func (d *Dialler) leave(org string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.total--
	if d.open[org]--; d.open[org] == 0 {
		delete(d.open, org)
	}
}

// errNoRelay says that a gateway has no relay.
var errNoRelay = errors.New("the gateway has no relay yet")

// climb tries the ways, each a while after the one before or when that has failed. The first one that leads to the gateway wins.
func (d *Dialler) climb(ctx context.Context, v *view.View, g view.RouteGateway, watch func(way) *trace) (*session, error) {
	n, cert, until, err := d.member(ctx, v)
	if err != nil {
		return nil, err
	}
	roots, err := identity.DecodeCertificates([]byte(v.Trust.Roots))
	if err != nil {
		return nil, fmt.Errorf("roots of %s: %w", v.Org.Name, err)
	}
	trust := &identity.Trust{Roots: roots, Pins: v.Trust.Pins[identity.Gateway], Denied: v.Trust.Denied, Now: d.cfg.Now}
	all := ways(v.Refs(g.Node.ID, n.id, until))
	if len(all) == 0 {
		return nil, errNoRelay
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(d.ctx, cancel)
	defer stop()
	type result struct {
		s   *session
		err error
	}
	results := make(chan result, len(all))
	var won *session
	var errs []error
	begun, ended := 0, 0
	over := ctx.Done()
	turn := time.NewTimer(0)
	defer turn.Stop()
	for ended < len(all) && won == nil {
		select {
		case <-turn.C:
			if begun == len(all) {
				continue
			}
			a := &attempt{d: d, way: all[begun], gateway: g, trust: trust, cert: cert}
			if watch != nil {
				a.trace = watch(a.way)
			}
			begun++
			d.tasks.Go(func() {
				actx, cancel := context.WithTimeout(ctx, attemptTimeout)
				defer cancel()
				s, err := a.open(actx)
				results <- result{s, err}
			})
			turn.Reset(stagger)
		case r := <-results:
			ended++
			if r.err != nil {
				errs = append(errs, r.err)
				if errors.Is(r.err, tunnel.ErrDenied) {
					all = all[:begun] // the gateway itself says no: another way leads to the same
				}
				turn.Reset(0)
				continue
			}
			won = r.s
		case <-over:
			all, over = all[:begun], nil // those that are under way say why
		}
	}
	if won == nil && len(errs) == 0 {
		errs = append(errs, context.Cause(ctx))
	}
	// Those that are left behind give up, and what they still open is closed.
	cancel()
	if left := begun - ended; left > 0 {
		d.tasks.Go(func() {
			for range left {
				if r := <-results; r.s != nil {
					_ = r.s.t.Close("another way was faster") // it is not used
					r.s.under()
				}
			}
		})
	}
	if won == nil {
		return nil, errors.Join(errs...)
	}
	won.until = until
	return won, nil
}

// attempt is a try to open a session by one way.
type attempt struct {
	d       *Dialler
	way     way
	gateway view.RouteGateway
	trust   *identity.Trust
	cert    *tls.Certificate
	trace   *trace // nil: nobody watches
}

// step runs f, which is a step on the way, and shows it.
func (a *attempt) step(name, to string, f func() (detail string, err error)) error {
	err := a.trace.step(name, to, f)
	if err != nil {
		return &stepError{a.way, name, err}
	}
	return nil
}

func (a *attempt) certificate() (*tls.Certificate, error) { return a.cert, nil }

// open goes up to the gateway.
func (a *attempt) open(ctx context.Context) (*session, error) {
	ref := a.way.ref
	port := ref.Port
	if a.way.rung == legs.LastTLS {
		port = ref.TLSPort
	}
	trust, err := legs.RelayTrust(ref)
	if err != nil {
		return nil, &stepError{a.way, control.StepRelay, err}
	}
	trust.Now = a.d.cfg.Now
	var addrs []netip.AddrPort
	resolve := func() (string, error) {
		if addrs, err = legs.Addrs(ctx, nil, ref, port); err != nil {
			return "", err
		}
		return a.allowed(addrs)
	}
	if _, literal := netip.ParseAddr(ref.Host); literal == nil {
		if _, err := resolve(); err != nil {
			return nil, &stepError{a.way, control.StepRelay, err}
		}
	} else if err := a.step(control.StepResolve, ref.Host, resolve); err != nil {
		return nil, err
	}
	var link datagram.Link
	var under func()
	if a.way.rung == legs.LastTLS {
		link, under, err = a.last(ctx, addrs, trust)
	} else {
		link, under, err = a.leg(ctx, addrs, trust)
	}
	if err != nil {
		return nil, err
	}
	var t *tunnel.Session
	err = a.step(control.StepGateway, "gateway "+a.gateway.Name, func() (string, error) {
		err := patiently(ctx, a.d.cfg.Now, func() (err error) {
			t, err = tunnel.Dial(ctx, tunnel.DialConfig{
				Link: link, Info: tunnel.LinkInfo{Name: a.way.String(), Peer: a.gateway.Node}, SingleLink: true, Gateway: a.gateway.Node,
				Certificate: a.certificate, Trust: func() *identity.Trust { return a.trust }, IdleTimeout: sessionIdle, Logger: a.d.log,
			})
			return err
		})
		return "QUIC, mutual TLS 1.3", err
	})
	if err != nil {
		under()
		return nil, err
	}
	return &session{t: t, way: a.way, under: under}, nil
}

// sessionIdle is how long a session outlives the loss of its path: it is not moved to another, so there is little to wait for.
const sessionIdle = 15 * time.Second

// addressError is that a relay's address may not be dialled.
type addressError struct{ error }

// Unwrap returns the cause.
func (e *addressError) Unwrap() error { return e.error }

// allowed holds a relay's addresses against what may be dialled: one that may not spoils all.
func (a *attempt) allowed(addrs []netip.AddrPort) (string, error) {
	if a.d.cfg.Relay == nil {
		return fmt.Sprint(addrs[0].Addr()), nil
	}
	for _, ap := range addrs {
		if err := a.d.cfg.Relay(a.way.ref.Node, ap.Addr()); err != nil {
			return "", &addressError{err}
		}
	}
	return fmt.Sprint(addrs[0].Addr()), nil
}

// leg takes a channel to the gateway on a leg of its own.
func (a *attempt) leg(ctx context.Context, addrs []netip.AddrPort, trust *identity.Trust) (datagram.Link, func(), error) {
	ref := a.way.ref
	at := fmt.Sprintf("relay %s, %s %d", ref.Name, map[leg.Transport]string{leg.UDP: "UDP", leg.TLS: "TLS over TCP"}[a.way.rung], ref.Port)
	if a.way.rung == leg.UDP && a.trace != nil {
		if err := a.step(control.StepBinding, at, func() (string, error) { return binding(ctx, addrs) }); err != nil {
			return nil, nil, err
		}
	}
	var l *leg.Leg
	if err := a.step(control.StepRelay, at, func() (_ string, err error) {
		l, err = leg.Dial(ctx, leg.Config{
			Relay: ref.Node, Addrs: addrs, Transport: a.way.rung, Verify: verifier(trust), Logger: a.d.log,
			Credentials: func() (string, string) { return ref.Username, ref.Password },
		})
		return "an allocation", err
	}); err != nil {
		return nil, nil, err
	}
	under := func() { _ = l.Close() } // the relay ends it anyhow
	var ch *leg.Channel
	if err := a.step(control.StepRendezvous, "relay "+ref.Name+" and gateway "+a.gateway.Name, func() (_ string, err error) {
		ch, err = l.Connect(ctx, a.gateway.Node)
		return "a channel to the gateway's leg", err
	}); err != nil {
		a.d.tasks.Go(under)
		return nil, nil, err
	}
	return ch, under, nil
}

// last takes a link to the gateway's SSH connection, over the relay's TLS port.
func (a *attempt) last(ctx context.Context, addrs []netip.AddrPort, trust *identity.Trust) (datagram.Link, func(), error) {
	ref := a.way.ref
	var l *reverse.Link
	if err := a.step(control.StepRelay, fmt.Sprintf("relay %s, TLS %d", ref.Name, ref.TLSPort), func() (_ string, err error) {
		l, err = reverse.DialTLS(ctx, reverse.TLSConfig{
			Relay: ref.Node, Addrs: addrs, Gateway: a.gateway.Node, Certificate: a.certificate, Verify: verifier(trust),
		})
		return "joined to the gateway's SSH connection", err
	}); err != nil {
		return nil, nil, err
	}
	return l, l.Close, nil
}

// verifier checks a relay's certificate.
func verifier(trust *identity.Trust) func(chain []*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
		return err
	}
}

// binding asks a relay for the time to it and back (RFC 8489 §7.3.1).
func binding(ctx context.Context, addrs []netip.AddrPort) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bindingTimeout)
	defer cancel()
	var errs []error
	for _, at := range addrs {
		pc, err := net.ListenUDP("udp", nil)
		if err != nil {
			return "", err
		}
		b, err := stun.Reflexive(ctx, pc, at)
		_ = pc.Close() // nothing waits in it
		if err == nil {
			return fmt.Sprintf("seen as %v", b.Reflexive.Addr()), nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// patiently runs f again for a while as long as what it is told is no: a policy may be on its way to the gateway.
func patiently(ctx context.Context, now func() time.Time, f func() error) error {
	for begun := now(); ; {
		err := f()
		if err == nil || !errors.Is(err, tunnel.ErrDenied) || now().Sub(begun) > denialGrace {
			return err
		}
		t := time.NewTimer(denialRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}
