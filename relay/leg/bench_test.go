package leg_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/leg"
)

// BenchmarkTransfer moves super-packets from one leg over a relay to another, all in this process on loopback: what it costs is the two
// legs and the relay together. Window: 512 KiB on UDP, 128 KiB on TLS.
func BenchmarkTransfer(b *testing.B) {
	for _, tr := range []leg.Transport{leg.UDP, leg.TLS} {
		for _, segments := range []int{1, 13, 44} {
			b.Run(fmt.Sprintf("%s/%d", tr, segments), func(b *testing.B) {
				l := startRelay(b, newPKI(b, relayNode))
				p := connect(b, l.config(clientNode, tr), l.config(gatewayNode, tr))
				window := int64(512 << 10)
				if tr == leg.TLS {
					window = 128 << 10
				}
				super := make([]byte, segments*1452)
				var arrived atomic.Int64
				progress := make(chan struct{}, 1)
				p.in.SetReceiver(receiver(func(d []byte) {
					arrived.Add(int64(len(d)))
					select {
					case progress <- struct{}{}:
					default:
					}
				}))
				b.SetBytes(int64(len(super)))
				b.ReportAllocs()
				sent, dropped := int64(0), int64(0)
				for b.Loop() {
					p.out.Send(super, 1452, datagram.ECT0)
					sent += int64(len(super))
					for sent-arrived.Load() > window {
						select {
						case <-progress:
						case <-time.After(100 * time.Millisecond):
							dropped += sent - arrived.Load()
							sent = arrived.Load() // a queue of a TLS leg drops what takes long to drain
						}
					}
				}
				b.ReportMetric(float64(dropped), "B-dropped")
				p.in.SetReceiver(nil)
				p.client.Close()
				p.gateway.Close()
			})
		}
	}
}
