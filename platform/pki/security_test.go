package pki

import (
	"testing"
	"time"

	"sallyway/internal/identity"
)

// TestSerialsAreRandom looks at many serial numbers: positive, within 20 octets, all different, and nearly all with more than 112 bits.
func TestSerialsAreRandom(t *testing.T) {
	o := newOrg("acme")
	key := newKey().Public()
	seen := map[string]bool{}
	long := 0
	for range 200 {
		c := must(o.cas[identity.Client].Leaf(o.node(identity.Client), key, time.Now(), time.Hour))
		if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 159 || seen[c.SerialNumber.String()] {
			t.Fatalf("serial %v", c.SerialNumber)
		}
		seen[c.SerialNumber.String()] = true
		if c.SerialNumber.BitLen() > 112 {
			long++
		}
	}
	if long < 190 {
		t.Errorf("%d of 200 serials have more than 112 bits", long)
	}
}
