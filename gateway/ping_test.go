package gateway

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"testing"
	"time"
)

func TestPingerGetsOnlyRealAnswers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("raw ICMP sockets need root")
	}
	var p pinger
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	payload := bytes.Repeat([]byte("sallyway"), 100)
	for _, dst := range []string{"127.0.0.1", "127.1.2.3", "::1"} {
		got, err := p.Echo(ctx, netip.MustParseAddr(dst), payload)
		if err != nil || !bytes.Equal(got, payload) {
			t.Errorf("Echo(%s) = %d bytes, %v", dst, len(got), err)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if got, err := p.Echo(short, netip.MustParseAddr("127.255.255.255"), payload); err == nil {
		t.Errorf("an address where nobody is answered %d bytes", len(got))
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := p.Echo(ctx, netip.MustParseAddr("127.0.0.1"), nil); err == nil {
		t.Error("a closed pinger answers")
	}
}
