package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// blank is a table of an image: one boot partition of 32 MiB.
func blank(size int64) *Table {
	esp, _ := ParseGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
	t := &Table{Disk: GUID{1}, block: 512, blocks: uint64(size / 512), first: 34, entrySize: 128, Partitions: make([]Partition, 128)}
	t.Partitions[0] = Partition{Type: esp, ID: GUID{2}, First: 2048, Last: 2048 + 32*mib/512 - 1, Attributes: 4, Name: BootLabel}
	return t
}

// makeDisk writes a file with a table of an image.
func makeDisk(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	mbr := make([]byte, 512)
	mbr[446+4], mbr[510], mbr[511] = 0xee, 0x55, 0xaa
	binary.LittleEndian.PutUint32(mbr[446+8:], 1)
	binary.LittleEndian.PutUint32(mbr[446+12:], uint32(size/512-1))
	copy(mbr, "boot code")
	if _, err := f.WriteAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	if err := blank(size).Write(f); err != nil {
		t.Fatal(err)
	}
}

// read reads a table and says nothing is wrong with it.
func read(t *testing.T, path string) *Table {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	table, err := ReadTable(f, fi.Size(), 512)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestGUID(t *testing.T) {
	g, err := ParseGUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
	if err != nil || g.String() != "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" || g[0] != 0x28 {
		t.Errorf("%v, %v, %x", g, err, g[:])
	}
	if _, err := ParseGUID(PartitionType); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "c12a", "z12a7328-f81f-11d2-ba4b-00a0c93ec93b"} {
		if _, err := ParseGUID(bad); err == nil {
			t.Errorf("%q is a GUID", bad)
		}
	}
}

// TestTableAsOthersSeeIt lets Debian's sfdisk read and check what was written, where it is installed.
func TestTableAsOthersSeeIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	makeDisk(t, path, 64*mib)
	grow(t, path, 128*mib)
	table := read(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	kind, _ := ParseGUID(PartitionType)
	n, err := table.Append(Partition{Type: kind, ID: GUID{9}, Name: Label}, leastNewState)
	if err != nil || n != 2 {
		t.Fatalf("partition %d, %v", n, err)
	}
	if err := table.Write(f); err != nil {
		t.Fatal(err)
	}
	mbr := make([]byte, 512)
	if _, err := f.ReadAt(mbr, 0); err != nil || binary.LittleEndian.Uint32(mbr[446+12:]) != 128*mib/512-1 || string(mbr[:9]) != "boot code" {
		t.Errorf("the protective entry has %d blocks", binary.LittleEndian.Uint32(mbr[446+12:]))
	}
	again := read(t, path)
	if p := again.Partitions[1]; again.stale || again.damaged != "" || p.Name != Label || p.Type != kind || p.First%2048 != 0 || p.Last <= p.First {
		t.Errorf("%+v, stale %v, damaged %q", p, again.stale, again.damaged)
	}
	if p := again.Partitions[0]; p != table.Partitions[0] || p.Attributes != 4 {
		t.Errorf("the boot partition has become %+v", p)
	}
	sfdisk, err := exec.LookPath("sfdisk")
	if err != nil {
		return // the checks above have read it back
	}
	out, err := exec.Command(sfdisk, "--verify", path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "No errors detected") {
		t.Errorf("sfdisk: %v\n%s", err, out)
	}
}

func grow(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// TestPowerCutWhileTableIsWritten cuts the writing of a table after each of its steps: either the old or the new table is there, whole.
func TestPowerCutWhileTableIsWritten(t *testing.T) {
	for cut := range 8 {
		path := filepath.Join(t.TempDir(), "disk")
		makeDisk(t, path, 64*mib)
		grow(t, path, 128*mib)
		table := read(t, path)
		kind, _ := ParseGUID(PartitionType)
		if _, err := table.Append(Partition{Type: kind, ID: GUID{9}, Name: Label}, leastNewState); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = table.Write(&cutDisk{File: f, left: cut})
		if err == nil && cut < 4 {
			t.Error("the cut was not felt")
		}
		_ = f.Close()
		if got := read(t, path).Partitions[0].Name; got != BootLabel {
			t.Errorf("cut after %d writes: the first partition is %q", cut, got)
		}
	}
}

// cutDisk fails after some writes; the one that fails is half done.
type cutDisk struct {
	*os.File
	left int
}

var errCut = errors.New("power cut")

func (c *cutDisk) WriteAt(b []byte, at int64) (int, error) {
	if c.left--; c.left < 0 {
		n, _ := c.File.WriteAt(b[:len(b)/2], at)
		return n, errCut
	}
	return c.File.WriteAt(b, at)
}

func TestDamagedTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	makeDisk(t, path, 64*mib)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("garbage"), 512+40); err != nil {
		t.Fatal(err)
	}
	table := read(t, path)
	if table.damaged == "" || table.Partitions[0].Name != BootLabel {
		t.Fatalf("%+v", table)
	}
	if err := table.Write(f); err != nil {
		t.Fatal(err)
	}
	if again := read(t, path); again.damaged != "" || again.Partitions[0] != table.Partitions[0] {
		t.Errorf("after the repair: %+v", again)
	}
}

func TestReadTableRefuses(t *testing.T) {
	good := filepath.Join(t.TempDir(), "disk")
	makeDisk(t, good, 64*mib)
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	whole = whole[:1*mib] // without the copy at the end
	for name, change := range map[string]func(b []byte){
		"no signature":      func(b []byte) { b[512] = 'X' },
		"checksum":          func(b []byte) { b[512+56]++ },
		"entries' checksum": func(b []byte) { b[1024]++ },
		"too many entries":  func(b []byte) { header(b, func(h []byte) { binary.LittleEndian.PutUint32(h[80:], 1<<31) }) },
		"entry size":        func(b []byte) { header(b, func(h []byte) { binary.LittleEndian.PutUint32(h[84:], 3) }) },
		"entries elsewhere": func(b []byte) { header(b, func(h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<60) }) },
		"other place":       func(b []byte) { header(b, func(h []byte) { binary.LittleEndian.PutUint64(h[24:], 5) }) },
		"partition outside": func(b []byte) {
			binary.LittleEndian.PutUint64(b[1024+40:], 1<<50)
			header(b, func(h []byte) { binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(b[1024:1024+128*128])) })
		},
	} {
		b := bytes.Clone(whole)
		change(b)
		if table, err := ReadTable(bytes.NewReader(b), 64*mib, 512); err == nil {
			t.Errorf("%s: %+v", name, table)
		}
	}
	if _, err := ReadTable(bytes.NewReader(whole), 64*mib, 512); err != nil {
		t.Errorf("unchanged: %v", err)
	}
}

// header changes the primary header and makes its checksum right again.
func header(b []byte, change func(h []byte)) {
	h := b[512:1024]
	change(h)
	binary.LittleEndian.PutUint32(h[16:], 0)
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
}

func FuzzReadTable(f *testing.F) {
	var b bytes.Buffer
	b.Write(make([]byte, 512))
	t := blank(64 * mib)
	var array []byte
	for _, p := range t.Partitions {
		array = t.appendEntry(array, p)
	}
	b.Write(t.header(1, t.blocks-1, 2, array))
	b.Write(array)
	f.Add(b.Bytes(), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= 1024+128*128 {
			header(b, func(h []byte) { binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(b[1024:1024+128*128])) })
		}
		table, err := ReadTable(bytes.NewReader(b), 64*mib, 512)
		if err != nil {
			return
		}
		n, err := table.Append(Partition{Type: GUID{1}}, leastNewState)
		if err != nil {
			return
		}
		p := table.Partitions[n-1]
		if p.First > p.Last || p.Last > table.lastUsable() {
			t.Errorf("new partition %+v of %d blocks", p, table.blocks)
		}
		for i, q := range table.Partitions {
			if i != n-1 && !q.Empty() && q.First <= p.Last && p.First <= q.Last {
				t.Errorf("the new partition lies over %+v", q)
			}
		}
	})
}

// fakeMachine is a machine with one disk: files in place of devices, and of what sysfs says of them.
type fakeMachine struct {
	t        *testing.T
	sys, dev string
}

func newMachine(t *testing.T) *fakeMachine {
	m := &fakeMachine{t, t.TempDir(), t.TempDir()}
	m.put("class/block/sr0/size", "100")
	m.put("class/block/loop0/size", "100")
	return m
}

func (m *fakeMachine) put(name, text string) {
	m.t.Helper()
	path := filepath.Join(m.sys, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text+"\n"), 0o644)); err != nil {
		m.t.Fatal(err)
	}
}

// show puts the disk and its partitions into sysfs as the kernel would.
func (m *fakeMachine) show(size int64, partitions ...int) {
	m.put("class/block/vda/size", strconv.FormatInt(size/512, 10))
	m.put("class/block/vda/queue/logical_block_size", "512")
	for _, n := range partitions {
		for _, at := range []string{"class/block/vda/vda%d", "class/block/vda%d"} {
			m.put(fmt.Sprintf(at, n)+"/partition", strconv.Itoa(n))
		}
	}
}

func (m *fakeMachine) finder() Finder {
	return Finder{Sys: m.sys, Dev: m.dev, Log: slog.New(slog.DiscardHandler), tell: func(_ *os.File, op, number int, start, length int64) error {
		if start%mib != 0 || length <= 0 {
			m.t.Errorf("the kernel is told of a partition at %d of %d bytes", start, length)
		}
		m.show(read(m.t, filepath.Join(m.dev, "vda")).size(), 1, number)
		return nil
	}}
}

func (t *Table) size() int64 { return int64(t.blocks) * t.block }

func TestPartitionIsMadeFoundAndGrown(t *testing.T) {
	m := newMachine(t)
	disk := filepath.Join(m.dev, "vda")
	makeDisk(t, disk, 34*mib)
	m.show(34*mib, 1)
	if _, err := m.finder().find(); !errors.Is(err, errNone) || !strings.Contains(err.Error(), "16 MiB") {
		t.Fatalf("a full disk: %v", err)
	}
	grow(t, disk, 128*mib)
	m.show(128*mib, 1)
	p, err := m.finder().find()
	if err != nil || p.device != "vda2" || len(p.notes) != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	if p, err = m.finder().find(); err != nil || p.device != "vda2" || p.grown || len(p.notes) != 0 {
		t.Fatalf("found again: %+v, %v", p, err)
	}
	before := read(t, disk).Partitions[1]
	grow(t, disk, 256*mib)
	m.show(256*mib, 1, 2)
	if p, err = m.finder().find(); err != nil || !p.grown {
		t.Fatalf("on a larger disk: %+v, %v", p, err)
	}
	after := read(t, disk)
	if q := after.Partitions[1]; q.First != before.First || q.Last <= before.Last || after.stale || q.ID != before.ID {
		t.Errorf("before %+v, after %+v", before, q)
	}
	if b := m.finder().BootPartition(""); b != "vda1" {
		t.Errorf("the boot partition is %q", b)
	}
	if b := m.finder().BootPartition(before.ID.String()); b != "vda2" {
		t.Errorf("the partition with an identifier is %q", b)
	}
}

// TestOtherDisksAreLeftAlone: a disk that is not ours, full or empty, is never written to.
func TestOtherDisksAreLeftAlone(t *testing.T) {
	m := newMachine(t)
	disk := filepath.Join(m.dev, "vda")
	makeDisk(t, disk, 64*mib)
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	table := read(t, disk)
	table.Partitions[0].Name = "EFI system partition"
	if err := errors.Join(table.Write(f), f.Close()); err != nil {
		t.Fatal(err)
	}
	m.show(64*mib, 1)
	before, _ := os.ReadFile(disk)
	if p, err := m.finder().find(); !errors.Is(err, errNone) {
		t.Errorf("%+v, %v", p, err)
	}
	if after, _ := os.ReadFile(disk); !bytes.Equal(before, after) {
		t.Error("somebody else's disk was written to")
	}
}

// needTools: e2fsprogs is essential in Debian, and elsewhere it may be missing.
func needTools(t *testing.T) {
	t.Helper()
	for _, tool := range Tools {
		if _, err := os.Stat(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}

// ext4 makes a file system in a file with the tools of the image.
func ext4(t *testing.T, size int64, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vda2")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	grow(t, path, size)
	args = append([]string{"-q", "-F", "-t", "ext4", "-L", Label}, append(args, path)...)
	if out, err := exec.Command("/sbin/mke2fs", args...).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return path
}

func probeFile(t *testing.T, path string) (super, content) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, has, err := probe(f)
	if err != nil {
		t.Fatal(err)
	}
	return s, has
}

func TestProbe(t *testing.T) {
	needTools(t)
	path := ext4(t, 32*mib)
	if s, has := probeFile(t, path); has != fileSystem || s.Label != Label || s.Damaged || s.Blocks*uint64(s.Block) != 32*mib {
		t.Errorf("%+v, %v", s, has)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{stateErrors}, superOffset+58); err != nil {
		t.Fatal(err)
	}
	if s, _ := probeFile(t, path); !s.Damaged {
		t.Error("errors that the kernel has noted are not seen")
	}
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if s, has := probeFile(t, path); has != lostSuper || s.Block != 1024 {
		t.Errorf("without its first superblock: %+v, %v", s, has)
	}
	for name, want := range map[string]content{"": empty, "something": foreign} {
		p := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(p, append([]byte(name), make([]byte, 8192)...), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, has := probeFile(t, p); has != want {
			t.Errorf("%q: %v", name, has)
		}
	}
}

// TestRepair damages file systems in ways that e2fsck -p repairs, that need more, and that need a copy of the superblock.
func TestRepair(t *testing.T) {
	needTools(t)
	for name, tc := range map[string]struct {
		damage func(f *os.File) error
		args   []string
		badly  bool
	}{
		"counts":          {func(f *os.File) error { _, err := f.WriteAt([]byte{1, 2, 3}, superOffset+12); return err }, nil, false},
		"superblock gone": {func(f *os.File) error { _, err := f.WriteAt(make([]byte, 4096), 0); return err }, []string{"-b", "8193", "-B", "1024"}, true},
		"inode table": {func(f *os.File) error {
			_, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, 64<<10), 300<<10)
			return err
		}, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			path := ext4(t, 32*mib, "-O", "^metadata_csum")
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(tc.damage(f), f.Close()); err != nil {
				t.Fatal(err)
			}
			m := &Mounted{}
			finder := Finder{Dev: filepath.Dir(path), Log: slog.New(slog.DiscardHandler)}
			if err := finder.repair(t.Context(), path, m, tc.args...); err != nil {
				t.Fatal(err)
			}
			if m.Damaged == "" || strings.Contains(m.Damaged, "badly") != tc.badly || len(m.Notes) != 1 {
				t.Errorf("%+v", m)
			}
			if out, err := exec.Command("/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("still damaged: %v\n%s", err, out)
			}
		})
	}
	m := &Mounted{}
	path := filepath.Join(t.TempDir(), "vda2")
	if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (Finder{Log: slog.New(slog.DiscardHandler)}).repair(t.Context(), path, m); err == nil || !strings.Contains(err.Error(), "could not be repaired") {
		t.Errorf("nothing to repair: %v", err)
	}
}

// TestForeignContentIsLeftAlone: what is no file system of ours is never formatted.
func TestForeignContentIsLeftAlone(t *testing.T) {
	dev := t.TempDir()
	path := filepath.Join(dev, "vda2")
	if err := os.WriteFile(path, append([]byte("precious"), make([]byte, 20*mib)...), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Finder{Sys: t.TempDir(), Dev: dev, Log: slog.New(slog.DiscardHandler)}.mount(t.Context(), place{device: "vda2"}, &Mounted{Folder: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(path); string(b[:8]) != "precious" {
		t.Error("it was written to")
	}
}

// TestWithoutADisk: state is in memory, and the notes say so.
func TestWithoutADisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	folder := filepath.Join(t.TempDir(), "state")
	m, err := Finder{Sys: t.TempDir(), Dev: t.TempDir(), Log: slog.New(slog.DiscardHandler)}.Open(t.Context(), folder)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(folder, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	if m.Device != "" || len(m.Notes) != 2 || !strings.Contains(m.Notes[1], "does not survive") {
		t.Errorf("%+v", m)
	}
	if err := os.WriteFile(filepath.Join(folder, "x"), nil, 0o600); err != nil {
		t.Error(err)
	}
}
