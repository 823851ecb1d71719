package api

import (
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"

	"sallyway/internal/control"
)

// Requests that one caller has: a token, a session, a node, or where nobody is known yet an address.
const (
	// DefaultRate is in requests a second. A person at a browser makes a few, a program that sets up an organization some tens.
	DefaultRate = 50
	// burstSeconds is how many seconds' worth can be used at once.
	burstSeconds = 4
	// budgetCallers is how many are told apart. Only those of the last burstSeconds are: whoever waited longer has a full budget again.
	budgetCallers = 1 << 16
)

// budget shares a platform's time between callers: a token bucket each. Every replica has its own, so behind a balancer a caller has up to as many
// times the rate as there are replicas; a shared count would put a round trip to Redis before every request.
type budget struct {
	rate float64 // a second; 0 is no limit

	mu      sync.Mutex
	callers map[string]*bucket // guarded by mu
	swept   time.Time          // guarded by mu
}

// allowance is what a caller has left.
type allowance struct {
	ok        bool
	quota     int           // requests in window
	window    time.Duration // in which the quota is there again
	remaining int
	reset     time.Duration // until it is whole again
	wait      time.Duration // until the next request, when not ok
}

func (b *budget) take(caller string, now time.Time) allowance {
	quota := b.rate * burstSeconds
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Sub(b.swept).Abs() >= burstSeconds*time.Second || len(b.callers) >= budgetCallers {
		for k, c := range b.callers {
			if now.Sub(c.at) >= burstSeconds*time.Second {
				delete(b.callers, k)
			}
		}
		if len(b.callers) >= budgetCallers {
			clear(b.callers) // all begin anew: a bound on memory, not on anybody's requests
		}
		b.swept = now
	}
	if b.callers == nil {
		b.callers = make(map[string]*bucket)
	}
	c := b.callers[caller]
	if c == nil {
		c = &bucket{tokens: quota, at: now}
		b.callers[caller] = c
	}
	c.tokens = min(quota, c.tokens+max(0, now.Sub(c.at).Seconds())*b.rate)
	c.at = now
	a := allowance{quota: int(quota), window: burstSeconds * time.Second}
	if a.ok = c.tokens >= 1; a.ok {
		c.tokens--
	} else {
		a.wait = time.Duration((1 - c.tokens) / b.rate * float64(time.Second))
	}
	a.remaining = int(c.tokens)
	a.reset = time.Duration((quota - c.tokens) / b.rate * float64(time.Second))
	return a
}

func seconds(d time.Duration) int { return int(math.Ceil(d.Seconds())) }

// spend takes a request from a caller's budget and says in headers what is left (draft-ietf-httpapi-ratelimit-headers). nil is go on.
func (s *server) spend(set func(name, value string), caller string) *problem {
	if s.budget.rate <= 0 {
		return nil
	}
	a := s.budget.take(caller, s.reg.Now())
	set("RateLimit-Policy", fmt.Sprintf(`"requests";q=%d;w=%d`, a.quota, seconds(a.window)))
	set("RateLimit", fmt.Sprintf(`"requests";r=%d;t=%d`, a.remaining, seconds(a.reset)))
	if a.ok {
		return nil
	}
	wait := max(1, seconds(a.wait))
	set("Retry-After", fmt.Sprint(wait))
	s.refused.WithLabelValues(control.CodeRateLimited).Inc()
	return &problem{control.Problem{
		Status: http.StatusTooManyRequests, Title: http.StatusText(http.StatusTooManyRequests), Code: control.CodeRateLimited,
		Detail: fmt.Sprintf("too many requests: a caller has %d a second", int(s.budget.rate)), Remedy: fmt.Sprintf("wait %d s, as Retry-After says, and try again", wait),
	}}
}
