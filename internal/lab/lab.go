// Package lab is a small internet on one machine: hosts in network namespaces around a router that lets through what goes
// to relays and to the platform and drops everything else, so that a client and a gateway have no way to each other but the
// product. Tests, benchmarks and `make demo` run the real programs on these hosts.
//
//	client ──┐                       ┌── relay1
//	gateway ─┤                       ├── relay2       203.0.113.0/24, 2001:db8::/32
//	 │ lan0  ├──────── router ───────┤
//	private  │                       ├── platform     443/tcp
//	gateway2 ┘                       └── peer         a host outside that relays may be configured to call
//	 │ lan0
//	private2
//
// A lab leaves nothing on the machine: namespaces without names, veth pairs inside of them, one temporary folder. Several
// labs may run at once. Linux and root are needed, and no program besides those under test.
//
//	l, err := lab.New(lab.Config{})
//	defer l.Close()
//	r, err := l.Client.Run(ctx, "curl", "http://web.default.sallyway.internal/")
package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/lab/wan"
)

// Config says what kind of lab. The zero Config is the usual one.
type Config struct {
	MTU int  // of the links between the sites, in bytes; zero is 1500
	NAT bool // client and gateways stand behind masquerading routers of their own, IPv4 only
	Raw bool // RawAddr in the private network can be reached around the product, for comparison
	// Direct lets the client call the first gateway's host over UDP, as if no firewall stood between.
	Direct bool
	Wire   Wire // what the links do with large packets
	// Access, when not nil, makes the link between the client's site and the router a long one: A is the client's end, so that
	// AtoB is its upload. The lab makes both ends. Its stats are AccessStats.
	Access *wan.Config
	// AccessNetem has the kernel's netem do that, without counts and where the kernel has it; else New fails with wan.ErrNoNetem.
	AccessNetem bool
	// Bin is the folder of the programs under test; empty is $SALLYWAY_BIN, then bin/ of the source tree.
	Bin string
	Log *slog.Logger // nil is silence
}

// Lab is a running lab. Methods may be called concurrently unless they say otherwise.
type Lab struct {
	ID string

	Router, Client, Platform, Relay1, Relay2, Gateway, Gateway2, Private, Private2, Peer *Host

	cfg   Config
	dir   string
	tmp   string
	hosts []*Host
	moves int // of the client; MoveClient is not called concurrently

	access *wan.Link // nil without Config.Access

	mu      sync.Mutex
	cut     []string // links that are cut; guarded by mu
	noUDP   bool     // the router drops UDP; guarded by mu
	procs   []*Proc  // guarded by mu
	closers []func() // guarded by mu
	closed  bool     // guarded by mu
}

const dirPrefix = "sallyway-lab-"

// closeGrace is how long processes have to end when the whole lab does: nobody needs a drain then.
const closeGrace = 2 * time.Second

// New lays out a lab. What a lab of the same machine left behind when it was killed is removed first.
func New(cfg Config) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab makes network namespaces: run it as root")
	}
	if cfg.MTU == 0 {
		cfg.MTU = lanMTU
	}
	if cfg.MTU < minMTU || cfg.MTU > maxMTU {
		return nil, fmt.Errorf("MTU %d is not between %d and %d", cfg.MTU, minMTU, maxMTU)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := Sweep(cfg.Log); err != nil {
		cfg.Log.Warn("leftovers of earlier labs remain", "error", err)
	}
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	l := &Lab{ID: hex.EncodeToString(b[:]), cfg: cfg}
	l.dir = filepath.Join(os.TempDir(), dirPrefix+l.ID)
	l.tmp = filepath.Join(l.dir, "tmp")
	if err := l.claim(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(l.dir))
	}
	if err := l.layOut(); err != nil {
		l.Close()
		return nil, fmt.Errorf("lay out the lab: %w", err)
	}
	return l, nil
}

// claim makes the lab's folder and writes down who owns it.
func (l *Lab) claim() error {
	if err := os.Mkdir(l.dir, 0o755); err != nil {
		return err
	}
	owner, err := processMark(os.Getpid())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(l.dir, "owner"), []byte(owner), 0o644); err != nil {
		return err
	}
	if err := os.Mkdir(l.tmp, 0o777); err != nil {
		return err
	}
	return os.Chmod(l.tmp, 0o1777)
}

// Dir is the lab's folder: one folder per host, and logs.
func (l *Lab) Dir() string { return l.dir }

// MTU is that of the links between the sites, in bytes.
func (l *Lab) MTU() int { return l.cfg.MTU }

// Hosts are all hosts.
func (l *Lab) Hosts() []*Host { return slices.Clone(l.hosts) }

func (l *Lab) onClose(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// Cut drops everything from and to the hosts from now on, in silence: no error tells anybody. Without hosts all is whole
// again. Connections that the router knows are cut too.
func (l *Lab) Cut(hosts ...*Host) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = l.cut[:0]
	for _, h := range hosts {
		l.cut = append(l.cut, site{name: h.Name}.link())
	}
	return l.Router.Do(func() error { return cutRules(l.cut, l.noUDP) })
}

// BlockUDP has the router drop all UDP from now on, in silence, or no more.
func (l *Lab) BlockUDP(on bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.noUDP = on
	return l.Router.Do(func() error { return cutRules(l.cut, l.noUDP) })
}

// Close ends every process, the newest first, closes what was opened on the hosts, and removes the lab. It is idempotent.
func (l *Lab) Close() {
	l.mu.Lock()
	procs, closers, done := l.procs, l.closers, l.closed
	l.procs, l.closers, l.closed = nil, nil, true
	l.mu.Unlock()
	if done {
		return
	}
	var wg sync.WaitGroup
	for _, p := range slices.Backward(procs) {
		wg.Go(func() { _ = p.stop(closeGrace) }) // what had to be killed has been
	}
	wg.Wait()
	for _, f := range slices.Backward(closers) {
		f()
	}
	for _, h := range l.hosts {
		h.close()
	}
	if os.Getenv("SALLYWAY_LAB_KEEP") == "" {
		if err := os.RemoveAll(l.dir); err != nil {
			l.cfg.Log.Warn("the lab's folder remains", "error", err)
		}
	}
}

// Bin returns the path of a program under test.
func (l *Lab) Bin(name string) (string, error) {
	dir := l.cfg.Bin
	if dir == "" {
		dir = os.Getenv("SALLYWAY_BIN")
	}
	if dir == "" {
		root, err := SourceRoot()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(root, "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	if unix.Access(path, unix.X_OK) != nil {
		return "", fmt.Errorf("%s is not there: run make first, or name the folder of the programs with SALLYWAY_BIN", path)
	}
	return path, nil
}

// SourceRoot is the folder of the source tree that the working directory is in.
func SourceRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not in the source tree", dir)
		}
	}
}
