package bench

// Alone is what a run of a single layer found beside throughput. It is a part of Result.
type Alone struct {
	RelayDelay  []Delay       `json:"relay_latency,omitempty"`
	RelayMemory []RelayMemory `json:"relay_memory,omitempty"`
}
