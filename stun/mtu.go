package stun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/pion/stun/v4"
)

// mtuAttempts is how often a size is tried, mtuWait how long an answer is waited for each time.
const (
	mtuAttempts = 3
	mtuWait     = 400 * time.Millisecond
)

// ErrNoDF says that this system has no way to forbid fragmentation of a socket's datagrams.
var ErrNoDF = errors.New("fragmentation can not be turned off on this system")

// PathMTU finds the largest of sizes, bytes of UDP payload, that reaches server unfragmented, by padded Binding requests: 0 if none does. An
// answer is small, so it is the way there that is measured. What is too large for the host's own interface counts as not reaching.
func PathMTU(ctx context.Context, server netip.AddrPort, sizes []int) (int, error) {
	server = unmap(server)
	network := "udp6"
	if server.Addr().Is4() {
		network = "udp4"
	}
	conn, err := net.DialUDP(network, nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return 0, fmt.Errorf("path MTU to %v: %w", server, err)
	}
	defer conn.Close()
	if err := forbidFragments(conn); err != nil {
		return 0, fmt.Errorf("path MTU to %v: %w", server, err)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	sizes = slices.Clone(sizes)
	slices.SortFunc(sizes, func(a, b int) int { return b - a })
	for _, size := range sizes {
		ok, err := passes(ctx, conn, size)
		if err != nil {
			return 0, fmt.Errorf("path MTU to %v: %w", server, err)
		}
		if ok {
			return size, nil
		}
	}
	return 0, nil
}

// passes reports whether a request of size bytes is answered.
func passes(ctx context.Context, conn *net.UDPConn, size int) (bool, error) {
	m, err := paddedRequest(size)
	if err != nil {
		return false, err
	}
	buf := make([]byte, 1500)
	for range mtuAttempts {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		if _, err := conn.Write(m.Raw); errors.Is(err, syscall.EMSGSIZE) {
			return false, nil
		}
		if err := conn.SetReadDeadline(time.Now().Add(mtuWait)); err != nil {
			return false, err
		}
		for {
			n, err := conn.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.EMSGSIZE) {
				break
			}
			if err != nil {
				return false, err
			}
			a := &stun.Message{Raw: buf[:n]}
			if a.Decode() == nil && a.TransactionID == m.TransactionID {
				return true, nil
			}
		}
	}
	return false, nil
}

// paddedRequest is a Binding request of size bytes, which is rounded down to a multiple of four.
func paddedRequest(size int) (*stun.Message, error) {
	const headers = 20 + 4 // of the message and of the attribute
	if size < headers || size > 1<<16-1 {
		return nil, fmt.Errorf("a request of %d bytes", size)
	}
	return stun.Build(stun.TransactionID, stun.BindingRequest, stun.RawAttribute{Type: attrPad, Value: make([]byte, (size-headers)/4*4)})
}
