package tunnel

import (
	"net/netip"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// LinkInfo is what is known about a link where it is handed over.
type LinkInfo struct {
	// Name is for people: the relay and transport, such as "fra-1 udp".
	Name string
	// Peer is who the link leads to, as the relay vouches; the session's TLS proves it. The zero Node is anybody.
	Peer identity.Node
}

// MergedConfig configures a Merged. The zero value is fine.
type MergedConfig struct {
	// Queue bounds the runs of datagrams that wait to be read, each of 64 KiB at most; 0 is DefaultQueue. What comes when it is full is
	// dropped and counted.
	Queue int
}

// Merged joins a gateway's links into the one packet conn that QUIC serves on. Every link gets a virtual address of its own, which is
// never given to another one, so that a move of a session from link to link is a migration to QUIC.
type Merged struct {
	core
}

// Add takes a link in: what arrives on it is read under the returned address, and what is written to that address leaves on it. The
// link is dropped when its Done is closed.
func (m *Merged) Add(l datagram.Link, info LinkInfo) (netip.AddrPort, error) { return netip.AddrPort{}, nil }

// NewMerged makes a conn without links. Close it when the server has stopped.
func NewMerged(cfg MergedConfig) (*Merged, error) { return nil, nil }

// Close ends the conn; its links are let go. It may be called more than once.
func (m *Merged) Close() error { return nil }

// Stats returns what was counted.
func (m *Merged) Stats() ConnStats { return ConnStats{} }

type core struct{}

// ConnStats counts what a Merged or a client's slots did.
type ConnStats struct {
	// Received and Sent are datagrams of QUIC.
	Received, Sent uint64
	// DroppedFull are datagrams that found the queue full.
	DroppedFull uint64
	// DroppedUnknown are datagrams to a virtual address whose link is gone.
	DroppedUnknown uint64
	// Probes are datagrams that were no QUIC.
	Probes uint64
	// Links is how many links there are now.
	Links int
}
