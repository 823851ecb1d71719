package dialler

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"sallyway/internal/control"
)

// trace is what the steps of one attempt took. The nil trace keeps nothing.
type trace struct {
	way     way
	changed func() // called after each change, without mu

	mu   sync.Mutex
	hops []control.TestHop // guarded by mu
	left bool              // it was given up because another was faster; guarded by mu
}

// step runs f and keeps what came of it.
func (t *trace) step(name, to string, f func() (detail string, err error)) error {
	if t == nil {
		_, err := f()
		return err
	}
	i := t.add(control.TestHop{Name: name, To: to, State: control.HopRunning})
	begun := time.Now()
	detail, err := f()
	state := control.HopOK
	if err != nil {
		state, detail = control.HopFailed, err.Error()
		if errors.Is(err, errSkipped) {
			state = control.HopSkipped
		}
	}
	t.mu.Lock()
	h := &t.hops[i]
	t.left = t.left || errors.Is(err, context.Canceled)
	h.State, h.Detail, h.Millis = state, detail, millis(time.Since(begun))
	t.mu.Unlock()
	t.changed()
	return err
}

// errSkipped says that there was nothing to be seen at a step.
var errSkipped = errors.New("nothing came unasked: the resource waits for its client to speak first")

func (t *trace) add(h control.TestHop) int {
	t.mu.Lock()
	t.hops = append(t.hops, h)
	i := len(t.hops) - 1
	t.mu.Unlock()
	t.changed()
	return i
}

// steps are those so far.
func (t *trace) steps() []control.TestHop {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.hops)
}

// failed says why the attempt failed, "" where it did not.
func (t *trace) failed() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.hops {
		if !t.left && h.State == control.HopFailed {
			return t.way.String() + ": " + h.Detail
		}
	}
	return ""
}

func millis(d time.Duration) float64 {
	return float64(d.Round(10*time.Microsecond).Microseconds()) / 1000
}
