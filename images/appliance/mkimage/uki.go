package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// section is one of the sections that the stub of a unified kernel image looks for in itself (systemd-stub(7)).
type section struct {
	name string
	data []byte
}

// efiName is how UEFI and systemd name an architecture.
var efiName = map[string]string{"amd64": "x64", "arm64": "aa64"}

// uki writes NAME.efi, one file that the firmware starts: stub, kernel, initramfs and command line. NAME.vmlinuz is the kernel alone.
func (b *builder) uki() error {
	stub, err := os.ReadFile(filepath.Join(b.root, "usr/lib/systemd/boot/efi/linux"+efiName[b.arch]+".efi.stub"))
	if err != nil {
		return err
	}
	linux, err := os.ReadFile(b.kernel.image)
	if err != nil {
		return err
	}
	initrd, err := os.ReadFile(filepath.Join(b.work, b.name+".initrd"))
	if err != nil {
		return err
	}
	image, err := addSections(stub, []section{
		{".osrel", []byte(b.osRelease())},
		{".uname", []byte(b.kernel.release)},
		{".cmdline", []byte(b.arguments())},
		{".initrd", initrd},
		{".linux", linux},
	})
	if err != nil {
		return fmt.Errorf("unified kernel image: %w", err)
	}
	return errors.Join(os.WriteFile(filepath.Join(b.work, b.name+".efi"), image, 0o644), os.WriteFile(filepath.Join(b.work, b.name+".vmlinuz"), linux, 0o644))
}

// Places in a PE file (Microsoft's PE format specification).
const (
	peOffset          = 0x3c // of the signature
	peHeader          = 4    // signature before the COFF header
	coffSections      = 2
	coffTime          = 4
	coffOptionalSize  = 16
	coffSize          = 20
	optionalData      = 8 // SizeOfInitializedData
	optionalAlign     = 32
	optionalFileAlign = 36
	optionalImageSize = 56
	optionalHeaders   = 60
	optionalChecksum  = 64
	sectionSize       = 40

	sectionData = 0x40000040 // initialized data that can be read
)

// addSections returns a PE file with sections added behind all others. Its time and checksum are zero: the firmware does not look at them.
func addSections(pe []byte, add []section) ([]byte, error) {
	le := binary.LittleEndian
	if len(pe) < 0x40 || string(pe[:2]) != "MZ" {
		return nil, errors.New("the stub is no PE file")
	}
	coff := int(le.Uint32(pe[peOffset:])) + peHeader
	if coff < peHeader || coff+coffSize > len(pe) || string(pe[coff-peHeader:coff]) != "PE\x00\x00" {
		return nil, errors.New("the stub is no PE file")
	}
	optional := coff + coffSize
	table := optional + int(le.Uint16(pe[coff+coffOptionalSize:]))
	count := int(le.Uint16(pe[coff+coffSections:]))
	if table < optional+optionalChecksum+4 || table+count*sectionSize > len(pe) {
		return nil, errors.New("the stub's headers are cut off")
	}
	headers := int(le.Uint32(pe[optional+optionalHeaders:]))
	align, fileAlign := le.Uint32(pe[optional+optionalAlign:]), le.Uint32(pe[optional+optionalFileAlign:])
	if align == 0 || fileAlign == 0 {
		return nil, errors.New("the stub's alignment is zero")
	}
	out := append([]byte(nil), pe...)
	var memory uint32 // end of what is mapped
	first := len(pe)  // of any section's content
	for i := range count {
		s := out[table+i*sectionSize:]
		memory = max(memory, le.Uint32(s[12:])+max(le.Uint32(s[8:]), le.Uint32(s[16:])))
		if at := int(le.Uint32(s[20:])); at > 0 {
			first = min(first, at)
		}
	}
	if end := table + (count+len(add))*sectionSize; end > headers || end > first {
		return nil, fmt.Errorf("the stub has no room for %d more sections", len(add))
	}
	data := le.Uint32(out[optional+optionalData:])
	for i, s := range add {
		memory = up(memory, max(align, 4096))
		out = append(out, make([]byte, int(up(uint32(len(out)), fileAlign))-len(out))...)
		at := uint32(len(out))
		size := up(uint32(len(s.data)), fileAlign)
		out = append(append(out, s.data...), make([]byte, int(size)-len(s.data))...)
		h := out[table+(count+i)*sectionSize:][:sectionSize]
		clear(h)
		copy(h[:8], s.name)
		le.PutUint32(h[8:], uint32(len(s.data)))
		le.PutUint32(h[12:], memory)
		le.PutUint32(h[16:], size)
		le.PutUint32(h[20:], at)
		le.PutUint32(h[36:], sectionData)
		memory += uint32(len(s.data))
		data += size
	}
	le.PutUint16(out[coff+coffSections:], uint16(count+len(add)))
	le.PutUint32(out[coff+coffTime:], 0)
	le.PutUint32(out[optional+optionalData:], data)
	le.PutUint32(out[optional+optionalImageSize:], up(memory, align))
	le.PutUint32(out[optional+optionalChecksum:], 0)
	return out, nil
}

// up rounds up to a multiple.
func up(n, to uint32) uint32 { return (n + to - 1) / to * to }
