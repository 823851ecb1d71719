package main

import (
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

// Sizes of the disk, in bytes. The rest behind the boot partition becomes the state partition at first boot; a disk that is made larger before then
// gives it more.
const (
	sectorSize = 512
	mib        = 1 << 20
	espStart   = 1 * mib
	espSize    = 256 * mib // three images side by side, kernels for BIOS twice, and room to grow
	diskSize   = 512 * mib
)

// espName is the name of the boot partition in the partition table. By it an appliance knows its disk.
const espName = "sallyway-esp"

// espType says that a partition is an EFI system partition, in the byte order of the table.
var espType = [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}

// gptEntries is how many entries a partition table has at least (UEFI 2.10 section 5.3.1: 16 KiB), and gptEntry the size of one.
const (
	gptEntries = 128
	gptEntry   = 128
	gptHeader  = 92
	// legacyBootable is the attribute by which syslinux's gptmbr.bin finds its partition.
	legacyBootable = 1 << 2
)

// identifier is a GUID that depends on nothing but what it is for: two builds have the same, and so have all appliances.
func identifier(of string) [16]byte {
	sum := sha256.Sum256([]byte("sallyway appliance " + of))
	id := [16]byte(sum[:16])
	id[7] = id[7]&0x0f | 0x40 // version 4
	id[8] = id[8]&0x3f | 0x80
	return id
}

// partitionTable writes the protective MBR with its boot code and both copies of a GPT with the one partition onto a disk.
func partitionTable(disk io.WriterAt, boot []byte) error {
	le := binary.LittleEndian
	const sectors = diskSize / sectorSize
	const tableSectors = gptEntries * gptEntry / sectorSize

	mbr := make([]byte, sectorSize)
	copy(mbr[:440], boot)
	p := mbr[446:]
	copy(p, []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff})
	le.PutUint32(p[8:], 1)
	le.PutUint32(p[12:], sectors-1)
	mbr[510], mbr[511] = 0x55, 0xaa

	entries := make([]byte, gptEntries*gptEntry)
	id := identifier("boot partition")
	copy(entries, espType[:])
	copy(entries[16:], id[:])
	le.PutUint64(entries[32:], espStart/sectorSize)
	le.PutUint64(entries[40:], (espStart+espSize)/sectorSize-1)
	if len(boot) > 0 {
		le.PutUint64(entries[48:], legacyBootable)
	}
	for i, c := range utf16.Encode([]rune(espName)) {
		le.PutUint16(entries[56+2*i:], c)
	}

	header := func(own, other, table uint64) []byte {
		h := make([]byte, sectorSize)
		copy(h, "EFI PART\x00\x00\x01\x00")
		le.PutUint32(h[12:], gptHeader)
		le.PutUint64(h[24:], own)
		le.PutUint64(h[32:], other)
		le.PutUint64(h[40:], 2+tableSectors)
		le.PutUint64(h[48:], sectors-2-tableSectors)
		id := identifier("disk")
		copy(h[56:], id[:])
		le.PutUint64(h[72:], table)
		le.PutUint32(h[80:], gptEntries)
		le.PutUint32(h[84:], gptEntry)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:gptHeader]))
		return h
	}
	for _, w := range []struct {
		data []byte
		at   int64
	}{
		{mbr, 0},
		{header(1, sectors-1, 2), sectorSize},
		{entries, 2 * sectorSize},
		{entries, (sectors - 1 - tableSectors) * sectorSize},
		{header(sectors-1, 1, sectors-1-tableSectors), (sectors - 1) * sectorSize},
	} {
		if _, err := disk.WriteAt(w.data, w.at); err != nil {
			return err
		}
	}
	return nil
}
