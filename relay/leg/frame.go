package leg

import (
	"encoding/binary"
	"errors"

	"sallyway/internal/datagram"
)

// Framing of ChannelData and STUN.
const (
	// channelHeader is number and length in front of ChannelData's payload, in bytes (RFC 8656 §12.4).
	channelHeader = 4
	// stunHeader is the size of a STUN message without attributes, in bytes (RFC 8489 §5).
	stunHeader = 20
	// minChannel and maxChannel are the channel numbers (RFC 8656 §12).
	minChannel = 0x4000
	maxChannel = 0x4FFF
	// maxMessage bounds a STUN message on a stream, in bytes: control messages of a relay are a few hundred.
	maxMessage = 4 << 10
)

// class is what the first byte of a datagram says (RFC 7983 §7).
type class uint8

const (
	classOther class = iota
	classSTUN
	classDTLS
	classChannel
)

func classify(first byte) class {
	switch {
	case first < 4:
		return classSTUN
	case first >= 20 && first < 64:
		return classDTLS
	case first >= 64 && first < 80:
		return classChannel
	}
	return classOther
}

// parseChannelData returns the channel number of a datagram and the length of its header and payload. On UDP what follows these is
// padding (RFC 8656 §12.5).
func parseChannelData(b []byte) (number uint16, size int, ok bool) {
	if len(b) < channelHeader || classify(b[0]) != classChannel {
		return 0, 0, false
	}
	number = binary.BigEndian.Uint16(b)
	size = channelHeader + int(binary.BigEndian.Uint16(b[2:]))
	return number, size, number <= maxChannel && size <= len(b)
}

// input takes what arrives on a carrier. It is called from the carrier's reading goroutine.
type input interface {
	// data takes over the batch.
	data(number uint16, b datagram.Batch)
	// control takes a DTLS record or STUN message in the clear. b is valid during the call.
	control(c class, b []byte)
	// malformed counts what is none of these.
	malformed()
}

// walk hands the datagrams of one read to in: b has datagrams of segment bytes each, the last possibly shorter, and lies in owner, of
// which every batch gets a reference. A run of one channel whose datagrams are full becomes one batch.
func walk(b []byte, segment int, ecn datagram.ECN, owner *datagram.Buffer, in input) {
	var (
		run    int    // start of the run under way
		number uint16 // its channel
		open   bool
	)
	flush := func(end int) {
		if open {
			owner.Retain()
			in.data(number, datagram.NewBatch(b[run:end:end], segment, channelHeader, ecn, owner))
			open = false
		}
	}
	for at := 0; at < len(b); at += segment {
		d := b[at:min(at+segment, len(b))]
		n, size, ok := parseChannelData(d)
		if !ok {
			flush(at)
			switch c := classify(d[0]); c {
			case classSTUN, classDTLS:
				in.control(c, d)
			default:
				in.malformed()
			}
			continue
		}
		if open && n != number {
			flush(at)
		}
		switch {
		case size == channelHeader:
			// An empty payload carries nothing, and a batch can not show it.
			flush(at)
		case size < len(d):
			// Padded: its stride is its own.
			flush(at)
			owner.Retain()
			in.data(n, datagram.NewBatch(d[:size:size], size, channelHeader, ecn, owner))
		case !open:
			run, number, open = at, n, true
		}
	}
	flush(len(b))
}

// errFraming says that a stream is neither STUN nor ChannelData, after which its framing is lost.
var errFraming = errors.New("the relay sent neither STUN nor ChannelData")

// nextFrame finds the first frame of a stream. size is what it occupies, padding included; size 0 asks for more bytes. used is its
// length without padding.
func nextFrame(b []byte) (c class, size, used int, err error) {
	if len(b) < channelHeader {
		return 0, 0, 0, nil
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	switch c = classify(b[0]); c {
	case classSTUN:
		used = stunHeader + n
		if used > maxMessage || n%4 != 0 {
			return 0, 0, 0, errFraming
		}
		size = used
	case classChannel:
		if binary.BigEndian.Uint16(b) > maxChannel {
			return 0, 0, 0, errFraming
		}
		used = channelHeader + n
		size = (used + 3) &^ 3
	default:
		return 0, 0, 0, errFraming
	}
	if size > datagram.MaxBatch {
		return 0, 0, 0, errFraming // a buffer could never hold it
	}
	if size > len(b) {
		return c, 0, 0, nil
	}
	return c, size, used, nil
}

// walkStream hands the whole frames at the start of b to in and returns how many bytes they take. Batches refer to owner as in walk.
func walkStream(b []byte, owner *datagram.Buffer, in input) (consumed int, err error) {
	for {
		start := consumed
		c, size, used, err := nextFrame(b[start:])
		if err != nil || size == 0 {
			return consumed, err
		}
		consumed += size
		if c == classSTUN {
			in.control(c, b[start:start+used])
			continue
		}
		if used == channelHeader {
			continue
		}
		number, end := binary.BigEndian.Uint16(b[start:]), start+used
		// Unpadded frames of one channel and size join up; the last of them may be shorter.
		for joined := size == used; joined; {
			c, size, more, err := nextFrame(b[end:])
			if err != nil || size == 0 || c != classChannel || more > used || more == channelHeader ||
				binary.BigEndian.Uint16(b[end:]) != number {
				break
			}
			consumed = end + size
			end += more
			joined = more == used
		}
		owner.Retain()
		in.data(number, datagram.NewBatch(b[start:end:end], used, channelHeader, datagram.NotECT, owner))
	}
}
