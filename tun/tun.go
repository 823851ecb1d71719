// Package tun is a TUN device with its addresses and routes: packets of the host in, packets to the host out.
//
// On Linux the device has a vnet header (IFF_VNET_HDR) with checksum and TCP segmentation offload, so one Read yields one
// packet of up to 64 KiB with the ten bytes of struct virtio_net_hdr in front of it (fields in host byte order), and one
// WriteParts takes the same. Where the kernel refuses the header, or datagram.NoOffload is set, HeaderLen is 0 and packets are at most the MTU.
//
//	d, err := tun.Open(tun.Config{Name: "sally0", MTU: 1500})
//	if errors.Is(err, tun.ErrUnavailable) { … say what err says, and go on without }
//	defer d.Close()
//	err = d.SetAddresses([]netip.Prefix{netip.MustParsePrefix("100.112.0.7/32")})
//	skipped, err := d.SetRoutes(wanted, protected)
//
// Routes are only set where they cannot cut the host off: see Hazards. The device, its addresses and its routes vanish
// with Close or with the process.
package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// ErrUnavailable says that this host or this process cannot have a TUN device. The error that wraps it names the remedy.
// Everything that needs no device goes on working.
var ErrUnavailable = errors.New("no TUN device")

const (
	// DefaultName is the interface name where Config has none.
	DefaultName = defaultPrefix + "0"
	// DefaultMTU is the MTU in bytes where Config has none: what apps expect, and what DNS over UDP and QUIC are built for.
	DefaultMTU = 1500
	// MinMTU is the smallest MTU in bytes that IPv6 allows (RFC 8200 section 5).
	MinMTU = 1280
	// MaxMTU leaves a vnet header of room in the largest IP packet.
	MaxMTU = 65500

	defaultPrefix = "sally"
	defaultNames  = 16 // sally0 to sally15 are tried

	// maxNameLen is IFNAMSIZ without its terminating zero.
	maxNameLen = 15
)

// Config says what device to make. The zero value is sally0 with MTU 1500.
type Config struct {
	Name string // interface name; where empty, DefaultName or the next free one: sally1 and so on
	MTU  int    // bytes; DefaultMTU where 0
}

// withDefaults fills the empty fields.
func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = DefaultName
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	return c
}

// Validate says what is wrong with c, after defaults.
func (c Config) Validate() error {
	c = c.withDefaults()
	if len(c.Name) > maxNameLen {
		return fmt.Errorf("interface name %q: at most %d bytes", c.Name, maxNameLen)
	}
	if c.Name == "." || c.Name == ".." || strings.ContainsFunc(c.Name, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '/' || r == ':' || r == '%'
	}) {
		return fmt.Errorf("interface name %q: letters, digits, dots and dashes only", c.Name)
	}
	if c.MTU < MinMTU || c.MTU > MaxMTU {
		return fmt.Errorf("MTU %d: must be from %d to %d", c.MTU, MinMTU, MaxMTU)
	}
	return nil
}

// SkippedRoute is a wanted route that was not set, and why.
type SkippedRoute struct {
	Prefix netip.Prefix
	Reason string // for a log line: "covers the subnet 10.0.3.0/24 of eth0"
}

// String is prefix and reason.
func (s SkippedRoute) String() string { return s.Prefix.String() + ": " + s.Reason }
