// Package stun asks relays what they see of a socket (RFC 8489), tells from two answers what kind of NAT is in between (RFC 4787 §4.1),
// and has the authenticated probes that measure a path (Prober, Responder). It knows messages and sockets and no role.
//
//	b, err := stun.Reflexive(ctx, conn, relay)          // b.Reflexive, b.RTT
//	d, err := stun.Discover(ctx, []netip.AddrPort{a, b}) // d.NAT, d.String() for a status page
package stun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/pion/stun/v4"
)

// Retransmission of requests over UDP (RFC 8489 §6.2.1).
const (
	// FirstTimeout is RTO, the wait before the first retransmission; it doubles each time.
	FirstTimeout = 500 * time.Millisecond
	// Attempts is Rc, how often a request is sent.
	Attempts = 7
	// LastTimeout is Rm × RTO, the wait after the last attempt.
	LastTimeout = 16 * FirstTimeout
)

// attrPad is a comprehension-optional attribute (RFC 8489 §14) of ours that servers skip. PADDING (RFC 5780 §7.6) is not used because
// it is comprehension-required, which servers without RFC 5780 must answer with 420.
const attrPad stun.AttrType = 0xC0F2

// requestSize is the size of a Binding request in bytes. A relay does not send more than it was sent before it knows who asks, and its
// largest answer has 20 bytes of header, 24 of an IPv6 XOR-MAPPED-ADDRESS, 8 of FINGERPRINT; the rest is room.
const requestSize = 72

// ErrNoAnswer says that a server did not answer any attempt.
var ErrNoAnswer = errors.New("no answer to STUN Binding requests: UDP is filtered on the way, or no relay is there")

// PacketConn is the part of a UDP socket that this package uses. *net.UDPConn has it.
type PacketConn interface {
	ReadFromUDPAddrPort(b []byte) (n int, from netip.AddrPort, err error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(t time.Time) error
	LocalAddr() net.Addr
}

// Binding is what a server saw.
type Binding struct {
	// Server is who was asked.
	Server netip.AddrPort
	// Reflexive is where the server saw the request come from, IPv4 unmapped.
	Reflexive netip.AddrPort
	// RTT is the time between the attempt that was answered and its answer; 0 if it can not be told which one was.
	RTT time.Duration
}

// Reflexive asks server where it sees conn. The socket must be unconnected and read by nobody else meanwhile; what arrives from others
// is discarded. It returns ErrNoAnswer when every attempt went unanswered (39.5 s) or ctx ended first.
func Reflexive(ctx context.Context, conn PacketConn, server netip.AddrPort) (Binding, error) {
	answers, err := ask(ctx, conn, []netip.AddrPort{server})
	if err != nil {
		return Binding{}, fmt.Errorf("ask %v for the reflexive address: %w", server, err)
	}
	return answers[0], nil
}

// transaction is a request under way.
type transaction struct {
	server   netip.AddrPort
	request  *stun.Message
	attempts int
	sent     time.Time // the last attempt
	next     time.Time // the next one, or when to give up
	answer   Binding
	done     bool
}

// ask sends a Binding request to every server and collects the answers, in the order of servers. It returns those that came, with
// ErrNoAnswer when there is none.
func ask(ctx context.Context, conn PacketConn, servers []netip.AddrPort) ([]Binding, error) {
	// A context that ends wakes the read up.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		stop()
		_ = conn.SetReadDeadline(time.Time{})
	}()
	var ts []*transaction
	for _, s := range servers {
		m, err := bindingRequest()
		if err != nil {
			return nil, err
		}
		ts = append(ts, &transaction{server: s, request: m})
	}
	var sendErr error
	open := len(ts)
	buf := make([]byte, 1500)
	for open > 0 && ctx.Err() == nil {
		now := time.Now()
		deadline := now.Add(LastTimeout)
		for _, t := range ts {
			if t.done {
				continue
			}
			if !now.Before(t.next) {
				if t.attempts == Attempts {
					t.done = true
					open--
					continue
				}
				if _, err := conn.WriteToUDPAddrPort(t.request.Raw, t.server); err != nil {
					sendErr = err // a route may come back before the next attempt
				}
				t.sent = now
				t.next = now.Add(FirstTimeout << t.attempts)
				if t.attempts++; t.attempts == Attempts {
					t.next = now.Add(LastTimeout)
				}
			}
			if t.next.Before(deadline) {
				deadline = t.next
			}
		}
		if open == 0 {
			break
		}
		if err := conn.SetReadDeadline(deadline); err != nil {
			return nil, err
		}
		if ctx.Err() != nil { // it may have ended just before the deadline was set
			break
		}
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case errors.Is(err, net.ErrClosed):
			return nil, err
		case err != nil: // an ICMP error of an earlier attempt
			sendErr = err
			continue
		}
		if t := match(ts, buf[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), time.Now()); t != nil {
			t.done = true
			open--
		}
	}
	var answers []Binding
	for _, t := range ts {
		if t.answer.Reflexive.IsValid() {
			answers = append(answers, t.answer)
		}
	}
	switch {
	case len(answers) > 0:
		return answers, nil
	case sendErr != nil:
		return nil, fmt.Errorf("%w (%w)", ErrNoAnswer, sendErr)
	}
	return nil, ErrNoAnswer
}

// match finds the transaction that b answers, and fills its answer in. An answer must come from the address that was asked.
func match(ts []*transaction, b []byte, from netip.AddrPort, now time.Time) *transaction {
	if !stun.IsMessage(b) {
		return nil
	}
	var m stun.Message
	if stun.Decode(b, &m) != nil || m.Type != stun.BindingSuccess {
		return nil
	}
	for _, t := range ts {
		if t.done || m.TransactionID != t.request.TransactionID || from != unmap(t.server) {
			continue
		}
		addr, err := MappedAddress(&m)
		if err != nil {
			return nil
		}
		t.answer = Binding{Server: t.server, Reflexive: addr}
		if t.attempts == 1 { // Karn: which attempt was answered?
			t.answer.RTT = now.Sub(t.sent)
		}
		return t
	}
	return nil
}

// MappedAddress reads XOR-MAPPED-ADDRESS, or MAPPED-ADDRESS of an old server, IPv4 unmapped.
func MappedAddress(m *stun.Message) (netip.AddrPort, error) {
	var x stun.XORMappedAddress
	err := x.GetFrom(m)
	if err != nil {
		var plain stun.MappedAddress
		if plain.GetFrom(m) != nil {
			return netip.AddrPort{}, fmt.Errorf("answer without a mapped address: %w", err)
		}
		x.IP, x.Port = plain.IP, plain.Port
	}
	a, ok := netip.AddrFromSlice(x.IP)
	if !ok || a.Unmap().IsUnspecified() || x.Port <= 0 || x.Port > 0xFFFF {
		return netip.AddrPort{}, errors.New("answer with a malformed mapped address")
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(x.Port)), nil
}

func bindingRequest() (*stun.Message, error) {
	const header, attrHeader = 20, 4
	return stun.Build(stun.TransactionID, stun.BindingRequest,
		stun.RawAttribute{Type: attrPad, Value: make([]byte, requestSize-header-attrHeader)})
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
