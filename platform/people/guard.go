package people

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Limits of guessing. A key is an account and where the guess comes from, so that whoever guesses from elsewhere keeps nobody out.
const (
	freeFailures = 5 // typing errors
	firstDelay   = time.Second
	maxDelay     = 5 * time.Minute
	forgetAfter  = 30 * time.Minute // without a failure
	guardKeys    = 8192             // told apart; when there are more, the one that waited longest is forgotten

	freeOfSource = 60 // of all accounts from one source
)

// guess is what failures are counted for, and how many are free.
type guess struct {
	key  string
	free int
}

// ofAccount counts guesses at an account from a source (or a browser that the account knows), ofSource all from a source.
func ofAccount(what, account, from string) guess {
	return guess{what + "|" + account + "|" + from, freeFailures}
}
func ofSource(from string) guess { return guess{"source|" + from, freeOfSource} }

// guard slows guessing down. The zero value is ready.
type guard struct {
	mu   sync.Mutex
	keys map[string]*failures // guarded by mu
}

type failures struct {
	count int
	last  time.Time
}

// delay is how long to wait after so many failures.
func (f *failures) delay(free int) time.Duration {
	if f.count < free {
		return 0
	}
	return min(maxDelay, firstDelay<<min(f.count-free, 20))
}

// waitLocked is how long until a key may try again.
func (g *guard) waitLocked(w guess, now time.Time) time.Duration {
	f := g.keys[w.key]
	if f == nil {
		return 0
	}
	if now.Sub(f.last) > forgetAfter {
		delete(g.keys, w.key)
		return 0
	}
	return max(0, f.delay(w.free)-now.Sub(f.last))
}

// try refuses a key that has to wait; otherwise the try counts as a failure until succeeded says otherwise, so that guesses which arrive
// at once are not all of the first.
func (g *guard) try(now time.Time, what ...guess) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var most time.Duration
	for _, w := range what {
		most = max(most, g.waitLocked(w, now))
	}
	if most > 0 {
		return slowDown(most)
	}
	if g.keys == nil {
		g.keys = make(map[string]*failures)
	}
	for _, w := range what {
		f := g.keys[w.key]
		if f == nil {
			if len(g.keys) >= guardKeys {
				g.forgetLocked()
			}
			f = &failures{}
			g.keys[w.key] = f
		}
		f.count++
		f.last = now
	}
	return nil
}

func (g *guard) forgetLocked() {
	oldest := ""
	for k, f := range g.keys {
		if oldest == "" || f.last.Before(g.keys[oldest].last) {
			oldest = k
		}
	}
	delete(g.keys, oldest)
}

// succeeded forgets the failures of an account from a source, and of the source's the one that try counted: a good account of one's own
// buys no more guesses at others.
func (g *guard) succeeded(account guess, source guess) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.keys, account.key)
	if f := g.keys[source.key]; f != nil {
		f.count--
	}
}

// guess is guard.try, and has the audit tell of a source that has to wait. p is whose account it is about; nil is nobody's: what was typed then is told
// to nobody, for people type passwords where names belong.
func (s *Service) guess(ctx context.Context, what string, p *store.Person, source string, guesses ...guess) error {
	err := s.guard.try(s.reg.Now(), guesses...)
	if err == nil {
		return nil
	}
	org, object := Platform, "unknown"
	if p != nil {
		org, object = p.Org, "person/"+p.ID
	}
	return errors.Join(err, s.reg.Guessing(ctx, org, what, object, source))
}

// RetryAfter is how many seconds a refusal asks to wait, "" when it asks for nothing: for the header of that name.
func RetryAfter(p *control.Problem) string {
	if p.Status != http.StatusTooManyRequests || len(p.Errors) == 0 {
		return ""
	}
	return p.Errors[0].Message
}

func slowDown(d time.Duration) error {
	seconds := strconv.Itoa(int(d/time.Second) + 1)
	e := registry.Refuse(http.StatusTooManyRequests, control.CodeRateLimited, "wait "+seconds+" seconds and try again", "too many failed tries")
	e.Errors = []control.ProblemPart{{Message: seconds, Location: "header.retry-after"}}
	return e
}
