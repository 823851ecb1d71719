package probe

import (
	"fmt"
	"net/netip"

	"sallyway/internal/addrspace"
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

// refused says why an address is not tried in a mode, "" when it is. In no mode it is what a relay never has: metadata services, the link, multicast,
// other spellings of IPv4.
func (m Mode) refused(a netip.Addr) string {
	r := addrspace.Of(a)
	switch r.Class {
	case addrspace.Internet:
		return ""
	case addrspace.Loopback, addrspace.Private, addrspace.Testing:
		if m == Private {
			return ""
		}
	}
	return r.What
}
