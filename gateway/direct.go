package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/client"
	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/tunnel"
)

const (
	// directPause is how often a session may ask for a direct path: each time has the gateway send up to 64 small probes to addresses that
	// the peer named.
	directPause = 5 * time.Second
	// directAsking is how many peers may be asked for at once, each for as long as relays take to say where the gateway is seen.
	directAsking = 64
)

// directPeers are the gateway's ends of direct paths, one for each session that asked.
type directPeers struct {
	d        *gatewayDaemon
	off      string // why there are none at all, "" if there may be
	endpoint *direct.Endpoint
	policy   atomic.Pointer[control.Direct]

	mu     sync.Mutex // guards what follows
	ctx    context.Context
	asking int
	peers  map[uint64]*directPeer // by session
	tasks  sync.WaitGroup
}

// directPeer is a session that asked.
type directPeer struct {
	last time.Time // when
	peer *direct.Peer
}

func newDirectPeers(d *gatewayDaemon, enabled bool) *directPeers {
	x := &directPeers{d: d, peers: map[uint64]*directPeer{}}
	x.policy.Store(&control.Direct{})
	if !enabled {
		x.off = "direct paths are off at this gateway"
		return x
	}
	x.endpoint = direct.New(direct.Config{
		Logger: d.sh.Log, Servers: func() []netip.AddrPort { return client.RelayAddrs(d.legs) },
		Private: func() bool { return x.policy.Load().Private },
		Refuse:  func(a netip.Addr) bool { return d.sites.LeadsInside(a) },
	})
	return x
}

// run serves until ctx ends.
func (x *directPeers) run(ctx context.Context) error {
	if x.endpoint == nil {
		return nil
	}
	x.mu.Lock()
	x.ctx = ctx
	x.mu.Unlock()
	err := x.endpoint.Run(ctx)
	x.mu.Lock()
	x.ctx = nil // nobody is asked for any more
	x.mu.Unlock()
	x.tasks.Wait()
	return err
}

// networkChanged is told that the host's addresses are others now.
func (x *directPeers) networkChanged() {
	if x.endpoint != nil {
		x.endpoint.NetworkChanged()
	}
}

func (x *directPeers) stats() direct.Stats {
	if x.endpoint == nil {
		return direct.Stats{}
	}
	return x.endpoint.Stats()
}

// follow takes the organization's setting over. Where it allows none, the paths end.
func (x *directPeers) follow(p control.Direct) {
	was := x.policy.Swap(&p)
	if p == *was {
		return
	}
	x.d.sh.Log.Info("direct paths", "allowed", p.On, "private", p.Private, "here", x.off == "")
	if p.On && (p.Private || !was.Private) {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range x.peers {
		if e.peer != nil {
			e.peer.Close()
			e.peer = nil
		}
	}
}

// sessionOver forgets a session.
func (x *directPeers) sessionOver(session uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.peers[session]; e != nil {
		if e.peer != nil {
			e.peer.Close()
		}
		delete(x.peers, session)
	}
}

// asked takes a peer's offer. It does not wait.
func (x *directPeers) asked(p tunnel.Peer, n tunnel.Notice) {
	refuse := func(why string) { x.answer(p, direct.Offer{Refused: why}) }
	if x.off != "" {
		refuse(x.off)
		return
	}
	if !x.policy.Load().On {
		refuse("the organization allows no direct paths")
		return
	}
	offer, err := direct.ParseOffer(n.Data)
	if err != nil {
		refuse("the offer is not understood")
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	keys, ok := x.d.srv.ProbeKeys(p.Session)
	if !ok || x.ctx == nil {
		return
	}
	e := x.peers[p.Session]
	if e == nil {
		e = &directPeer{}
		x.peers[p.Session] = e
	}
	if time.Since(e.last) < directPause || x.asking >= directAsking {
		refuse("asked too often")
		return
	}
	e.last = time.Now()
	if e.peer != nil {
		e.peer.Close()
		e.peer = nil
	}
	ctx := x.ctx
	x.asking++
	x.tasks.Go(func() {
		peer, own, err := x.endpoint.Open(ctx, direct.PeerConfig{Keys: keys, OnLink: func(l *direct.Link) { x.add(p, l) }})
		x.mu.Lock()
		defer x.mu.Unlock()
		x.asking--
		if err != nil {
			refuse(fmt.Sprint("no direct path from the gateway: ", err))
			return
		}
		if x.peers[p.Session] != e || !x.policy.Load().On { // over meanwhile
			peer.Close()
			return
		}
		e.peer = peer
		peer.Punch(offer.Candidates)
		x.answer(p, direct.Offer{Candidates: own})
	})
}

// answer tells a peer.
func (x *directPeers) answer(p tunnel.Peer, o direct.Offer) {
	b, err := json.Marshal(o)
	if err != nil {
		return // no Offer of ours fails
	}
	x.d.srv.Notify(func(q tunnel.Peer) bool { return q.Session == p.Session }, tunnel.Notice{Type: client.NoticeDirect, Data: b})
}

// add takes a path that works in. What uses it is the peer's choice.
func (x *directPeers) add(p tunnel.Peer, l *direct.Link) {
	info := tunnel.LinkInfo{Name: fmt.Sprintf("direct %v", l.Addr()), Peer: p.Node}
	if _, err := x.d.merged.Add(l, info); err != nil && !errors.Is(err, context.Canceled) {
		x.d.sh.Log.Debug("link not taken", "path", info.Name, "peer", p.Node, "err", err)
	}
}
