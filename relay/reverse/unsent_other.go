//go:build !linux

package reverse

import "net"

// LimitUnsent does nothing here.
func LimitUnsent(net.Conn) {}
