package fallback

import (
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// BenchmarkLink sends runs of 40 datagrams of 1400 bytes from client to gateway, all ends in this process.
func BenchmarkLink(b *testing.B) {
	w := newWorld(b, func(c *Config) { c.Logger = nil })
	n := w.acme.node(identity.Gateway, "g-1")
	g := w.gateway(n, w.acme.sshIdentity(n, nil, nil))
	up, err := w.dial(n, w.acme.leaf(w.acme.node(identity.Client, "c-1"), time.Now()))
	if err != nil {
		b.Fatal(err)
	}
	down := <-g.links
	down.got.keep = false
	waitFor(b, "all slots are there", func() bool { return g.Status().Connections == 4 })
	run := make([]byte, 40*1400)
	received := func() int {
		down.got.mu.Lock()
		defer down.got.mu.Unlock()
		return down.got.bytes
	}
	b.SetBytes(int64(len(run)))
	sent := 0
	for b.Loop() {
		up.Send(run, 1400, datagram.NotECT)
		sent += len(run)
		for sent-received() > 200<<10 {
			time.Sleep(20 * time.Microsecond) // a window, so that nothing is dropped
		}
	}
}
