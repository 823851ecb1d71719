package leg

import (
	"testing"
	"time"
)

func TestBacklog(t *testing.T) {
	const most = 2 << 20
	for _, tc := range []struct {
		name       string
		rate, load int // bytes/s that drain and that are sent
		want       int // bytes
	}{
		{"idle link", 1 << 40, 100 << 20, most},
		{"100 Mbit/s, twice of it sent", 12_500_000, 25_000_000, 250_000},
		{"20 Mbit/s", 2_500_000, 25_000_000, 50_000},
		{"1 Mbit/s", 125_000, 25_000_000, leastBacklog},
		{"10 Gbit/s", 1_250_000_000, 2_500_000_000, most},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := backlog{most: most}
			limit, queued := most, 0
			now := time.Hour
			b.at = now
			for range 3000 { // a millisecond each
				now += time.Millisecond
				room := max(limit-queued, 0)
				n := min(tc.load/1000, room)
				queued += n
				queued -= min(queued, tc.rate/1000)
				if b.sent(n, now) {
					limit, _ = b.look(queued, now)
				}
			}
			if diff := limit - tc.want; max(diff, -diff) > tc.want/7 {
				t.Errorf("%d bytes, want %d", limit, tc.want)
			}
		})
	}
	// The rate rises: the queue is given more room within a second, although what is held bounds what is sent.
	b := backlog{most: most}
	limit, queued, now := most, 0, time.Hour
	b.at = now
	run := func(rate, ms int) {
		for range ms {
			now += time.Millisecond
			n := max(limit-queued, 0)
			queued += n
			queued -= min(queued, rate/1000)
			if b.sent(n, now) {
				limit, _ = b.look(queued, now)
			}
		}
	}
	run(2_500_000, 1000)
	if limit > 60_000 {
		t.Errorf("%d bytes at 20 Mbit/s", limit)
	}
	run(125_000_000, 1000)
	if limit != most {
		t.Errorf("%d bytes at 1 Gbit/s", limit)
	}
	// A pause says nothing about the rate.
	run(2_500_000, 1000)
	now += time.Minute
	queued = 0
	b.sent(1000, now)
	if l, _ := b.look(1000, now); l < limit {
		t.Errorf("%d bytes after a pause, %d before", l, limit)
	}
	// Nothing drains: nothing is concluded.
	b = backlog{most: most}
	for i := range 10 {
		b.sent(0, time.Duration(i+1)*backlogLook)
		if l, _ := b.look(5000, time.Duration(i+1)*backlogLook); l != most {
			t.Errorf("%d bytes while nothing drains", l)
		}
	}
}
