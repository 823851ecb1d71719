package stun

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pion/stun/v4"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// relay answers Binding requests on loopback, after dropping the first drop of them, and claims to see the asker at port+shift. It
// refuses to be an amplifier.
func relay(t *testing.T, drop, shift int) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	other, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { conn.Close(); <-done; other.Close() })
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			var m stun.Message
			if err := stun.Decode(b[:n], &m); err != nil || m.Type != stun.BindingRequest {
				t.Errorf("relay got %v, %v", &m, err)
				continue
			}
			if drop--; drop >= 0 {
				continue
			}
			// Noise that must not be taken for the answer: QUIC, another transaction, an answer without an address.
			for _, noise := range [][]byte{
				{0x40, 1, 2, 3},
				stun.MustBuild(stun.TransactionID, stun.BindingSuccess, &stun.XORMappedAddress{IP: net.IPv4(9, 9, 9, 9), Port: 9}).Raw,
				stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess).Raw,
			} {
				_, _ = conn.WriteToUDPAddrPort(noise, from)
			}
			// And somebody else's answer to the same transaction.
			_, _ = other.WriteToUDPAddrPort(stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess,
				&stun.XORMappedAddress{IP: net.IPv4(9, 9, 9, 9), Port: 9}).Raw, from)
			a := stun.MustBuild(stun.NewTransactionIDSetter(m.TransactionID), stun.BindingSuccess,
				&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port()) + shift}, stun.Fingerprint)
			if len(a.Raw) > n {
				t.Errorf("answer of %d bytes to a request of %d", len(a.Raw), n)
			}
			_, _ = conn.WriteToUDPAddrPort(a.Raw, from)
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestReflexive(t *testing.T) {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, tt := range []struct {
		name    string
		drop    int
		wantRTT bool
	}{{"first attempt answered", 0, true}, {"second attempt answered", 1, false}} {
		t.Run(tt.name, func(t *testing.T) {
			s := relay(t, tt.drop, 0)
			b, err := Reflexive(t.Context(), conn, s)
			if err != nil {
				t.Fatal(err)
			}
			if b.Reflexive != local || b.Server != s {
				t.Errorf("seen as %v by %v, want %v by %v", b.Reflexive, b.Server, local, s)
			}
			if (b.RTT > 0) != tt.wantRTT {
				t.Errorf("RTT %v", b.RTT)
			}
		})
	}
}

func TestReflexiveUnanswered(t *testing.T) {
	conn, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := Reflexive(ctx, conn, relay(t, 100, 0)); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("error %v, want ErrNoAnswer", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v with a context of 50 ms", d)
	}
	// The socket is usable afterwards.
	if _, err := Reflexive(t.Context(), conn, relay(t, 0, 0)); err != nil {
		t.Error(err)
	}
}

func TestDiscover(t *testing.T) {
	for _, tt := range []struct {
		name   string
		shifts []int // per relay
		silent int
		want   NAT
		text   string
	}{
		{"one relay, no NAT", []int{0}, 0, NATNone, "no NAT"},
		{"two relays, no NAT", []int{0, 0}, 0, NATNone, "no NAT"},
		{"same port seen", []int{1, 1}, 0, NATEndpointIndependent, "endpoint-independent mapping"},
		{"other port seen", []int{1, 2}, 0, NATDependent, "address-and-port-dependent"},
		{"one answers", []int{1}, 1, NATUnknown, "no answer from 127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var servers []netip.AddrPort
			for range tt.silent {
				servers = append(servers, relay(t, 100, 0))
			}
			for _, s := range tt.shifts {
				servers = append(servers, relay(t, 0, s))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			d, err := Discover(ctx, servers)
			if err != nil {
				t.Fatal(err)
			}
			if d.NAT != tt.want {
				t.Errorf("NAT %q, want %q", d.NAT, tt.want)
			}
			if !strings.Contains(d.String(), tt.text) {
				t.Errorf("status %q does not say %q", d, tt.text)
			}
			if len(d.Silent) != tt.silent || d.Local.Addr() != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("discovery %+v", d)
			}
		})
	}
	if _, err := Discover(t.Context(), nil); err == nil {
		t.Error("no error without a server")
	}
}

func TestMappedAddress(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  stun.Setter
		want string
	}{
		{"xor, IPv4", &stun.XORMappedAddress{IP: net.IPv4(192, 0, 2, 1), Port: 32853}, "192.0.2.1:32853"},
		{"xor, IPv6", &stun.XORMappedAddress{IP: net.ParseIP("2001:db8::1"), Port: 1}, "[2001:db8::1]:1"},
		{"plain", &stun.MappedAddress{IP: net.IPv4(192, 0, 2, 1), Port: 5}, "192.0.2.1:5"},
		{"none", nothing{}, ""},
		{"port 0", &stun.XORMappedAddress{IP: net.IPv4(192, 0, 2, 1), Port: 0}, ""},
		{"unspecified", &stun.XORMappedAddress{IP: net.IPv4(0, 0, 0, 0), Port: 7}, ""},
		{"truncated", stun.RawAttribute{Type: stun.AttrXORMappedAddress, Value: []byte{0, 1, 2}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := stun.MustBuild(stun.TransactionID, stun.BindingSuccess, tt.set)
			a, err := MappedAddress(m)
			if tt.want == "" {
				if err == nil {
					t.Errorf("got %v, want an error", a)
				}
				return
			}
			if err != nil || a != netip.MustParseAddrPort(tt.want) {
				t.Errorf("got %v, %v, want %v", a, err, tt.want)
			}
		})
	}
}
