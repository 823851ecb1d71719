package state

import (
	"encoding/binary"
	"errors"
	"io"
	"strings"
)

// What we read of an ext4 superblock (Documentation/filesystems/ext4/super.rst), which lies 1024 bytes from the start.
const (
	superOffset = 1024
	superBytes  = 1024
	superMagic  = 0xef53
	stateErrors = 2 // s_state: the file system was found damaged while it was used
)

// super is a superblock.
type super struct {
	Label   string
	Damaged bool // the kernel has noted errors
	Blocks  uint64
	Block   int64 // bytes
}

// readSuper reads the superblock at an offset; ok is false where none is.
func readSuper(r io.ReaderAt, at int64) (super, bool) {
	b := make([]byte, superBytes)
	if _, err := r.ReadAt(b, at); err != nil {
		return super{}, false
	}
	le := binary.LittleEndian
	shift := le.Uint32(b[24:])
	if le.Uint16(b[56:]) != superMagic || shift > 6 {
		return super{}, false
	}
	label, _, _ := strings.Cut(string(b[120:136]), "\x00")
	return super{
		Label: label, Damaged: le.Uint16(b[58:])&stateErrors != 0, Block: 1024 << shift,
		Blocks: uint64(le.Uint32(b[4:])) | uint64(le.Uint32(b[0x150:]))<<32,
	}, true
}

// backups are where mke2fs puts the first copy of the superblock, with blocks of 1 and of 4 KiB.
var backups = []struct{ at, block int64 }{{8193 * 1024, 1024}, {32768 * 4096, 4096}}

// probe says what a partition holds.
func probe(r io.ReaderAt) (s super, has content, err error) {
	if s, ok := readSuper(r, superOffset); ok {
		return s, fileSystem, nil
	}
	for _, b := range backups {
		if _, ok := readSuper(r, b.at); ok {
			return super{Block: b.block}, lostSuper, nil
		}
	}
	head := make([]byte, 4096)
	if _, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return super{}, foreign, err
	}
	for _, c := range head {
		if c != 0 {
			return super{}, foreign, nil
		}
	}
	return super{}, empty, nil
}

// content is what a partition holds.
type content int

const (
	empty      content = iota
	fileSystem         // ext4
	lostSuper          // ext4 whose first superblock is gone
	foreign            // something else
)
