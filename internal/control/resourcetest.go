package control

import "time"

// TestResource asks the platform to open a session to a resource itself.
//
//	POST /api/v1/orgs/{org}/resources/{name}/test    TestResource → ResourceTest
type TestResource struct {
	// Gateway is the one to go through, by name or id; empty is each that serves the resource.
	Gateway string `json:"gateway,omitempty" maxLength:"63"`
	// Host is one of the resource's, where that is a network or a domain.
	Host string `json:"host,omitempty" maxLength:"253"`
	// Port is a TCP port of the resource; 0 is the one that its gateways probe, else its first.
	Port uint16 `json:"port,omitempty"`
}

// ResourceTest is what came of a test.
type ResourceTest struct {
	Resource string        `json:"resource"`
	Target   string        `json:"target"` // tcp host:port
	OK       bool          `json:"ok"`     // by one gateway at least
	Refused  bool          `json:"refused,omitempty"`
	Verdict  string        `json:"verdict"` // a sentence
	Remedy   string        `json:"remedy,omitempty"`
	Gateways []GatewayTest `json:"gateways"`
	Started  time.Time     `json:"started"`
	Millis   float64       `json:"ms"` // until the connection was there, by the last gateway; else in all
}

// GatewayTest is a test by way of one gateway.
type GatewayTest struct {
	Gateway string `json:"gateway"`
	OK      bool   `json:"ok"`
	// Path is the relay and the rung that led there: fra-1 udp, fra-1 tls, fra-1 tls-8443.
	Path string    `json:"path,omitempty"`
	Hops []TestHop `json:"hops"`
	// Tried are ways that led nowhere, with why.
	Tried   []string `json:"tried,omitempty"`
	RTT     float64  `json:"rtt_ms,omitempty"` // to the gateway and back
	Verdict string   `json:"verdict"`
	Remedy  string   `json:"remedy,omitempty"`
	Done    bool     `json:"done"`
}

// HopState is how far a hop is.
type HopState string

// The states of a hop.
const (
	HopOK      HopState = "ok"
	HopFailed  HopState = "failed"
	HopRunning HopState = "running"
	HopSkipped HopState = "skipped"
)

// Names of hops, in their order.
const (
	StepResolve    = "resolve"    // the relay's name
	StepBinding    = "binding"    // STUN to the relay and back
	StepRelay      = "relay"      // an allocation on the relay, or its TLS port
	StepRendezvous = "rendezvous" // the relay leads to the gateway
	StepGateway    = "gateway"    // QUIC with the gateway
	StepResource   = "resource"   // the gateway's policy, its look-up of the name, its connection
	StepFirstByte  = "first-byte" // what the resource says unasked
)

// TestHop is a step on the way from the platform to a resource.
type TestHop struct {
	Name   string   `json:"name"` // see StepResolve
	To     string   `json:"to"`   // for people
	State  HopState `json:"state"`
	Millis float64  `json:"ms"`
	Detail string   `json:"detail,omitempty"`
}
