package leg

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"time"

	"github.com/pion/stun/v4"
)

const (
	// checkPause is the least time between two checks of a suspect relay, so that forged signs cost ten small messages a second.
	checkPause = 100 * time.Millisecond
	// retryRefresh is the longest wait before a Refresh refused for its credential is tried again.
	retryRefresh = 30 * time.Second
	// A leg over which datagrams came in most of the last steadyTicks ticks of listenTick, and in none of the silentTicks after them, is one
	// whose relay is asked: on a leg in use there are ten probes a second at least. idleTick is the tick of a leg that is not in use, which it is when
	// idleMost datagrams come in one.
	listenTick  = 100 * time.Millisecond
	steadyTicks = 10
	silentTicks = 3
	idleTick    = 500 * time.Millisecond
	idleMost    = 4
	// leastLifetime is what an allocation's lifetime is taken for when the relay grants less, or does not say.
	leastLifetime = 10 * time.Second
)

// allocate makes the allocation: IPv4, or what the relay has.
func (l *Leg) allocate(ctx context.Context) error {
	set := []stun.Setter{transportUDP, lifetimeAttr(l.cfg.Lifetime)}
	m, err := l.request(ctx, l.patient(), "allocate", stun.MethodAllocate, true, set...)
	var refused *Error
	if errors.As(err, &refused) && refused.Code == CodeFamily {
		m, err = l.request(ctx, l.patient(), "allocate", stun.MethodAllocate, true, append(set, familyIPv6)...)
	}
	if err != nil {
		return err
	}
	relayed, err := xorAddr(m, stun.AttrXORRelayedAddress)
	if err != nil {
		return fmt.Errorf("allocate: %w", err)
	}
	reflexive, _ := xorAddr(m, stun.AttrXORMappedAddress)
	l.mu.Lock()
	l.relayed, l.reflexive = relayed, reflexive
	l.mu.Unlock()
	l.granted(m)
	return nil
}

// granted notes the lifetime in an answer.
func (l *Leg) granted(m *stun.Message) {
	d, _ := lifetimeOf(m)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lifetime = max(d, leastLifetime)
	l.expires = time.Now().Add(l.lifetime)
}

// refresh prolongs the allocation, or ends it when lifetime is 0.
func (l *Leg) refresh(ctx context.Context, s schedule, lifetime time.Duration) (*stun.Message, error) {
	m, err := l.request(ctx, s, "refresh", stun.MethodRefresh, true, lifetimeAttr(lifetime))
	if err == nil && lifetime > 0 {
		l.granted(m)
	}
	return m, err
}

// refused decides what a refused Refresh means. It reports whether the leg lives on: with a credential that does not count it does until
// the lifetime it has ends, because a renewed credential may come in time.
func (l *Leg) refused(err error) (lives bool) {
	var e *Error
	if errors.As(err, &e) && (e.Code == CodeUnauthorized || e.Code == CodeStaleNonce) {
		l.mu.Lock()
		left := time.Until(l.expires)
		l.mu.Unlock()
		if left > 0 {
			l.log.Warn("the relay did not prolong the allocation", "error", err, "expires_in", left.Round(time.Second))
			return true
		}
	}
	l.lose(err)
	return false
}

// maintain refreshes the allocation at half of its lifetime and keeps the path to the relay open in between: a Binding request proves
// that the relay is there and keeps the mapping of a NAT.
func (l *Leg) maintain() {
	l.mu.Lock()
	refreshAt := time.Now().Add(l.lifetime / 2)
	l.mu.Unlock()
	for {
		wait := min(time.Until(refreshAt), jitter(l.cfg.Keepalive))
		if !l.sleep(wait) {
			return
		}
		if time.Now().Before(refreshAt) {
			_, err := l.request(l.ctx, l.patient(), "keepalive", stun.MethodBinding, false)
			var e *Error
			if err != nil && !errors.As(err, &e) { // any answer shows life
				l.lose(err)
				return
			}
			continue
		}
		if _, err := l.refresh(l.ctx, l.patient(), l.cfg.Lifetime); err != nil {
			if !l.refused(err) {
				return
			}
			l.mu.Lock()
			refreshAt = time.Now().Add(min(max(time.Until(l.expires)/2, time.Second), retryRefresh))
			l.mu.Unlock()
			continue
		}
		l.mu.Lock()
		refreshAt = time.Now().Add(l.lifetime / 2)
		l.mu.Unlock()
	}
}

// listen doubts the relay when what came steadily ends: a gateway sends nothing by itself that could go unanswered while its clients wait for
// it. When they have all fallen silent it costs one request.
func (l *Leg) listen() {
	var heard silence
	var before uint64
	tick := idleTick
	for l.sleep(tick) {
		n := l.stats.ReceivedDatagrams.Load()
		switch {
		case tick == idleTick && n-before > idleMost:
			heard = steady
		case heard.tick(n != before):
			l.suspect(errSilent)
		}
		before = n
		if tick = listenTick; heard == 0 {
			tick = idleTick
		}
	}
}

// silence has a bit for each of the last ticks, the latest lowest: whether something came.
type silence uint32

// steady is that something came in every tick.
const steady silence = 1<<(steadyTicks+silentTicks) - 1

// tick notes another tick and reports whether it is the one that ends a steady stream.
func (s *silence) tick(came bool) bool {
	*s = *s << 1 & steady
	if came {
		*s |= 1
	}
	const last = 1 << silentTicks // the last tick in which something came, if it is this silence that is new
	return *s&(last-1) == 0 && *s&last != 0 && bits.OnesCount32(uint32(*s)) > steadyTicks/2
}

// watch checks a suspect relay: an authenticated Refresh in quick succession where there is a sign that it is gone, in calmer succession
// where there is only a doubt. Signs can be forged; that nothing answers these can not.
func (l *Leg) watch() {
	for {
		var sign error
		select {
		case <-l.ctx.Done():
			return
		case sign = <-l.signs:
		case doubt := <-l.doubts:
			var lives bool
			if lives, sign = l.doubt(doubt); !lives {
				return
			}
		}
		if sign != nil {
			if !l.check(l.ctx, l.quick(), sign) {
				return
			}
			if l.Doubtful() {
				l.setDoubtful(false)
			}
		}
		if !l.sleep(checkPause) {
			return
		}
	}
}

// doubt checks calmly, until a sign comes that calls for a quick check, which it returns.
func (l *Leg) doubt(doubt error) (lives bool, sign error) {
	ctx, cancel := context.WithCancel(l.ctx)
	defer cancel()
	l.setDoubtful(true)
	defer func() {
		if lives && sign == nil {
			l.setDoubtful(false)
		}
	}()
	patience := l.gentle()
	if errors.Is(doubt, errSuspected) {
		patience = l.calm()
	}
	done := make(chan bool, 1)
	go func() { done <- l.check(ctx, patience, doubt) }()
	select {
	case lives = <-done:
		return lives, nil
	case sign = <-l.signs:
		cancel()
		return <-done, sign
	}
}

// setDoubtful tells whoever owns the leg.
func (l *Leg) setDoubtful(doubtful bool) {
	l.doubtful.Store(doubtful)
	if l.cfg.OnDoubt != nil {
		l.cfg.OnDoubt(doubtful)
	}
}

// check asks the relay whether it knows this leg and reports whether the leg lives on. A check that ctx broke off says yes.
func (l *Leg) check(ctx context.Context, s schedule, sign error) (lives bool) {
	count(&l.stats.Checks, &l.cfg.Metrics.Checks, 1)
	_, err := l.refresh(ctx, s, l.cfg.Lifetime)
	switch {
	case err == nil:
		return true
	case l.ctx.Err() == nil && errors.Is(err, context.Canceled):
		return true
	case errors.Is(err, errNoAnswer):
		err = fmt.Errorf("%w (%w)", err, sign)
	}
	return l.refused(err)
}

// sleep waits; it reports false when the leg ended.
func (l *Leg) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-l.ctx.Done():
		return false
	}
}

// jitter returns between 80 and 100 % of d, so that legs do not beat in time.
func jitter(d time.Duration) time.Duration { return d - time.Duration(rand.Int64N(int64(d)/5+1)) }
