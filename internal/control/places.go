package control

import (
	"net/netip"
	"time"
)

// Places are where a node is and which relays it is to have, in records of nodes. Relays have Region and FailureDomain, gateways and clients
// Region and the lists, which are names of relays.
type Places struct {
	Region string `json:"region,omitempty" doc:"label of where it is, such as eu-central"`
	// FailureDomain is what a relay may fail together with: two relays of a gateway are of different ones where that is possible.
	FailureDomain string   `json:"failure_domain,omitempty" doc:"what a relay may fail together with, such as a rack, a building, a provider"`
	PinRelays     []string `json:"pin_relays,omitempty" doc:"relays that it has before all others while they are usable"`
	ExcludeRelays []string `json:"exclude_relays,omitempty" doc:"relays that it never has"`
	PreferRelays  []string `json:"prefer_relays,omitempty" doc:"relays that go before nearer ones"`
}

// UpdatePlaces changes what is not nil; an empty text or list takes away.
type UpdatePlaces struct {
	Region        *string   `json:"region,omitempty" doc:"label of where it is; empty takes it away"`
	FailureDomain *string   `json:"failure_domain,omitempty" doc:"what a relay may fail together with; empty takes it away"`
	PinRelays     *[]string `json:"pin_relays,omitempty" doc:"relays that it has before all others while they are usable, by name or id"`
	ExcludeRelays *[]string `json:"exclude_relays,omitempty" doc:"relays that it never has, by name or id"`
	PreferRelays  *[]string `json:"prefer_relays,omitempty" doc:"relays that go before nearer ones, by name or id"`
}

// OutsideState is what was found when the platform tried a relay from outside.
type OutsideState string

// The states. A relay that was never tried has none.
const (
	OutsideReached   OutsideState = "reached"
	OutsidePartly    OutsideState = "partly"     // by some of its ports
	OutsideUnreached OutsideState = "unreached"  // by none
	OutsideNotProbed OutsideState = "not_probed" // Why says why
)

// Outside is what the platform found when it last tried a relay as nodes reach it.
type Outside struct {
	State   OutsideState   `json:"state"`
	Since   time.Time      `json:"since"` // of State
	At      time.Time      `json:"at"`
	Address *netip.Addr    `json:"address,omitempty"` // that was tried
	RTT     time.Duration  `json:"rtt,omitempty"`     // of STUN over UDP, in nanoseconds
	Why     string         `json:"why,omitempty"`     // of what is not well, in a sentence
	Remedy  string         `json:"remedy,omitempty"`
	Checks  []OutsideCheck `json:"checks,omitempty"`
}

// OutsideCheck is one port of a relay.
type OutsideCheck struct {
	Name   string `json:"name"` // such as STUN 5349/udp
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// RelayChoices say why a gateway has the relays that it has, and not the others.
type RelayChoices struct {
	Gateway string        `json:"gateway"`
	Items   []RelayChoice `json:"items"` // those that it has first
}

// RelayChoice is a relay and what it is to a gateway.
type RelayChoice struct {
	Relay         string    `json:"relay"`
	Shared        bool      `json:"shared,omitempty"` // of the platform
	Place         string    `json:"place,omitempty"`  // active, standby; empty is none
	State         NodeState `json:"state"`
	Region        string    `json:"region,omitempty"`
	FailureDomain string    `json:"failure_domain,omitempty"`
	// RTT is what the gateway measured, in nanoseconds; 0 is not known.
	RTT time.Duration `json:"rtt,omitempty"`
	// Gateways is how many gateways of the organization have it, Active how many of them as the active one. Load is what it carries besides, in
	// gateways: traffic and allocations.
	Gateways int     `json:"gateways"`
	Active   int     `json:"active"`
	Load     float64 `json:"load"`
	Why      string  `json:"why"`
}
