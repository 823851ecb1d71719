package tally

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lines is a log whose lines a test takes.
type lines struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}}))
}

func (l *lines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := strings.Split(strings.TrimSpace(l.b.String()), "\n")
	l.b.Reset()
	if out[0] == "" {
		return nil
	}
	return out
}

func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		var l Log
		log := out.logger()
		want := func(when string, lines ...string) {
			t.Helper()
			if got := out.take(); strings.Join(got, "\n") != strings.Join(lines, "\n") {
				t.Errorf("%s:\n%s\nwant\n%s", when, strings.Join(got, "\n"), strings.Join(lines, "\n"))
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- l.Run(ctx, log) }()
		for i := range 100 {
			l.Info(log, "a", "refused", "to", i)
		}
		l.Info(log, "b", "refused", "to", "b")
		want("at once", "msg=refused to=0", "msg=refused to=b")
		time.Sleep(Interval - Interval/20)
		synctest.Wait()
		want("within the interval")
		time.Sleep(Interval / 10)
		synctest.Wait()
		want("after it", "msg=refused to=99 times=99")
		l.Info(log, "b", "refused", "to", "b")
		want("another that was quiet", "msg=refused to=b")
		l.Info(log, "a", "refused", "to", 7)
		want("again within an interval")
		time.Sleep(2 * Interval)
		synctest.Wait()
		want("a single one", "msg=refused to=7")
		time.Sleep(2 * Interval)
		synctest.Wait()
		if len(l.kinds) != 0 {
			t.Errorf("%d kinds are not forgotten", len(l.kinds))
		}
		l.Info(log, "a", "refused", "to", 1)
		l.Info(log, "a", "refused", "to", 2)
		cancel()
		if err := <-ran; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		want("at the end", "msg=refused to=1", "msg=refused to=2")
	})
}

// Without Run the next of a kind brings the line.
func TestLogWithoutRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		var l Log
		for range 3 {
			l.Info(out.logger(), 1, "x")
		}
		time.Sleep(Interval)
		l.Info(out.logger(), 1, "x")
		if got := fmt.Sprint(out.take()); got != "[msg=x msg=x times=3]" {
			t.Error(got)
		}
	})
}

func TestLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		var l Log
		for i := range 10 * MaxKinds {
			l.Info(out.logger(), i, "x")
		}
		if n := len(out.take()); n != MaxKinds+1 || len(l.kinds) != n {
			t.Errorf("%d lines, %d kinds", n, len(l.kinds))
		}
	})
}
