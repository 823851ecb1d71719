package reverse

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

// Pacing of a Tunnel.
const (
	// RetryInterval is between attempts at a relay, before jitter.
	RetryInterval = 5 * time.Second
	// slotIdle is how long the further slots stay after the last link.
	slotIdle = 2 * time.Minute
	// renewCheck is how often a connection looks whether there is a fresher certificate, renewBefore how long before its own ends it is
	// replaced even under load.
	renewCheck  = time.Minute
	renewBefore = time.Hour
)

// MaxLinks is how many links a gateway has with one relay.
const MaxLinks = 1024

// TunnelConfig says which relay a gateway serves on, and as whom.
type TunnelConfig struct {
	// Relay and HostCAs are asked for at every connection: what they return may change.
	Relay   identity.Node
	HostCAs func() []string
	// Resolve finds the addresses of its SSH port.
	Resolve func(ctx context.Context) ([]netip.AddrPort, error)
	// Gateway is this node, Identity its key and newest certificate.
	Gateway  identity.Node
	Identity func() Identity
	// OnLink takes the links of peers. It must set a receiver before it returns, and not block. The Tunnel closes them.
	OnLink func(peer identity.Node, l *Link)
	// OnChange is told when the first connection came up or was lost; nil is nothing.
	OnChange func(up bool, err error)
	// Dial and Control are as in TLSConfig.
	Dial    func(ctx context.Context, network, address string) (net.Conn, error)
	Control func(network, address string, c syscall.RawConn) error
	// Queue bounds what waits to be written on a link, in bytes; 0 is DefaultQueue.
	Queue  int
	Logger *slog.Logger
}

// Tunnel is a gateway's SSH connections to one relay, up to Slots: the first is kept up, the others while there are links. Its methods may
// be called concurrently.
type Tunnel struct {
	cfg   TunnelConfig
	retry time.Duration // RetryInterval; tests have less time

	mu       sync.Mutex // guards what follows
	links    map[uint64]*boundLink
	idle     time.Time // since when there is no link
	busy     chan struct{}
	conns    [Slots]*sshConn
	since    time.Time
	lastErr  error
	draining bool
	total    uint64
}

// boundLink is a link with its channels.
type boundLink struct {
	*Link
	bundle *Bundle
	peer   identity.Node
}

// TunnelStatus is what is known of a Tunnel.
type TunnelStatus struct {
	Relay       identity.Node `json:"relay"`
	Up          bool          `json:"up"`
	Connections int           `json:"connections"`
	Links       int           `json:"links"`
	TotalLinks  uint64        `json:"total_links"`
	Since       time.Time     `json:"since,omitzero"`
	Draining    bool          `json:"draining,omitempty"`
	Error       string        `json:"error,omitempty"`
}

// NewTunnel makes a tunnel; Run connects it.
func NewTunnel(cfg TunnelConfig) *Tunnel {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Queue == 0 {
		cfg.Queue = DefaultQueue
	}
	return &Tunnel{cfg: cfg, retry: RetryInterval, links: map[uint64]*boundLink{}, busy: make(chan struct{}), since: time.Now()}
}

// Run keeps the tunnel up until ctx ends, then ends its links and returns.
func (t *Tunnel) Run(ctx context.Context) error {
	var slots sync.WaitGroup
	for slot := range Slots {
		slots.Go(func() { t.keep(ctx, slot) })
	}
	slots.Wait()
	t.mu.Lock()
	var rest []*boundLink
	for _, l := range t.links {
		rest = append(rest, l)
	}
	t.mu.Unlock()
	for _, l := range rest {
		l.Close()
	}
	return ctx.Err()
}

// Status says how the tunnel is.
func (t *Tunnel) Status() TunnelStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := TunnelStatus{Relay: t.cfg.Relay, Up: t.conns[0] != nil, Links: len(t.links), TotalLinks: t.total, Since: t.since, Draining: t.draining}
	for _, c := range t.conns {
		if c != nil {
			st.Connections++
		}
	}
	if t.lastErr != nil && !st.Up {
		st.Error = t.lastErr.Error()
	}
	return st
}

// keep holds a slot's connection up.
func (t *Tunnel) keep(ctx context.Context, slot int) {
	log := t.cfg.Logger.With("slot", slot)
	for ctx.Err() == nil {
		if slot > 0 && !t.awaitLinks(ctx) {
			return
		}
		started := time.Now()
		err := t.connect(ctx, slot, log)
		if ctx.Err() != nil {
			return
		}
		if slot == 0 {
			t.mu.Lock()
			news := t.lastErr == nil || err == nil || t.lastErr.Error() != err.Error()
			t.lastErr = err
			t.mu.Unlock()
			if news && err != nil {
				log.Warn("SSH connection to the relay is not there", "err", err, "retry_every", t.retry)
			}
		} else if err != nil {
			log.Debug("further SSH connection is not there", "err", err)
		}
		if rest := jitter(t.retry) - time.Since(started); err != nil && rest > 0 {
			pause(ctx, rest)
		}
	}
}

// errReplaced says that a fresher certificate was taken up, errIdle that there are no links for a further slot.
var (
	errReplaced = errors.New("replaced with a fresh certificate")
	errIdle     = errors.New("no links")
)

// connect opens the connection of a slot and holds it to its end.
func (t *Tunnel) connect(ctx context.Context, slot int, log *slog.Logger) error {
	dctx, cancel := context.WithTimeout(ctx, SSHGrace)
	addrs, err := t.cfg.Resolve(dctx)
	if err != nil {
		cancel()
		return err
	}
	c, err := dialSSH(dctx, &SSHConfig{
		Relay: t.cfg.Relay, HostCAs: t.cfg.HostCAs(), Addrs: addrs, Gateway: t.cfg.Gateway, Identity: t.cfg.Identity(), Slot: slot,
		OnChannel: t.channel, OnDraining: t.drain, Dial: t.cfg.Dial, Control: t.cfg.Control,
	})
	cancel()
	if err != nil {
		return err
	}
	defer c.close()
	t.set(slot, c, nil)
	if slot == 0 {
		log.Info("SSH connection to the relay is up")
	}
	err = t.hold(ctx, slot, c)
	lost := err
	if errors.Is(err, errReplaced) || errors.Is(err, errIdle) {
		err = nil
	}
	t.set(slot, nil, lost)
	if slot == 0 && err != nil && ctx.Err() == nil {
		log.Warn("SSH connection to the relay is lost", "err", err)
	}
	return err
}

// hold waits until the connection ends or has no use any more.
func (t *Tunnel) hold(ctx context.Context, slot int, c *sshConn) error {
	tick := time.NewTicker(min(renewCheck, slotIdle/4))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.done:
			if c.err == nil {
				return net.ErrClosed
			}
			return c.err
		case <-tick.C:
		}
		t.mu.Lock()
		idle := len(t.links) == 0
		long := idle && time.Since(t.idle) > slotIdle
		t.mu.Unlock()
		if slot > 0 && long {
			return errIdle
		}
		if cert, _, err := t.cfg.Identity().Parse(); err == nil && cert.Serial != c.serial && (idle || time.Until(c.expires) < renewBefore) {
			return errReplaced
		}
	}
}

func (t *Tunnel) set(slot int, c *sshConn, err error) {
	t.mu.Lock()
	t.conns[slot] = c
	if slot == 0 {
		t.since, t.lastErr = time.Now(), err
		if c != nil {
			t.draining = false
		}
	}
	t.mu.Unlock()
	if slot == 0 && t.cfg.OnChange != nil {
		t.cfg.OnChange(c != nil, err)
	}
}

func (t *Tunnel) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.draining = true
}

// awaitLinks waits until there is a link.
func (t *Tunnel) awaitLinks(ctx context.Context) bool {
	t.mu.Lock()
	n, busy := len(t.links), t.busy
	t.mu.Unlock()
	if n > 0 {
		return true
	}
	select {
	case <-busy:
		return true
	case <-ctx.Done():
		return false
	}
}

// channel takes a channel: of a new link, or a further one of a link that is there.
func (t *Tunnel) channel(o Open, ch io.ReadWriteCloser, kill func()) {
	t.mu.Lock()
	l := t.links[o.Link]
	fresh := l == nil
	if fresh && len(t.links) >= MaxLinks || !fresh && (l.peer != o.Peer || l.bundle.Channels() >= Slots) {
		t.mu.Unlock()
		_ = ch.Close() // the relay sees it end
		return
	}
	if fresh {
		l = t.newLink(o)
		t.links[o.Link] = l
		t.total++
		if len(t.links) == 1 {
			close(t.busy)
		}
	}
	t.mu.Unlock()
	if fresh {
		t.cfg.OnLink(o.Peer, l.Link)
	}
	_ = l.bundle.Add(ch, kill) // a link that is over is no news
}

func (t *Tunnel) newLink(o Open) *boundLink {
	l := &boundLink{Link: &Link{out: NewQueue(t.cfg.Queue), draining: make(chan struct{})}, peer: o.Peer}
	l.bundle = NewBundle(l.out, func(frames []byte, owner *datagram.Buffer) error {
		return Frames(frames, func(r Run) { l.receive(r, owner) })
	}, func() { t.forget(o.Link) })
	l.done, l.close, l.err = l.bundle.Done(), l.bundle.Close, l.bundle.Err
	return l
}

// forget takes a link that has ended off the list.
func (t *Tunnel) forget(id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.links, id)
	if len(t.links) == 0 {
		t.idle, t.busy = time.Now(), make(chan struct{})
	}
}

// Frames calls f with the runs of a chunk, which has whole frames and no control.
func Frames(b []byte, f func(Run)) error {
	for len(b) > 0 {
		run, kind, used, err := Next(b)
		if err != nil {
			return err
		}
		if used == 0 || kind != 0 || len(run.Frames) == 0 {
			return errors.New("a chunk with a broken frame")
		}
		f(run)
		b = b[used:]
	}
	return nil
}

// jitter is d give or take a tenth.
func jitter(d time.Duration) time.Duration { return d - d/10 + rand.N(d/5) }

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
