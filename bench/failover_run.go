package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// disturbance is a cause at work on a bed.
type disturbance struct {
	at time.Time
	// over ends the cause, and returns when what was away has come back.
	over func(context.Context) (time.Time, error)
	// rest ends what over has left, after the measurement; nil is nothing.
	rest func(context.Context) (time.Time, error)
	// idle, where there is one, reports whether what the cause begins has come to its end.
	idle func() bool
}

// measuring is the right to measure, which one bed has at a time.
type measuring struct {
	mu   *sync.Mutex
	once sync.Once
}

func take(mu *sync.Mutex) *measuring {
	mu.Lock()
	return &measuring{mu: mu}
}

// give passes it on; again is nothing.
func (t *measuring) give() { t.once.Do(t.mu.Unlock) }

// run makes one run of a job. An error is a run that could not be made; the bed is not to be used again then.
func (b *failoverBed) run(ctx context.Context, turns *failoverTurns, j failoverJob, n int) (Try, error) {
	try := Try{Way: j.way, Cause: j.cause.name, Load: j.load, Run: n, Expect: j.cause.ends}
	start := time.Now()
	if err := b.whole(ctx); err != nil {
		return try, err
	}
	try.Whole = ms(time.Since(start))
	if err := b.hold(ctx); err != nil {
		return try, err
	}
	r := &failoverRun{failoverBed: b, cause: j.cause, try: &try, window: max(turns.cfg.Window, j.cause.window), most: ownWait, load: j.load}
	if b.site.Laptop == nil {
		r.most = peerWaits
	}
	defer r.abandon()
	var d *disturbance
	var err error
	if j.load == LoadQuiet {
		d, err = r.quiet(ctx, &turns.turn)
	} else {
		d, err = r.measure(ctx, &turns.turn)
	}
	if err == nil {
		for _, end := range []func(context.Context) (time.Time, error){d.over, d.rest} {
			if end != nil && err == nil {
				_, err = end(ctx)
			}
		}
	}
	if err == nil && j.cause.climbs {
		err = r.climb(ctx)
	}
	return try, err
}

// failoverRun is one run.
type failoverRun struct {
	*failoverBed
	cause  cause
	load   string
	try    *Try
	window time.Duration
	most   time.Duration // that something may be silent

	beats  *beats
	stream *stream
	counts *dropCounter
}

// abandon closes what an error left open.
func (r *failoverRun) abandon() {
	if r.beats != nil {
		_ = r.beats.stop() // told already
	}
	if r.stream != nil {
		r.stream.abandon()
	}
	if r.counts != nil {
		r.counts.stop()
	}
}

// begin opens the connections and waits until they are at speed.
func (r *failoverRun) begin(ctx context.Context) error {
	c, err := r.open(ctx)
	if err != nil {
		return fmt.Errorf("open the connection of the exchanges: %w", err)
	}
	r.beats = startBeats(c, failoverPace)
	r.try.Open = 1 + len(r.held)
	if r.load != LoadIdle {
		if r.stream, err = r.failoverBed.stream(ctx, r.load == LoadDown); err != nil {
			return err
		}
		r.try.Open++
	}
	wait(ctx, beforehand)
	if r.beats.count() == 0 || r.stream != nil && r.stream.count() == 0 {
		return errors.New("nothing arrives on a connection that was just opened")
	}
	return nil
}

// measure watches undisturbed, disturbs, and watches again. The cause goes on, unless everything was away.
func (r *failoverRun) measure(ctx context.Context, mu *sync.Mutex) (*disturbance, error) {
	start := time.Now()
	turn := take(mu)
	defer turn.give()
	r.try.Turn = ms(time.Since(start))
	fresh := r.dial(ctx)
	defer func() { fresh.end() }()
	select {
	case took := <-fresh.done:
		r.try.NewBefore = ms(took)
	case <-time.After(openWait):
		return nil, errors.New("no new connection on a bed that is whole")
	}
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	if r.cause.counts {
		r.counts = r.countDrops(ctx)
	}
	from, before, err := r.paths(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.meter(); err != nil {
		return nil, err
	}
	begin := time.Now()
	wait(ctx, r.window)
	path, moves, err := r.paths(ctx)
	if err != nil {
		return nil, err
	}
	r.try.Path, r.try.Early = path, moves-before
	if from == "" {
		r.try.Path = ""
	}
	if r.counts != nil {
		r.counts.mark(ctx)
	}
	hit := r.cause.hit
	if r.site.Laptop == nil {
		hit = r.cause.hub
	}
	d, err := hit(ctx, r.failoverBed, path)
	if err != nil {
		return nil, fmt.Errorf("disturb: %w", err)
	}
	fresh.end()
	fresh = r.dial(ctx)
	r.undisturbed(begin, d.at)
	wait(ctx, time.Until(d.at.Add(r.window)))
	back, dark := d.at, r.cause.dark
	if r.site.Laptop == nil && d.over != nil {
		dark = causeHubAway
	}
	if dark > 0 {
		turn.give()
		wait(ctx, time.Until(d.at.Add(dark)))
		over := d.over
		d.over = nil
		if back, err = over(ctx); err != nil {
			return nil, fmt.Errorf("end the disturbance: %w", err)
		}
	}
	end := r.recovered(ctx, turn, d, back, fresh)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	r.disturbed(d.at, end)
	if dark > 0 {
		if first := r.beats.firstAfter(back); !first.IsZero() {
			r.try.Resumed = ms(first.Sub(back))
		}
	}
	if after, now, err := r.paths(ctx); err == nil {
		r.try.After, r.try.Moves = after, now-moves
	}
	if r.counts != nil {
		after, before := r.counts.result(ctx)
		r.try.Dropped, r.try.DroppedBefore, r.try.Resent, r.try.ResentBefore = after.dropped, before.dropped, after.lost, before.lost
		r.counts = nil
	}
	r.finish(ctx)
	return d, nil
}

// paths are the path of the client's session and how often it has moved; nothing of a peer.
func (r *failoverRun) paths(ctx context.Context) (string, uint64, error) {
	if r.site.Laptop == nil {
		return "", 0, nil
	}
	s, _, err := r.clientSession(ctx)
	return s.Path, s.Moves, err
}

// undisturbed notes what the connections were like before.
func (r *failoverRun) undisturbed(from, to time.Time) {
	r.try.Window = ms(to.Sub(from))
	r.try.gaps = r.beats.gaps(from, to)
	r.try.Before = ms(r.beats.longest(from, to))
	if r.stream != nil {
		r.try.BulkBefore = ms(r.stream.longest(from, to))
	}
}

// disturbed notes what they were like from the disturbance on.
func (r *failoverRun) disturbed(from, to time.Time) {
	r.try.Watched = ms(to.Sub(from))
	r.try.Stall = ms(r.beats.longest(from, to))
	r.try.Excess = r.try.Stall - r.try.Before
	if r.stream != nil {
		r.try.Bulk = ms(r.stream.longest(from, to))
		r.try.BulkExcess = r.try.Bulk - r.try.BulkBefore
	}
}

// recovered waits until all works again that may, and returns when it looked last. The turn is passed on meanwhile where that takes longer
// than the window.
func (r *failoverRun) recovered(ctx context.Context, turn *measuring, d *disturbance, back time.Time, fresh *dials) time.Time {
	deadline := back.Add(r.most)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		now := time.Now()
		works := func(a *arrivals, ended bool) bool {
			return ended || a.last().After(back) && now.Sub(a.last()) < recently
		}
		select {
		case took := <-fresh.done:
			r.try.New = ms(took)
		default:
		}
		streams := r.stream == nil || works(&r.stream.arrivals, len(r.stream.ended) > 0)
		if r.try.New > 0 && works(&r.beats.arrivals, r.beats.ended() != nil) && streams && (d.idle == nil || d.idle()) {
			return now
		}
		if now.After(deadline) || ctx.Err() != nil {
			r.try.Silent = true
			return now
		}
		turn.give()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// finish closes the connections, looks at every byte, and counts what is lost.
func (r *failoverRun) finish(ctx context.Context) {
	lose := func(n int, what string, err error) {
		if r.try.Lost += n; r.try.Why == "" {
			r.try.Why = what + ": " + err.Error()
		}
	}
	stuck := r.try.Silent
	if s := r.stream; s != nil {
		r.stream = nil
		if stuck && time.Since(s.last()) > recently {
			s.abandon()
			r.try.Bytes = s.received.Load()
			lose(1, "the stream", errStuck)
		} else {
			n, err := s.finish(ctx)
			r.try.Bytes = n
			if err != nil {
				lose(1, "the stream", err)
				r.try.Wrong = errors.Is(err, errWrongBytes)
			}
		}
	}
	b := r.beats
	r.beats = nil
	since := time.Since(b.last())
	if err := b.stop(); err != nil {
		lose(1, "the exchanges", err)
	} else if stuck && since > recently {
		lose(1, "the exchanges", errStuck)
	}
	answer := openWait
	if stuck {
		answer = recently
	}
	if n, err := r.heldLost(answer); n > 0 {
		lose(n, "held", err)
	}
}

// errStuck is a connection on which nothing came within the time that it had, and which was not closed either.
var errStuck = errors.New("nothing comes, and it is not closed")

// quiet measures the next byte on a connection that was idle before and after the disturbance.
func (r *failoverRun) quiet(ctx context.Context, mu *sync.Mutex) (*disturbance, error) {
	c, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r.try.Open = 1 + len(r.held)
	wait(ctx, quietFor)
	turn := take(mu)
	defer turn.give()
	took, err := ask(c, 1, openWait)
	if err != nil {
		return nil, err
	}
	r.try.Before = ms(took)
	turn.give()
	wait(ctx, quietFor)
	turn = take(mu)
	defer func() { turn.give() }()
	path, moves, err := r.paths(ctx)
	if err != nil {
		return nil, err
	}
	r.try.Path = path
	d, err := r.cause.hit(ctx, r.failoverBed, path)
	if err != nil {
		return nil, fmt.Errorf("disturb: %w", err)
	}
	wait(ctx, quietAfter)
	fresh := r.dial(ctx)
	defer fresh.end()
	took, err = ask(c, 2, r.most)
	r.try.Stall, r.try.Excess, r.try.Watched = ms(took), ms(took)-r.try.Before, ms(time.Since(d.at))
	if err != nil {
		var timeout net.Error
		r.try.Silent = errors.As(err, &timeout) && timeout.Timeout()
		r.try.Lost, r.try.Why = 1, "the idle connection: "+err.Error()
	}
	select {
	case took := <-fresh.done:
		r.try.New = ms(took)
	case <-time.After(r.most):
		r.try.Silent = true
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if n, err := r.heldLost(openWait); n > 0 {
		r.try.Lost, r.try.Why = r.try.Lost+n, err.Error()
	}
	if after, now, err := r.paths(ctx); err == nil {
		r.try.After, r.try.Moves = after, now-moves
	}
	return d, nil
}

// climbPace is that of the exchanges while the session climbs back: slow, since other beds measure meanwhile.
const climbPace = 50 * time.Millisecond

// climb waits until the session is back on UDP after a cause that has ended.
func (r *failoverRun) climb(ctx context.Context) error {
	c, err := r.open(ctx)
	if err != nil {
		return fmt.Errorf("open a connection: %w", err)
	}
	b := startBeats(c, climbPace)
	start := time.Now()
	for {
		path, _, err := r.paths(ctx)
		if err == nil && onUDP(path) {
			break
		}
		if time.Since(start) > wholeWait || ctx.Err() != nil {
			_ = b.stop() // what follows says enough
			return fmt.Errorf("not back on UDP %v after it passes again: %q, %w", time.Since(start).Round(time.Second), path, errors.Join(err, context.Cause(ctx)))
		}
		wait(ctx, 50*time.Millisecond)
	}
	r.try.Back = ms(time.Since(start))
	wait(ctx, time.Second) // the move itself
	r.try.Climb = ms(b.longest(start, time.Now()))
	r.try.Open++
	if err := b.stop(); err != nil {
		r.try.Lost, r.try.Why = r.try.Lost+1, "the exchanges of the way back: "+err.Error()
	}
	return nil
}
