package network

import (
	"net"

	"golang.org/x/net/ipv6"
)

func setHopLimit(conn net.PacketConn) error {
	return ipv6.NewPacketConn(conn).SetMulticastHopLimit(255)
}
