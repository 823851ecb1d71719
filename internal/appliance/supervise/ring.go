package supervise

import (
	"bytes"
	"strings"
	"sync"
	"time"
)

// Bounds of what is kept of a daemon's log: so much is enough to see why one failed, and a chatty one takes no memory from the rest.
const (
	ringLines = 200
	lineBytes = 512
)

// Line is one line of a log, cut to lineBytes.
type Line struct {
	At   time.Time
	Text string
}

// Ring keeps the last lines that were written to it. It is an io.Writer; all methods may be called concurrently.
type Ring struct {
	mu    sync.Mutex
	lines []Line // guarded by mu
	next  int    // where the next line goes once lines is full; guarded by mu
	part  []byte // of a line that has not ended; guarded by mu
	now   func() time.Time
}

// NewRing returns an empty ring.
func NewRing() *Ring { return &Ring{now: time.Now} }

// Write takes a piece of a log. It never fails.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	for {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		if room := lineBytes - len(r.part); room > 0 {
			r.part = append(r.part, line[:min(room, len(line))]...)
		}
		if !ended {
			return n, nil
		}
		r.addLocked(string(r.part))
		r.part = r.part[:0]
		p = rest
	}
}

func (r *Ring) addLocked(text string) {
	l := Line{r.now(), printable(text)}
	if len(r.lines) < ringLines {
		r.lines = append(r.lines, l)
		return
	}
	r.lines[r.next] = l
	r.next = (r.next + 1) % ringLines
}

// printable replaces what could move a terminal's cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// Last returns the newest n lines, oldest first.
func (r *Ring) Last(n int) []Line {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := append(append([]Line{}, r.lines[r.next:]...), r.lines[:r.next]...)
	return all[max(0, len(all)-n):]
}
