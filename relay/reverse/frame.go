package reverse

import (
	"encoding/binary"
	"errors"

	"sallyway/internal/datagram"
)

// Sizes, in bytes.
const (
	// MaxPayload is the largest payload of a frame.
	MaxPayload = 16 << 10
	// frameHeader is a frame's length, controlFrame a control frame as a whole, chunkHeader a chunk's number and size.
	frameHeader  = 2
	controlFrame = 3
	chunkHeader  = 6
	// MaxChunk is the most frames that are written at once.
	MaxChunk = 60 << 10
)

// Control is the kind of a control frame.
type Control byte

// The control frames of a TLS connection. An unknown kind is no error: it is of a newer peer.
const (
	ControlPing     Control = 1 // node → relay, every KeepaliveInterval
	ControlPong     Control = 2 // relay → node
	ControlReady    Control = 3 // relay → node: the gateway has taken the link; before it nothing is sent
	ControlDraining Control = 4 // relay → node: move
)

// errFrame says that a stream has lost its framing or never had one.
var errFrame = errors.New("frame too large")

// Run is a run of frames in a stream: a batch whose datagrams have two bytes before them.
type Run struct {
	Frames []byte
	Stride int
}

// Next finds the first run of whole frames of one size (the last of them may be smaller) or control frame in b and returns how many bytes
// it takes; 0 asks for more bytes. kind is 0 for a run.
func Next(b []byte) (run Run, kind Control, used int, err error) {
	n, size, err := frame(b)
	if err != nil || size == 0 {
		return Run{}, 0, 0, err
	}
	if n == 0 {
		return Run{}, Control(b[frameHeader]), size, nil
	}
	end := size
	for {
		m, more, err := frame(b[end:])
		if err != nil || more == 0 || m == 0 || more > size {
			break // an error is found again at the start of the next run
		}
		end += more
		if more < size {
			break
		}
	}
	return Run{Frames: b[:end:end], Stride: size}, 0, end, nil
}

// frame looks at the first frame of b: the length of its payload and what it takes in all, 0 where it is not whole.
func frame(b []byte) (n, size int, err error) {
	if len(b) < frameHeader {
		return 0, 0, nil
	}
	n = int(binary.BigEndian.Uint16(b))
	switch {
	case n > MaxPayload:
		return 0, 0, errFrame
	case n == 0:
		size = controlFrame
	default:
		size = frameHeader + n
	}
	if size > len(b) {
		return n, 0, nil
	}
	return n, size, nil
}

// appendFrames cuts payload into frames of segment bytes and appends them.
func appendFrames(b, payload []byte, segment int) []byte {
	for len(payload) > 0 {
		n := min(segment, len(payload))
		b = binary.BigEndian.AppendUint16(b, uint16(n))
		b = append(b, payload[:n]...)
		payload = payload[n:]
	}
	return b
}

// batch makes a run that lies in owner a batch, with a reference of its own.
func (r Run) batch(owner *datagram.Buffer) datagram.Batch {
	owner.Retain()
	return datagram.NewBatch(r.Frames, r.Stride, frameHeader, datagram.NotECT, owner)
}

// count is how many frames a run has.
func (r Run) count() uint64 { return uint64((len(r.Frames) + r.Stride - 1) / r.Stride) }
