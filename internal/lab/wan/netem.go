package wan

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoNetem is a kernel without netem.
var ErrNoNetem = errors.New("this kernel has no netem (CONFIG_NET_SCH_NETEM)")

// netemPacket is what a packet of netem's queue, which counts packets, is taken for: bytes.
const netemPacket = 1500

// Netem has the kernel emulate d on what leaves through device dev of the calling thread's network namespace, in place of a Link; tc shows it and
// what it counts. Where the kernel cannot, it fails with ErrNoNetem and changes nothing; there is nothing to ask beforehand, since trying loads the
// module. It knows neither an MTU nor how long a packet is held back for others to overtake; its queue counts packets, and a super-packet as one.
func Netem(dev string, d Direction) error {
	if err := d.validate(); err != nil {
		return fmt.Errorf("netem: %w", err)
	}
	if d.MTU > 0 || d.Reorder > 0 {
		return errors.New("netem: an MTU and reordering are for the emulator")
	}
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("netem on %s: %w", dev, err)
	}
	q := netlink.NewNetem(netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT}, netemAttrs(d))
	if err := netlink.QdiscReplace(q); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("netem on %s: %w", dev, ErrNoNetem)
	} else if err != nil {
		return fmt.Errorf("netem on %s: %w", dev, err)
	}
	return nil
}

// netemAttrs says d in netem's terms. Its jitter goes both ways from its delay, ours is added, and its queue holds what is delayed, too.
func netemAttrs(d Direction) netlink.NetemQdiscAttrs {
	d = d.withDefaults()
	a := netlink.NetemQdiscAttrs{
		Latency: uint32((d.Delay + d.Jitter/2) / time.Microsecond),
		Jitter:  uint32(d.Jitter / 2 / time.Microsecond),
		Loss:    float32(100 * d.Loss),
		Rate64:  uint64(d.Rate / 8),
	}
	held := float64(maxHeld)
	if d.Rate > 0 {
		held = float64(d.Queue) + float64(d.Rate)/8*(d.Delay+d.Jitter).Seconds()
	}
	a.Limit = uint32(math.Ceil(held / netemPacket))
	return a
}
