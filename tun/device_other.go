//go:build !linux

package tun

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"
)

// Device is an open TUN device. There is none on this system yet.
type Device struct{}

// Open returns an ErrUnavailable.
func Open(c Config) (*Device, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w on %s: use the SOCKS5 or HTTP proxy, or port forwards", ErrUnavailable, runtime.GOOS)
}

// Name is empty.
func (d *Device) Name() string { return "" }

// Index is 0.
func (d *Device) Index() int { return 0 }

// MTU is 0.
func (d *Device) MTU() int { return 0 }

// HeaderLen is 0.
func (d *Device) HeaderLen() int { return 0 }

// IPv6 is false.
func (d *Device) IPv6() bool { return false }

// Read returns net.ErrClosed.
func (d *Device) Read([]byte) (int, error) { return 0, net.ErrClosed }

// WriteParts returns net.ErrClosed.
func (d *Device) WriteParts([][]byte) (int, error) { return 0, net.ErrClosed }

// SetAddresses returns an ErrUnavailable.
func (d *Device) SetAddresses([]netip.Prefix) error { return ErrUnavailable }

// SetRoutes returns an ErrUnavailable.
func (d *Device) SetRoutes([]netip.Prefix, []netip.Addr) ([]SkippedRoute, error) {
	return nil, ErrUnavailable
}

// Routes returns an ErrUnavailable.
func (d *Device) Routes() ([]netip.Prefix, error) { return nil, ErrUnavailable }

// SetOwnResolvers does nothing.
func (d *Device) SetOwnResolvers([]netip.Addr) {}

// Watch waits for ctx.
func (d *Device) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}

// SetReadDeadline returns net.ErrClosed.
func (d *Device) SetReadDeadline(time.Time) error { return net.ErrClosed }

// Hazards returns an ErrUnavailable.
func (d *Device) Hazards() (Hazards, error) { return Hazards{}, ErrUnavailable }

// Close does nothing.
func (d *Device) Close() error { return nil }
