package clock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeClock is off by something, and can be set.
type fakeClock struct {
	mu    sync.Mutex
	off   time.Duration // to be added to the machine's
	steps []time.Duration
	slews []time.Duration
	err   error
}

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

func (c *fakeClock) Step(d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.off += d
		c.steps = append(c.steps, d)
	}
	return c.err
}

func (c *fakeClock) Slew(d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.off += d
		c.slews = append(c.slews, d)
	}
	return c.err
}

// timeServer is an NTP server on loopback.
type timeServer struct {
	addr string

	mu     sync.Mutex
	asked  int
	off    time.Duration         // of its clock
	tamper func(b []byte)        // what it does to its answer
	before func(q []byte) []byte // what comes before the answer
	silent bool
}

func serve(t *testing.T) *timeServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &timeServer{addr: conn.LocalAddr().String()}
	done := make(chan struct{})
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	go func() {
		defer close(done)
		b := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.asked++
			if !s.silent {
				if s.before != nil {
					_, _ = conn.WriteTo(s.before(b[:n]), from)
				}
				a := answer(binary.BigEndian.Uint64(b[40:]), time.Now().Add(s.off))
				if s.tamper != nil {
					s.tamper(a)
				}
				_, _ = conn.WriteTo(a, from)
			}
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *timeServer) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *timeServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// ntpTime is t as a timestamp.
func ntpTime(t time.Time) uint64 {
	return uint64(t.Unix()-ntpEpoch)<<32 | uint64(t.Nanosecond())<<32/1e9
}

// answer is a good one.
func answer(cookie uint64, now time.Time) []byte {
	b := make([]byte, packetSize)
	b[0], b[1] = version<<3|modeServer, 2
	binary.BigEndian.PutUint32(b[4:], 1<<16/50)  // root delay 20 ms
	binary.BigEndian.PutUint32(b[8:], 1<<16/100) // root dispersion 10 ms
	binary.BigEndian.PutUint64(b[24:], cookie)
	binary.BigEndian.PutUint64(b[32:], ntpTime(now))
	binary.BigEndian.PutUint64(b[40:], ntpTime(now))
	return b
}

// keep runs a Keeper with short intervals until the test's end.
func keep(t *testing.T, c Clock, servers ...*timeServer) *Keeper {
	t.Helper()
	cfg := Config{Clock: c, retry: 20 * time.Millisecond, poll: 50 * time.Millisecond, timeout: 200 * time.Millisecond}
	for _, s := range servers {
		cfg.Servers = append(cfg.Servers, s.addr)
	}
	k := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := k.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return k
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func near(got, want time.Duration) bool { return (got - want).Abs() < 200*time.Millisecond }

func TestStepAndSlew(t *testing.T) {
	a, b := serve(t), serve(t)
	c := &fakeClock{off: -56 * 365 * 24 * time.Hour} // as a machine without a clock: 1970
	k := keep(t, c, a, b)
	if err := k.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	if len(c.steps) != 1 || !near(c.off, 0) {
		t.Errorf("steps %v, off by %v", c.steps, c.off)
	}
	c.mu.Unlock()
	if s := k.Status(); !s.Good || s.Server == "" || s.Error != "" || len(s.Servers) != 2 {
		t.Errorf("status: %+v", s)
	}
	for _, s := range []*timeServer{a, b} {
		s.set(func() { s.off = 300 * time.Millisecond })
	}
	until(t, "a slew", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.slews) > 0 && near(c.off, 300*time.Millisecond)
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.steps) != 1 {
		t.Errorf("300 ms were stepped: %v", c.steps)
	}
}

// TestOneLies has one of three servers an hour off: the other two count.
func TestOneLies(t *testing.T) {
	a, b, liar := serve(t), serve(t), serve(t)
	liar.set(func() {
		liar.off = time.Hour
		liar.tamper = func(p []byte) { binary.BigEndian.PutUint64(p[4:], 0) } // it says that it is perfect
	})
	c := &fakeClock{off: time.Minute}
	k := keep(t, c, liar, a, b)
	if err := k.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !near(c.off, 0) {
		t.Errorf("off by %v", c.off)
	}
}

// TestTwoDiffer believes neither of two.
func TestTwoDiffer(t *testing.T) {
	a, b := serve(t), serve(t)
	b.set(func() { b.off = time.Hour })
	c := &fakeClock{}
	k := keep(t, c, a, b)
	until(t, "a word about it", func() bool { return strings.Contains(k.Status().Error, "differ") })
	until(t, "several rounds", func() bool { return a.count() > 5 })
	c.mu.Lock()
	if k.Good() || len(c.steps)+len(c.slews) > 0 {
		t.Errorf("good %v, steps %v, slews %v", k.Good(), c.steps, c.slews)
	}
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Wait(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "differ") {
		t.Errorf("Wait: %v", err)
	}
}

// TestOneOfTwoIsGone believes the one that is left, after a while.
func TestOneOfTwoIsGone(t *testing.T) {
	a, b := serve(t), serve(t)
	b.set(func() { b.silent = true })
	c := &fakeClock{off: time.Minute}
	k := keep(t, c, a, b)
	if err := k.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := a.count(); n < alone {
		t.Errorf("believed after %d rounds", n)
	}
}

// TestInsaneAnswers has answers that nobody should believe; the clock stays as it is.
func TestInsaneAnswers(t *testing.T) {
	for name, tc := range map[string]struct {
		tamper func([]byte)
		off    time.Duration
		want   string
	}{
		"a client's mode":     {tamper: func(b []byte) { b[0] = version<<3 | modeClient }, want: "no answer"},
		"another's question":  {tamper: func(b []byte) { b[30] ^= 1 }, want: "no answer"},
		"version 7":           {tamper: func(b []byte) { b[0] = 7<<3 | modeServer }, want: "version 7"},
		"not synchronized":    {tamper: func(b []byte) { b[0] |= 3 << 6 }, want: "not synchronized"},
		"stratum 16":          {tamper: func(b []byte) { b[1] = 16 }, want: "not synchronized"},
		"far from the root":   {tamper: func(b []byte) { binary.BigEndian.PutUint32(b[8:], 5<<16) }, want: "off by"},
		"no time":             {tamper: func(b []byte) { clear(b[40:48]) }, want: "no time"},
		"sent before it came": {tamper: func(b []byte) { b[43]--; b[42]-- }, want: "before it had"},
		"1999":                {off: -27 * 365 * 24 * time.Hour, want: "cannot be"},
		"2070":                {off: 44 * 365 * 24 * time.Hour, want: "cannot be"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t)
			s.set(func() { s.off, s.tamper = tc.off, tc.tamper })
			c := &fakeClock{}
			k := keep(t, c, s)
			until(t, "an error", func() bool { return strings.Contains(k.Status().Error, tc.want) })
			if k.Good() {
				t.Error("good")
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if len(c.steps)+len(c.slews) > 0 {
				t.Errorf("steps %v, slews %v", c.steps, c.slews)
			}
		})
	}
}

// TestForgedFirst has an answer to another question arrive first: it is not taken, and does not end the waiting.
func TestForgedFirst(t *testing.T) {
	s := serve(t)
	s.set(func() {
		s.before = func(q []byte) []byte { return answer(binary.BigEndian.Uint64(q[40:])+1, time.Now().Add(time.Hour)) }
	})
	c := &fakeClock{}
	k := keep(t, c, s)
	if err := k.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !near(k.Status().Offset, 0) {
		t.Errorf("offset %v", k.Status().Offset)
	}
}

// TestKissOfDeath does not ask again whoever says DENY, and asks less often whoever says RATE.
func TestKissOfDeath(t *testing.T) {
	kiss := func(code string) func([]byte) {
		return func(b []byte) {
			b[1] = 0
			copy(b[12:16], code)
		}
	}
	deny, rate, good, good2 := serve(t), serve(t), serve(t), serve(t)
	deny.set(func() { deny.tamper = kiss("DENY") })
	rate.set(func() { rate.tamper = kiss("RATE") })
	k := keep(t, &fakeClock{}, deny, rate, good, good2)
	until(t, "several rounds", func() bool { return good.count() >= 4 })
	if n := deny.count(); n != 1 {
		t.Errorf("who said DENY was asked %d times", n)
	}
	if n, all := rate.count(), good.count(); n >= all {
		t.Errorf("who said RATE was asked %d times of %d", n, all)
	}
	if !k.Good() {
		t.Error("not good")
	}
	// All of them: it is said what to do.
	only := serve(t)
	only.set(func() { only.tamper = kiss("RSTR") })
	k = keep(t, &fakeClock{}, only)
	until(t, "a word about it", func() bool { return strings.Contains(k.Status().Error, "name others") })
	if n := only.count(); n != 1 {
		t.Errorf("who said RSTR was asked %d times", n)
	}
}

// TestServersOfTheNetwork prefers the configured ones, then those of DHCP, then the default.
func TestServersOfTheNetwork(t *testing.T) {
	k := New(Config{})
	if got := k.Status().Servers; fmt.Sprint(got) != fmt.Sprint(DefaultServers) {
		t.Errorf("%q", got)
	}
	k.Offer([]string{"192.0.2.1"})
	if got := k.Status().Servers; fmt.Sprint(got) != "[192.0.2.1]" {
		t.Errorf("%q", got)
	}
	k = New(Config{Servers: []string{"192.0.2.2"}})
	k.Offer([]string{"192.0.2.1"})
	if got := k.Status().Servers; fmt.Sprint(got) != "[192.0.2.2]" {
		t.Errorf("%q", got)
	}
}

// TestGoodWearsOff calls a clock good for a day after it was confirmed, and that it cannot be set an error.
func TestGoodWearsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &fakeClock{}
		k := New(Config{Clock: c})
		if k.Good() {
			t.Error("good from the beginning")
		}
		c.err = errors.New("not permitted")
		if err := k.correct(sample{server: "a", offset: time.Minute}); err == nil || k.Good() {
			t.Errorf("good though it could not be set: %v", err)
		}
		c.err = nil
		if err := k.correct(sample{server: "a", offset: time.Minute}); err != nil || !k.Good() {
			t.Errorf("not good: %v", err)
		}
		time.Sleep(stale - time.Second)
		if !k.Good() {
			t.Error("not good any more")
		}
		time.Sleep(2 * time.Second)
		if k.Good() {
			t.Error("still good")
		}
	})
}

func TestStamp(t *testing.T) {
	for _, want := range []time.Time{
		time.Date(2026, 11, 22, 10, 0, 0, 500_000_000, time.UTC),
		time.Date(2036, 2, 7, 6, 28, 15, 0, time.UTC), // the last second of the first era
		time.Date(2036, 2, 7, 6, 28, 17, 0, time.UTC), // in the second one
		time.Date(2060, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(1970, 1, 1, 0, 0, 1, 0, time.UTC),
	} {
		if got := stamp(ntpTime(want)); got.Sub(want).Abs() > time.Microsecond {
			t.Errorf("%v became %v", want, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(answer(1, time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)), uint64(1))
	f.Add([]byte{0x24, 0, 0, 0}, uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, cookie uint64) {
		r, err := parse(b, cookie)
		if err != nil {
			return
		}
		if len(b) < packetSize || binary.BigEndian.Uint64(b[24:]) != cookie || r.root > maxRoot || r.transmit.Before(r.receive) {
			t.Errorf("%x: %+v", b, r)
		}
	})
}
