// Package clock keeps the machine's clock right by SNTP, the client mode of RFC 5905, and says whether it is: certificates
// can be judged by a right clock only.
//
// A round asks every server once. Answers count that RFC 5905 section 14 and good sense let count; with two servers or more
// two have to agree, so that a single one that is wrong moves nothing. A clock that is off by more than half a second is
// stepped, by less it is slewed. A server that says DENY or RSTR is not asked again for a day, one that says RATE more seldom
// (section 7.4).
//
//	k := clock.New(clock.Config{Log: log})
//	go k.Run(ctx)
//	k.Offer(serversOfDHCP)
//	err := k.Wait(ctx) // nil: the clock is right
package clock

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// DefaultServers are asked where neither the configuration nor DHCP names any.
var DefaultServers = []string{"0.pool.ntp.org", "1.pool.ntp.org", "2.pool.ntp.org", "time.cloudflare.com"}

// Clock is what is kept right.
type Clock interface {
	Now() time.Time
	// Step sets the clock: adds offset at once.
	Step(offset time.Duration) error
	// Slew has the clock run faster or slower until offset is made up for.
	Slew(offset time.Duration) error
}

// Config of a Keeper. The zero value keeps the machine's clock by DefaultServers.
type Config struct {
	Clock   Clock    // nil: the machine's, which needs CAP_SYS_TIME
	Servers []string // host or host:port; they go before those that are offered
	// Floor is a time that is surely over, such as the program's build: no answer before it is believed, nor one of more than
	// 20 years after it. Zero: 2026.
	Floor time.Time
	Log   *slog.Logger // nil: silent

	// Durations for tests; zero: the constants below.
	retry, poll, timeout time.Duration
}

const (
	stepAbove  = 500 * time.Millisecond // beyond it a clock is stepped
	agreement  = 250 * time.Millisecond // how far two servers may differ beyond what their answers leave open
	retryFirst = 2 * time.Second        // after a round without result; doubled each time up to pollLast
	pollFirst  = 64 * time.Second       // after a round with one; doubled each time up to pollLast
	pollLast   = 1024 * time.Second
	timeout    = 3 * time.Second // for one answer
	stale      = 24 * time.Hour  // a clock that has not been confirmed for so long is not called good
	banned     = 24 * time.Hour  // how long a server that said DENY is left alone
	maxServers = 8               // of one source
	// alone is how many rounds in a row one server of several must have been the only one that answered until it is believed:
	// a site may have two in its settings of which one is gone.
	alone = 3
)

// epoch is the default Floor.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Status is what is known about the clock.
type Status struct {
	Good    bool          `json:"good"`
	Servers []string      `json:"servers,omitempty"` // those that are asked
	Server  string        `json:"server,omitempty"`  // whose answer was taken last
	Offset  time.Duration `json:"offset"`            // of the clock to it, before it was corrected; nanoseconds
	Last    time.Time     `json:"last,omitzero"`     // when that was, by the corrected clock
	Error   string        `json:"error,omitempty"`   // why the latest round had no result
}

// Keeper keeps a clock. Its methods may be called concurrently.
type Keeper struct {
	cfg  Config
	wake chan struct{} // other servers

	mu      sync.Mutex // guards what follows
	offered []string
	status  Status
	good    chan struct{} // closed when the clock is good for the first time
	last    time.Time     // of the latest result, by the monotonic clock
	servers map[string]*server
	lonely  int // rounds in a row in which one of several answered
}

// server is what is remembered about one.
type server struct {
	until time.Time     // not to be asked before, by the monotonic clock
	pause time.Duration // after the latest RATE
}

// New makes a Keeper; it does nothing until Run.
func New(cfg Config) *Keeper {
	if cfg.Clock == nil {
		cfg.Clock = System{}
	}
	if cfg.Floor.IsZero() {
		cfg.Floor = epoch
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.retry, cfg.poll, cfg.timeout = cmp.Or(cfg.retry, retryFirst), cmp.Or(cfg.poll, pollFirst), cmp.Or(cfg.timeout, timeout)
	return &Keeper{cfg: cfg, wake: make(chan struct{}, 1), good: make(chan struct{}), servers: map[string]*server{}}
}

// Offer says which servers the network names, by DHCP. It replaces those of an earlier call and has them asked soon.
func (k *Keeper) Offer(servers []string) {
	servers = servers[:min(len(servers), maxServers)]
	k.mu.Lock()
	same := slices.Equal(servers, k.offered)
	k.offered = slices.Clone(servers)
	k.mu.Unlock()
	if !same && len(k.cfg.Servers) == 0 {
		k.Now()
	}
}

// Now has a round begin soon, as when the machine has just come online.
func (k *Keeper) Now() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Good says whether the clock has been confirmed lately.
func (k *Keeper) Good() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.goodLocked()
}

func (k *Keeper) goodLocked() bool { return !k.last.IsZero() && time.Since(k.last) < stale }

// Wait returns when the clock has been right for the first time, or with ctx's error and what was wrong.
func (k *Keeper) Wait(ctx context.Context) error {
	select {
	case <-k.good:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the clock is not known to be right (%s): %w", cmp.Or(k.Status().Error, "no time server was asked yet"), ctx.Err())
	}
}

// Status returns what is known now.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.status
	s.Good = k.goodLocked()
	s.Servers = k.namesLocked()
	return s
}

// namesLocked are the servers to ask.
func (k *Keeper) namesLocked() []string {
	switch {
	case len(k.cfg.Servers) > 0:
		return slices.Clone(k.cfg.Servers)
	case len(k.offered) > 0:
		return slices.Clone(k.offered)
	}
	return slices.Clone(DefaultServers)
}

// Run asks and corrects until ctx ends, and returns nil then.
func (k *Keeper) Run(ctx context.Context) error {
	retry, poll := k.cfg.retry, k.cfg.poll
	for {
		pause := retry
		if err := k.round(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			k.failed(err)
			retry, poll = min(2*retry, pollLast), k.cfg.poll
		} else {
			pause, retry, poll = poll, k.cfg.retry, min(2*poll, pollLast)
		}
		t := time.NewTimer(pause + rand.N(pause/8))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-k.wake:
			t.Stop()
			retry = k.cfg.retry
		case <-t.C:
		}
	}
}

// failed keeps and tells why a round had no result.
func (k *Keeper) failed(err error) {
	k.mu.Lock()
	news := k.status.Error != err.Error()
	k.status.Error = err.Error()
	k.mu.Unlock()
	if news {
		k.cfg.Log.Warn("no time from the time servers", "error", err)
	}
}

// round asks all servers once and corrects the clock.
func (k *Keeper) round(ctx context.Context) error {
	k.mu.Lock()
	names := k.namesLocked()
	now := time.Now()
	asked := slices.DeleteFunc(slices.Clone(names), func(s string) bool {
		have := k.servers[s]
		return have != nil && now.Before(have.until)
	})
	k.mu.Unlock()
	if len(asked) == 0 {
		return errors.New("all time servers asked not to be asked: name others as ntp in the configuration")
	}
	type result struct {
		sample
		err error
	}
	results := make(chan result, len(asked))
	for _, name := range asked {
		go func() {
			s, err := query(ctx, k.cfg.Clock, name, k.cfg.timeout)
			if err == nil {
				err = k.believable(s)
			}
			s.server = name
			results <- result{s, err}
		}()
	}
	var samples []sample
	var wrong []string
	for range asked {
		r := <-results
		if r.err != nil {
			k.learn(r.server, r.err)
			wrong = append(wrong, fmt.Sprintf("%s: %v", r.server, r.err))
			continue
		}
		samples = append(samples, r.sample)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	slices.Sort(wrong)
	if len(samples) == 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	best, agree := choose(samples)
	switch {
	case agree >= 2 || len(names) == 1:
		k.lonely = 0
	case len(samples) == 1:
		if k.lonely++; k.lonely < alone {
			return fmt.Errorf("only %s answers (%s)", best.server, strings.Join(wrong, "; "))
		}
	default:
		k.lonely = 0
		slices.SortFunc(samples, func(a, b sample) int { return cmp.Compare(a.server, b.server) })
		var says []string
		for _, s := range samples {
			says = append(says, fmt.Sprintf("%s says %v", s.server, s.offset.Round(time.Millisecond)))
		}
		return fmt.Errorf("time servers differ: %s", strings.Join(says, ", "))
	}
	return k.correct(best)
}

// believable judges a time by itself.
func (k *Keeper) believable(s sample) error {
	t := k.cfg.Clock.Now().Add(s.offset)
	if t.Before(k.cfg.Floor) || t.After(k.cfg.Floor.AddDate(20, 0, 0)) {
		return fmt.Errorf("it says %s, which cannot be", t.UTC().Format(time.DateOnly))
	}
	return nil
}

// learn remembers a kiss of death.
func (k *Keeper) learn(name string, err error) {
	var kiss kissError
	if !errors.As(err, &kiss) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.servers[name]
	if s == nil {
		s = &server{}
		k.servers[name] = s
	}
	switch kiss {
	case "DENY", "RSTR":
		s.until = time.Now().Add(banned)
	case "RATE":
		s.pause = min(max(2*s.pause, 2*k.cfg.poll), banned)
		s.until = time.Now().Add(s.pause)
	}
}

// choose returns the answer with the shortest way among the greatest number of answers that agree, and that number.
func choose(samples []sample) (sample, int) {
	var best sample
	most := 0
	for _, s := range samples {
		n := 0
		for _, o := range samples {
			if (s.offset - o.offset).Abs() <= s.uncertainty()+o.uncertainty()+agreement {
				n++
			}
		}
		if n > most || n == most && s.uncertainty() < best.uncertainty() {
			best, most = s, n
		}
	}
	return best, most
}

// correct applies an offset.
func (k *Keeper) correct(s sample) error {
	step := s.offset.Abs() > stepAbove
	var err error
	if step {
		err = k.cfg.Clock.Step(s.offset)
	} else {
		err = k.cfg.Clock.Slew(s.offset)
	}
	if err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	if step {
		k.cfg.Log.Info("clock set", "server", s.server, "offset", s.offset)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.last = time.Now()
	k.status.Server, k.status.Offset, k.status.Last, k.status.Error = s.server, s.offset, k.cfg.Clock.Now(), ""
	select {
	case <-k.good:
	default:
		k.cfg.Log.Info("the clock is right", "server", s.server, "offset", s.offset)
		close(k.good)
	}
	return nil
}

// ntpPort is where servers listen.
const ntpPort = "123"

// address adds the port where there is none.
func address(server string) string {
	if _, _, err := net.SplitHostPort(server); err == nil {
		return server
	}
	return net.JoinHostPort(server, ntpPort)
}
