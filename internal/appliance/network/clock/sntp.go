package clock

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"
)

// A packet is 48 bytes, all big endian (RFC 5905 section 7.3); extensions and MACs may follow and are not looked at:
//
//	 0  leap indicator (2 bits), version (3), mode (3)    16  reference timestamp
//	 1  stratum                                           24  origin timestamp: the client's transmit timestamp, sent back
//	 2  poll exponent                                     32  receive timestamp
//	 3  precision exponent                                40  transmit timestamp
//	 4  root delay, 16.16 fixed point seconds
//	 8  root dispersion, the same
//	12  reference identifier, or the kiss code
//
// Timestamps are 32.32 fixed point seconds since 1900.
const packetSize = 48

const (
	modeClient = 3
	modeServer = 4
	version    = 4
	maxStratum = 15
	maxRoot    = 1500 * time.Millisecond // RFC 5905's MAXDIST: half of root delay plus root dispersion
)

// reply is what a server says.
type reply struct {
	receive, transmit time.Time     // when it had the question and sent the answer, by its clock
	root              time.Duration // how wrong its clock may be
}

// kissError is a kiss-o'-death: the server's four letters (RFC 5905 section 7.4).
type kissError string

func (k kissError) Error() string { return fmt.Sprintf("it asks to be left alone (%q)", string(k)) }

// errNotOurs is an answer to another question: who waits goes on waiting.
var errNotOurs = errors.New("not the answer to this question")

// parse reads an answer to the question with the given transmit timestamp.
func parse(b []byte, cookie uint64) (reply, error) {
	if len(b) < packetSize {
		return reply{}, errNotOurs
	}
	if mode := b[0] & 7; mode != modeServer || binary.BigEndian.Uint64(b[24:]) != cookie {
		return reply{}, errNotOurs
	}
	if v := b[0] >> 3 & 7; v < 3 || v > 4 {
		return reply{}, fmt.Errorf("it speaks version %d", v)
	}
	stratum := b[1]
	if stratum == 0 {
		code := make([]byte, 0, 4)
		for _, c := range b[12:16] {
			if c < 'A' || c > 'Z' {
				break
			}
			code = append(code, c)
		}
		return reply{}, kissError(code)
	}
	if stratum > maxStratum || b[0]>>6 == 3 {
		return reply{}, errors.New("it is not synchronized itself")
	}
	r := reply{
		receive:  stamp(binary.BigEndian.Uint64(b[32:])),
		transmit: stamp(binary.BigEndian.Uint64(b[40:])),
		root:     short(binary.BigEndian.Uint32(b[4:]))/2 + short(binary.BigEndian.Uint32(b[8:])),
	}
	if binary.BigEndian.Uint64(b[40:]) == 0 || binary.BigEndian.Uint64(b[32:]) == 0 {
		return reply{}, errors.New("it sends no time")
	}
	if d := r.transmit.Sub(r.receive); d < 0 || d > 10*time.Second {
		return reply{}, errors.New("it sent the answer before it had the question")
	}
	if r.root > maxRoot {
		return reply{}, fmt.Errorf("its clock may be off by %v", r.root.Round(time.Millisecond))
	}
	return r, nil
}

// era is the length of one in seconds.
const era = 1 << 32

var ntpEpoch = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC).Unix()

// stamp turns a timestamp into a time in the 136 years around 2026, whatever the machine's clock says: it is what is in doubt.
func stamp(ts uint64) time.Time {
	s := ntpEpoch + int64(ts>>32)
	for s < epoch.Unix()-era/2 {
		s += era
	}
	return time.Unix(s, int64(ts&0xffffffff*1e9>>32)).UTC()
}

// short turns 16.16 fixed point seconds into a duration.
func short(v uint32) time.Duration { return time.Duration(uint64(v) * 1e9 >> 16) }

// sample is an answer that can be used.
type sample struct {
	server string
	offset time.Duration // to be added to the clock
	delay  time.Duration // there and back
	root   time.Duration
}

// uncertainty is how wrong the offset may be.
func (s sample) uncertainty() time.Duration { return s.delay/2 + s.root }

// query asks one server once. What is asked carries a random number where a timestamp would be: it does not tell the
// machine's clock, and is not to be guessed by who does not see it.
func query(ctx context.Context, c Clock, server string, timeout time.Duration) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", address(server)) // connected: others are not heard
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, packetSize, 512)
	b[0] = version<<3 | modeClient
	if _, err := rand.Read(b[40:48]); err != nil {
		return sample{}, err
	}
	cookie := binary.BigEndian.Uint64(b[40:])
	sent, began := c.Now(), time.Now()
	if _, err := conn.Write(b); err != nil {
		return sample{}, err
	}
	for {
		n, err := conn.Read(b[:cap(b)])
		took := time.Since(began) // monotonic: a step in between changes nothing
		if err != nil {
			if ctx.Err() != nil {
				return sample{}, errors.New("no answer")
			}
			return sample{}, err
		}
		r, err := parse(b[:n], cookie)
		if errors.Is(err, errNotOurs) {
			continue
		}
		if err != nil {
			return sample{}, err
		}
		back := sent.Add(took)
		return sample{
			offset: r.receive.Sub(sent)/2 + r.transmit.Sub(back)/2,
			delay:  max(took-r.transmit.Sub(r.receive), 0),
			root:   r.root,
		}, nil
	}
}
