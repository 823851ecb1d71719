package bench

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/relay/wire"
)

// RelayMemory is what idle allocations cost a relay.
type RelayMemory struct {
	Server      string `json:"server"`
	Control     string `json:"control"` // how the clients talk to the relay
	Allocations int    `json:"allocations"`
	Empty       int64  `json:"empty_bytes"` // resident before the first
	Idle        int64  `json:"idle_bytes"`  // resident with all of them, at once
	// Settled is what is resident when they have been idle for a while: what was garbage of their beginning is gone. 0 is not
	// measured.
	Settled int64 `json:"settled_bytes,omitempty"`
	Lost    int   `json:"lost,omitempty"` // allocations that were not there any more by then
}

// resident is what counts.
func (m RelayMemory) resident() int64 { return cmp.Or(m.Settled, m.Idle) }

// idleBar is what 10 000 idle allocations may cost.
const (
	idleBar         = 300 << 20
	idleAllocations = 10_000
	idleDialers     = 8 // handshakes at once
)

// idleEnd says what legs are to be held.
type idleEnd struct {
	Relay   netip.AddrPort
	Dir     string // of the certificates
	Legs    int
	Sources [2]byte // the first bytes of their addresses
}

// idleLegs measures the relay's memory with legs of ours: control in DTLS.
func (r *relayRun) idleLegs(ctx context.Context, bed *relayBed) error {
	dir, err := os.MkdirTemp(r.lab.Dir(), "pki-")
	if err != nil {
		return err
	}
	if err := writePKI(dir, identity.Relay); err != nil {
		return err
	}
	key := newRelayKey()
	srv, err := bed.start(ctx, OwnRelay, key, dir)
	if err != nil {
		return err
	}
	defer srv.stop()
	before, err := srv.proc.Usage()
	if err != nil {
		return err
	}
	fmt.Fprintf(r.out, "%d legs over DTLS\n", r.cfg.Idle)
	p, err := startPart(ctx, bed.load, "idle-legs", idleEnd{srv.addr, dir, r.cfg.Idle, bed.sources}, hex.EncodeToString(key))
	if err != nil {
		return err
	}
	defer p.Kill()
	after, err := srv.proc.Usage()
	if err != nil {
		return err
	}
	m := RelayMemory{Server: OwnRelay, Control: "DTLS", Allocations: r.cfg.Idle, Empty: before.RSS, Idle: after.RSS}
	if r.cfg.Settle > 0 {
		select {
		case <-time.After(r.cfg.Settle):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if after, err = srv.proc.Usage(); err != nil {
			return err
		}
		m.Settled = after.RSS
		for _, line := range p.Log.Since(0, "^lost ") {
			var n int
			if _, err := fmt.Sscanf(line.Text, "lost %d:", &n); err == nil {
				m.Lost = max(m.Lost, n)
			}
		}
	}
	r.res.RelayMemory = append(r.res.RelayMemory, m)
	return nil
}

// legConfig is that of a leg of ours to a relay of a run.
func legConfig(addr netip.AddrPort, node identity.Node, trust *identity.Trust, key []byte) leg.Config {
	user := relayUser(node)
	password := wire.Password(key, user)
	return leg.Config{
		Relay: relayNode(identity.Relay), Addrs: []netip.AddrPort{addr},
		Verify: func(chain []*x509.Certificate) error {
			_, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth)
			return err
		},
		Credentials: func() (string, string) { return user, password },
	}
}

// relayKey is the key that a process was started with.
func relayKey() ([]byte, error) {
	key, err := hex.DecodeString(os.Getenv(keyVariable))
	if err != nil || len(key) == 0 {
		return nil, fmt.Errorf("%s is no key", keyVariable)
	}
	return key, nil
}

// idleLegsPart dials legs and holds them until ctx ends.
func idleLegsPart(ctx context.Context, config []byte) error {
	var cfg idleEnd
	if err := json.Unmarshal(config, &cfg); err != nil {
		return err
	}
	key, err := relayKey()
	if err != nil {
		return err
	}
	trust, err := loadTrust(cfg.Dir)
	if err != nil {
		return err
	}
	bed := relayBed{sources: cfg.Sources}
	held := make([]*leg.Leg, cfg.Legs)
	failed := make([]error, cfg.Legs)
	next := make(chan int)
	var wg sync.WaitGroup
	for range idleDialers {
		wg.Go(func() {
			for i := range next {
				c := legConfig(cfg.Relay, identity.Node{Org: relayOrg, Kind: identity.Client, ID: fmt.Sprintf("n%d", i)}, trust, key)
				c.Control = bindTo(bed.source(i))
				held[i], failed[i] = leg.Dial(ctx, c)
			}
		})
	}
	for i := range held {
		next <- i
	}
	close(next)
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		return err
	}
	fmt.Println("ready", len(held))
	var lost atomic.Int64 // a log keeps its newest lines only: each tells the number
	for i, l := range held {
		wg.Go(func() {
			select {
			case <-l.Done():
				fmt.Printf("lost %d: leg %d: %v\n", lost.Add(1), i, l.Err())
			case <-ctx.Done(): // the process ends with its legs: nobody waits for ten thousand good-byes
			}
		})
	}
	wg.Wait()
	<-ctx.Done()
	return nil
}

// bindTo has a socket come from an address.
func bindTo(from netip.Addr) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: from.As4()}) }); cerr != nil {
			return cerr
		}
		return err
	}
}
