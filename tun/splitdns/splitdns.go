// Package splitdns makes a host ask one resolver about certain domains, and its own about everything else.
//
// There are three ways, chosen by what the host has (Mode):
//
//   - systemd-resolved runs and /etc/resolv.conf leads to it: the link of a TUN gets our resolver with routing-only domains.
//     Nothing else on the host changes, and it is gone with the link.
//   - /etc/resolv.conf is a file of its own: our resolver is put first in it. There is no split in that file, so our resolver
//     is asked about everything and must forward the rest to Upstreams. The edit is journaled: it is undone by Close, and
//     after a crash or a power cut by the next New with the same state folder.
//   - in a network namespace that shares the file with the host nothing is done: an edit would change the host's DNS.
//
// A catch-all domain is refused in each.
package splitdns

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// Mode is a way to change the host's DNS.
type Mode int

// Modes.
const (
	Off        Mode = iota // nothing is changed
	Resolved               // per link, by systemd-resolved
	ResolvConf             // by a journaled edit of resolv.conf
)

// String is the name of the mode.
func (m Mode) String() string {
	switch m {
	case Off:
		return "off"
	case Resolved:
		return "systemd-resolved"
	case ResolvConf:
		return "resolv.conf"
	}
	return fmt.Sprintf("Mode(%d)", int(m))
}

// DefaultResolvConf is where resolvers are named (resolv.conf(5)).
const DefaultResolvConf = "/etc/resolv.conf"

// Config says whose DNS is split, and where.
type Config struct {
	Interface  string       // of the TUN; systemd-resolved needs it
	StateDir   string       // where the journal is; must exist and outlive a reboot
	ResolvConf string       // DefaultResolvConf where empty
	Log        *slog.Logger // nil logs nothing

	// Run runs a command and returns its output; nil runs it for real.
	Run func(name string, args ...string) ([]byte, error)
	// root is where /run and /proc are, for tests.
	root string
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	switch {
	case c.Interface == "":
		return errors.New("splitdns: no interface")
	case c.StateDir == "":
		return errors.New("splitdns: no state folder for the journal")
	}
	return nil
}

// DNS is the split DNS of a host. Its methods may be called concurrently.
type DNS struct {
	cfg  Config
	mode Mode
	why  string // why mode is Off

	mu        sync.Mutex // guards what follows, and makes changes one at a time
	active    bool
	upstreams []netip.Addr
}

// New undoes what an earlier process has left behind, and finds out how this host does DNS. It changes nothing else.
func New(c Config) (*DNS, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.ResolvConf == "" {
		c.ResolvConf = DefaultResolvConf
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Run == nil {
		c.Run = run
	}
	d := &DNS{cfg: c}
	undone, err := undo(d.journalPath())
	if err != nil {
		return nil, fmt.Errorf("undo an earlier edit of %s: %w", c.ResolvConf, err)
	}
	if undone {
		c.Log.Info("undid an earlier edit of resolv.conf", "path", c.ResolvConf)
	}
	d.mode, d.why = detect(c)
	d.upstreams = d.currentUpstreams()
	return d, nil
}

// Mode is the way that was chosen, and for Off the reason.
func (d *DNS) Mode() (Mode, string) { return d.mode, d.why }

// Upstreams are the host's own resolvers, as they were before Set: where our resolver forwards the names that are not ours.
func (d *DNS) Upstreams() []netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.upstreams)
}

// Set makes the host ask servers, on port 53, about domains and what is below them. It replaces what was set before. With
// Off it does nothing. No servers or no domains is the same as Clear.
func (d *DNS) Set(servers []netip.Addr, domains []string) error {
	names := make([]string, 0, len(domains))
	for _, n := range domains {
		n, err := cleanDomain(n)
		if err != nil {
			return err
		}
		names = append(names, n)
	}
	for _, s := range servers {
		if !s.IsValid() || s.IsUnspecified() || s.IsMulticast() || s.Zone() != "" {
			return fmt.Errorf("splitdns: server %v: not an address to ask", s)
		}
	}
	if len(servers) == 0 || len(names) == 0 {
		return d.Clear()
	}
	slices.Sort(names)
	names = slices.Compact(names)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch d.mode {
	case Resolved:
		d.active = true // and half of it is, where it fails
		return d.setResolved(servers, names)
	case ResolvConf:
		d.active = true
		return d.setResolvConfLocked(servers)
	}
	return nil
}

// Clear takes back what Set has done.
func (d *DNS) Clear() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.active {
		return nil
	}
	switch d.mode {
	case Resolved:
		if _, err := d.cfg.Run("resolvectl", "revert", d.cfg.Interface); err != nil {
			return fmt.Errorf("resolvectl revert: %w", err)
		}
	case ResolvConf:
		if _, err := undo(d.journalPath()); err != nil {
			return fmt.Errorf("undo the edit of %s: %w", d.cfg.ResolvConf, err)
		}
	}
	d.active = false
	return nil
}

// Close is Clear. Where it fails, the next New tries again.
func (d *DNS) Close() error { return d.Clear() }

// maxDomain is the longest domain name, bytes (RFC 1035 section 2.3.4).
const maxDomain = 253

// cleanDomain returns a name without dots at its ends and in lower case, or why it cannot be one of ours.
func cleanDomain(n string) (string, error) {
	c := strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(n, "~"), "."), "."))
	if c == "" {
		return "", fmt.Errorf("splitdns: domain %q would catch every name", n)
	}
	if len(c) > maxDomain {
		return "", fmt.Errorf("splitdns: domain of %d bytes: at most %d", len(c), maxDomain)
	}
	for label := range strings.SplitSeq(c, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) || label[0] == '-' {
			return "", fmt.Errorf("splitdns: domain %q: not a domain name", n)
		}
	}
	return c, nil
}
