package leg

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun/v4"
)

// TestSilence: which patterns of ticks are the end of a steady stream.
func TestSilence(t *testing.T) {
	for _, c := range []struct {
		name, ticks string // x: something came
		at          []int  // ticks that end a stream
	}{
		{"nothing", "....................", nil},
		{"a stream that goes on", "xxxxxxxxxxxxxxxxxxxxxxxxx", nil},
		{"a stream that ends", "xxxxxxxxxx..........", []int{12}},
		{"one with holes", "x.xx.xx.xx..xx.....", []int{16}},
		{"a pause too short to count", "xxxxxxxxxx..xxxxxxxx", nil},
		{"twice", "xxxxxxxxxx...xxxxxx....", []int{12, 21}},
		{"a few of few", "x..x..x..x..x..x....", nil},
		{"a burst", "xxx.................", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s silence
			var at []int
			for i, tick := range c.ticks {
				if s.tick(tick == 'x') {
					at = append(at, i)
				}
			}
			if !slices.Equal(at, c.at) {
				t.Errorf("%v, want %v", at, c.at)
			}
		})
	}
}

// doubts takes down what a leg says of its doubts, and when.
type doubts struct {
	mu   sync.Mutex
	said []bool
	at   []time.Time
}

func (d *doubts) note(doubtful bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.said, d.at = append(d.said, doubtful), append(d.at, time.Now())
}

func (d *doubts) list() []bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.said)
}

// since is how long after begin the first doubt came.
func (d *doubts) since(begin time.Time) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.at) == 0 {
		return -1
	}
	return d.at[0].Sub(begin)
}

// stream has datagrams counted on the leg, one every interval, for d.
func stream(l *Leg, interval, d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		l.stats.ReceivedDatagrams.Add(1)
		time.Sleep(interval) // of a bubble
	}
}

func TestDoubts(t *testing.T) {
	with := func(f func(t *testing.T, d *doubts, f *fakeRelay, l *Leg)) func(*testing.T) {
		return func(t *testing.T) {
			d, cfg := &doubts{}, fakeConfig()
			cfg.OnDoubt = d.note
			bubble(t, cfg, func(t *testing.T, r *fakeRelay, l *Leg) { f(t, d, r, l) })
		}
	}
	t.Run("a stream ends and the relay answers", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		stream(l, 50*time.Millisecond, 3*time.Second)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := d.list(); !slices.Equal(got, []bool{true, false}) || l.Doubtful() {
			t.Errorf("%v, doubtful %v", got, l.Doubtful())
		}
		if n := l.Stats().Checks; n != 1 || l.Err() != nil {
			t.Errorf("%d checks, %v", n, l.Err())
		}
	}))
	t.Run("a stream ends with the relay", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		stream(l, 50*time.Millisecond, 3*time.Second)
		f.die()
		begin := time.Now()
		const heard = (silentTicks + 1) * listenTick
		lostWithin(t, l, gentleTotal, heard+gentleTotal+time.Millisecond)
		if s := d.since(begin); s < 0 || s > heard {
			t.Errorf("it doubted after %v", s)
		}
		if got := d.list(); !slices.Equal(got, []bool{true}) || !l.Doubtful() || !errors.Is(l.Err(), errNoAnswer) {
			t.Errorf("%v, %v", got, l.Err())
		}
	}))
	t.Run("what comes seldom ends without notice", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		stream(l, 300*time.Millisecond, 10*time.Second)
		time.Sleep(10 * time.Second)
		if got := d.list(); len(got) != 0 {
			t.Errorf("%v", got)
		}
	}))
	t.Run("the relay is silent for a second", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		stream(l, 50*time.Millisecond, 3*time.Second)
		f.die()
		time.Sleep(time.Second)
		f.mu.Lock()
		f.dead = false
		f.mu.Unlock()
		time.Sleep(time.Second)
		if got := d.list(); !slices.Equal(got, []bool{true, false}) || l.Err() != nil {
			t.Errorf("%v, %v", got, l.Err())
		}
	}))
	t.Run("a keepalive goes unanswered", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		f.die()
		begin := time.Now()
		lostWithin(t, l, 0, DefaultKeepalive+leastSlow+gentleTotal+time.Millisecond)
		if s := d.since(begin); s < 0 || s > DefaultKeepalive+leastSlow {
			t.Errorf("it doubted after %v", s)
		}
	}))
	t.Run("a slow relay is no silent one", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		f.setRTT(150 * time.Millisecond)
		time.Sleep(4 * DefaultKeepalive)
		if got := d.list(); len(got) != 0 {
			t.Errorf("%v", got)
		}
	}))
	t.Run("a sign during a doubt", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		f.setRTT(30 * time.Millisecond)
		l.suspect(errSilent)
		time.Sleep(10 * time.Millisecond)
		l.suspect(errUnknown)
		time.Sleep(time.Second)
		if got := d.list(); !slices.Equal(got, []bool{true, false}) || l.Doubtful() {
			t.Errorf("%v, doubtful %v", got, l.Doubtful())
		}
	}))
	t.Run("TLS", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d, cfg := &doubts{}, fakeConfig()
			cfg.OnDoubt = d.note
			f := newFakeRelay(t)
			f.stream = true
			l := up(t, f, cfg)
			f.die()
			begin := time.Now()
			lostWithin(t, l, 0, DefaultKeepalive+slowStream+gentleStream+time.Millisecond)
			if s := d.since(begin); s < 0 || s > DefaultKeepalive+slowStream {
				t.Errorf("it doubted after %v", s)
			}
			_ = l.Close()
		})
	})
	t.Run("a rendezvous goes unanswered", with(func(t *testing.T, d *doubts, f *fakeRelay, l *Leg) {
		f.on(stun.MethodChannelBind, func(*stun.Message) *stun.Message { return nil })
		begin := time.Now()
		_, err := l.bind(t.Context(), clientNode, peerRelayed, nil)
		if !errors.Is(err, errNoAnswer) {
			t.Error(err)
		}
		if s := d.since(begin); s < 0 || s > leastSlow+time.Millisecond {
			t.Errorf("it doubted after %v", s)
		}
	}))
}
