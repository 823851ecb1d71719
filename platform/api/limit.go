package api

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"sallyway/internal/identity"
)

// Limits of refused requests from one source: an address, or a /64 of IPv6.
const (
	failureBurst   = 20
	failureRefill  = 3 * time.Second // one more failure is allowed after this
	limiterSources = 4096            // told apart; when there are more, the one that waited longest is forgotten
)

// Limiter counts failures by source. The zero value is ready.
type Limiter struct {
	// Tell is called with the source of each failure, for other platforms on the same database; nil is nobody. It must not block.
	Tell func(source string)

	mu      sync.Mutex
	sources map[string]*bucket // guarded by mu
}

type bucket struct {
	tokens float64
	at     time.Time
}

func (b *bucket) fill(now time.Time) {
	b.tokens = min(failureBurst, b.tokens+max(0, now.Sub(b.at).Seconds())/failureRefill.Seconds())
	b.at = now
}

// allow says whether a source may try.
func (l *Limiter) allow(source string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.sources[source]
	if b == nil {
		return true
	}
	b.fill(now)
	if b.tokens >= failureBurst {
		delete(l.sources, source)
	}
	return b.tokens >= 1
}

// failed counts a failure and tells of it.
func (l *Limiter) failed(source string, now time.Time) {
	l.Failed(source, now)
	if l.Tell != nil {
		l.Tell(source)
	}
}

// Failed counts a failure that another platform told of.
func (l *Limiter) Failed(source string, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sources == nil {
		l.sources = make(map[string]*bucket)
	}
	b := l.sources[source]
	if b == nil {
		if len(l.sources) >= limiterSources {
			oldest := ""
			for s, c := range l.sources {
				if oldest == "" || c.at.Before(l.sources[oldest].at) {
					oldest = s
				}
			}
			delete(l.sources, oldest)
		}
		b = &bucket{tokens: failureBurst, at: now}
		l.sources[source] = b
	}
	b.fill(now)
	b.tokens--
}

// guessing has the audit tell of a source that has to wait because it was refused too often.
func (s *server) guessing(ctx context.Context, what, from string) {
	if err := s.reg.Guessing(ctx, identity.SharedOrg, what, "", from); err != nil {
		s.log.Warn("a source that guesses is not in the audit log", "source", from, "error", err)
	}
}

// forwardedKey is the key of a mark in a context: the listener stands behind a load balancer.
type forwardedKey struct{}

// Forwarded marks connections of the plain HTTP listener: a load balancer before it says where requests come from.
func Forwarded(ctx context.Context) context.Context {
	return context.WithValue(ctx, forwardedKey{}, true)
}

// source is where a request comes from, as a key for limits and the audit: an IPv4 address or a /64. The last entry of X-Forwarded-For
// counts behind a load balancer, which is the one that it wrote itself.
func source(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	if on, _ := r.Context().Value(forwardedKey{}).(bool); on {
		if f := r.Header.Values("X-Forwarded-For"); len(f) > 0 {
			entries := strings.Split(f[len(f)-1], ",")
			host = strings.TrimSpace(entries[len(entries)-1])
		}
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return "unknown"
	}
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // never fails for IPv6
		return p.String()
	}
	return a.String()
}
