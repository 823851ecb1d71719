package policy

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
)

// HealthKind is what a gateway does to find out whether it reaches a resource.
type HealthKind string

// The kinds. HealthDefault is HealthTCP where the resource has a TCP port of its own to ask, else HealthOff.
const (
	HealthDefault HealthKind = ""
	HealthOff     HealthKind = "off"
	HealthTCP     HealthKind = "tcp"   // a connection is accepted
	HealthTLS     HealthKind = "tls"   // and a TLS handshake completes, whatever the certificate
	HealthHTTP    HealthKind = "http"  // a GET is answered with a status below 500
	HealthHTTPS   HealthKind = "https" // the same over TLS
)

// maxHealthPath bounds the path of a probe, in bytes.
const maxHealthPath = 512

// Health says how a gateway probes a resource. Its text is KIND[:PORT][/PATH], such as off, tcp, tls:443 or http:8080/healthz; the
// zero Health is the empty text.
type Health struct {
	Kind HealthKind
	Port uint16 // 0 is the resource's first TCP port, where that is a port and no range
	Path string // of http and https; "" is /
}

// String is the text form.
func (h Health) String() string {
	s := string(h.Kind)
	if h.Port != 0 {
		s += ":" + strconv.Itoa(int(h.Port))
	}
	return s + h.Path
}

// ParseHealth reads the text form.
func ParseHealth(s string) (Health, error) {
	bad := func(why string) (Health, error) {
		return Health{}, fmt.Errorf("health probe %.80q %s: want off, tcp, tls, http or https, then :PORT and for the last two /PATH if needed, such as http:8080/healthz", s, why)
	}
	head, path := s, ""
	if i := strings.IndexByte(s, '/'); i >= 0 {
		head, path = s[:i], s[i:]
	}
	kind, port, hasPort := strings.Cut(head, ":")
	h := Health{Kind: HealthKind(kind), Path: path}
	switch h.Kind {
	case HealthDefault:
		if s != "" {
			return bad("has no kind")
		}
		return h, nil
	case HealthOff:
		if hasPort || path != "" {
			return bad("is off and has a port or a path")
		}
	case HealthTCP, HealthTLS:
		if path != "" {
			return bad("has a path")
		}
	case HealthHTTP, HealthHTTPS:
		_, err := url.ParseRequestURI(path)
		if path != "" && (err != nil || len(path) > maxHealthPath || strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r >= 0x7f })) {
			return bad("has a path that is none")
		}
	default:
		return bad("is of no known kind")
	}
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return bad("has a port that is none")
		}
		h.Port = uint16(n)
	}
	return h, nil
}

// MarshalText writes the text form.
func (h Health) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads the text form.
func (h *Health) UnmarshalText(b []byte) error {
	v, err := ParseHealth(string(b))
	if err == nil {
		*h = v
	}
	return err
}

// Probe says what to do to see whether r is reached: where, and how. Nothing is to be done for a network, a wildcard, or where no port is
// known.
func (r *Resource) Probe() (host string, h Health, ok bool) {
	h = r.Health
	if h.Kind == HealthOff || strings.HasPrefix(r.Address, "*.") {
		return "", h, false
	}
	host = r.Address
	if p, isAddr := r.Prefix(); isAddr {
		if !p.IsSingleIP() {
			return "", h, false
		}
		host = p.Addr().String()
	}
	if h.Kind == HealthDefault {
		h.Kind = HealthTCP
	}
	if h.Port == 0 {
		if len(r.TCP) == 0 || r.TCP[0].First != r.TCP[0].Last {
			return "", h, false
		}
		h.Port = r.TCP[0].First
	}
	return host, h, true
}
