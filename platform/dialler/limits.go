package dialler

import (
	"sync"
	"time"
)

// Tests of an organization: at most testBurst at once, then one more each testRefill.
const (
	testBurst  = 10
	testRefill = 3 * time.Second
	// maxTests is how many tests run at once.
	maxTests = 8
)

// limits count tests.
type limits struct {
	mu      sync.Mutex
	running int                // guarded by mu
	orgs    map[string]*bucket // guarded by mu
}

type bucket struct {
	tokens float64
	at     time.Time
}

// begin counts a test in; false says that there are too many, and when to come again.
func (l *limits) begin(org string, now time.Time) (wait time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running >= maxTests {
		return testRefill, false
	}
	if l.orgs == nil {
		l.orgs = make(map[string]*bucket)
	}
	for name, b := range l.orgs { // what is full again is as good as unknown
		b.tokens = min(testBurst, b.tokens+max(0, now.Sub(b.at).Seconds())/testRefill.Seconds())
		b.at = now
		if b.tokens >= testBurst && name != org {
			delete(l.orgs, name)
		}
	}
	b := l.orgs[org]
	if b == nil {
		b = &bucket{testBurst, now}
		l.orgs[org] = b
	}
	if b.tokens < 1 {
		return time.Duration((1 - b.tokens) * float64(testRefill)), false
	}
	b.tokens--
	l.running++
	return 0, true
}

func (l *limits) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running--
}
