package tunnel

import (
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// The longest a receiver waits when the active path dies under load and the session moves by itself. Bars are those of a loaded test machine; a quiet one does in a quarter of them.
func TestStallOnFailover(t *testing.T) {
	if testing.Short() {
		t.Skip("measures")
	}
	for _, tc := range []struct {
		name     string
		download bool
		silent   bool // the path goes dark; else its link ends
		bar      time.Duration
	}{
		{"upload, dead link", false, false, 300 * time.Millisecond},
		{"download, dead link", true, false, 300 * time.Millisecond},
		{"upload, dark path", false, true, 700 * time.Millisecond},
		{"download, dark path", true, true, 700 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, nil)
			var atServer progress
			port := tcpServer(t, func(c *net.TCPConn) {
				defer c.Close()
				if tc.download {
					stream(c)
					return
				}
				atServer.drain(c)
			})
			first, second := w.link("first"), w.link("second")
			s := w.dial(first, nil)
			if err := s.Standby(timeout(t, 5*time.Second), second, LinkInfo{Name: "second"}); err != nil {
				t.Fatal(err)
			}
			c, err := s.DialTCP(timeout(t, 5*time.Second), "127.0.0.1", port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Reset()
			receiver := &atServer
			if tc.download {
				receiver = new(progress)
				go receiver.drain(c)
			} else {
				go stream(c)
			}
			eventually(t, "traffic", func() bool { return receiver.n.Load() > 8<<20 })
			receiver.longest.Store(0)
			before := receiver.n.Load()
			if tc.silent {
				cut(first, true)
			} else {
				first.end()
				first.peer.end()
			}
			eventually(t, "traffic on the second path", func() bool { return s.Path().Moves == 1 && receiver.n.Load() > before+8<<20 })
			stall := time.Duration(receiver.longest.Load())
			t.Logf("longest stall %v", stall)
			if stall > tc.bar {
				t.Errorf("longest stall %v, bar %v", stall, tc.bar)
			}
		})
	}
}

// stream writes until it fails.
func stream(w io.Writer) {
	b := make([]byte, 32<<10)
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// progress counts what arrives and the longest pause.
type progress struct{ n, longest atomic.Int64 }

func (p *progress) drain(r io.Reader) {
	b := make([]byte, 64<<10)
	last := time.Now()
	for {
		n, err := r.Read(b)
		now := time.Now()
		if d := int64(now.Sub(last)); d > p.longest.Load() {
			p.longest.Store(d)
		}
		last = now
		p.n.Add(int64(n))
		if err != nil {
			return
		}
	}
}

func BenchmarkTCPThroughSession(b *testing.B) {
	w := newWorld(b, nil)
	port := tcpServer(b, func(c *net.TCPConn) {
		defer c.Close()
		new(progress).drain(c)
	})
	s := w.dial(w.link("a"), nil)
	c, err := s.DialTCP(timeout(b, 5*time.Second), "127.0.0.1", port)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Reset()
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}
