package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"sallyway/internal/policy"
)

// Paths of the requests other than CONNECT.
const (
	udpPath     = "/.well-known/masque/udp/" // {target_host}/{target_port}/ (RFC 9298 §3)
	ipPath      = "/.well-known/masque/ip/"  // RFC 9484 §3; the default template's */*/ is taken, too
	dnsPath     = "/dns-query"               // RFC 8484 §4.1
	controlPath = "/.well-known/sallyway/session"
)

// Protocols of extended CONNECT (RFC 9220).
const (
	protoUDP     = "connect-udp"
	protoIP      = "connect-ip"
	protoControl = "sallyway-session"
)

// maxHost is the longest DNS name, in bytes (RFC 1035 §3.1).
const maxHost = 253

// parseTarget reads what a peer wants to reach.
func parseTarget(proto policy.Proto, host, port string) (policy.Target, error) {
	t := policy.Target{Proto: proto, Host: host}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil || p == 0 {
		return t, fmt.Errorf("port %.10q is none", port)
	}
	t.Port = uint16(p)
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" {
			return t, errors.New("addresses with a zone are not reachable through a session")
		}
		t.Addr = a.Unmap()
		t.Host = t.Addr.String()
		return t, nil
	}
	return t, checkName(host)
}

// checkName refuses what no resolver takes and what would look odd in a log.
func checkName(host string) error {
	if host == "" || len(host) > maxHost {
		return fmt.Errorf("host name of %d bytes", len(host))
	}
	for _, c := range []byte(host) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`/\:@[]%?#"`, c) >= 0 {
			return fmt.Errorf("host name %.40q has a character that no name has", host)
		}
	}
	return nil
}

// parseAuthority reads the :authority of a CONNECT request.
func parseAuthority(authority string) (policy.Target, error) {
	host, port, err := net.SplitHostPort(authority)
	if err != nil {
		return policy.Target{}, fmt.Errorf("target %.80q is not host:port", authority)
	}
	return parseTarget(policy.TCP, host, port)
}

// parseUDPPath reads the path of a CONNECT-UDP request.
func parseUDPPath(escaped string) (policy.Target, error) {
	rest, ok := strings.CutPrefix(escaped, udpPath)
	if !ok {
		return policy.Target{}, errors.New("not the path of a UDP proxy")
	}
	parts := strings.Split(strings.TrimSuffix(rest, "/"), "/")
	if len(parts) != 2 {
		return policy.Target{}, errors.New("path is not " + udpPath + "{target_host}/{target_port}/")
	}
	host, err := url.PathUnescape(parts[0])
	if err != nil {
		return policy.Target{}, errors.New("malformed target host")
	}
	return parseTarget(policy.UDP, host, parts[1])
}

// formatUDPPath is the inverse of parseUDPPath. The colons of an IPv6 address are escaped (RFC 9298 §3).
func formatUDPPath(host string, port uint16) string {
	escaped := strings.ReplaceAll(url.PathEscape(host), ":", "%3A")
	return udpPath + escaped + "/" + strconv.Itoa(int(port)) + "/"
}

// connectRequest makes an extended CONNECT request (RFC 9220 §3).
func connectRequest(proto, authority, escapedPath string) (*http.Request, error) {
	u, err := url.Parse("https://" + authority + escapedPath)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	return &http.Request{Method: http.MethodConnect, Proto: proto, Host: authority, URL: u, Header: http.Header{}}, nil
}
