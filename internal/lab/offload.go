package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Wire says what the links between the hosts do with packets larger than their MTU. The zero Wire is what veth pairs do by
// themselves: super-packets cross whole.
type Wire struct {
	// NoSegmentation has every sender's kernel cut what it sends into packets of the MTU before the link, as if no network
	// card could.
	NoSegmentation bool
	// GRO has every receiver put packets together again: TCP, and UDP for sockets that ask for it or on their way through a
	// router. It means nothing on a link that carries super-packets whole.
	GRO bool
	// Hold is how long a receiver waits for more packets of a run before it hands one up (gro_flush_timeout). Zero is not at
	// all: a run ends with what came in one piece of work.
	Hold time.Duration
}

// String says what a Wire does, for people.
func (w Wire) String() string {
	if !w.NoSegmentation {
		return "super-packets cross whole"
	}
	s := "packets of the MTU"
	if w.GRO {
		s += ", put together by the receiver"
		if w.Hold > 0 {
			s += fmt.Sprintf(" within %v", w.Hold)
		}
	}
	return s
}

// holdPolls is how often a receiver's work comes up empty before the link's own interrupts are in charge again
// (napi_defer_hard_irqs); the kernel wants it beside gro_flush_timeout.
const holdPolls = 2

// Features of a link, by the names that `ethtool -k` shows.
var (
	segmentation = []string{"tx-generic-segmentation", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp-mangleid-segmentation", "tx-udp-segmentation"}
	together     = []string{"rx-gro", "rx-udp-gro-forwarding"}
)

// apply sets up a link of the calling thread's namespace.
func (w Wire) apply(dev string) error {
	if !w.NoSegmentation {
		return nil
	}
	want := make(map[string]bool)
	for _, f := range segmentation {
		want[f] = false
	}
	for _, f := range together {
		want[f] = w.GRO
	}
	if err := setFeatures(dev, want); err != nil {
		return err
	}
	if !w.GRO || w.Hold == 0 {
		return nil
	}
	dir := filepath.Join("/sys/class/net", dev)
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "napi_defer_hard_irqs"), []byte(strconv.Itoa(holdPolls)), 0),
		os.WriteFile(filepath.Join(dir, "gro_flush_timeout"), []byte(strconv.FormatInt(w.Hold.Nanoseconds(), 10)), 0),
	)
}

// Commands and sizes of linux/ethtool.h.
const (
	ethtoolStrings     = 0x1b
	ethtoolStringCount = 0x37
	ethtoolGet         = 0x3a
	ethtoolSet         = 0x3b
	ethtoolFeatureSet  = 4
	ethtoolNameLen     = 32
)

// setFeatures turns features of a link of the calling thread's namespace on and off. It is an error when the kernel knows
// one of them and it is not as wanted afterwards; one that the kernel does not know is off.
func setFeatures(dev string, want map[string]bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := featureNames(fd, dev)
	if err != nil {
		return fmt.Errorf("features of %s: %w", dev, err)
	}
	blocks := (len(names) + 31) / 32
	set := ethtoolHead(ethtoolSet, uint32(blocks), 8*blocks)
	for i, name := range names {
		on, ok := want[name]
		if !ok {
			continue
		}
		valid, requested := set[8+i/32*8:], set[12+i/32*8:]
		bit := uint32(1) << (i % 32)
		ne.PutUint32(valid, ne.Uint32(valid)|bit)
		if on {
			ne.PutUint32(requested, ne.Uint32(requested)|bit)
		}
	}
	if err := ethtool(fd, dev, set); err != nil {
		return fmt.Errorf("set features of %s: %w", dev, err)
	}
	get := ethtoolHead(ethtoolGet, uint32(blocks), 16*blocks)
	if err := ethtool(fd, dev, get); err != nil {
		return fmt.Errorf("features of %s: %w", dev, err)
	}
	var wrong []string
	for name, on := range want {
		i := slices.Index(names, name)
		// Of each block: available, requested, active, never changed.
		if active := i >= 0 && ne.Uint32(get[8+i/32*16+8:])&(1<<(i%32)) != 0; active != on {
			wrong = append(wrong, fmt.Sprintf("%s is %v", name, active))
		}
	}
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return fmt.Errorf("features of %s: the kernel did not obey: %s", dev, strings.Join(wrong, ", "))
	}
	return nil
}

// ne is the order of the kernel's structures.
var ne = binary.NativeEndian

// ethtoolHead makes a request of two numbers and size more bytes.
func ethtoolHead(cmd, second uint32, size int) []byte {
	b := make([]byte, 8+size)
	ne.PutUint32(b, cmd)
	ne.PutUint32(b[4:], second)
	return b
}

// featureNames are the features that the kernel knows, in its order.
func featureNames(fd int, dev string) ([]string, error) {
	count := ethtoolHead(ethtoolStringCount, 0, 12) // a mask of 8 bytes, and one number
	ne.PutUint64(count[8:], 1<<ethtoolFeatureSet)
	if err := ethtool(fd, dev, count); err != nil {
		return nil, err
	}
	n := int(ne.Uint32(count[16:]))
	text := ethtoolHead(ethtoolStrings, ethtoolFeatureSet, 4+n*ethtoolNameLen)
	ne.PutUint32(text[8:], uint32(n))
	if err := ethtool(fd, dev, text); err != nil {
		return nil, err
	}
	names := make([]string, n)
	for i := range names {
		names[i] = unix.ByteSliceToString(text[12+i*ethtoolNameLen:][:ethtoolNameLen])
	}
	return names, nil
}

// ethtool makes one request about a link (SIOCETHTOOL); the answer is in b.
func ethtool(fd int, dev string, b []byte) error {
	req := struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&b[0])}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return os.NewSyscallError("ioctl SIOCETHTOOL", errno)
	}
	return nil
}
