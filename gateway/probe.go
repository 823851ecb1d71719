package gateway

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/stun"
)

// Probes of the relays that the gateway might be given. A round of them costs a packet each way for every relay.
const (
	probeInterval = time.Minute // between rounds, give or take a tenth
	probeFirst    = 5 * time.Second
	probeTimeout  = 4 * time.Second // of a round of one address family
	probesKept    = 5               // the median of these is told
)

// relayProbes measures round-trip times to relays by STUN over UDP. The zero value is ready; methods may be called concurrently.
type relayProbes struct {
	mu     sync.Mutex
	relays []control.ProbeRelay
	recent map[string][]time.Duration // by relay id, newest last; guarded by mu, as is relays
}

// follow takes over which relays to measure, and forgets what was known of others and of those that have another address.
func (p *relayProbes) follow(relays []control.ProbeRelay) {
	p.mu.Lock()
	defer p.mu.Unlock()
	recent := make(map[string][]time.Duration)
	for _, r := range relays {
		if slices.Contains(p.relays, r) {
			recent[r.ID] = p.recent[r.ID]
		}
	}
	p.relays, p.recent = slices.Clone(relays), recent
}

// report is the median of each relay that answers.
func (p *relayProbes) report() map[string]time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out map[string]time.Duration
	for id, ds := range p.recent {
		if len(ds) == 0 {
			continue
		}
		if out == nil {
			out = make(map[string]time.Duration)
		}
		out[id] = slices.Sorted(slices.Values(ds))[len(ds)/2]
	}
	return out
}

// run measures until ctx ends: soon for the first few rounds, so that there is a median, then once in a while.
func (p *relayProbes) run(ctx context.Context) error {
	next := time.NewTimer(probeFirst)
	defer next.Stop()
	for rounds := 0; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next.C:
		}
		wait := probeFirst
		if p.round(ctx) {
			if rounds++; rounds >= probesKept/2+1 {
				wait = probeInterval*9/10 + rand.N(probeInterval/5)
			}
		}
		next.Reset(wait)
	}
}

// round measures every relay once, and reports whether there is one.
func (p *relayProbes) round(ctx context.Context) bool {
	p.mu.Lock()
	relays := slices.Clone(p.relays)
	p.mu.Unlock()
	if len(relays) == 0 {
		return false
	}
	byAddr := make(map[netip.AddrPort]control.ProbeRelay, len(relays))
	var four, six []netip.AddrPort
	for _, r := range relays {
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", r.Host)
		if err != nil || len(found) == 0 {
			p.note(r, 0)
			continue
		}
		a := netip.AddrPortFrom(found[0].Unmap(), r.Port)
		byAddr[a] = r
		if a.Addr().Is4() {
			four = append(four, a)
		} else {
			six = append(six, a)
		}
	}
	for _, servers := range [][]netip.AddrPort{four, six} {
		if len(servers) == 0 {
			continue
		}
		// Discover asks all of a family at once and waits for the slowest, or for the end.
		fctx, cancel := context.WithTimeout(ctx, probeTimeout)
		found, err := stun.Discover(fctx, servers)
		cancel()
		if err == nil {
			for _, b := range found.Bindings {
				p.note(byAddr[b.Server], b.RTT)
				delete(byAddr, b.Server)
			}
		}
	}
	for _, r := range byAddr {
		p.note(r, 0)
	}
	return true
}

// note takes a measurement, or its lack: then the oldest one is forgotten, so that a relay which has fallen silent becomes unknown.
func (p *relayProbes) note(r control.ProbeRelay, rtt time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.relays, r) {
		return // it was taken away meanwhile
	}
	ds := p.recent[r.ID]
	if rtt > 0 {
		ds = append(ds, rtt)
	}
	if len(ds) > probesKept || (rtt == 0 && len(ds) > 0) {
		ds = ds[1:]
	}
	p.recent[r.ID] = ds
}
