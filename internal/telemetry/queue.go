package telemetry

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// Bounds of what waits to be sent.
const (
	maxQueued    = 4096            // spans, some 2 KiB each; what comes beyond is dropped and counted
	maxBatch     = 512             // spans of one request
	spanInterval = 2 * time.Second // a span waits no longer than this
)

// queue holds ended spans until they are sent. It never blocks who ends one.
type queue struct {
	full    chan struct{} // holds something when a batch is complete
	dropped prometheus.Counter

	mu     sync.Mutex
	spans  []sdktrace.ReadOnlySpan // guarded by mu
	closed bool                    // guarded by mu
}

var _ sdktrace.SpanProcessor = (*queue)(nil)

func newQueue(dropped prometheus.Counter) *queue {
	return &queue{full: make(chan struct{}, 1), dropped: dropped}
}

// OnStart implements sdktrace.SpanProcessor.
func (*queue) OnStart(context.Context, sdktrace.ReadWriteSpan) {}

// OnEnd implements sdktrace.SpanProcessor.
func (q *queue) OnEnd(s sdktrace.ReadOnlySpan) {
	if !s.SpanContext().IsSampled() {
		return
	}
	q.mu.Lock()
	room := !q.closed && len(q.spans) < maxQueued
	if room {
		q.spans = append(q.spans, s)
	}
	n := len(q.spans)
	q.mu.Unlock()
	if !room {
		q.dropped.Inc()
		return
	}
	if n >= maxBatch {
		select {
		case q.full <- struct{}{}:
		default: // it is said already
		}
	}
}

// take returns at most a batch of what waits, the oldest first.
func (q *queue) take() []sdktrace.ReadOnlySpan {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.spans), maxBatch)
	batch := q.spans[:n:n]
	q.spans = append([]sdktrace.ReadOnlySpan(nil), q.spans[n:]...)
	if len(q.spans) >= maxBatch {
		select {
		case q.full <- struct{}{}:
		default:
		}
	}
	return batch
}

// close drops what comes from now on, and returns how many spans were left.
func (q *queue) close() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.spans)
	q.spans, q.closed = nil, true
	return n
}

// Shutdown implements sdktrace.SpanProcessor.
func (q *queue) Shutdown(context.Context) error { return nil }

// ForceFlush implements sdktrace.SpanProcessor.
func (q *queue) ForceFlush(context.Context) error { return nil }
