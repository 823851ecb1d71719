package dialler

import (
	"sync"
	"time"
)

// Tests of an organization: at most testBurst at once, then one more each testRefill.
const (
	testBurst  = 10
	testRefill = 3 * time.Second
	// maxTests is how many tests run at once, maxOrgTests how many of one organization: a gateway takes eight sessions of one node.
	maxTests, maxOrgTests = 8, 4
)

// limits count tests.
type limits struct {
	mu      sync.Mutex
	running int                // guarded by mu
	orgs    map[string]*bucket // guarded by mu
}

type bucket struct {
	tokens  float64
	at      time.Time
	running int
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
		if b.tokens >= testBurst && b.running == 0 && name != org {
			delete(l.orgs, name)
		}
	}
	b := l.orgs[org]
	if b == nil {
		b = &bucket{tokens: testBurst, at: now}
		l.orgs[org] = b
	}
	if b.running >= maxOrgTests {
		return testRefill, false
	}
	if b.tokens < 1 {
		return time.Duration((1 - b.tokens) * float64(testRefill)), false
	}
	b.tokens--
	b.running++
	l.running++
	return 0, true
}

// end counts out a test that began.
func (l *limits) end(org string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running--
	l.orgs[org].running--
}
