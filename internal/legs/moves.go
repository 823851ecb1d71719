package legs

import (
	"cmp"
	"slices"

	"sallyway/relay/leg"
)

// Why legs move from one transport to another, in status, log and MoveCount.
const (
	WhyLost       = "the leg before was lost"
	WhyUnanswered = "the relay does not answer"
	WhyBetter     = "a better transport works again"
)

// moveKey is a kind of move.
type moveKey struct {
	from, to leg.Transport
	why      string
}

// MoveCount says how often legs of a keeper moved from one transport to another for a reason.
type MoveCount struct {
	From, To leg.Transport
	Reason   string
	Count    uint64
}

// moved counts a move.
func (r *relay) moved(from, to leg.Transport, why string) {
	r.mu.Lock()
	r.moves++
	r.why = why
	r.mu.Unlock()
	r.k.mu.Lock()
	defer r.k.mu.Unlock()
	r.k.moves[moveKey{from, to, why}]++
}

// Moves lists the moves of all legs since the keeper began.
func (k *Keeper) Moves() []MoveCount {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]MoveCount, 0, len(k.moves))
	for m, n := range k.moves {
		out = append(out, MoveCount{m.from, m.to, m.why, n})
	}
	slices.SortFunc(out, func(a, b MoveCount) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Reason, b.Reason))
	})
	return out
}
