//go:build !linux

package stun

import "net"

func forbidFragments(*net.UDPConn) error { return ErrNoDF }
