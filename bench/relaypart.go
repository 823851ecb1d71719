package bench

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
)

// partNumber tells the logs of processes of one name apart.
var partNumber atomic.Int64

// parts are processes that measurements of single layers start on the lab's hosts.
var parts = map[string]func(ctx context.Context, config []byte) error{
	"forward":        forwardPart,
	"idle-legs":      idleLegsPart,
	"leg-client":     legClient,
	"leg-gateway":    legGateway,
	"netstack-own":   ownNetstack,
	"netstack-plain": plainNetstack,
}

// Part runs a part of a measurement until ctx ends: a process of its own on a host of the lab, told what to do in JSON.
func Part(ctx context.Context, name string, config []byte) error {
	f, ok := parts[name]
	if !ok {
		return fmt.Errorf("no part %q: one of %s", name, strings.Join(slices.Sorted(maps.Keys(parts)), ", "))
	}
	return f(ctx, config)
}

// alone writes the tables of a run of single layers. It says whether it was one.
func (r *Result) alone(b *strings.Builder) bool {
	n := b.Len()
	if len(r.Relay) > 0 {
		r.relayTable(b)
	}
	if len(r.Netstack) > 0 {
		r.netstackTable(b)
	}
	if len(r.Layers) > 0 {
		r.layersTable(b)
	}
	return b.Len() > n
}
