package push

import (
	"context"
	"errors"
	"time"

	"sallyway/platform/presence"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// reopened is how old a stream is at least that ends because another platform tells of a newer one: word of one that was older may come late.
const reopened = 3 * time.Second

// RemoteChanged is told of a change that was committed by another platform. A version that is known is no news.
func (h *Hub) RemoteChanged(name string, version uint64) {
	h.mu.Lock()
	o := h.orgLocked(name)
	news := version > o.version
	if news {
		h.invalidateLocked(name, version)
	}
	h.mu.Unlock()
	if news {
		h.moves.Store(true)
		h.wakeAllocation()
	}
}

// RemoteDropped is told of a node that lost its rights by another platform.
func (h *Hub) RemoteDropped(node string) {
	h.reg.Board.Drop(node)
	h.end(node, 0, ErrDropped)
}

// RemoteOpened is told of a node that opened a stream at another platform: it has left this one.
func (h *Hub) RemoteOpened(node string) { h.end(node, reopened, ErrReplaced) }

// RemoteBeat is told of a heartbeat that another platform got.
func (h *Hub) RemoteBeat(node string, b presence.Beat) { h.beat(node, b) }

// Streams is how many control streams there are.
func (h *Hub) Streams() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.streams)
}

// catchUp sees to it that a node that comes from another platform is told nothing older here: word of a change may still be on its way.
func (h *Hub) catchUp(ctx context.Context, name string) error {
	if h.cfg.Peers == (alone{}) {
		return nil
	}
	var version uint64
	err := h.reg.Store.View(ctx, func(tx store.Tx) error {
		o, err := tx.Org(ctx, name)
		if err == nil {
			version = o.Version
		}
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return ErrDropped
	}
	if err != nil {
		return err
	}
	h.RemoteChanged(name, version)
	return nil
}

// View is an organization as it is now; store.ErrNotFound when there is none.
func (h *Hub) View(ctx context.Context, name string) (*view.View, error) {
	if err := h.catchUp(ctx, name); err != nil {
		if errors.Is(err, ErrDropped) {
			return nil, store.ErrNotFound
		}
		return nil, err
	}
	v, _, _, err := h.current(ctx, name)
	return v, err
}
