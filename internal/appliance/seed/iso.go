package seed

import (
	"encoding/binary"
)

// isoSector is the logical block of ISO 9660, in bytes.
const isoSector = 2048

// Places of the volume, in sectors (ECMA-119 §6.2: the first 16 are the system's).
const (
	isoPrimary    = 16
	isoTerminator = 17
	isoPathsLE    = 18
	isoPathsBE    = 19
	isoRoot       = 20
	isoFiles      = 21
)

// isoFile is a file of the root folder: its Rock Ridge name, its name of ECMA-119 §7.5 (8 characters, a dot, a version), by which files are
// sorted, and what it holds.
type isoFile struct {
	name, level1 string
	data         []byte
}

// iso returns a volume (ECMA-119) with these files, whose real names stand in Rock Ridge entries (RRIP 1.09): Linux, cloud-init and others
// show them. All times are zero.
func iso(files []isoFile) []byte {
	sectors := func(n int) int { return (n + isoSector - 1) / isoSector }
	size := isoFiles
	for _, f := range files {
		size += sectors(len(f.data))
	}
	out := make([]byte, size*isoSector)
	at := func(sector int) []byte { return out[sector*isoSector:] }

	root := append(isoRecord("\x00", isoRoot, isoSector, true, susp("SP", 0xbe, 0xef, 0), rockRidge(0o40555), extension()),
		isoRecord("\x01", isoRoot, isoSector, true, rockRidge(0o40555))...)
	next := isoFiles
	for _, f := range files {
		root = append(root, isoRecord(f.level1, next, len(f.data), false, rockRidge(0o100444), susp("NM", append([]byte{0}, f.name...)...))...)
		copy(at(next), f.data)
		next += sectors(len(f.data))
	}
	copy(at(isoRoot), root)

	// Path tables (§9.4): the root alone.
	copy(at(isoPathsLE), []byte{1, 0, isoRoot, 0, 0, 0, 1, 0, 0, 0})
	copy(at(isoPathsBE), []byte{1, 0, 0, 0, 0, isoRoot, 0, 1, 0, 0})

	// Primary volume descriptor (§8.4).
	p := at(isoPrimary)
	copy(p, "\x01CD001\x01\x00")
	copy(p[8:], isoText("LINUX", 32))
	copy(p[40:], isoText(Label, 32))
	copy(p[80:], both32(size))
	copy(p[120:], both16(1))
	copy(p[124:], both16(1))
	copy(p[128:], both16(isoSector))
	copy(p[132:], both32(10))
	binary.LittleEndian.PutUint32(p[140:], isoPathsLE)
	binary.BigEndian.PutUint32(p[148:], isoPathsBE)
	copy(p[156:], isoRecord("\x00", isoRoot, isoSector, true))
	for i := 190; i < 813; i++ { // texts about who made it
		p[i] = ' '
	}
	for _, date := range []int{813, 830, 847, 864} { // §8.4.26.1: all digits '0' is no date
		copy(p[date:], "0000000000000000\x00")
	}
	p[881] = 1
	copy(at(isoTerminator), "\xffCD001\x01")
	return out
}

// isoRecord is a directory record (§9.1) with system use fields behind the name.
func isoRecord(name string, sector, size int, folder bool, system ...[]byte) []byte {
	r := make([]byte, 33, 255)
	copy(r[2:], both32(sector))
	copy(r[10:], both32(size))
	if folder {
		r[25] = 2
	}
	copy(r[28:], both16(1))
	r[32] = byte(len(name))
	r = append(r, name...)
	if len(r)%2 == 1 {
		r = append(r, 0)
	}
	for _, s := range system {
		r = append(r, s...)
	}
	if len(r)%2 == 1 {
		r = append(r, 0)
	}
	r[0] = byte(len(r))
	return r
}

// susp is a system use entry (SUSP §4.1): signature, length, version 1.
func susp(signature string, data ...byte) []byte {
	return append([]byte{signature[0], signature[1], byte(4 + len(data)), 1}, data...)
}

// rockRidge is an entry PX (RRIP §4.1.1): mode, one link, root's.
func rockRidge(mode int) []byte {
	var d []byte
	for _, v := range []int{mode, 1, 0, 0} {
		d = append(d, both32(v)...)
	}
	return susp("PX", d...)
}

// extension says that the entries are Rock Ridge's (SUSP §5.5).
func extension() []byte {
	const id = "RRIP_1991A"
	return susp("ER", append([]byte{byte(len(id)), 0, 0, 1}, id...)...)
}

// isoText pads with spaces.
func isoText(s string, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = ' '
	}
	copy(b, s)
	return b
}

// both16 and both32 are numbers in both orders of bytes (§7.2.3, §7.3.3).
func both16(v int) []byte {
	return binary.BigEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, uint16(v)), uint16(v))
}

func both32(v int) []byte {
	return binary.BigEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, uint32(v)), uint32(v))
}
