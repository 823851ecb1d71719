package udpio

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// skfNetOff is where the kernel's classic BPF sees the network header: SKF_NET_OFF of linux/filter.h.
const skfNetOff = 0xFFF00000

// Offsets in headers.
const (
	ip4Source   = 12
	ip6Source   = 8
	ip6Header   = 40
	ip6Next     = 6
	protocolUDP = 17
)

// Scratch cells of the programs.
const (
	cellSource = iota
	cellPort
)

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(code uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | code | unix.BPF_K, K: k, Jt: yes, Jf: no}
}

// loadSource appends what puts the source address into A and cellSource: an IPv4 address as it is, of an IPv6 address the words combined.
func loadSource(p []unix.SockFilter) []unix.SockFilter {
	const load, word = unix.BPF_LD | unix.BPF_ABS | unix.BPF_W, 4
	p = append(p,
		stmt(unix.BPF_LD|unix.BPF_ABS|unix.BPF_B, skfNetOff),
		stmt(unix.BPF_ALU|unix.BPF_RSH|unix.BPF_K, 4),
		jump(unix.BPF_JEQ, 6, 2, 0),
		stmt(load, skfNetOff+ip4Source),
		stmt(unix.BPF_JMP|unix.BPF_JA, 13), // to the last instruction below, which stores
	)
	for i := range uint32(4) {
		p = append(p, stmt(load, skfNetOff+ip6Source+i*word))
		if i > 0 {
			p = append(p, stmt(unix.BPF_LDX|unix.BPF_MEM, cellSource), stmt(unix.BPF_ALU|unix.BPF_XOR|unix.BPF_X, 0))
		}
		p = append(p, stmt(unix.BPF_ST, cellSource))
	}
	return p
}

// steeringProgram returns the index of a socket. The packet begins behind the UDP header.
func steeringProgram(s *Steering, pins []Pin) []unix.SockFilter {
	p := []unix.SockFilter{stmt(unix.BPF_LD|unix.BPF_ABS|unix.BPF_B, 0)}
	for _, r := range s.first {
		p = append(p,
			jump(unix.BPF_JGE, uint32(r.First), 0, 2),
			jump(unix.BPF_JGT, uint32(r.Last), 1, 0),
			stmt(unix.BPF_RET|unix.BPF_K, 0),
		)
	}
	p = loadSource(p)
	p = append(p,
		// The source port, behind an IPv4 header of any length or a plain IPv6 header; an IPv6 header with extensions goes without.
		stmt(unix.BPF_LD|unix.BPF_ABS|unix.BPF_B, skfNetOff),
		stmt(unix.BPF_ALU|unix.BPF_RSH|unix.BPF_K, 4),
		jump(unix.BPF_JEQ, 6, 3, 0),
		stmt(unix.BPF_LDX|unix.BPF_B|unix.BPF_MSH, skfNetOff),
		stmt(unix.BPF_LD|unix.BPF_IND|unix.BPF_H, skfNetOff),
		stmt(unix.BPF_JMP|unix.BPF_JA, 4),
		stmt(unix.BPF_LD|unix.BPF_ABS|unix.BPF_B, skfNetOff+ip6Next),
		jump(unix.BPF_JEQ, protocolUDP, 1, 0),
		stmt(unix.BPF_JMP|unix.BPF_JA, 1), // what A holds, the same for all of them, serves
		stmt(unix.BPF_LD|unix.BPF_ABS|unix.BPF_H, skfNetOff+ip6Header),
		stmt(unix.BPF_ST, cellPort),
	)
	for _, pin := range pins {
		p = append(p,
			stmt(unix.BPF_LD|unix.BPF_MEM, cellPort),
			jump(unix.BPF_JEQ, uint32(pin.From.Port()), 0, 3),
			stmt(unix.BPF_LD|unix.BPF_MEM, cellSource),
			jump(unix.BPF_JEQ, sourceKey(pin.From.Addr()), 0, 1),
			stmt(unix.BPF_RET|unix.BPF_K, uint32(pin.Socket)),
		)
	}
	p = append(p,
		stmt(unix.BPF_LD|unix.BPF_MEM, cellPort),
		// Neighbouring ports and addresses differ in their low bits; multiplying brings these up, and the best bits are the high ones.
		stmt(unix.BPF_ALU|unix.BPF_MUL|unix.BPF_K, 0x9E3779B1),
		stmt(unix.BPF_LDX|unix.BPF_MEM, cellSource),
		stmt(unix.BPF_ALU|unix.BPF_XOR|unix.BPF_X, 0),
		stmt(unix.BPF_ALU|unix.BPF_MUL|unix.BPF_K, s.multiplier),
		stmt(unix.BPF_ALU|unix.BPF_RSH|unix.BPF_K, 16),
		stmt(unix.BPF_ALU|unix.BPF_MOD|unix.BPF_K, uint32(s.shards)),
		stmt(unix.BPF_ALU|unix.BPF_ADD|unix.BPF_K, 1),
		stmt(unix.BPF_RET|unix.BPF_A, 0),
	)
	return p
}

// sourceKey is what loadSource makes of an address.
func sourceKey(a netip.Addr) uint32 {
	if a = a.Unmap(); a.Is4() {
		b := a.As4()
		return binary.BigEndian.Uint32(b[:])
	}
	b := a.As16()
	var k uint32
	for i := 0; i < len(b); i += 4 {
		k ^= binary.BigEndian.Uint32(b[i:])
	}
	return k
}

func (c *Conn) steer(s *Steering, pins []Pin) error {
	return c.attach(unix.SO_ATTACH_REUSEPORT_CBPF, steeringProgram(s, pins))
}

// attach gives the socket a program.
func (c *Conn) attach(option int, p []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	var err error
	cerr := c.raw.Control(func(fd uintptr) { err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, option, &prog) })
	return errors.Join(cerr, err)
}

func (c *Conn) buffers() (read, write int) {
	_ = c.raw.Control(func(fd uintptr) {
		// The kernel reports twice what is usable.
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF); err == nil {
			read = n / 2
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil {
			write = n / 2
		}
	})
	return read, write
}

// Positions in SO_MEMINFO (linux/sock_diag.h).
const (
	memInfoUsed  = 0 // SK_MEMINFO_RMEM_ALLOC
	memInfoLimit = 1 // SK_MEMINFO_RCVBUF
	memInfoDrops = 8 // SK_MEMINFO_DROPS
	memInfoVars  = 9
)

// Gauge reads the state of a socket's receive queue without allocating. It is for one goroutine.
type Gauge struct {
	raw  syscall.RawConn
	info [memInfoVars]uint32
	size uint32
	ok   bool
	do   func(fd uintptr)
}

// NewGauge makes a gauge of c's receive queue.
func (c *Conn) NewGauge() *Gauge {
	g := &Gauge{raw: c.raw}
	g.do = g.read
	return g
}

func (g *Gauge) read(fd uintptr) {
	g.size = uint32(unsafe.Sizeof(g.info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&g.info[0])), uintptr(unsafe.Pointer(&g.size)), 0)
	g.ok = errno == 0
}

// Queue returns the state of the queue, or the zero state where the socket is closed.
func (g *Gauge) Queue() QueueState {
	g.ok = false
	if err := g.raw.Control(g.do); err != nil || !g.ok {
		return QueueState{}
	}
	return QueueState{Used: g.info[memInfoUsed], Limit: g.info[memInfoLimit], Drops: uint64(g.info[memInfoDrops])}
}
