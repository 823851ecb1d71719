package probe

import (
	"fmt"
	"net/netip"
)

// Mode says which relays are tried.
type Mode string

// The modes. The zero Mode is Auto.
const (
	Auto    Mode = "auto"    // those with an address of the Internet
	Off     Mode = "off"     // none
	Private Mode = "private" // also those with a private or a loopback address
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Auto, Off, Private:
		return m, nil
	case "":
		return Auto, nil
	}
	return "", fmt.Errorf("%.20q is none of auto, off and private", s)
}

// span is a range of addresses that relays on the Internet do not have, and what it is (RFC 6890 and what clouds answer metadata on).
type span struct {
	prefix netip.Prefix
	what   string
}

// Ranges that are never tried, in any mode: a relay is not there, and something else may be.
var never = spans(
	"0.0.0.0/8", "unspecified", "::/128", "unspecified", "169.254.0.0/16", "link-local or metadata", "fe80::/10", "link-local", "fec0::/10", "site-local",
	"fd00:ec2::254/128", "metadata", "fd20:ce::254/128", "metadata", "100.100.100.200/32", "metadata", "192.0.0.0/24", "metadata or reserved", "168.63.129.16/32", "metadata",
	"224.0.0.0/4", "multicast", "ff00::/8", "multicast", "240.0.0.0/4", "reserved or broadcast",
)

// Ranges that are tried in mode Private alone.
var inside = spans(
	"127.0.0.0/8", "loopback", "::1/128", "loopback", "10.0.0.0/8", "private", "172.16.0.0/12", "private", "192.168.0.0/16", "private", "fc00::/7", "private",
	"100.64.0.0/10", "private (carrier)", "198.18.0.0/15", "private (benchmarks)",
	"192.0.2.0/24", "documentation", "198.51.100.0/24", "documentation", "203.0.113.0/24", "documentation", "2001:db8::/32", "documentation",
)

// carrying are IPv6 ranges with an IPv4 address inside of them: another spelling of any of the above.
var carrying = spans(
	"::/96", "IPv4-compatible", "::ffff:0:0:0/96", "translated", "64:ff9b::/96", "translated", "64:ff9b:1::/48", "translated", "2002::/16", "6to4", "2001::/32", "Teredo",
)

func spans(pairs ...string) (out []span) {
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, span{netip.MustParsePrefix(pairs[i]), pairs[i+1]})
	}
	return out
}

func within(list []span, a netip.Addr) string {
	for _, s := range list {
		if s.prefix.Contains(a) {
			return s.what
		}
	}
	return ""
}

// refused says why an address is not tried in a mode, "" when it is.
func (m Mode) refused(a netip.Addr) string {
	if a.Zone() != "" {
		return "link-local"
	}
	a = a.Unmap()
	if !a.IsValid() {
		return "no address"
	}
	if what := within(never, a); what != "" {
		return what
	}
	if what := within(inside, a); what != "" {
		if m == Private {
			return ""
		}
		return what
	}
	return within(carrying, a)
}
