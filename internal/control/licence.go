package control

import (
	"time"

	"sallyway/internal/entitlement"
)

// CodeLicenceLimit says that an organization's licence does not allow more.
const CodeLicenceLimit = "licence_limit"

// States of a licence.
const (
	LicenceNone      = "none"      // nothing is limited
	LicenceValid     = "valid"     //
	LicenceExpiring  = "expiring"  // in 30 days at most
	LicenceExpired   = "expired"   // what runs goes on, nothing can be added
	LicenceEarly     = "early"     // its time has not come: as expired
	LicenceUntrusted = "untrusted" // the platform does not trust its key (any more): as expired
)

// Licence is what an organization may have, and has.
type Licence struct {
	State string `json:"state" enum:"none,valid,expiring,expired,early,untrusted"`
	// Problem says why nothing can be added, or what will be soon; empty otherwise.
	Problem string `json:"problem,omitempty"`
	// Installation is the platform's id, which a licence can be bound to.
	Installation string `json:"installation"`
	// Entitlement is what the licence says; absent without one.
	Entitlement *entitlement.Entitlement `json:"entitlement,omitempty"`
	Source      string                   `json:"source,omitempty" doc:"where it came from"`
	Installed   *time.Time               `json:"installed,omitempty"`
	Use         []LicenceUse             `json:"use"`
}

// LicenceUse is how much of something there is.
type LicenceUse struct {
	What  string `json:"what" enum:"gateways,relays,clients"`
	Used  int64  `json:"used"`
	Limit *int64 `json:"limit,omitempty" doc:"absent: none"`
}

// InstallLicence brings a signed licence.
type InstallLicence struct {
	Licence string `json:"licence" maxLength:"16384" doc:"signed, in one line"`
	// Source says where it came from, for people; empty is the API.
	Source string `json:"source,omitempty" maxLength:"200"`
}
