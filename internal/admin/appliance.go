package admin

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"sallyway/internal/appliance/seed"
	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// appliances are the kinds of node that an appliance can be told to be by a disk.
func (k nodeKind) appliance() bool { return k == gateways || k == relays }

// applianceFlags say which disk to write for an appliance, and what stands on it besides the token.
type applianceFlags struct {
	iso                     string
	addresses, routers, dns []string
	ntp                     []string
	proxy                   string
}

func (f *applianceFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.iso, "appliance-iso", "", "write the token onto a disk image (NoCloud) that is attached to an appliance as its CD")
	flags.StringSliceVar(&f.addresses, "appliance-address", nil, "the appliance's address with its prefix length, such as 192.0.2.10/24 (default: DHCP)")
	flags.StringSliceVar(&f.routers, "appliance-router", nil, "its default router")
	flags.StringSliceVar(&f.dns, "appliance-dns", nil, "its name servers (default: what DHCP says)")
	flags.StringSliceVar(&f.ntp, "appliance-ntp", nil, "its time servers (default: what DHCP says)")
	flags.StringVar(&f.proxy, "appliance-proxy", "", "URL of the proxy that it has to take")
}

// network checks the flags.
func (f *applianceFlags) network() (seed.Network, error) {
	var n seed.Network
	if f.iso == "" {
		if len(f.addresses)+len(f.routers)+len(f.dns)+len(f.ntp) > 0 || f.proxy != "" {
			return n, daemon.Usagef("the appliance's network stands on its disk: add --appliance-iso FILE")
		}
		return n, nil
	}
	var errs [3]error
	n.Addresses, errs[0] = parseAll(f.addresses, "--appliance-address", netip.ParsePrefix)
	n.Routers, errs[1] = parseAll(f.routers, "--appliance-router", netip.ParseAddr)
	n.DNS, errs[2] = parseAll(f.dns, "--appliance-dns", netip.ParseAddr)
	if err := errors.Join(errs[:]...); err != nil {
		return n, err
	}
	n.NTP, n.Proxy = f.ntp, f.proxy
	for _, p := range n.Addresses {
		if p.IsSingleIP() && p.Addr().Is4() {
			return n, daemon.Usagef("--appliance-address %v: write the length of the network's prefix, such as %v/24", p, p.Addr())
		}
	}
	for _, r := range n.Routers {
		if len(n.Addresses) == 0 {
			return n, daemon.Usagef("--appliance-router needs --appliance-address: DHCP names a router itself")
		}
		if !r.IsLinkLocalUnicast() && !slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Contains(r) }) {
			return n, daemon.Usagef("--appliance-router %v is not in the network of any --appliance-address", r)
		}
	}
	if u, err := url.Parse(n.Proxy); n.Proxy != "" && (err != nil || u.Host == "") {
		return n, daemon.Usagef("--appliance-proxy: want a URL such as http://proxy.example:3128")
	}
	return n, nil
}

// applianceDisk is the file of a disk, made before the token so that no token is lost for want of a place to put it.
type applianceDisk struct {
	file *os.File // nil: none was asked for
	path string
	net  seed.Network
	done bool
}

// open makes the file, which nobody else can read. One that is there already is left alone.
func (f *applianceFlags) open() (*applianceDisk, error) {
	n, err := f.network()
	if err != nil || f.iso == "" {
		return &applianceDisk{}, err
	}
	file, err := os.OpenFile(f.iso, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, daemon.Usagef("--appliance-iso %s: the file exists\nname another, or remove it first", f.iso)
	}
	if err != nil {
		return nil, daemon.Usagef("--appliance-iso: %w", err)
	}
	return &applianceDisk{file: file, path: f.iso, net: n}, nil
}

// write puts a node's token onto the disk.
func (d *applianceDisk) write(k nodeKind, n control.CreatedNode) error {
	if d.file == nil {
		return nil
	}
	s := seed.Seed{Role: k.name, Token: n.Token, Network: d.net}
	err := errors.Join(s.WriteISO(d.file), d.file.Sync())
	if err != nil {
		return daemon.Failf("%s: %w\n`sallyway %s token %s --appliance-iso FILE` makes a fresh token on another disk", d.path, err, k.name, n.Name)
	}
	d.done = true
	return nil
}

// close removes what was not finished.
func (d *applianceDisk) close() error {
	if d.file == nil {
		return nil
	}
	err := d.file.Close()
	if !d.done {
		err = errors.Join(err, os.Remove(d.path))
	}
	return err
}

// tell prints what to do with the disk.
func (d *applianceDisk) tell(w io.Writer, k nodeKind, n control.CreatedNode, done string) {
	if d.file == nil {
		created(w, k, n, done)
		return
	}
	path := d.path
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	fmt.Fprintf(w, "%s %s %s (%s).\n\n%s holds its token, which works once until %s: keep it as a secret.\n"+
		"Attach it as CD to a virtual machine that starts the appliance's image, and remove it when\n`sallyway %s show %s` says healthy.\n",
		k.name, n.Name, done, n.ID, path, moment(&n.Expires), k.name, n.Name)
}
