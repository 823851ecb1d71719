package client

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"sallyway/internal/identity"
	"sallyway/internal/tally"
)

// virtualTTL is how long answers made from the configuration may be cached, in seconds: short, since a configuration can change.
const virtualTTL = 30

// upstreamTimeout bounds one exchange with one of the host's own resolvers.
const upstreamTimeout = 3 * time.Second

// ednsSize is the UDP size that answers offer, in bytes: the largest the stub sends.
const ednsSize = 4096

// maxQueries bounds the queries that are being answered; more are dropped, and their askers ask again.
const maxQueries = 512

// stub answers the host's DNS queries for what lies behind gateways (split DNS): names of resources and gateways from the
// configuration, domains that a resource names from the gateway's network by DNS over HTTPS (RFC 8484), and, where the host can not
// split by domain, everything else from the resolvers that the host had before.
type stub struct {
	log   *slog.Logger
	table func() *table
	// resolve asks a gateway; query and answer are DNS messages in wire format.
	resolve func(ctx context.Context, gateways []identity.Node, query []byte) ([]byte, error)
	// upstreams are the host's own resolvers, when queries outside of our domains reach us at all.
	upstreams func() []netip.AddrPort

	asking atomic.Int32 // queries being answered
	often  tally.Log    // queries that failed
}

// answer returns the reply to a query, both in wire format, or nil for what is no query and for one too many. size bounds the reply in bytes and is
// dns.MaxMsgSize over TCP; a longer one is truncated (RFC 1035 §4.1.1).
func (s *stub) answer(ctx context.Context, query []byte, size int) []byte {
	var q dns.Msg
	if err := q.Unpack(query); err != nil || q.Response || len(q.Question) != 1 {
		return nil
	}
	if size != dns.MaxMsgSize {
		size = dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = max(size, min(int(opt.UDPSize()), ednsSize))
		}
	}
	defer s.asking.Add(-1)
	if s.asking.Add(1) > maxQueries {
		return nil
	}
	m := s.reply(ctx, &q, query)
	if opt := q.IsEdns0(); opt != nil && m.IsEdns0() == nil {
		m.SetEdns0(ednsSize, opt.Do()) // RFC 6891 §6.1.1
	}
	m.Truncate(size)
	b, err := m.Pack()
	if err != nil {
		s.log.Warn("encode DNS answer", "err", err)
		return nil
	}
	return b
}

func (s *stub) reply(ctx context.Context, q *dns.Msg, raw []byte) *dns.Msg {
	if q.Opcode != dns.OpcodeQuery {
		return failure(q, dns.RcodeNotImplemented) // an UPDATE is no question to hand on
	}
	question := q.Question[0]
	name := canonical(question.Name)
	t := s.table()
	if addrs, known := t.addresses(name); known {
		return s.fromTable(q, question, addrs)
	}
	if gateways, known := t.resolver(name); known {
		m, err := s.exchange(ctx, gateways, raw)
		if err != nil {
			s.often.Info(s.log, whyRefused(err), "name not resolved by gateway", "name", name, "err", err)
			return failure(q, dns.RcodeServerFailure)
		}
		return m
	}
	if strings.HasSuffix(name, ".sallyway.internal") || name == "sallyway.internal" {
		return failure(q, dns.RcodeNameError)
	}
	for _, up := range s.upstreams() {
		c := &dns.Client{Net: "udp", Timeout: upstreamTimeout, UDPSize: ednsSize}
		m, _, err := c.ExchangeContext(ctx, q, up.String())
		if err == nil && m.Truncated {
			c.Net = "tcp"
			m, _, err = c.ExchangeContext(ctx, q, up.String())
		}
		if err == nil {
			return m
		}
	}
	return failure(q, dns.RcodeRefused)
}

func (s *stub) exchange(ctx context.Context, gateways []identity.Node, raw []byte) (*dns.Msg, error) {
	b, err := s.resolve(ctx, gateways, raw)
	if err != nil {
		return nil, err
	}
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		return nil, fmt.Errorf("the gateway's answer is malformed: %w", err)
	}
	// DNS over HTTPS sends id 0 (RFC 8484 §4.1); the asker wants its own back.
	if len(raw) >= 2 {
		m.Id = uint16(raw[0])<<8 | uint16(raw[1])
	}
	return m, nil
}

func (s *stub) fromTable(q *dns.Msg, question dns.Question, addrs []netip.Addr) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	for _, a := range addrs {
		head := dns.RR_Header{Name: question.Name, Class: dns.ClassINET, Ttl: virtualTTL}
		switch {
		case a.Is4() && question.Qtype == dns.TypeA:
			head.Rrtype = dns.TypeA
			m.Answer = append(m.Answer, &dns.A{Hdr: head, A: a.AsSlice()})
		case a.Is6() && question.Qtype == dns.TypeAAAA:
			head.Rrtype = dns.TypeAAAA
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: head, AAAA: a.AsSlice()})
		}
	}
	return m
}

func failure(q *dns.Msg, rcode int) *dns.Msg {
	m := new(dns.Msg).SetRcode(q, rcode)
	m.RecursionAvailable = true
	return m
}
