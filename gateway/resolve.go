package gateway

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/miekg/dns"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

const (
	// dnsTimeout bounds one exchange with one of the host's name servers, and dnsTotal all of them for one query: a client's own patience is
	// hardly longer.
	dnsTimeout = 3 * time.Second
	dnsTotal   = 8 * time.Second
	// dnsServers is how many of the name servers are asked at most, one after the other.
	dnsServers = 4
)

// names asks the name servers of the gateway's network on behalf of peers (DNS over HTTPS, RFC 8484).
type names struct {
	enforce *enforcer
	// servers are the host's name servers, host:port each.
	servers func() ([]string, error)
}

// systemServers reads the name servers of a resolv.conf.
func systemServers(path string) ([]string, error) {
	cfg, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil, err
	}
	out := make([]string, len(cfg.Servers))
	for i, s := range cfg.Servers {
		out[i] = net.JoinHostPort(s, cfg.Port)
	}
	return out, nil
}

// ednsSize is the UDP size offered to name servers, in bytes: what passes every path unfragmented (DNS flag day 2020).
const ednsSize = 1232

// Resolve answers a DNS query in wire format for names that a policy lets the peer resolve.
func (n *names) Resolve(ctx context.Context, peer identity.Node, query []byte) ([]byte, error) {
	var q dns.Msg
	if err := q.Unpack(query); err != nil || q.Response || q.Opcode != dns.OpcodeQuery || len(q.Question) != 1 {
		return nil, &tunnel.ProxyError{Type: tunnel.RequestError, Detail: "this is not a DNS query with one question"}
	}
	s, err := n.enforce.current()
	if err != nil {
		return nil, err
	}
	name := q.Question[0].Name
	if d := s.Evaluate(peer, policy.Target{Proto: policy.DNS, Host: name}); !d.Allowed {
		return nil, tunnel.Denied(d.Rule, d.Reason)
	}
	if q.Question[0].Qtype == dns.TypeAXFR || q.Question[0].Qtype == dns.TypeIXFR {
		return nil, &tunnel.ProxyError{Type: tunnel.RequestError, Detail: "zone transfers are not served"}
	}
	id := q.Id
	q.Id = dns.Id() // RFC 8484 asks for id 0 on HTTPS, which is a poor one towards a name server
	m, err := n.exchange(ctx, &q)
	if err != nil {
		return nil, err
	}
	m.Id = id
	b, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("encode the name server's answer: %w", err)
	}
	return b, nil
}

// exchange asks one name server after the other until one has an answer. That it fails, refuses or does not know how is none of the name's:
// it is the answer only where no other is better.
func (n *names) exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	servers, err := n.servers()
	if err != nil || len(servers) == 0 {
		return nil, &tunnel.ProxyError{Type: tunnel.DNSError, Detail: "the gateway's host has no name server configured", Err: err}
	}
	last := error(&tunnel.ProxyError{Type: tunnel.DNSTimeout, Detail: "the gateway's name servers do not answer"})
	ctx, cancel := context.WithTimeout(ctx, dnsTotal)
	defer cancel()
	var poor *dns.Msg
	for _, addr := range servers[:min(len(servers), dnsServers)] {
		c := &dns.Client{Net: "udp", Timeout: dnsTimeout, UDPSize: ednsSize}
		m, _, err := c.ExchangeContext(ctx, q, addr)
		if err == nil && m.Truncated {
			c.Net = "tcp"
			m, _, err = c.ExchangeContext(ctx, q, addr)
		}
		switch {
		case err == nil && failed(m.Rcode):
			if poor == nil {
				poor = m
			}
			continue
		case err == nil:
			return m, nil
		}
		pe := tunnel.AsProxyError(err)
		last = &tunnel.ProxyError{Type: tunnel.DNSTimeout, Detail: "the gateway's name servers do not answer", Err: pe}
		if ctx.Err() != nil {
			break
		}
	}
	if poor != nil {
		return poor, nil
	}
	return nil, last
}

// failed reports whether an answer speaks of the name server and not of the name.
func failed(rcode int) bool {
	return rcode == dns.RcodeServerFailure || rcode == dns.RcodeRefused || rcode == dns.RcodeNotImplemented
}
