package stun

import (
	"net/netip"
	"time"
)

// Asker asks servers for the reflexive address of a socket that others read, too. It does no I/O and keeps no clock: packets and times
// go in, packets come out. Its methods are not for concurrent use.
type Asker struct{ ts []*transaction }

// Ask is a request to send at once. The caller must not change it.
type Ask struct {
	To      netip.AddrPort
	Request []byte
}

// NewAsker makes an asker of servers, each asked once.
func NewAsker(servers []netip.AddrPort) (*Asker, error) {
	a := &Asker{}
	for _, s := range servers {
		m, err := bindingRequest()
		if err != nil {
			return nil, err
		}
		a.ts = append(a.ts, &transaction{server: unmap(s), request: m})
	}
	return a, nil
}

// Step returns the requests that are due and when to call again, the zero time when every server has answered or was asked often enough.
func (a *Asker) Step(now time.Time) (out []Ask, next time.Time) {
	for _, t := range a.ts {
		if t.done {
			continue
		}
		if !now.Before(t.next) {
			if t.attempts == Attempts {
				t.done = true
				continue
			}
			out = append(out, Ask{To: t.server, Request: t.request.Raw})
			t.sent, t.next = now, now.Add(FirstTimeout<<t.attempts)
			t.attempts++
		}
		if next.IsZero() || t.next.Before(next) {
			next = t.next
		}
	}
	return out, next
}

// Handle takes what was received from an address and reports whether it was an answer to a request of this asker's.
func (a *Asker) Handle(now time.Time, b []byte, from netip.AddrPort) bool {
	return match(a.ts, b, unmap(from), now) != nil
}

// Bindings are the answers so far, in the order of the servers.
func (a *Asker) Bindings() []Binding {
	var out []Binding
	for _, t := range a.ts {
		if t.answer.Reflexive.IsValid() {
			out = append(out, t.answer)
		}
	}
	return out
}
