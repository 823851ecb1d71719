package stun

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/pion/stun/v4"
)

// TestPathMTU asks a server that drops what is larger than its path.
func TestPathMTU(t *testing.T) {
	srv, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	const most = 1400
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2000)
		lost := map[int]bool{}
		for {
			n, from, err := srv.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if n > most {
				continue
			}
			if !lost[n] { // the first of every size: it is sent again
				lost[n] = true
				continue
			}
			m := &stun.Message{Raw: append([]byte(nil), buf[:n]...)}
			if m.Decode() != nil {
				t.Error("not a STUN message")
				continue
			}
			a := stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess)
			_, _ = srv.WriteToUDPAddrPort(a.Raw, from) // lost like any datagram
		}
	}()
	defer func() {
		srv.Close()
		<-done
	}()
	at := netip.MustParseAddrPort(srv.LocalAddr().String())
	got, err := PathMTU(t.Context(), at, []int{1200, 1472, 1400, 1452})
	if errors.Is(err, ErrNoDF) {
		t.Skip(err)
	}
	if err != nil || got != 1400 {
		t.Errorf("%d, %v, want 1400", got, err)
	}
	if got, err := PathMTU(t.Context(), at, []int{1472}); err != nil || got != 0 {
		t.Errorf("%d, %v, want none", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := PathMTU(ctx, at, []int{1472}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v after the context ended", err)
	}
	if _, err := PathMTU(t.Context(), at, []int{3}); err == nil {
		t.Error("a request that has no room for its header")
	}
}
