package legs

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyway/relay/leg"
)

// Timing of what happens to a leg.
const (
	// rushInterval is from the start of one attempt to the start of the next while traffic waits; the last rushMost-rushShort of an outage have
	// rushLonger between them. What waits is told at least every waitFresh.
	rushInterval = 500 * time.Millisecond
	rushLonger   = time.Second
	rushShort    = 20
	rushMost     = 40
	rushAtOnce   = 8
	waitFresh    = 2 * time.Second
	// rushStagger is TLSStagger while traffic waits, or two round trips to the relay if these are longer.
	rushStagger = 250 * time.Millisecond
	// leastGrace and mostGrace bound how long a doubtful leg has to itself before another is dialled beside it; in between it is two round trips.
	leastGrace = 50 * time.Millisecond
	mostGrace  = 300 * time.Millisecond
	// kickMemory is for how long after a change of the host's network a doubt is taken to come of it.
	kickMemory = 2 * time.Second
	// doubtPatience is how long a leg may doubt before the last rung is worth a try.
	doubtPatience = 300 * time.Millisecond
	// upgradeFirst is when a leg over TLS first looks whether UDP works. The pause doubles up to UpgradeInterval, and begins where it was when UDP
	// had not held for heldFor.
	upgradeFirst = 5 * time.Second
	heldFor      = time.Minute
	// A leg that another one took the place of is closed when nothing has come over it for retireQuiet, after retireMost at the latest.
	retireQuiet = 3 * time.Second
	retireMost  = 30 * time.Second
	retireTick  = 250 * time.Millisecond
)

// purpose is what an attempt is for.
type purpose int

const (
	redial  purpose = iota // there is no leg
	beside                 // the leg doubts its relay
	upgrade                // a better transport may work by now
	purposes
)

// outcome of an attempt: a leg, or why not. Both are nil for one that was not needed any more.
type outcome struct {
	purpose purpose
	l       *leg.Leg
	err     error
}

// trying are the attempts for a purpose that are under way.
type trying struct {
	n      int
	ctx    context.Context // theirs; nil when there is none, or they were given up
	cancel context.CancelFunc
}

// keeping is what keep knows; it belongs to its goroutine.
type keeping struct {
	r   *relay
	ctx context.Context
	log *slog.Logger

	cur      *leg.Leg
	up       time.Time // when cur came up
	draining <-chan struct{}
	retired  []*leg.Leg // still open, or were a moment ago

	outcomes chan outcome
	tasks    sync.WaitGroup
	trying   [purposes]trying

	last     leg.Transport // of the latest leg, "" before the first
	rtt      time.Duration // to the relay, as the latest leg measured it
	started  time.Time     // the latest attempt
	next     time.Time     // when to dial again without a leg
	rushed   int           // attempts since there was a leg, while traffic waited
	brief    int           // legs in a row that did not live for long
	climbs   time.Time     // when to look for a better transport
	climbing time.Duration // the pause before the look after that
}

// keep holds one leg up until ctx ends.
func (r *relay) keep(ctx context.Context) {
	r.mu.Lock()
	log := r.k.cfg.Logger.With("relay", r.ref.Name)
	r.missing = time.Now()
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer r.set(nil, ErrUnwanted) // who waits for the leg looks again
	k := &keeping{r: r, ctx: ctx, log: log, outcomes: make(chan outcome), next: time.Now(), climbing: r.k.firstUpgrade()}
	defer k.tasks.Wait()
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var done <-chan struct{}
		if k.cur != nil {
			done = k.cur.Done()
		}
		select {
		case <-ctx.Done():
			if l := k.cur; l != nil {
				r.set(nil, nil)
				k.tasks.Go(func() { _ = l.Close() }) // only ever reports what Done told
			}
			return
		case <-done:
			k.lost()
		case <-k.draining:
			k.draining = nil
			log.Info("relay is draining")
			if r.k.cfg.OnDown != nil {
				r.k.cfg.OnDown(r.node, errors.New("the relay is draining"))
			}
		case o := <-k.outcomes:
			k.take(o)
		case <-r.doubts:
			k.doubt()
		case <-r.waits:
			k.hurry()
		case <-r.kick: // what is under way may have left by what is not there any more
			switch {
			case k.cur == nil:
				k.forgo(redial)
				k.dial(time.Now())
			case k.orphaned():
				k.forgo(beside)
				k.cur.Abandon(errOrphaned)
			}
		case <-timer.C:
		}
		timer.Reset(k.step())
	}
}

// step does what is due and returns when to look again.
func (k *keeping) step() time.Duration {
	now := time.Now()
	switch {
	case k.cur == nil:
		if n := k.trying[redial].n; n >= rushAtOnce || (n > 0 && !k.rushing()) {
			return time.Hour // an outcome says when
		}
		if wait := time.Until(k.next); wait > 0 {
			return wait
		}
		k.dial(now)
		return time.Until(k.next)
	case k.cur.Transport() == k.r.k.cfg.Transports[0]:
		return time.Hour
	}
	if wait := time.Until(k.climbs); wait > 0 {
		return wait
	}
	k.climbs = now.Add(jitter(k.climbing))
	k.climbing = min(2*k.climbing, k.r.k.upgrade)
	if k.trying[upgrade].n == 0 && k.draining != nil {
		k.attempt(upgrade, k.r.k.cfg.Transports[:1], 0, 0)
	}
	return time.Until(k.climbs)
}

// rushing reports whether traffic waits for a leg, and not in vain for long.
func (k *keeping) rushing() bool {
	k.r.mu.Lock()
	defer k.r.mu.Unlock()
	return k.rushed < rushMost && time.Since(k.r.waited) < waitFresh
}

// interval is from the start of one attempt to the start of the next.
func (k *keeping) interval() time.Duration {
	switch {
	case !k.rushing():
		return k.r.k.retry
	case k.rushed < rushShort:
		return min(rushInterval, k.r.k.retry)
	}
	return min(rushLonger, k.r.k.retry)
}

// hurry brings the next attempt forward.
func (k *keeping) hurry() {
	if k.cur == nil && k.rushing() {
		if next := k.started.Add(jitter(k.interval())); next.Before(k.next) {
			k.next = next
		}
	}
}

// dial begins an attempt because there is no leg.
func (k *keeping) dial(now time.Time) {
	k.r.mu.Lock()
	k.r.tries++
	try := k.r.tries
	k.r.mu.Unlock()
	stagger := TLSStagger
	if k.rushing() {
		k.rushed++
		stagger = k.stagger()
	}
	k.started, k.next = now, now.Add(jitter(k.interval()))
	k.log.Info("dialling relay", "try", try)
	k.attempt(redial, k.r.k.cfg.Transports, 0, stagger)
}

func (k *keeping) stagger() time.Duration { return min(max(rushStagger, 2*k.rtt), TLSStagger) }

// attempt dials the relay over transports, unless the leg there is stops doubting within grace.
func (k *keeping) attempt(p purpose, transports []leg.Transport, grace, stagger time.Duration) {
	t := &k.trying[p]
	if t.ctx == nil {
		t.ctx, t.cancel = context.WithCancel(k.ctx)
	}
	t.n++
	ctx := t.ctx
	cur := k.cur
	k.tasks.Go(func() {
		o := outcome{purpose: p}
		if grace == 0 || (sleep(ctx, grace) && cur.Doubtful()) {
			o.l, o.err = k.r.dial(ctx, transports, stagger)
		}
		select {
		case k.outcomes <- o:
		case <-k.ctx.Done():
			if o.l != nil {
				_ = o.l.Close()
			}
		}
	})
}

// forgo gives up the attempts for a purpose.
func (k *keeping) forgo(p purpose) {
	if t := &k.trying[p]; t.ctx != nil {
		t.cancel()
		t.ctx = nil
	}
}

// take is told what came of an attempt.
func (k *keeping) take(o outcome) {
	r := k.r
	if k.trying[o.purpose].n--; k.trying[o.purpose].n == 0 {
		k.forgo(o.purpose)
	}
	if o.l == nil {
		if o.err == nil || k.cur != nil || o.purpose != redial || errors.Is(o.err, context.Canceled) {
			return
		}
		r.set(nil, o.err)
		r.mu.Lock()
		r.failed = true
		r.mu.Unlock()
		r.missed()
		k.log.Warn("relay not reached", "err", o.err, "retry_every", k.interval())
		return
	}
	switch {
	case k.cur == nil:
		k.adopt(o.l, WhyLost)
	case o.purpose == beside && (k.cur.Doubtful() || over(k.cur)):
		k.adopt(o.l, WhyUnanswered)
	case o.purpose == upgrade && k.cur.Transport() != r.k.cfg.Transports[0]:
		k.adopt(o.l, WhyBetter)
	default:
		k.log.Debug("leg not needed", "transport", o.l.Transport())
		k.tasks.Go(func() { _ = o.l.Close() })
	}
}

// errOrphaned ends a leg whose own address is not the host's any more.
var errOrphaned = errors.New("this host has another address now")

// orphaned reports whether the leg's own address is not the host's any more: then nothing reaches it, and nothing needs to be asked.
func (k *keeping) orphaned() bool {
	addrs, err := k.r.k.addrs()
	return err == nil && isForeign(k.cur.LocalAddr().Addr(), addrs)
}

// isForeign reports whether own is an address that none of a host's interfaces has.
func isForeign(own netip.Addr, addrs []net.Addr) bool {
	own = own.Unmap().WithZone("")
	return own.IsValid() && !own.IsUnspecified() && !slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(own.AsSlice())
	})
}

func over(l *leg.Leg) bool {
	select {
	case <-l.Done():
		return true
	default:
		return false
	}
}

// adopt makes l the relay's leg. The one before stays for a while.
func (k *keeping) adopt(l *leg.Leg, why string) {
	r := k.r
	old := k.cur
	now := time.Now()
	switch {
	case k.last != "" && l.Transport() != k.last:
		r.moved(k.last, l.Transport(), why)
		k.log.Info("leg moved", "from", k.last, "to", l.Transport(), "reason", why, "reflexive", l.ReflexiveAddr(), "relayed", l.RelayedAddr())
	default:
		k.log.Info("leg up", "transport", l.Transport(), "reflexive", l.ReflexiveAddr(), "relayed", l.RelayedAddr())
	}
	best := r.k.cfg.Transports[0]
	if l.Transport() != best {
		if k.last == best && now.Sub(k.up) >= heldFor || k.last == "" {
			k.climbing = r.k.firstUpgrade()
		}
		k.climbs = now.Add(jitter(k.climbing))
		k.climbing = min(2*k.climbing, r.k.upgrade)
	}
	for p := range purposes {
		k.forgo(p)
	}
	k.cur, k.up, k.last, k.draining = l, now, l.Transport(), l.Draining()
	r.set(l, nil)
	if r.k.cfg.OnUp != nil {
		r.k.cfg.OnUp(r.node, l)
	}
	if old != nil {
		k.retire(old)
	}
	if l.Doubtful() {
		k.doubt()
	}
}

// lost is told that the leg has ended.
func (k *keeping) lost() {
	r, l, now := k.r, k.cur, time.Now()
	err := l.Err()
	k.rtt = l.Stats().RTT
	k.cur, k.draining = nil, nil
	r.set(nil, err)
	k.tasks.Go(func() { _ = l.Close() })
	k.log.Warn("leg lost", "err", err)
	if r.k.cfg.OnDown != nil {
		r.k.cfg.OnDown(r.node, err)
	}
	k.next = now
	// A relay that takes legs and loses them soon must not be dialled in a tight loop.
	if now.Sub(k.up) >= r.k.retry || errors.Is(err, errOrphaned) {
		k.brief, k.rushed = 0, 0
	} else if k.brief++; k.brief > 1 {
		k.next = now.Add(jitter(k.interval()))
	}
}

// doubt looks whether the leg doubts its relay, and has another one dialled beside it if so.
func (k *keeping) doubt() {
	r := k.r
	k.retired = slices.DeleteFunc(k.retired, over)
	if slices.ContainsFunc(k.retired, func(l *leg.Leg) bool { return !l.Doubtful() && l.Transport() == r.k.cfg.Transports[0] }) {
		// What was left for its silence speaks again.
		k.retired = nil
		if soon := time.Now().Add(time.Second); k.cur != nil && soon.Before(k.climbs) {
			k.climbs = soon
		}
	}
	doubtful := k.cur != nil && k.cur.Doubtful() && !over(k.cur)
	r.mu.Lock()
	begins := doubtful && r.doubted.IsZero()
	switch {
	case begins:
		r.doubted = time.Now()
	case !doubtful:
		r.doubted = time.Time{}
	}
	r.mu.Unlock()
	if begins {
		k.tasks.Go(func() { // the last rung, too, may have to stand in
			if sleep(k.ctx, doubtPatience) {
				r.missed()
			}
		})
	}
	if !doubtful || k.trying[beside].n > 0 || k.draining == nil {
		return
	}
	k.rtt = k.cur.Stats().RTT
	transports := slices.DeleteFunc(slices.Clone(r.k.cfg.Transports), func(t leg.Transport) bool { return t == k.cur.Transport() })
	r.mu.Lock()
	kicked := time.Since(r.kicked) < kickMemory
	r.mu.Unlock()
	if kicked || k.cur.Transport() != r.k.cfg.Transports[0] || len(transports) == 0 {
		transports = r.k.cfg.Transports // after a change of network the address may be what is wrong with the leg, not the transport
	}
	k.attempt(beside, transports, min(max(2*k.rtt, leastGrace), mostGrace), k.stagger())
}

// retire closes a leg that another one has taken the place of, when nothing comes over it any more.
func (k *keeping) retire(l *leg.Leg) {
	k.retired = append(slices.DeleteFunc(k.retired, over), l)
	k.tasks.Go(func() {
		defer l.Close()
		tick := time.NewTicker(retireTick)
		defer tick.Stop()
		began, heard, count := time.Now(), time.Now(), l.Stats().ReceivedDatagrams
		for time.Since(heard) < retireQuiet && time.Since(began) < retireMost {
			select {
			case <-k.ctx.Done():
				return
			case <-l.Done():
				return
			case <-tick.C:
			}
			if n := l.Stats().ReceivedDatagrams; n != count {
				heard, count = time.Now(), n
			}
		}
		k.log.Debug("leg retired", "transport", l.Transport(), "after", time.Since(began).Round(time.Millisecond))
	})
}
