package probe

import (
	"cmp"
	"fmt"
	"net/netip"

	"sallyway/internal/identity"
)

// Permit says why an address of a relay is not dialled in a mode, for whoever dials relays beside a Prober; nil is that it is. Off is for looks alone, and
// judges as Auto. Relays of the platform are its operator's own, wherever they are.
func (m Mode) Permit(relay identity.Node, a netip.Addr) error {
	if m = cmp.Or(m, Auto); m == Off {
		m = Auto
	}
	if relay.Org == identity.SharedOrg {
		m = Private
	}
	if what := m.refused(a); what != "" {
		return fmt.Errorf("its address %v is %s, and the platform dials no such address for an organization", a, what)
	}
	return nil
}
