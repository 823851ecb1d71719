package agent

import (
	"fmt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

// Cached is what a node's state folder knows without its daemon.
type Cached struct {
	Node     identity.Node
	Name     string
	Platform string          // URL
	Pin      string          // of the platform's CA; "" where the system's roots vouch for it
	Config   *control.Config // nil before the first one came. It holds TURN credentials
}

// ReadCached reads a node's state folder. Nothing in it is changed. An error says that nobody has enrolled there, or that it can not be read.
func ReadCached(stateDir string) (*Cached, error) {
	var n nodeState
	known, err := load(stateDir, nodeFile, &n)
	switch {
	case err != nil:
		return nil, err
	case !known:
		return nil, fmt.Errorf("no node has enrolled in %s", stateDir)
	}
	var c cacheState
	if _, err := load(stateDir, cacheFile, &c); err != nil {
		return nil, err
	}
	return &Cached{Node: n.Node, Name: n.Name, Platform: n.URL, Pin: n.Pin, Config: c.Config}, nil
}
