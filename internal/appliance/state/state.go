// Package state finds, makes, repairs and mounts the state partition: the one place of an appliance that outlives a restart. It holds the
// daemons' keys, for a platform its database, and what the appliance was last configured with.
package state

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PartitionType is the type of a state partition in a GUID partition table.
const PartitionType = "c27275a7-52c0-463a-a178-1a8d8ec3db7b"

// Label is the name of the state partition and the label of its file system.
const Label = "sallyway-state"

// BootLabel is the name of the partition that an image boots from: a disk that has one is ours, and its free space, too.
const BootLabel = "sallyway-esp"

// Tools are the programs of e2fsprogs that an image carries, with the libraries that ldd names for them at the same paths. An image without
// them mounts a state partition that has a file system, and can neither make nor repair one.
var Tools = []string{"/sbin/mke2fs", "/sbin/e2fsck"}

// Mounted is an appliance's state folder.
type Mounted struct {
	Folder string
	Device string // "" in memory: nothing outlives a restart
	Bytes  uint64 // size of the file system
	Made   bool   // at this start
	// Notes are for the console: what was made, grown, repaired, or why there is none.
	Notes []string
	// Damaged says what was repaired, or what is lost; "" is nothing.
	Damaged string
}

// Finder looks for the state partition of a machine.
type Finder struct {
	Sys, Dev string // /sys and /dev
	Log      *slog.Logger

	// tell tells the kernel of a partition; tests have no kernel for their disks. Nil is tellKernel.
	tell func(w *os.File, op, number int, start, length int64) error
}

// disks are whole disks, without those that come and go or live in memory.
func (f Finder) disks() []string {
	var out []string
	all, _ := os.ReadDir(filepath.Join(f.Sys, "class/block"))
	for _, e := range all {
		name := e.Name()
		if _, err := os.Stat(filepath.Join(f.Sys, "class/block", name, "partition")); err == nil {
			continue
		}
		if slices.ContainsFunc([]string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		if f.number(name, "size") == 0 || f.number(name, "ro") == 1 {
			continue
		}
		out = append(out, name)
	}
	return out
}

// number reads a number of a block device's folder in sysfs, 0 where there is none.
func (f Finder) number(device, name string) int64 {
	b, err := os.ReadFile(filepath.Join(f.Sys, "class/block", device, name))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // 0 is what is returned
	return n
}

// BootPartition is the device of the partition that images are kept on: the one with this unique identifier, in lower case, or else the first with
// the name BootLabel. It is "" where there is none.
func (f Finder) BootPartition(id string) string {
	named := ""
	for _, d := range f.disks() {
		t, err := f.table(d)
		if err != nil {
			continue
		}
		for i, p := range t.Partitions {
			if p.Empty() {
				continue
			}
			device, ok := f.partition(d, i+1)
			if ok && id != "" && p.ID.String() == id {
				return device
			}
			if ok && named == "" && p.Name == BootLabel {
				named = device
			}
		}
	}
	return named
}

// partition returns the device name of a partition, by its number.
func (f Finder) partition(disk string, number int) (string, bool) {
	all, _ := filepath.Glob(filepath.Join(f.Sys, "class/block", disk, disk+"*", "partition")) // the pattern is right
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(number) {
			return filepath.Base(filepath.Dir(p)), true
		}
	}
	return "", false
}

// place is a state partition that was found or made.
type place struct {
	device string // name below /dev
	grown  bool
	notes  []string
}

// errNone says that this machine has no place for state.
var errNone = errors.New("no disk of this machine has a state partition or room for one")

// find looks for the partition, makes it where one of our disks has room, and grows it where its disk has become larger.
func (f Finder) find() (place, error) {
	stateType, err := ParseGUID(PartitionType)
	if err != nil {
		return place{}, err
	}
	type ours struct {
		disk  string
		table *Table
	}
	var room []ours
	var errs []error
	for _, d := range f.disks() {
		t, err := f.table(d)
		if errors.Is(err, errNoTable) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", d, err))
			continue
		}
		for i, p := range t.Partitions {
			if p.Type == stateType || !p.Empty() && p.Name == Label {
				return f.use(d, t, i+1)
			}
			if !p.Empty() && p.Name == BootLabel {
				room = append(room, ours{d, t})
			}
		}
	}
	// A whole disk, or a partition of another kind of table, with our file system.
	all, _ := os.ReadDir(filepath.Join(f.Sys, "class/block"))
	for _, e := range all {
		if s, ok := f.super(e.Name()); ok && s.Label == Label {
			return place{device: e.Name()}, nil
		}
	}
	for _, o := range room {
		p := Partition{Type: stateType, Name: Label}
		if _, err := rand.Read(p.ID[:]); err != nil {
			return place{}, err
		}
		p.ID[7], p.ID[8] = p.ID[7]&0x0f|0x40, p.ID[8]&0x3f|0x80 // RFC 9562 section 5.4
		n, err := o.table.Append(p, leastNewState)
		if err == nil {
			err = f.commit(o.disk, o.table, n, true)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", o.disk, err))
			continue
		}
		name, ok := f.partition(o.disk, n)
		if !ok {
			errs = append(errs, fmt.Errorf("disk %s: the new partition %d has not appeared", o.disk, n))
			continue
		}
		size := int64(o.table.Partitions[n-1].Last-o.table.Partitions[n-1].First+1) * o.table.block
		return place{device: name, notes: []string{fmt.Sprintf("made the state partition %s of %d MiB in the free space of %s", name, size>>20, o.disk)}}, nil
	}
	return place{}, errors.Join(append([]error{errNone}, errs...)...)
}

// use takes partition number of a disk, and grows it first where it can.
func (f Finder) use(disk string, t *Table, number int) (place, error) {
	name, ok := f.partition(disk, number)
	if !ok {
		return place{}, fmt.Errorf("disk %s: the kernel does not show partition %d", disk, number)
	}
	p := place{device: name}
	if t.damaged != "" {
		p.notes = append(p.notes, fmt.Sprintf("disk %s: %s; its copy is used", disk, t.damaged))
	}
	if t.Grow(number) {
		if err := f.commit(disk, t, number, false); err != nil {
			p.notes = append(p.notes, fmt.Sprintf("disk %s is larger than its partitions, and the state partition could not grow: %v", disk, err))
		} else {
			p.grown = true
		}
	}
	return p, nil
}

func (f Finder) table(disk string) (*Table, error) {
	r, err := os.Open(filepath.Join(f.Dev, disk))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	block := f.number(disk, "queue/logical_block_size")
	if block == 0 {
		block = 512
	}
	return ReadTable(r, f.number(disk, "size")*512, int(block)) // sysfs counts in units of 512 bytes, whatever the block
}

func (f Finder) super(device string) (super, bool) {
	r, err := os.Open(filepath.Join(f.Dev, device))
	if err != nil {
		return super{}, false
	}
	defer r.Close()
	return readSuper(r, superOffset)
}

// commit writes a table and tells the kernel about one partition, which is new or has grown; others may be in use.
func (f Finder) commit(disk string, t *Table, number int, isNew bool) error {
	w, err := os.OpenFile(filepath.Join(f.Dev, disk), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	p := t.Partitions[number-1]
	if isNew {
		// What was in the free space is nobody's: without this an old file system could shine through.
		if _, err := w.WriteAt(make([]byte, 1<<20), int64(p.First)*t.block); err != nil {
			return err
		}
	}
	if err := t.Write(w); err != nil {
		return err
	}
	op := blkpgResize
	if isNew {
		op = blkpgAdd
	}
	tell := f.tell
	if tell == nil {
		tell = tellKernel
	}
	return tell(w, op, number, int64(p.First)*t.block, int64(p.Last-p.First+1)*t.block)
}

// The operations of ioctl BLKPG (linux/blkpg.h).
const (
	blkpg       = 0x1269
	blkpgAdd    = 1
	blkpgResize = 3
)

// tellKernel changes one partition in the kernel's view of a disk. start and length are bytes.
func tellKernel(w *os.File, op, number int, start, length int64) error {
	part := struct { // struct blkpg_partition
		start, length int64
		number        int32
		names         [128]byte
		_             [4]byte
	}{start: start, length: length, number: int32(number)}
	arg := struct { // struct blkpg_ioctl_arg
		op, flags, size int32
		_               int32
		data            unsafe.Pointer
	}{op: int32(op), size: int32(unsafe.Sizeof(part)), data: unsafe.Pointer(&part)}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, w.Fd(), blkpg, uintptr(unsafe.Pointer(&arg)))
	if e != 0 {
		return fmt.Errorf("tell the kernel about partition %d: %w", number, e)
	}
	return nil
}

// Disks come late from some buses; a machine without them should not wait long.
const (
	settleFast = 300 * time.Millisecond
	settleSlow = 5 * time.Second
)

// slowBuses are folders of sysfs that show that disks may still come.
var slowBuses = []string{"class/nvme", "class/scsi_host", "bus/vmbus/devices"}

func (f Finder) settle() time.Duration {
	for _, b := range slowBuses {
		if all, err := os.ReadDir(filepath.Join(f.Sys, b)); err == nil && len(all) > 0 {
			return settleSlow
		}
	}
	return settleFast
}

// Open mounts the state partition at folder. Without a disk, or with one that cannot be used, folder is in memory and the notes say why.
// It returns an error only where not even that can be had.
func (f Finder) Open(ctx context.Context, folder string) (*Mounted, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	deadline := time.Now().Add(f.settle())
	p, err := f.find()
	for err != nil && time.Now().Before(deadline) && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond) // no event tells that no disk comes any more
		p, err = f.find()
	}
	m := &Mounted{Folder: folder, Notes: p.notes}
	if err == nil {
		if err = f.mount(ctx, p, m); err == nil {
			return m, nil
		}
	}
	m.Notes = append(m.Notes, fmt.Sprintf("state is in memory: %s", firstLine(err)), "this appliance's identity does not survive a restart: give it a disk, then enrol it anew")
	if err := unix.Mount("tmpfs", folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=50%"); err != nil {
		return nil, fmt.Errorf("state in memory: %w", err)
	}
	return m, nil
}

func firstLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

// mount makes or repairs the file system where that is needed, and mounts it.
func (f Finder) mount(ctx context.Context, p place, m *Mounted) error {
	device := filepath.Join(f.Dev, p.device)
	r, err := os.Open(device)
	if err != nil {
		return err
	}
	s, has, err := probe(r)
	_ = r.Close() // was only read
	if err != nil {
		return fmt.Errorf("read %s: %w", device, err)
	}
	switch has {
	case foreign:
		return fmt.Errorf("%s holds something that is no ext4 file system; it is left alone: erase its first MiB to have it used", device)
	case empty:
		if err := f.run(ctx, 5*time.Minute, 0, "/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-L", Label, "-m", "1", "-E", "lazy_itable_init=1,lazy_journal_init=1", device); err != nil {
			return fmt.Errorf("make a file system on %s: %w", device, err)
		}
		m.Made = true
		m.Notes = append(m.Notes, "made a file system on "+p.device)
	case lostSuper:
		if err := f.repair(ctx, device, m, "-b", strconv.FormatInt(map[int64]int64{1024: 8193, 4096: 32768}[s.Block], 10), "-B", strconv.FormatInt(s.Block, 10)); err != nil {
			return err
		}
	case fileSystem:
		if s.Damaged {
			if err := f.repair(ctx, device, m); err != nil {
				return err
			}
		}
	}
	if err := attach(device, m.Folder); err != nil {
		if fix := f.repair(ctx, device, m); fix != nil {
			return errors.Join(err, fix)
		}
		if err := attach(device, m.Folder); err != nil {
			return err
		}
	}
	m.Device = p.device
	if p.grown {
		if err := growMounted(m.Folder, f.number(p.device, "size")*512); err != nil {
			m.Notes = append(m.Notes, fmt.Sprintf("the file system on %s could not grow with its partition: %v", p.device, err))
		} else {
			m.Notes = append(m.Notes, fmt.Sprintf("the disk has become larger: the state partition is %d MiB now", f.number(p.device, "size")>>11))
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.Folder, &st); err == nil {
		m.Bytes = st.Blocks * uint64(st.Bsize)
	}
	return nil
}

// attach mounts; the kernel replays the journal after a power cut.
func attach(device, folder string) error {
	err := unix.Mount(device, folder, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, "errors=remount-ro")
	if err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return nil
}

// Exit codes of e2fsck(8): 1 means that errors were corrected, 4 that some were left.
const (
	fsckCorrected = 1 | 2 // 2: and a restart is due, which a mount that has not happened yet does not need
)

// fsckTries is how often a badly damaged file system is gone over: what one run corrects can bring out more.
const fsckTries = 3

// repair runs e2fsck in the way that needs nobody, and if that is not enough, answers yes to all of its questions.
func (f Finder) repair(ctx context.Context, device string, m *Mounted, args ...string) error {
	name := filepath.Base(device)
	err := f.run(ctx, 15*time.Minute, fsckCorrected, "/sbin/e2fsck", append(append([]string{"-f", "-p"}, args...), device)...)
	if err == nil {
		m.Damaged = "the file system on " + name + " was damaged and has been repaired"
		m.Notes = append(m.Notes, m.Damaged)
		return nil
	}
	f.Log.Warn("e2fsck -p was not enough", "device", device, "err", err)
	for try := range fsckTries {
		good := fsckCorrected
		if try == fsckTries-1 {
			good = 0 // by now nothing may be left to correct
		}
		if err = f.run(ctx, 15*time.Minute, good, "/sbin/e2fsck", append(append([]string{"-f", "-y"}, args...), device)...); err != nil && try == 0 {
			return fmt.Errorf("the file system on %s is damaged and could not be repaired: %w", name, err)
		}
		args = nil // the first superblock is there again
	}
	if err != nil {
		return fmt.Errorf("the file system on %s is damaged and could not be repaired: %w", name, err)
	}
	m.Damaged = "the file system on " + name + " was damaged badly; it has been repaired, and files may be missing"
	m.Notes = append(m.Notes, m.Damaged)
	return nil
}

// run runs a tool. Exit codes whose bits are all in good are fine.
func (f Finder) run(ctx context.Context, limit time.Duration, good int, path string, args ...string) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not in this image", path)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/sbin", "LC_ALL=C"}
	out, err := cmd.CombinedOutput()
	f.Log.Debug("ran", "tool", path, "output", string(out), "err", err)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode()&^good == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %.200s", filepath.Base(path), err, strings.ReplaceAll(strings.TrimSpace(string(out)), "\n", "; "))
	}
	return nil
}

// resizeFS is ioctl EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64).
const resizeFS = 0x40086610

// growMounted lets a mounted ext4 fill its device of size bytes.
func growMounted(folder string, size int64) error {
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.Fd()), &st); err != nil {
		return err
	}
	blocks := uint64(size) / uint64(st.Bsize)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, d.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks))); e != 0 {
		return e
	}
	return nil
}
