package relay

import (
	"hash/maphash"
	"sync"
	"time"

	"sallyway/relay/budget"
)

// A limiter holds token buckets by source in a table of fixed size, so that no number of (forged) sources makes it grow. Where a set of
// the table is full of busy sources, newcomers share one of its buckets: they may be limited early, never late.
type limiter struct {
	seed  maphash.Seed
	every int64 // nanoseconds per token
	ahead int64 // burst, in nanoseconds
	sets  [limiterSets]limiterSet
}

const (
	limiterSets = 1024
	limiterWays = 4
)

type limiterSet struct {
	mu    sync.Mutex // guards the rest
	entry [limiterWays]struct {
		tag  uint64
		paid int64
	}
}

// init sets one token per every, and burst tokens at most.
func (l *limiter) init(every time.Duration, burst int64) {
	l.seed, l.every, l.ahead = maphash.MakeSeed(), int64(every), burst*int64(every)
}

// allow takes n tokens of src at now (Unix nanoseconds).
func (l *limiter) allow(src budget.Source, n int, now int64) bool {
	h := maphash.Bytes(l.seed, src[:])
	set := &l.sets[h%limiterSets]
	set.mu.Lock()
	defer set.mu.Unlock()
	at := -1
	for i := range set.entry {
		if set.entry[i].tag == h {
			at = i
			break
		}
	}
	if at < 0 {
		at = int(h>>32) % limiterWays
		for i := range set.entry {
			if set.entry[i].paid <= now {
				at = i
				break
			}
		}
		set.entry[at].tag = h
	}
	e := &set.entry[at]
	next := max(e.paid, now) + int64(n)*l.every
	if next-now > l.ahead {
		return false
	}
	e.paid = next
	return true
}

// penalties counts failed authentications by key (a source or an identity) in a table of fixed size. Each failure doubles the time during
// which further failures of the key get no answer, so that guessing is slow and costs the guesser, not the node whose name is used: right
// credentials are always accepted.
type penalties struct {
	once sync.Once
	seed maphash.Seed
	sets [256]penaltySet
}

type penaltySet struct {
	mu    sync.Mutex // guards the rest
	entry [limiterWays]struct {
		tag   uint64
		count uint8
		until int64
	}
}

// The first penaltyFree failures cost nothing: a clock or a rotation may be to blame. Then silence lasts penaltyFirst, doubling up to
// penaltyMost, and is forgotten after as long again.
const (
	penaltyFree  = 4
	penaltyFirst = 500 * time.Millisecond
	penaltyMost  = 64 * time.Second
)

func (p *penalties) set(key []byte) (*penaltySet, uint64) {
	p.once.Do(func() { p.seed = maphash.MakeSeed() })
	h := maphash.Bytes(p.seed, key)
	return &p.sets[h%uint64(len(p.sets))], h
}

// active reports whether key is being punished at now (Unix nanoseconds).
func (p *penalties) active(key []byte, now int64) bool {
	s, h := p.set(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.entry {
		if s.entry[i].tag == h {
			return s.entry[i].count > penaltyFree && now < s.entry[i].until
		}
	}
	return false
}

// failed counts a failure and reports whether it may be answered.
func (p *penalties) failed(key []byte, now int64) (answer bool) {
	s, h := p.set(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	at := 0
	for i := range s.entry {
		if s.entry[i].tag == h {
			at = i
			break
		}
		if s.entry[i].until < s.entry[at].until {
			at = i
		}
	}
	e := &s.entry[at]
	if e.tag != h || now-e.until > int64(penaltyMost) {
		e.tag, e.count, e.until = h, 0, now
	}
	if e.count > penaltyFree && now < e.until {
		return false
	}
	if e.count < 64 {
		e.count++
	}
	delay := time.Duration(0)
	if e.count > penaltyFree {
		delay = min(penaltyFirst<<min(e.count-penaltyFree-1, 7), penaltyMost)
	}
	e.until = now + int64(delay)
	return true
}
