package registry

import (
	"context"
	"time"

	"sallyway/platform/store"
)

// beforeKey is the key of what runs before a change in a context.
type beforeKey struct{}

type before struct {
	fn   func(ctx context.Context, tx store.Tx, now time.Time) error
	done bool // a transaction with it was committed
}

// Before has fn run inside of the first transaction that changes something with the returned context, ahead of the change; its error undoes the
// transaction and is that of the method. The context that fn gets has methods which read (Node, Resource …) read inside of the transaction. done says
// whether such a transaction was committed. The context is for one goroutine.
func Before(ctx context.Context, fn func(ctx context.Context, tx store.Tx, now time.Time) error) (_ context.Context, done func() bool) {
	b := &before{fn: fn}
	return context.WithValue(ctx, beforeKey{}, b), func() bool { return b.done }
}
