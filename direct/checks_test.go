package direct

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"sallyway/stun"
)

// nat is a simulated NAT or firewall in front of one end (RFC 4787 §4.1, §5).
type nat struct {
	public    netip.Addr
	dependent bool // another mapping for every destination
	filter    filter
	blocked   bool // nothing passes
	ports     map[netip.AddrPort]uint16
	sent      map[uint16][]netip.AddrPort // by public port: to whom
}

type filter int

const (
	anyone filter = iota
	sameHost
	samePort
)

// out maps a packet's source.
func (n *nat) out(to netip.AddrPort) netip.AddrPort {
	key := to
	if !n.dependent {
		key = netip.AddrPort{}
	}
	port, ok := n.ports[key]
	if !ok {
		port = uint16(40000 + len(n.ports))
		n.ports[key] = port
	}
	n.sent[port] = append(n.sent[port], to)
	return netip.AddrPortFrom(n.public, port)
}

// in reports whether a packet passes.
func (n *nat) in(from netip.AddrPort, port uint16) bool {
	return slices.ContainsFunc(n.sent[port], func(to netip.AddrPort) bool {
		return n.filter == anyone || to == from || (n.filter == sameHost && to.Addr() == from.Addr())
	})
}

// world are two ends, with one way of delay between them.
type world struct {
	now    time.Time
	delay  time.Duration
	nats   [2]*nat
	ends   [2]*checks
	flying []flight
	sent   [2]int
}

type flight struct {
	at       time.Time
	to       int
	from     netip.AddrPort
	port     uint16
	contents []byte
}

func (w *world) send(end int, x packet) {
	w.sent[end]++
	from := w.nats[end].out(x.to)
	other := 1 - end
	if w.nats[end].blocked || w.nats[other].blocked || x.to.Addr() != w.nats[other].public {
		return
	}
	w.flying = append(w.flying, flight{w.now.Add(w.delay), other, from, x.to.Port(), x.b})
}

// run lets time pass, a millisecond at a time.
func (w *world) run(d time.Duration) { w.pass(d, time.Millisecond) }

// rest lets much time pass, in larger steps.
func (w *world) rest(d time.Duration) { w.pass(d, 20*time.Millisecond) }

func (w *world) pass(d, by time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(by) {
		var later []flight
		arrived := w.flying
		w.flying = nil
		for _, f := range arrived {
			if f.at.After(w.now) {
				later = append(later, f)
				continue
			}
			if !w.nats[f.to].in(f.from, f.port) {
				continue
			}
			c := w.ends[f.to]
			if stun.IsRequest(f.contents) {
				if a := c.request(w.now, f.from, f.contents); a != nil {
					if len(a) > len(f.contents) {
						panic("an answer larger than the request")
					}
					w.send(f.to, packet{f.from, a})
				}
			} else {
				c.answer(w.now, f.from, f.contents)
			}
		}
		w.flying = append(later, w.flying...)
		for i, c := range w.ends {
			out, _ := c.step(w.now)
			for _, x := range out {
				w.send(i, x)
			}
		}
	}
}

var (
	clientIP  = netip.MustParseAddr("198.51.100.7")
	gatewayIP = netip.MustParseAddr("203.0.113.9")
	relayAddr = netip.MustParseAddrPort("192.0.2.1:5349")
)

func newWorld(client, gateway nat, delay time.Duration) *world {
	w := &world{now: time.Unix(1_700_000_000, 0), delay: delay}
	client.public, gateway.public = clientIP, gatewayIP
	keys := stun.Keys{Out: [32]byte{1}, In: [32]byte{2}}
	for i, n := range []*nat{&client, &gateway} {
		n.ports, n.sent = map[netip.AddrPort]uint16{}, map[uint16][]netip.AddrPort{}
		w.nats[i] = n
	}
	w.ends = [2]*checks{newChecks(keys, true), newChecks(keys.Swap(), false)}
	own := [2]netip.AddrPort{w.nats[0].out(relayAddr), w.nats[1].out(relayAddr)} // as a relay sees them
	w.ends[1].start(w.now, own[:1])
	w.run(delay + time.Millisecond) // the gateway's answer goes over the relay meanwhile
	w.ends[0].start(w.now, own[1:])
	return w
}

func TestPunching(t *testing.T) {
	for _, tc := range []struct {
		name            string
		client, gateway nat
		works           bool
	}{
		{"no NAT", nat{}, nat{}, true},
		{"stateful firewalls", nat{filter: samePort}, nat{filter: samePort}, true},
		{"NAT by host", nat{filter: sameHost}, nat{filter: sameHost}, true},
		{"one symmetric, the other filters by host", nat{filter: sameHost}, nat{dependent: true, filter: samePort}, true},
		{"one symmetric, the other none", nat{dependent: true, filter: samePort}, nat{}, true},
		{"one symmetric, the other filters by port", nat{filter: samePort}, nat{dependent: true, filter: samePort}, false},
		{"both symmetric", nat{dependent: true, filter: samePort}, nat{dependent: true, filter: samePort}, false},
		{"UDP blocked at the client", nat{blocked: true}, nat{}, false},
		{"UDP blocked at the gateway", nat{}, nat{blocked: true, filter: samePort}, false},
	} {
		for _, delay := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 150 * time.Millisecond} {
			w := newWorld(tc.client, tc.gateway, delay)
			began := w.now
			asking := w.ends[0]
			for asking.chosen == nil && !asking.over && w.now.Sub(began) < 10*time.Second {
				w.run(10 * time.Millisecond)
			}
			if works := asking.chosen != nil; works != tc.works {
				t.Errorf("%s, %v: chosen %v, over %v, want works=%v", tc.name, delay, asking.chosen, asking.over, tc.works)
				continue
			}
			took := w.now.Sub(began)
			if !tc.works {
				if !asking.over || took > 4*time.Second {
					t.Errorf("%s, %v: over %v after %v", tc.name, delay, asking.over, took)
				}
				for i, n := range w.sent {
					if n > 2*tries {
						t.Errorf("%s, %v: end %d sent %d probes, want %d at most", tc.name, delay, i, n, tries)
					}
				}
				continue
			}
			if most := 4*delay + settle + 250*time.Millisecond; took > most {
				t.Errorf("%s, %v: worked after %v, want %v", tc.name, delay, took, most)
			}
			if rtt := asking.chosen.rtt; rtt < 2*delay || rtt > 2*delay+5*time.Millisecond {
				t.Errorf("%s: RTT %v, want %v", tc.name, rtt, 2*delay)
			}
			w.run(time.Second)
			if r := w.ends[1].remotes; !slices.ContainsFunc(r, func(r *remote) bool { return r.admitted(w.now) }) {
				t.Errorf("%s, %v: the other end has proved no address", tc.name, delay)
			}
			if delay > 20*time.Millisecond {
				continue // what follows takes no part in the delay
			}
			// In use both ends keep the addresses alive, with a probe and an answer every 5 s each.
			before := w.sent
			w.rest(5 * time.Minute)
			for i, c := range w.ends {
				if !slices.ContainsFunc(c.remotes, func(r *remote) bool { return r.admitted(w.now) }) {
					t.Errorf("%s, %v: end %d lost the address while it is in use", tc.name, delay, i)
				}
				if n := w.sent[i] - before[i]; n < 100 || n > 140 {
					t.Errorf("%s, %v: end %d sent %d probes and answers in 5 minutes, want 120", tc.name, delay, i, n)
				}
			}
			// The asking end goes: the other one stops by itself.
			w.ends[0] = newChecks(stun.Keys{}, true)
			w.rest(2 * Admission)
			before = w.sent
			w.rest(time.Minute)
			if w.sent[1] != before[1] {
				t.Errorf("%s, %v: %d probes to an end that is gone", tc.name, delay, w.sent[1]-before[1])
			}
			if slices.ContainsFunc(w.ends[1].remotes, func(r *remote) bool { return r.admitted(w.now) }) {
				t.Errorf("%s, %v: an address is admitted without an answer in 30 s", tc.name, delay)
			}
		}
	}
}

// TestPlayedBack: a recorded request that comes from elsewhere is answered with no more bytes than it has, admits nobody, and makes this
// end send one probe for each.
func TestPlayedBack(t *testing.T) {
	keys := stun.Keys{Out: [32]byte{1}, In: [32]byte{2}}
	now := time.Unix(1_700_000_000, 0)
	c := newChecks(keys.Swap(), false)
	peer := netip.AddrPortFrom(clientIP, 4000)
	c.start(now, []netip.AddrPort{peer})
	recorded := stun.NewProber(keys).Probe(now, 0)
	victim := netip.AddrPortFrom(clientIP, 4001)
	in, out := 0, 0
	for range 1000 {
		now = now.Add(20 * time.Millisecond)
		in += len(recorded)
		out += len(c.request(now, victim, recorded))
		packets, _ := c.step(now)
		for _, x := range packets {
			if x.to == victim {
				out += len(x.b)
			}
		}
	}
	if out > 2*in {
		t.Errorf("%d bytes out for %d in", out, in)
	}
	for _, r := range c.remotes {
		if r.admitted(now) {
			t.Errorf("%v is admitted on a request alone", r.addr)
		}
	}
	// Neither do answers of a prober that is not this one's, nor the right one from a wrong address.
	r := c.remote(victim)
	if r == nil {
		t.Fatal("no remote")
	}
	probe := r.prober.Probe(now, 0)
	answer, ok := stun.NewResponder(keys, 0, 0).Respond(now, probe, netip.AddrPort{})
	if !ok {
		t.Fatal("no answer")
	}
	if c.answer(now, peer, answer) != nil {
		t.Error("an answer proved the address it did not come from")
	}
	forged := slices.Clone(answer)
	forged[len(forged)-1] ^= 1
	if c.answer(now, victim, forged) != nil {
		t.Error("an answer without integrity proved an address")
	}
	if c.answer(now, victim, answer) == nil {
		t.Error("the right answer proved nothing")
	}
	if c.answer(now, victim, answer) != nil {
		t.Error("the same answer proved an address twice")
	}
}

// TestBounded: whatever comes, there are no more addresses than may be named.
func TestBounded(t *testing.T) {
	keys := stun.Keys{Out: [32]byte{1}, In: [32]byte{2}}
	now := time.Unix(1_700_000_000, 0)
	c := newChecks(keys.Swap(), false)
	prober := stun.NewProber(keys)
	for port := range uint16(200) {
		now = now.Add(20 * time.Millisecond)
		c.request(now, netip.AddrPortFrom(clientIP, 2000+port), prober.Probe(now, 0))
	}
	if len(c.remotes) != MaxCandidates {
		t.Errorf("%d addresses, want %d", len(c.remotes), MaxCandidates)
	}
	packets := 0
	for range 10_000 {
		now = now.Add(time.Millisecond)
		out, _ := c.step(now)
		packets += len(out)
	}
	if packets > MaxCandidates*tries {
		t.Errorf("%d probes, want %d at most", packets, MaxCandidates*tries)
	}
}
