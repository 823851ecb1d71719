package direct

import (
	"net/netip"
	"slices"
	"time"

	"sallyway/stun"
)

// Pace of the probes. An address gets eight of 40 bytes within two seconds, and no more unless its owner answers.
const (
	// burst probes are sent burstInterval apart: the first opens this end's NAT, which takes the other end's from then on.
	burst         = 5
	burstInterval = 50 * time.Millisecond
	// tries is how many probes an address gets; the wait after each one beyond the burst doubles, from slowInterval.
	tries        = 8
	slowInterval = 200 * time.Millisecond
	// lastWait is how long an answer to the last probe is waited for.
	lastWait = time.Second
	// settle is how long after the first answer the asking end waits for a better address.
	settle = 150 * time.Millisecond
	// keepalive is between probes on an address in use: it keeps the NATs' mappings, of which some live for 30 s only.
	keepalive = 5 * time.Second
)

// Admission is how long after an answered probe QUIC is taken from an address.
const Admission = 30 * time.Second

// packet is a datagram to send.
type packet struct {
	to netip.AddrPort
	b  []byte
}

// remote is an address of the other end's.
type remote struct {
	addr   netip.AddrPort
	prober *stun.Prober
	sent   int
	next   time.Time // when the next probe is due, or the last one is given up
	failed bool
	proved time.Time // when the last answer to a probe of ours came; zero before the first
	asked  time.Time // when the last valid request came
	rtt    time.Duration
}

// checks is the exchange of probes with one other end. It does no I/O and keeps no clock. The asking end chooses one address of those
// that answer; the other end follows: it keeps an address alive while requests come from it. Not for concurrent use.
type checks struct {
	keys      stun.Keys
	asking    bool
	responder *stun.Responder
	remotes   []*remote
	first     time.Time // when the first answer came
	chosen    *remote   // of the asking end
	over      bool      // the asking end found nothing
}

func newChecks(keys stun.Keys, asking bool) *checks {
	return &checks{keys: keys, asking: asking, responder: stun.NewResponder(keys, 0, 0)}
}

// start has every address tried from now on.
func (c *checks) start(now time.Time, addrs []netip.AddrPort) {
	for _, a := range addrs {
		c.add(now, a)
	}
	c.over = c.asking && len(c.remotes) == 0
}

// add adds an address, unless there are enough.
func (c *checks) add(now time.Time, a netip.AddrPort) *remote {
	if r := c.remote(a); r != nil {
		return r
	}
	if len(c.remotes) == MaxCandidates {
		return nil
	}
	r := &remote{addr: a, prober: stun.NewProber(c.keys), next: now}
	c.remotes = append(c.remotes, r)
	return r
}

func (c *checks) remote(a netip.AddrPort) *remote {
	if i := slices.IndexFunc(c.remotes, func(r *remote) bool { return r.addr == a }); i >= 0 {
		return c.remotes[i]
	}
	return nil
}

// request takes a request from an address. The answer is nil for what lacks integrity, or comes too often.
func (c *checks) request(now time.Time, from netip.AddrPort, b []byte) (answer []byte) {
	// The answer names no address, so that it is as small as the request.
	answer, ok := c.responder.Respond(now, b, netip.AddrPort{})
	if !ok {
		return nil
	}
	if r := c.add(now, from); r != nil {
		r.asked = now
		if r.proved.IsZero() && r.sent == tries {
			// It is there after all: one probe for each of its own, since a request may have been recorded and played back.
			r.sent, r.next, r.failed = tries-1, now, false
		}
	}
	return answer
}

// answer takes an answer from an address. It reports which address it proves, nil for none.
func (c *checks) answer(now time.Time, from netip.AddrPort, b []byte) *remote {
	r := c.remote(from)
	if r == nil {
		return nil
	}
	if _, ok := r.prober.Handle(now, b); !ok {
		return nil
	}
	if r.proved.IsZero() {
		r.next = now.Add(keepalive)
	}
	if c.first.IsZero() {
		c.first = now
	}
	r.proved, r.failed, r.rtt = now, false, r.prober.Stats().RTT
	return r
}

// admitted reports whether QUIC may come from the address.
func (r *remote) admitted(now time.Time) bool {
	return !r.proved.IsZero() && now.Sub(r.proved) < Admission
}

// step returns what is to be sent and when to call again; the zero time is never, unless something comes.
func (c *checks) step(now time.Time) (out []packet, next time.Time) {
	soonest := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	open := false
	for _, r := range c.remotes {
		r.prober.Expire(now, lastWait)
		switch {
		case r.failed:
			continue
		case !r.proved.IsZero():
			if !c.keeps(r, now) {
				continue
			}
		case c.chosen != nil:
			continue // no use any more
		}
		if !now.Before(r.next) {
			if r.proved.IsZero() && r.sent == tries {
				r.failed = true
				continue
			}
			out = append(out, packet{r.addr, r.prober.Probe(now, 0)})
			r.sent = min(r.sent+1, tries)
			r.next = now.Add(c.wait(r))
		}
		open = open || r.proved.IsZero()
		soonest(r.next)
	}
	if !c.asking || c.chosen != nil || c.over {
		return out, next
	}
	switch {
	case !c.first.IsZero() && (!open || now.Sub(c.first) >= settle):
		c.choose()
	case !c.first.IsZero():
		soonest(c.first.Add(settle))
	case !open && len(c.remotes) > 0:
		c.over = true
	}
	return out, next
}

// wait is how long after the probe that was just sent the next thing is due.
func (c *checks) wait(r *remote) time.Duration {
	switch {
	case !r.proved.IsZero():
		return keepalive
	case r.sent < burst:
		return burstInterval
	case r.sent < tries:
		return slowInterval << (r.sent - burst)
	}
	return lastWait
}

// keeps reports whether an address that has answered is kept alive.
func (c *checks) keeps(r *remote, now time.Time) bool {
	if !r.admitted(now) {
		return false
	}
	if c.asking {
		return c.chosen == nil || c.chosen == r
	}
	return now.Sub(r.asked) < Admission
}

// choose picks the quickest address.
func (c *checks) choose() {
	for _, r := range c.remotes {
		if !r.proved.IsZero() && (c.chosen == nil || r.rtt < c.chosen.rtt) {
			c.chosen = r
		}
	}
}
