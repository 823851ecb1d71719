// Package tunnel is the end-to-end session between a client (or a site) and a gateway: QUIC with mutual TLS 1.3 over whatever links
// there are, and HTTP/3 proxying on it. A link (internal/datagram) is a channel on a relay; the relay sees ciphertext only.
//
//	request                                                         what it is
//	CONNECT host:port                                               a TCP flow (RFC 9114 §4.4)
//	CONNECT /.well-known/masque/udp/{host}/{port}/  connect-udp     a UDP flow (RFC 9298), large payloads as capsules (RFC 9297 §3.5)
//	CONNECT /.well-known/masque/ip/                 connect-ip      IP packets (RFC 9484)
//	GET, POST /dns-query                                            a name that the gateway's network resolves (RFC 8484)
//	CONNECT /.well-known/sallyway/session           sallyway        control: path messages, notices, the session's end
//
// A client dials over a first link, keeps a second one validated, and moves when the first one fails; flows do not notice:
//
//	s, err := tunnel.Dial(ctx, tunnel.DialConfig{Link: link, Gateway: node, Certificate: cert, Trust: trust})
//	err = s.Standby(ctx, other, "ams-2 udp")        // validated now, used later
//	c, err := s.DialTCP(ctx, "db.internal", 5432)   // refused, filtered and denied are told apart: see ProxyError
//	err = s.Failover("probes unanswered")           // everything goes over the other link from here on
//
// A gateway adds every link it gets to one Merged and serves on that:
//
//	m, err := tunnel.NewMerged(tunnel.MergedConfig{})
//	srv, err := tunnel.Listen(m, tunnel.ServeConfig{Node: node, Certificate: cert, Trust: trust, Handler: h})
//	go srv.Run(ctx)
//	m.Add(link, "fra-1 udp")
//
// What may be reached is the Handler's decision; tunnel carries it to the peer as an HTTP status with Proxy-Status (RFC 9209), and back
// into a *ProxyError there.
package tunnel
