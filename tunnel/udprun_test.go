package tunnel

import (
	"bytes"
	"context"
	"errors"
	"net"
	"testing"
)

func TestReadPackets(t *testing.T) {
	type run struct {
		n, size int
	}
	for name, c := range map[string]struct {
		come []int // lengths of the datagrams that wait
		room int
		want []run
	}{
		"one":                {[]int{5}, 100, []run{{5, 5}}},
		"equal":              {[]int{5, 5, 5}, 100, []run{{15, 5}}},
		"shorter ends it":    {[]int{5, 5, 3, 5}, 100, []run{{13, 5}, {5, 5}}},
		"longer ends it":     {[]int{5, 5, 6, 6}, 100, []run{{10, 5}, {12, 6}}},
		"no room":            {[]int{5, 5, 5}, 12, []run{{10, 5}, {5, 5}}},
		"cut off":            {[]int{20, 4}, 8, []run{{8, 8}, {4, 4}}},
		"empty alone":        {[]int{0, 0, 5}, 100, []run{{0, 0}, {0, 0}, {5, 5}}},
		"empty ends a run":   {[]int{5, 0, 5}, 100, []run{{5, 5}, {0, 0}, {5, 5}}},
		"one byte, and room": {[]int{1, 1, 1}, 3, []run{{3, 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			u := &UDPConn{queue: make(chan []byte, len(c.come))}
			var cancel context.CancelCauseFunc
			u.ctx, cancel = context.WithCancelCause(t.Context())
			var sent []byte
			for i, n := range c.come {
				p := bytes.Repeat([]byte{byte('a' + i)}, n)
				sent = append(sent, p...)
				u.queue <- p
			}
			var got []byte
			b := make([]byte, c.room)
			for i, want := range c.want {
				n, size, err := u.ReadPackets(b)
				if (run{n, size}) != want || err != nil {
					t.Fatalf("read %d: %d bytes of %d, %v, want %v", i, n, size, err, want)
				}
				got = append(got, b[:n]...)
			}
			if name != "cut off" && !bytes.Equal(got, sent) {
				t.Errorf("%q, want %q", got, sent)
			}
			cancel(net.ErrClosed)
			if _, _, err := u.ReadPackets(b); !errors.Is(err, net.ErrClosed) {
				t.Error("after the end:", err)
			}
		})
	}
}

func TestReadPacketAfterARun(t *testing.T) {
	u := &UDPConn{queue: make(chan []byte, 3), ctx: t.Context()}
	for _, p := range []string{"ab", "cd", "longer"} {
		u.queue <- []byte(p)
	}
	b := make([]byte, 100)
	if n, size, err := u.ReadPackets(b); string(b[:n]) != "abcd" || size != 2 || err != nil {
		t.Fatalf("%q of %d, %v", b[:n], size, err)
	}
	if n, err := u.ReadPacket(b); string(b[:n]) != "longer" || err != nil {
		t.Fatalf("%q, %v", b[:n], err)
	}
}
