package tun

import "encoding/binary"

// littleEndian is whether this host is.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1
