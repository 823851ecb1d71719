package tunnel

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"golang.org/x/net/dns/dnsmessage"

	"sallyway/internal/telemetry"
)

// DNS over HTTPS (RFC 8484).
const (
	dnsMessageType = "application/dns-message"
	// maxDNS is the largest DNS message, in bytes.
	maxDNS = 65535
	// maxQuery is the largest query that goes into a request's header, in bytes; queries are far smaller.
	maxQuery = 8 << 10
)

// Resolve has the gateway answer a DNS query in wire format (RFC 1035 §4.1) and returns the answer. A refusal is a *ProxyError.
func (s *Session) Resolve(ctx context.Context, query []byte) ([]byte, error) {
	if len(query) > maxQuery {
		return nil, fmt.Errorf("resolve: query of %d bytes, limit %d", len(query), maxQuery)
	}
	req := &http.Request{
		Method: http.MethodGet, Host: s.authority,
		URL:    &url.URL{Scheme: "https", Host: s.authority, Path: dnsPath, RawQuery: "dns=" + base64.RawURLEncoding.EncodeToString(query)},
		Header: http.Header{"Accept": {dnsMessageType}},
	}
	str, rsp, err := s.request(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	defer str.CancelRead(codeGone) // nothing is left to read, or nobody wants it
	_ = str.Close()                // nothing was to follow the header
	var answer []byte
	if err := s.untilDone(ctx, str, func() (err error) {
		answer, err = io.ReadAll(io.LimitReader(rsp.Body, maxDNS+1))
		return err
	}); err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	if len(answer) > maxDNS {
		return nil, fmt.Errorf("resolve: answer of more than %d bytes", maxDNS)
	}
	return answer, nil
}

// serveDNS answers GET and POST requests (RFC 8484 §4.1).
func (p *peerSession) serveDNS(w http.ResponseWriter, r *http.Request) {
	query, err := readQuery(r)
	if err != nil {
		p.fail(w, err)
		return
	}
	answer, err := p.srv.cfg.Handler.Resolve(telemetry.Extract(r.Context(), r.Header), p.peer, query)
	if err != nil {
		p.fail(w, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", dnsMessageType)
	h.Set("Content-Length", strconv.Itoa(len(answer)))
	h.Set("Cache-Control", "max-age="+strconv.FormatUint(uint64(freshness(answer)), 10))
	_, _ = w.Write(answer) // nobody is left to tell
}

func readQuery(r *http.Request) ([]byte, error) {
	bad := func(status int, detail string) error {
		return &ProxyError{Type: RequestError, Status: status, Detail: detail}
	}
	var query []byte
	switch r.Method {
	case http.MethodGet:
		encoded := r.URL.Query().Get("dns")
		var err error
		if query, err = base64.RawURLEncoding.DecodeString(encoded); err != nil || encoded == "" {
			return nil, bad(http.StatusBadRequest, "no DNS query in parameter dns")
		}
	case http.MethodPost:
		if r.Header.Get("Content-Type") != dnsMessageType {
			return nil, bad(http.StatusUnsupportedMediaType, "content is not "+dnsMessageType)
		}
		var err error
		if query, err = io.ReadAll(io.LimitReader(r.Body, maxDNS+1)); err != nil {
			return nil, bad(http.StatusBadRequest, "query cut off")
		}
	default:
		return nil, bad(http.StatusMethodNotAllowed, "GET or POST")
	}
	if len(query) > maxDNS {
		return nil, bad(http.StatusRequestEntityTooLarge, "query too large")
	}
	var parser dnsmessage.Parser
	if _, err := parser.Start(query); err != nil {
		return nil, bad(http.StatusBadRequest, "not a DNS message")
	}
	return query, nil
}

// freshness is the smallest TTL among an answer's records in seconds (RFC 8484 §5.1); 0 where there are none.
func freshness(answer []byte) uint32 {
	var p dnsmessage.Parser
	if _, err := p.Start(answer); err != nil || p.SkipAllQuestions() != nil {
		return 0
	}
	least, found := uint32(0), false
	for {
		h, err := p.AnswerHeader()
		if err != nil || p.SkipAnswer() != nil {
			return least
		}
		if !found || h.TTL < least {
			least, found = h.TTL, true
		}
	}
}
