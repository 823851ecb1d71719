// Package tally keeps a log readable where one thing happens often: the first of its kind is a line at once, and what follows is one line
// per Interval, which tells of the last and how many there were.
//
//	var refused tally.Log
//	refused.Info(log, key{peer, rule}, "flow refused", "peer", peer, "to", target)
//	err := refused.Run(ctx, log) // for the line of an interval after which nothing comes
package tally

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Interval is between two lines of one kind.
const Interval = 10 * time.Second

// MaxKinds bounds the kinds that are told apart at a time. What comes beyond shares one.
const MaxKinds = 1024

// Log counts. The zero value is ready, and its methods may be called concurrently.
type Log struct {
	mu    sync.Mutex // guards kinds
	kinds map[any]*kind
}

// kind is what happens again.
type kind struct {
	told  time.Time // when it last was
	times int       // since then
	level slog.Level
	msg   string // of the last time
	args  []any
}

// rest is the key of what is not told apart.
type rest struct{}

// Info logs msg with args, or counts it where there has been a line of the same key, which is comparable, within the Interval. A line that
// stands for several says so by the key times.
func (l *Log) Info(log *slog.Logger, key any, msg string, args ...any) {
	l.add(log, slog.LevelInfo, key, msg, args)
}

// Warn is Info for what somebody should do something about.
func (l *Log) Warn(log *slog.Logger, key any, msg string, args ...any) {
	l.add(log, slog.LevelWarn, key, msg, args)
}

func (l *Log) add(log *slog.Logger, level slog.Level, key any, msg string, args []any) {
	now := time.Now()
	l.mu.Lock()
	k := l.kinds[key]
	if k == nil && len(l.kinds) >= MaxKinds {
		key = rest{}
		k = l.kinds[key]
	}
	if k == nil {
		if l.kinds == nil {
			l.kinds = map[any]*kind{}
		}
		k = &kind{}
		l.kinds[key] = k
	}
	k.times, k.level, k.msg, k.args = k.times+1, level, msg, args
	line := k.takeLocked(now)
	l.mu.Unlock()
	line(log)
}

// takeLocked returns the line that is due, or one that does nothing.
func (k *kind) takeLocked(now time.Time) func(*slog.Logger) {
	if k.times == 0 || now.Sub(k.told) < Interval {
		return func(*slog.Logger) {}
	}
	level, msg, args := k.level, k.msg, k.args
	if k.times > 1 {
		args = append(slices.Clone(args), "times", k.times)
	}
	*k = kind{told: now}
	return func(log *slog.Logger) { log.Log(context.Background(), level, msg, args...) }
}

// Run logs what an Interval has left until ctx ends, then the rest.
func (l *Log) Run(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(Interval / 10)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			l.flush(log, now)
		case <-ctx.Done():
			l.flush(log, time.Now().Add(Interval))
			return ctx.Err()
		}
	}
}

// flush logs what is due at now, and forgets the kinds that have not happened again.
func (l *Log) flush(log *slog.Logger, now time.Time) {
	var lines []func(*slog.Logger)
	l.mu.Lock()
	for key, k := range l.kinds {
		if k.times == 0 && now.Sub(k.told) >= Interval {
			delete(l.kinds, key)
			continue
		}
		lines = append(lines, k.takeLocked(now))
	}
	l.mu.Unlock()
	for _, line := range lines {
		line(log)
	}
}
