package state

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"unicode/utf16"
)

// A GUID partition table (UEFI specification 2.10, chapter 5.3): a header in block 1, an array of entries, and copies of both at the end
// of the disk.

// GUID is a GUID as it lies on a disk: the first three groups are little-endian.
type GUID [16]byte

// ParseGUID reads the written form.
func ParseGUID(s string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		return g, fmt.Errorf("%.40q is no GUID", s)
	}
	copy(g[:], b)
	g.swap()
	return g, nil
}

func (g *GUID) swap() {
	g[0], g[1], g[2], g[3] = g[3], g[2], g[1], g[0]
	g[4], g[5] = g[5], g[4]
	g[6], g[7] = g[7], g[6]
}

// String is the written form, in lower case.
func (g GUID) String() string {
	g.swap()
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

// Partition is an entry. First and Last are blocks, both in it.
type Partition struct {
	Type, ID    GUID
	First, Last uint64
	Attributes  uint64
	Name        string
}

// Empty says that the entry is not used.
func (p Partition) Empty() bool { return p.Type == GUID{} }

// Table is a partition table.
type Table struct {
	Disk       GUID
	Partitions []Partition // by number, from 1 at index 0; unused ones are Empty
	block      int64       // bytes
	blocks     uint64      // of the disk
	entries    uint64      // block of the array behind the primary header
	entrySize  int
	first      uint64 // block that partitions may begin at
	damaged    string // what was wrong with the copy that was not used; "" is nothing
	stale      bool   // the copy at the end is not at the end of this disk
}

// Limits of a table that we read.
const (
	gptSignature  = "EFI PART"
	gptRevision   = 0x00010000
	headerSize    = 92
	maxEntries    = 1024
	maxEntrySize  = 4096
	leastArray    = 16384 // bytes that the specification reserves
	nameOffset    = 56
	nameBytes     = 72
	alignment     = 1 << 20 // bytes: where partitions begin
	leastEntry    = 128
	leastNewState = 16 << 20 // bytes: the smallest state partition that is worth making
)

// errNoTable says that a disk has no GPT.
var errNoTable = errors.New("no GUID partition table")

// ReadTable reads the table of a disk of size bytes in blocks of block bytes. When the table at the front is damaged the copy at the end is
// used.
func ReadTable(r io.ReaderAt, size int64, block int) (*Table, error) {
	if block < 512 || block > 65536 || block&(block-1) != 0 {
		return nil, fmt.Errorf("blocks of %d bytes", block)
	}
	blocks := uint64(size) / uint64(block)
	if size <= 0 || blocks < 8 {
		return nil, errNoTable
	}
	t, err := readAt(r, 1, blocks, int64(block))
	if err == nil {
		backup, backupErr := readAt(r, blocks-1, blocks, int64(block))
		if backupErr != nil {
			t.stale = true
		} else if backup.Disk != t.Disk {
			t.stale = true
		}
		return t, nil
	}
	backup, backupErr := readAt(r, blocks-1, blocks, int64(block))
	if backupErr != nil {
		return nil, err
	}
	backup.damaged = err.Error()
	backup.entries = 2
	return backup, nil
}

// readAt reads the header in one block and the entries that it names.
func readAt(r io.ReaderAt, at, blocks uint64, block int64) (*Table, error) {
	h := make([]byte, block)
	if _, err := r.ReadAt(h, int64(at)*block); err != nil {
		return nil, fmt.Errorf("read block %d: %w", at, err)
	}
	if string(h[:8]) != gptSignature {
		return nil, errNoTable
	}
	le := binary.LittleEndian
	size := le.Uint32(h[12:])
	if size < headerSize || int64(size) > block {
		return nil, errors.New("partition table: wrong header size")
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if crc32.ChecksumIEEE(h[:size]) != sum {
		return nil, errors.New("partition table: wrong checksum of the header")
	}
	n, each := le.Uint32(h[80:]), le.Uint32(h[84:])
	if le.Uint64(h[24:]) != at || n == 0 || n > maxEntries || each < leastEntry || each > maxEntrySize || each&(each-1) != 0 {
		return nil, errors.New("partition table: wrong header")
	}
	t := &Table{block: block, blocks: blocks, first: le.Uint64(h[40:]), entries: le.Uint64(h[72:]), entrySize: int(each)}
	copy(t.Disk[:], h[56:72])
	array := make([]byte, int(n)*int(each))
	if t.entries < 2 || t.entries >= blocks {
		return nil, errors.New("partition table: the entries lie outside of the disk")
	}
	if _, err := r.ReadAt(array, int64(t.entries)*block); err != nil {
		return nil, fmt.Errorf("read the partition table's entries: %w", err)
	}
	if crc32.ChecksumIEEE(array) != le.Uint32(h[88:]) {
		return nil, errors.New("partition table: wrong checksum of the entries")
	}
	for e := range int(n) {
		p, err := parseEntry(array[e*int(each):])
		if err != nil {
			return nil, fmt.Errorf("partition %d: %w", e+1, err)
		}
		if !p.Empty() && p.Last >= blocks {
			return nil, fmt.Errorf("partition %d ends behind the disk", e+1)
		}
		t.Partitions = append(t.Partitions, p)
	}
	return t, nil
}

func parseEntry(b []byte) (Partition, error) {
	var p Partition
	copy(p.Type[:], b)
	copy(p.ID[:], b[16:])
	le := binary.LittleEndian
	p.First, p.Last, p.Attributes = le.Uint64(b[32:]), le.Uint64(b[40:]), le.Uint64(b[48:])
	var name []uint16
	for i := nameOffset; i < nameOffset+nameBytes; i += 2 {
		c := le.Uint16(b[i:])
		if c == 0 {
			break
		}
		name = append(name, c)
	}
	p.Name = string(utf16.Decode(name))
	if !p.Empty() && (p.First < 2 || p.Last < p.First) {
		return p, errors.New("its blocks are wrong")
	}
	return p, nil
}

func (t *Table) appendEntry(to []byte, p Partition) []byte {
	b := make([]byte, t.entrySize)
	if !p.Empty() {
		le := binary.LittleEndian
		copy(b, p.Type[:])
		copy(b[16:], p.ID[:])
		le.PutUint64(b[32:], p.First)
		le.PutUint64(b[40:], p.Last)
		le.PutUint64(b[48:], p.Attributes)
		for i, c := range utf16.Encode([]rune(p.Name)) {
			if i >= nameBytes/2 {
				break
			}
			le.PutUint16(b[nameOffset+2*i:], c)
		}
	}
	return append(to, b...)
}

// arrayBlocks is how many blocks the array of entries takes.
func (t *Table) arrayBlocks() uint64 {
	n := int64(max(len(t.Partitions)*t.entrySize, leastArray))
	return uint64((n + t.block - 1) / t.block)
}

// lastUsable is the last block that a partition may have on this disk.
func (t *Table) lastUsable() uint64 { return t.blocks - 2 - t.arrayBlocks() }

// lastUsed is the last block of any partition.
func (t *Table) lastUsed() uint64 {
	last := max(t.first, 2+t.arrayBlocks()) - 1
	for _, p := range t.Partitions {
		if !p.Empty() {
			last = max(last, p.Last)
		}
	}
	return last
}

// Append adds a partition in the free space behind all others, up to the end of the disk, and returns its number. There has to be room for
// least bytes.
func (t *Table) Append(p Partition, least int64) (int, error) {
	unit := uint64(max(alignment/t.block, 1))
	p.First = (t.lastUsed() + unit) / unit * unit // the next block, rounded up
	last := t.lastUsable()
	if p.First > last || int64(last-p.First+1) < least/t.block {
		return 0, fmt.Errorf("there are less than %d MiB free behind the last partition", least>>20)
	}
	p.Last = (last+1)/unit*unit - 1
	for i := range t.Partitions {
		if t.Partitions[i].Empty() {
			t.Partitions[i] = p
			return i + 1, nil
		}
	}
	return 0, errors.New("the partition table has no free entry")
}

// Grow makes the last partition as large as the disk allows, when it is number and at least a unit of alignment is free behind it. It
// reports whether anything changed.
func (t *Table) Grow(number int) bool {
	p := &t.Partitions[number-1]
	unit := uint64(max(alignment/t.block, 1))
	last := (t.lastUsable()+1)/unit*unit - 1
	if p.Last != t.lastUsed() || last < p.Last+unit || t.lastUsable() < unit {
		return false
	}
	p.Last = last
	return true
}

// disk is where a table is written to.
type disk interface {
	io.WriterAt
	Sync() error
}

// Write writes the table: first the copy at the end of the disk, then the one at the front, so that at any moment one of them is whole.
func (t *Table) Write(w disk) error {
	if len(t.Partitions)*t.entrySize > int(t.arrayBlocks())*int(t.block) || t.lastUsed() > t.lastUsable() {
		return errors.New("partition table: the disk has no room for the copy at its end")
	}
	var array []byte
	for _, p := range t.Partitions {
		array = t.appendEntry(array, p)
	}
	end := t.blocks - 1
	backup := t.header(end, 1, end-t.arrayBlocks(), array)
	front := t.header(1, end, 2, array)
	for _, part := range []struct {
		at     uint64
		array  uint64
		header []byte
	}{{end, end - t.arrayBlocks(), backup}, {1, 2, front}} {
		if _, err := w.WriteAt(array, int64(part.array)*t.block); err != nil {
			return fmt.Errorf("write the partition table: %w", err)
		}
		if _, err := w.WriteAt(part.header, int64(part.at)*t.block); err != nil {
			return fmt.Errorf("write the partition table: %w", err)
		}
		if err := w.Sync(); err != nil {
			return fmt.Errorf("write the partition table: %w", err)
		}
	}
	return t.protect(w)
}

func (t *Table) header(at, other, entries uint64, array []byte) []byte {
	b := make([]byte, t.block)
	le := binary.LittleEndian
	copy(b, gptSignature)
	le.PutUint32(b[8:], gptRevision)
	le.PutUint32(b[12:], headerSize)
	le.PutUint64(b[24:], at)
	le.PutUint64(b[32:], other)
	le.PutUint64(b[40:], max(t.first, 2))
	le.PutUint64(b[48:], t.lastUsable())
	copy(b[56:], t.Disk[:])
	le.PutUint64(b[72:], entries)
	le.PutUint32(b[80:], uint32(len(t.Partitions)))
	le.PutUint32(b[84:], uint32(t.entrySize))
	le.PutUint32(b[88:], crc32.ChecksumIEEE(array))
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:headerSize]))
	return b
}

// protect sets the size in the protective MBR's entry (section 5.2.3), where there is one of the whole disk. Boot code and other entries
// (a hybrid table) stay.
func (t *Table) protect(w disk) error {
	r, ok := w.(io.ReaderAt)
	if !ok {
		return nil
	}
	mbr := make([]byte, t.block)
	if _, err := r.ReadAt(mbr, 0); err != nil {
		return fmt.Errorf("read the boot record: %w", err)
	}
	entry := mbr[446:462]
	if mbr[510] != 0x55 || mbr[511] != 0xaa || entry[4] != 0xee || binary.LittleEndian.Uint32(entry[8:]) != 1 {
		return nil
	}
	want := make([]byte, 4)
	binary.LittleEndian.PutUint32(want, uint32(min(t.blocks-1, 0xffffffff)))
	if bytes.Equal(entry[12:], want) {
		return nil
	}
	copy(entry[12:], want)
	if _, err := w.WriteAt(mbr, 0); err != nil {
		return fmt.Errorf("write the boot record: %w", err)
	}
	return w.Sync()
}
