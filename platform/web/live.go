package web

import (
	"context"
	"fmt"
	"hash/fnv"
	"net/http"
	"sync"
	"time"

	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Intervals of live pages.
const (
	watchInterval = time.Second
	liveEvery     = 15 * time.Second // a comment keeps proxies from ending a silent stream
	liveWrite     = 30 * time.Second
	liveLife      = time.Hour // then the browser opens it again, and its right to read is looked at once more
	maxStreams    = 1000
)

// watchers know when something of an organization is another than a second ago: what administrators change, and what nodes tell. They look
// only where somebody watches.
type watchers struct {
	reg *registry.Registry

	mu    sync.Mutex
	orgs  map[string]*watched // guarded by mu
	count int                 // streams; guarded by mu
}

type watched struct {
	streams int
	mark    uint64
	changed chan struct{} // closed at the next change
}

func newWatchers(reg *registry.Registry) *watchers {
	return &watchers{reg: reg, orgs: make(map[string]*watched)}
}

// watch counts a stream in, unless there are too many, and returns how to count it out.
func (w *watchers) watch(org string) (done func(), ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.count >= maxStreams {
		return nil, false
	}
	w.count++
	o := w.orgs[org]
	if o == nil {
		o = &watched{changed: make(chan struct{})}
		w.orgs[org] = o
	}
	o.streams++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.count--
		if o.streams--; o.streams == 0 {
			delete(w.orgs, org)
		}
	}, true
}

// next is a channel that closes at the next change.
func (w *watchers) next(org string) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if o := w.orgs[org]; o != nil {
		return o.changed
	}
	return nil
}

func (w *watchers) run(ctx context.Context) {
	t := time.NewTicker(watchInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		w.mu.Lock()
		names := make([]string, 0, len(w.orgs))
		for name := range w.orgs {
			names = append(names, name)
		}
		w.mu.Unlock()
		for _, name := range names {
			mark, err := w.mark(ctx, name)
			if err != nil {
				continue // the pages themselves tell of a database that is gone
			}
			w.mu.Lock()
			if o := w.orgs[name]; o != nil && o.mark != mark {
				if o.mark != 0 {
					close(o.changed)
					o.changed = make(chan struct{})
				}
				o.mark = mark
			}
			w.mu.Unlock()
		}
	}
}

// mark is another when something that a page shows is another.
func (w *watchers) mark(ctx context.Context, org string) (uint64, error) {
	h := fnv.New64a()
	err := w.reg.Store.View(ctx, func(tx store.Tx) error {
		h.Reset()
		o, err := tx.Org(ctx, org)
		if err != nil {
			return err
		}
		seq, _, err := tx.AuditHead(ctx, org)
		if err != nil {
			return err
		}
		ns, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%d %d ", o.Version, seq) // a hash takes everything
		now := w.reg.Now()
		for _, n := range ns {
			beat, _ := w.reg.Board.Get(n.ID)
			fmt.Fprintf(h, "%s %s %d ", n.ID, w.reg.Board.State(n, now), beat.At.UnixNano())
		}
		return nil
	})
	return h.Sum64() | 1, err // never 0
}

// live is a stream of events (HTML Living Standard, server-sent events): "change" when the page is to be read again.
func (q *request) live() error {
	done, ok := q.s.watchers.watch(q.org)
	if !ok {
		return problem(http.StatusServiceUnavailable, "", "reload the page by hand, or try again later", "too many pages watch at once")
	}
	defer done()
	rc := http.NewResponseController(q.w)
	_ = rc.SetReadDeadline(time.Time{})
	h := q.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	send := func(text string) bool {
		_ = rc.SetWriteDeadline(time.Now().Add(liveWrite))
		if _, err := q.w.Write([]byte(text)); err != nil {
			return false
		}
		return rc.Flush() == nil
	}
	next := q.s.watchers.next(q.org)
	// What changed between the page and this stream is told at once.
	if !send("retry: 2000\nevent: change\ndata:\n\n") {
		return nil
	}
	beat, end := time.NewTicker(liveEvery), time.NewTimer(liveLife)
	defer beat.Stop()
	defer end.Stop()
	for {
		select {
		case <-q.ctx.Done():
			return nil
		case <-end.C:
			return nil
		case <-beat.C:
			if _, err := q.s.cfg.People.FromRequest(q.r); err != nil {
				return nil
			}
			if !send(": \n\n") {
				return nil
			}
		case <-next:
			next = q.s.watchers.next(q.org)
			if !send("event: change\ndata:\n\n") {
				return nil
			}
		}
	}
}
