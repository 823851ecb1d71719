package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"sallyway/internal/datagram"
)

const (
	clonePath = "/dev/net/tun"

	// vnetHeaderLen is sizeof(struct virtio_net_hdr), bytes.
	vnetHeaderLen = 10

	// offloads are those that every reader of a device with a vnet header takes.
	offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	// udpOffloads are for readers that ask for them. The kernel takes both or none, from Linux 6.2 on.
	udpOffloads = unix.TUN_F_USO4 | unix.TUN_F_USO6

	// addrGenNone is IN6_ADDR_GEN_MODE_NONE: no link-local address, so no router solicitations into the device.
	addrGenNone = 1

	// maxParts is how many parts a write takes at most: IOV_MAX is 1024, a 64 KiB packet has a header and a few chunks.
	maxParts = 64
)

// Device is an open TUN device that is up. Read has one caller at a time; everything else may be called concurrently.
type Device struct {
	file      *os.File
	raw       syscall.RawConn
	headerLen int
	name      string
	mtu       int
	link      netlink.Link
	nl        *netlink.Handle // of the network namespace that Open was called in
	ipv6      bool            // whether the namespace has IPv6 on the device
	writers   sync.Pool       // of *writer

	closed    atomic.Bool
	closeOnce sync.Once
	closeErr  error

	mu           sync.Mutex // guards what follows, and makes changes of addresses and routes one at a time
	ownResolvers []netip.Addr
}

// Open makes the device, or takes over a persistent one of that name, sets its MTU and brings it up, in the network
// namespace of the calling thread. Without a name in c it takes the first of sally0, sally1 … that no other process has. Without /dev/net/tun or CAP_NET_ADMIN the error is an ErrUnavailable.
func Open(c Config) (*Device, error) {
	named := c.Name != ""
	c = c.withDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	fd, headerLen, err := openFD(c.Name)
	for i := 1; !named && i < defaultNames && errors.Is(err, unix.EBUSY); i++ {
		c.Name = defaultPrefix + strconv.Itoa(i)
		fd, headerLen, err = openFD(c.Name)
	}
	if err != nil {
		return nil, err
	}
	// wireguard/tun puts the descriptor into the poller and owns it from here.
	wg, name, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open %s: %w", c.Name, err)
	}
	d := &Device{file: wg.File(), headerLen: headerLen, name: name, mtu: c.MTU}
	d.writers.New = func() any { return newWriter() }
	if err := d.setUp(); err != nil {
		d.Close()
		return nil, fmt.Errorf("set up %s: %w", name, err)
	}
	return d, nil
}

// openFD returns a non-blocking descriptor of the device and the length of its vnet header.
func openFD(name string) (fd, headerLen int, err error) {
	fd, err = unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, 0, fmt.Errorf("%w: %s is missing: load it with `modprobe tun`, or give it to the container with --device %s",
			ErrUnavailable, clonePath, clonePath)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, 0, fmt.Errorf("%w: may not open %s: run as root or allow the device", ErrUnavailable, clonePath)
	case err != nil:
		return -1, 0, fmt.Errorf("open %s: %w", clonePath, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("interface name %q: %w", name, err)
	}
	err = unix.EINVAL
	if datagram.OffloadAllowed() {
		headerLen = vnetHeaderLen
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if errors.Is(err, unix.EINVAL) {
		// No vnet header here (an emulated kernel, or a persistent device without), or none wanted: packet by packet then.
		headerLen = 0
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			return -1, 0, fmt.Errorf("%w: CAP_NET_ADMIN is missing: run as root, or `setcap cap_net_admin+ep` the binary, or give the container --cap-add NET_ADMIN", ErrUnavailable)
		case errors.Is(err, unix.EBUSY):
			return -1, 0, fmt.Errorf("interface %s is in use by another process: choose another name (--tun-name), or do without one (--tun off): %w", name, err)
		}
		return -1, 0, fmt.Errorf("create interface %s: %w", name, err)
	}
	return fd, headerLen, nil
}

// setUp fills the rest of d and brings the link up.
func (d *Device) setUp() error {
	var err error
	if d.raw, err = d.file.SyscallConn(); err != nil {
		return err
	}
	if d.headerLen > 0 {
		// wireguard/tun has just asked for USO as well: take that back, not every reader knows of it.
		if err := d.setOffloads(offloads); err != nil {
			return fmt.Errorf("offloads: %w", err)
		}
	}
	if d.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	if d.link, err = d.nl.LinkByName(d.name); err != nil {
		return err
	}
	if err := d.nl.LinkSetMTU(d.link, d.mtu); err != nil {
		return permission(fmt.Errorf("MTU %d: %w", d.mtu, err))
	}
	d.ipv6 = ipv6Enabled(d.name)
	if d.ipv6 {
		// Best effort: kernels before 4.5 keep their link-local address, and netstack drops its multicasts.
		_ = d.nl.LinkSetIP6AddrGenMode(d.link, addrGenNone)
	}
	if err := d.nl.LinkSetUp(d.link); err != nil {
		return permission(fmt.Errorf("up: %w", err))
	}
	return nil
}

func (d *Device) setOffloads(flags int) error {
	var errno error
	if err := d.raw.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) }); err != nil {
		return err
	}
	return errno
}

// EnableUDPSegments asks the kernel for UDP super-packets and reports whether there are any: from then on Read returns, and
// WriteParts may be given, runs of datagrams behind one header of type VIRTIO_NET_HDR_GSO_UDP_L4. Without (no vnet header, or
// Linux before 6.2) the kernel cuts such runs up, as if nothing had been asked.
func (d *Device) EnableUDPSegments() bool {
	return d.headerLen > 0 && d.setOffloads(offloads|udpOffloads) == nil
}

// permission makes a refusal an ErrUnavailable: the device was persistent and ours to open, but not to change.
func permission(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: CAP_NET_ADMIN is missing: run as root: %w", ErrUnavailable, err)
	}
	return err
}

// ipv6Enabled reports whether the interface can have IPv6 addresses.
func ipv6Enabled(name string) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
	return err == nil && len(b) > 0 && b[0] == '0'
}

// Name is the name of the interface.
func (d *Device) Name() string { return d.name }

// Index is the index of the interface.
func (d *Device) Index() int { return d.link.Attrs().Index }

// MTU is the MTU in bytes.
func (d *Device) MTU() int { return d.mtu }

// HeaderLen is how many bytes of virtio_net_hdr stand in front of every packet: 10, or 0 without offloads.
func (d *Device) HeaderLen() int { return d.headerLen }

// IPv6 reports whether the interface can have IPv6 addresses and routes.
func (d *Device) IPv6() bool { return d.ipv6 }

// Read waits for one packet of the host and copies it, after its header, into p. p should hold HeaderLen plus 65535
// bytes: what does not fit is lost. After Close the error is net.ErrClosed.
func (d *Device) Read(p []byte) (int, error) {
	n, err := d.file.Read(p)
	if err != nil {
		return 0, d.ioError("read", err)
	}
	return n, nil
}

// SetReadDeadline ends a waiting Read at t with os.ErrDeadlineExceeded; the zero time takes that back.
func (d *Device) SetReadDeadline(t time.Time) error { return d.file.SetReadDeadline(t) }

// WriteParts hands the host one packet, after its header, in parts whose bytes follow each other; it keeps none of them.
// A packet that the kernel has no room for is lost, with ENOBUFS or EAGAIN. After Close the error is net.ErrClosed.
func (d *Device) WriteParts(parts [][]byte) (int, error) {
	w := d.writers.Get().(*writer)
	defer d.writers.Put(w)
	if err := w.load(parts); err != nil {
		return 0, err
	}
	err := d.raw.Write(w.run)
	n, errno := w.n, w.errno
	w.unload()
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		return 0, d.ioError("write", err)
	}
	return n, nil
}

func (d *Device) ioError(op string, err error) error {
	// The poller has its own error for a closed file, and a device that was deleted under us says EBADFD.
	if d.closed.Load() || errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) {
		return fmt.Errorf("%s %s: %w", op, d.name, net.ErrClosed)
	}
	return fmt.Errorf("%s %s: %w", op, d.name, err)
}

// Close removes the device, and with it its addresses and routes, and ends a waiting Read.
func (d *Device) Close() error {
	d.closeOnce.Do(func() {
		d.closed.Store(true)
		d.closeErr = d.file.Close()
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.nl != nil {
			d.nl.Close()
		}
	})
	return d.closeErr
}

// writer is one writev: its vector, its result, and the function that does it, made once so that a write allocates nothing.
type writer struct {
	iov   [maxParts]unix.Iovec
	cnt   int
	n     int
	errno syscall.Errno
	run   func(fd uintptr) bool
}

func newWriter() *writer {
	w := new(writer)
	w.run = func(fd uintptr) bool {
		for {
			n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(w.cnt))
			if errno == unix.EINTR {
				continue
			}
			w.n, w.errno = int(n), errno
			return true // also when it would block: a full device loses the packet
		}
	}
	return w
}

func (w *writer) load(parts [][]byte) error {
	w.cnt, w.n, w.errno = 0, 0, 0
	for _, p := range parts {
		if len(p) == 0 {
			continue
		}
		if w.cnt == maxParts {
			w.unload()
			return fmt.Errorf("packet in more than %d parts: %w", maxParts, unix.EMSGSIZE)
		}
		w.iov[w.cnt].Base = &p[0]
		w.iov[w.cnt].SetLen(len(p))
		w.cnt++
	}
	if w.cnt == 0 {
		return fmt.Errorf("empty packet: %w", unix.EINVAL)
	}
	return nil
}

// unload forgets the caller's memory.
func (w *writer) unload() {
	for i := range w.cnt {
		w.iov[i].Base = nil
	}
}
