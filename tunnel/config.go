package tunnel

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyway/internal/identity"
)

// Defaults of limits and timers.
const (
	// DefaultQueue is how many buffers of 64 KiB may wait to be read by QUIC: 16 MiB.
	DefaultQueue = 256
	// DefaultHandshakeTimeout bounds silence during the handshake.
	DefaultHandshakeTimeout = 5 * time.Second
	// DefaultIdleTimeout outlives a relay's restart and a laptop's short sleep.
	DefaultIdleTimeout = 120 * time.Second
	// DefaultSessions is how many sessions a node may have at a gateway: one in use, one left by a crash, and room for a second process.
	DefaultSessions = 8
	// DefaultFlows is how many flows a node may have open at a gateway.
	DefaultFlows = 4096
	// DefaultHandshakes is how many handshakes a second go without Retry.
	DefaultHandshakes = 50
)

const (
	// initialPacket is QUIC's least packet in bytes: with the headers of TURN, UDP and IPv6 before it, it passes a path of 1280.
	initialPacket = 1200
	// connectionIDLength makes collisions and guesses hopeless, in bytes.
	connectionIDLength = 8
	// keepAlive is shorter than the 30 s after which NATs forget a UDP mapping.
	keepAlive = 15 * time.Second
	// Windows in bytes: 16 MiB a stream is 1 Gbit/s at 130 ms.
	streamWindow, maxStreamWindow = 1 << 20, 16 << 20
	// connWindow is open from the start: what flows that nobody reads have received counts against it for as long as they live, and beside dozens
	// of them a new one must still get its answer. It is a bound, no memory; a stream's window grows while somebody reads.
	connWindow, maxConnWindow = 64 << 20, 64 << 20
	// uniStreams is HTTP/3's three (control and QPACK's two) and some for extensions.
	uniStreams = 8
	// spareStreams are streams beside those of flows: control, DNS, and room to answer that there are too many flows.
	spareStreams = 100
	// maxHeader bounds a request's or response's header, in bytes.
	maxHeader = 16 << 10
	// authorizeTimeout bounds Handler.Authorize.
	authorizeTimeout = 10 * time.Second
)

// alpn is HTTP/3's. Roles are told apart by certificates: extended key usage and kind, on both ends.
var alpn = []string{http3.NextProtoH3}

func quicConfig(handshake, idle time.Duration) *quic.Config {
	return &quic.Config{
		Versions:                       []quic.Version{quic.Version1, quic.Version2},
		HandshakeIdleTimeout:           handshake,
		MaxIdleTimeout:                 idle,
		InitialStreamReceiveWindow:     streamWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		InitialConnectionReceiveWindow: connWindow,
		MaxConnectionReceiveWindow:     maxConnWindow,
		MaxIncomingStreams:             -1,
		MaxIncomingUniStreams:          uniStreams,
		InitialPacketSize:              initialPacket,
		EnableDatagrams:                true,
		Allow0RTT:                      false,
	}
}

func (c *DialConfig) validate() error {
	if err := c.Gateway.Validate(); err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	switch {
	case c.Gateway.Kind != identity.Gateway:
		return fmt.Errorf("%v is no gateway", c.Gateway)
	case c.Link == nil:
		return errors.New("no link to dial over")
	case c.Link.MaxPayload() < initialPacket:
		return fmt.Errorf("the link carries %d bytes at most, QUIC needs %d: its MTU is too small", c.Link.MaxPayload(), initialPacket)
	case c.Certificate == nil || c.Trust == nil:
		return errors.New("no certificate or no trust")
	case c.HandshakeTimeout < 0 || c.IdleTimeout < 0:
		return errors.New("negative timeout")
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = DefaultIdleTimeout
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// tls lets a handshake pass with exactly the gateway.
func (c *DialConfig) tls() *tls.Config {
	cfg := identity.TLSConfig(c.Certificate, false, alpn, func(chain []*x509.Certificate) error {
		n, err := c.Trust().Verify(chain, x509.ExtKeyUsageServerAuth)
		if err != nil {
			return err
		}
		if n != c.Gateway {
			return fmt.Errorf("%v answered, want %v", n, c.Gateway)
		}
		return nil
	})
	cfg.ServerName = c.Gateway.ServerName()
	return cfg
}

func (c *ServeConfig) validate() error {
	if err := c.Node.Validate(); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	switch {
	case c.Node.Kind != identity.Gateway:
		return fmt.Errorf("%v is no gateway", c.Node)
	case c.Certificate == nil || c.Trust == nil:
		return errors.New("no certificate or no trust")
	case c.Handler == nil:
		return errors.New("no handler")
	case c.HandshakeTimeout < 0 || c.IdleTimeout < 0 || c.Limits.Sessions < 0 || c.Limits.Flows < 0:
		return errors.New("negative timeout or limit")
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = DefaultIdleTimeout
	}
	if c.Limits.Sessions == 0 {
		c.Limits.Sessions = DefaultSessions
	}
	if c.Limits.Flows == 0 {
		c.Limits.Flows = DefaultFlows
	}
	if c.Limits.Handshakes == 0 {
		c.Limits.Handshakes = DefaultHandshakes
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// tls lets a handshake pass with clients and sites of this gateway's organization, and with the platform as one of its nodes.
func (c *ServeConfig) tls() *tls.Config {
	return identity.TLSConfig(c.Certificate, true, alpn, func(chain []*x509.Certificate) error {
		_, err := c.verify(chain)
		if err != nil {
			c.Logger.Warn("peer refused in the handshake", "err", err)
		}
		return err
	})
}

func (c *ServeConfig) verify(chain []*x509.Certificate) (identity.Node, error) {
	n, err := c.Trust().Verify(chain, x509.ExtKeyUsageClientAuth)
	if err != nil {
		return n, err
	}
	if n.Org != c.Node.Org {
		return n, fmt.Errorf("%v is of another organization than %v", n, c.Node)
	}
	if n.Kind != identity.Client && n.Kind != identity.Site && n.Kind != identity.Platform {
		return n, fmt.Errorf("%v is of kind %s: only clients and sites may dial a gateway, and the platform", n, n.Kind)
	}
	return n, nil
}
