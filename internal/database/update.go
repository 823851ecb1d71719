package database

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Limits of updates.
const (
	// batchMost is how many updates share a transaction. A commit waits for the disk, about a millisecond: together they wait once.
	batchMost = 64
	// batchTimeout ends a transaction whose database does not answer.
	batchTimeout = 30 * time.Second
	// attempts is how often a transaction is run that others at the same time made fail. From the second on it runs alone.
	attempts = 5
)

// queue runs updates. Those that come while others run wait, and go into the next transaction together, each inside of a savepoint: one
// after the other, undone alone when it fails, and answered when all are committed. There is no goroutine: one of those that wait runs the
// transaction for all.
type queue struct {
	d *dialect
	// begin starts a transaction that may write. attempt counts from 0; from 1 on no other update of any process may run beside it.
	begin func(ctx context.Context, attempt int) (*transaction, error)
	lead  chan struct{} // capacity is how many transactions run at once

	mu      sync.Mutex
	waiting []*request // guarded by mu
}

// transaction is one that began.
type transaction struct {
	q        querier
	commit   func() error
	rollback func() error
}

// request is an update that waits.
type request struct {
	ctx  context.Context //nolint:containedctx // of the caller that waits: it may have gone when the update's turn comes
	fn   func(*Tx) error
	done chan struct{} // closed when err and panicked are set
	err  error
	// panicked is what fn panicked with; it goes on in the goroutine that asked.
	panicked any
}

// do runs fn in a transaction with others.
func (w *queue) do(ctx context.Context, fn func(*Tx) error) error {
	r := &request{ctx: ctx, fn: fn, done: make(chan struct{})}
	w.mu.Lock()
	w.waiting = append(w.waiting, r)
	w.mu.Unlock()
	gone := ctx.Done()
	for {
		select {
		case <-r.done:
			if r.panicked != nil {
				panic(r.panicked)
			}
			return r.err
		case <-gone:
			w.mu.Lock()
			i := slices.Index(w.waiting, r)
			if i >= 0 {
				w.waiting = slices.Delete(w.waiting, i, i+1)
			}
			w.mu.Unlock()
			if i >= 0 {
				return ctx.Err()
			}
			gone = nil // it runs: what becomes of it is known soon
		case w.lead <- struct{}{}:
			w.turn()
		}
	}
}

// turn runs what waits.
func (w *queue) turn() {
	defer func() { <-w.lead }()
	w.mu.Lock()
	n := min(batchMost, len(w.waiting))
	batch := slices.Clone(w.waiting[:n])
	w.waiting = slices.Delete(w.waiting, 0, n)
	w.mu.Unlock()
	if n == 0 {
		return
	}
	err := fmt.Errorf("%w: the update was abandoned", ErrUnavailable) // when fn ends the goroutine
	defer func() {
		for _, r := range batch {
			if err != nil {
				r.err = err
			}
			close(r.done)
		}
	}()
	err = w.run(batch)
}

// run runs a batch until it is committed or can not be. Its error is that of all; else each request has its own.
func (w *queue) run(batch []*request) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(batch[0].ctx), batchTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		again, err := w.attempt(ctx, batch, attempt)
		if err == nil {
			return nil
		}
		if !again || attempt+1 == attempts || ctx.Err() != nil {
			return w.d.translate(err)
		}
	}
}

// attempt runs a batch once. It says whether running it again may help.
func (w *queue) attempt(ctx context.Context, batch []*request, attempt int) (again bool, err error) {
	tx, err := w.begin(ctx, attempt)
	if err != nil {
		// A connection that lay idle may be dead: the next one is fresh.
		return attempt == 0 && w.d.lost(err) || w.d.again(err), err
	}
	ended := false
	defer func() {
		if !ended { // an error, or fn ended the goroutine
			_ = tx.rollback() // the error that brought us here tells more
		}
	}()
	for _, r := range batch {
		r.err = nil
		if r.panicked != nil {
			continue
		}
		if err := r.ctx.Err(); err != nil {
			r.err = err
			continue
		}
		t := &Tx{q: tx.q, d: w.d, ctx: ctx}
		if err := t.nested(len(batch) > 1, r); err != nil {
			return attempt == 0 && w.d.lost(err) || w.d.again(err), err
		}
		if len(batch) == 1 && (r.err != nil || r.panicked != nil) {
			return false, nil // rolled back
		}
	}
	ended = true
	if err := tx.commit(); err != nil {
		// Not again when the connection is lost: nobody knows whether it was committed.
		return w.d.again(err), errors.Join(err, tx.rollback())
	}
	return false, nil
}

// nested runs one request of a transaction. An error ends the transaction.
func (t *Tx) nested(savepoint bool, r *request) error {
	if savepoint {
		if _, err := t.q.ExecContext(t.ctx, `SAVEPOINT one`); err != nil {
			return err
		}
	}
	func() {
		defer func() { r.panicked = recover() }()
		r.err = r.fn(t)
	}()
	if t.broken != nil {
		r.panicked = nil
		return t.broken
	}
	if !savepoint {
		return nil
	}
	end := `RELEASE SAVEPOINT one`
	if r.err != nil || r.panicked != nil {
		end = `ROLLBACK TO SAVEPOINT one`
	}
	_, err := t.q.ExecContext(t.ctx, end)
	return err
}
