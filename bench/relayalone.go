package bench

// Alone is what a run of a single layer found beside throughput. It is a part of Result.
type Alone struct {
	RelayDelay  []Delay       `json:"relay_latency,omitempty"`
	RelayMemory []RelayMemory `json:"relay_memory,omitempty"`
	Layers      []Layer       `json:"layers,omitempty"`
}

// join adds what another run found.
func (a *Alone) join(more Alone) {
	a.RelayDelay = append(a.RelayDelay, more.RelayDelay...)
	a.RelayMemory = append(a.RelayMemory, more.RelayMemory...)
	a.Layers = append(a.Layers, more.Layers...)
}
