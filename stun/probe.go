package stun

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math/bits"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/stun/v4"
)

// Probes are STUN Binding requests and responses (RFC 8489) that travel as datagrams of a path, next to QUIC, whose first byte is
// 64 or more (RFC 9000 §17, the fixed bit) where theirs is 0 or 1. A request may be padded to find out what size passes.
//
//	request    header, [number], [pad], MESSAGE-INTEGRITY-SHA256 under the key of the asker's direction
//	response   header, [XOR-MAPPED-ADDRESS], MESSAGE-INTEGRITY-SHA256 under the key of the answerer's direction
//
// The integrity is truncated to 16 bytes (RFC 8489 §14.6). What does not carry it is dropped without a word. The number is eight bytes in an attribute
// of ours, counts up over all paths of whoever shares the keys, and lets an ordered Responder tell a probe that is played back.
const (
	headerSize     = 20
	attrHeaderSize = 4
	integritySize  = 16
	numberSize     = 8
	// MinProbe is the size in bytes of a probe without padding.
	MinProbe = headerSize + attrHeaderSize + integritySize
	// MaxProbe is the largest probe, in bytes.
	MaxProbe = 9216
	// magicCookie is the fixed value in every STUN header (RFC 8489 §5).
	magicCookie = 0x2112A442
)

// KeySize is the size of a probe key in bytes.
const KeySize = 32

// Keys are an end's keys: Out for what it sends, In for what it receives. The other end has them the other way round.
type Keys struct {
	Out, In [KeySize]byte
}

// Swap returns the other end's keys.
func (k Keys) Swap() Keys { return Keys{Out: k.In, In: k.Out} }

// Numbers numbers the probes of all Probers that share keys. The zero Numbers is ready; it may be used concurrently.
type Numbers struct{ last atomic.Uint64 }

// IsProbe reports whether a datagram may be a probe rather than QUIC. It looks at header fields only.
func IsProbe(b []byte) bool {
	return len(b) >= MinProbe && b[0] < 4 && binary.BigEndian.Uint32(b[4:]) == magicCookie
}

// IsRequest reports whether a probe is a request, which a Responder takes, rather than an answer, which a Prober takes.
func IsRequest(b []byte) bool { return len(b) >= 2 && b[0] == 0 && b[1] == 1 }

// sealer computes MESSAGE-INTEGRITY-SHA256 under one key, reusing its state. Not for concurrent use.
type sealer struct {
	mac hash.Hash
	sum [sha256.Size]byte
}

func newSealer(key [KeySize]byte) sealer { return sealer{mac: hmac.New(sha256.New, key[:])} }

func (s *sealer) compute(b []byte) []byte {
	s.mac.Reset()
	s.mac.Write(b)
	return s.mac.Sum(s.sum[:0])[:integritySize]
}

// AddTo appends the attribute (stun.Setter). It must be the last.
func (s *sealer) AddTo(m *stun.Message) error {
	// The length in the header counts the attribute itself (RFC 8489 §14.6).
	m.Length += attrHeaderSize + integritySize
	m.WriteLength()
	sum := s.compute(m.Raw)
	m.Length -= attrHeaderSize + integritySize
	m.Add(stun.AttrMessageIntegritySHA256, sum)
	return nil
}

var errIntegrity = errors.New("probe without valid integrity")

// check verifies a whole message: its header, and that it ends in MESSAGE-INTEGRITY-SHA256 under the key. It reads b only.
func (s *sealer) check(b []byte) error {
	if len(b) < MinProbe || len(b) > MaxProbe || binary.BigEndian.Uint32(b[4:]) != magicCookie ||
		int(binary.BigEndian.Uint16(b[2:])) != len(b)-headerSize {
		return errIntegrity
	}
	body, attr := b[:len(b)-attrHeaderSize-integritySize], b[len(b)-attrHeaderSize-integritySize:]
	if binary.BigEndian.Uint16(attr) != uint16(stun.AttrMessageIntegritySHA256) || binary.BigEndian.Uint16(attr[2:]) != integritySize {
		return errIntegrity
	}
	if !hmac.Equal(s.compute(body), attr[attrHeaderSize:]) {
		return errIntegrity
	}
	return nil
}

// Window is over how many probes loss is told.
const Window = 64

// forgetAfter is how long an unanswered probe is remembered, so that a late answer still tells the round-trip time and takes the loss
// back.
const forgetAfter = 5 * time.Second

// maxOutstanding bounds the probes that are remembered; the oldest is forgotten first.
const maxOutstanding = 128

// Answer is what an answered probe tells.
type Answer struct {
	// RTT is the round-trip time.
	RTT time.Duration
	// Size is the size of the probe in bytes: that much passed towards the peer.
	Size int
	// Mapped is where the peer saw the probe come from, if it said so.
	Mapped netip.AddrPort
	// Late says that the probe had been counted as lost before.
	Late bool
}

// PathStats is what the probes say of a path.
type PathStats struct {
	Sent, Answered uint64
	// RTT and Deviation are the smoothed round-trip time and its mean deviation (RFC 6298 §2), 0 before the first answer; MinRTT is
	// the smallest.
	RTT, Deviation, MinRTT time.Duration
	// Loss is the lost share of the last Window probes that were decided, 0 to 1.
	Loss float64
	// Decided is how many probes Loss is of.
	Decided int
	// Unanswered is how many probes in a row were lost, up to now.
	Unanswered int
	// LastAnswer is when the last answer came; zero before the first.
	LastAnswer time.Time
}

type sentProbe struct {
	id   [stun.TransactionIDSize]byte
	at   time.Time
	size int
	seq  uint64
	lost bool
}

// Prober asks over one path. It does no I/O and keeps no clock: packets and times go in, packets come out. Its methods may be called
// concurrently.
type Prober struct {
	mu      sync.Mutex // guards everything below
	out, in sealer
	numbers *Numbers    // nil: probes are not numbered
	pending []sentProbe // oldest first
	seq     uint64
	history uint64 // one bit per decided probe, the newest lowest: 1 is lost
	newest  uint64 // seq of the lowest bit of history
	decided int    // how many bits of history count
	st      PathStats
}

// NewProber makes a prober with this end's keys. An ordered Responder that has seen a numbered probe does not answer its probes.
func NewProber(k Keys) *Prober { return &Prober{out: newSealer(k.Out), in: newSealer(k.In)} }

// NewNumberedProber makes a prober whose probes are numbered by n, which all numbered probers with these keys share.
func NewNumberedProber(k Keys, n *Numbers) *Prober {
	p := NewProber(k)
	p.numbers = n
	return p
}

// Probe returns a new request to send at once, of size bytes (0: as small as can be; rounded up to a multiple of 4 and to what the
// padding attribute needs). The caller owns it.
func (p *Prober) Probe(now time.Time, size int) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := new(stun.Message)
	var number, pad stun.Setter = nothing{}, nothing{}
	least := MinProbe
	if p.numbers != nil {
		number = stun.RawAttribute{Type: attrNumber, Value: binary.BigEndian.AppendUint64(nil, p.numbers.last.Add(1))}
		least += attrHeaderSize + numberSize
	}
	if size > least {
		size = min(max((size+3)&^3, least+attrHeaderSize), MaxProbe)
		pad = stun.RawAttribute{Type: attrPad, Value: make([]byte, size-least-attrHeaderSize)}
	}
	if err := m.Build(stun.TransactionID, stun.BindingRequest, number, pad, &p.out); err != nil {
		panic(fmt.Sprintf("build probe: %v", err)) // no setter of ours fails
	}
	if len(p.pending) == maxOutstanding {
		p.loseLocked(&p.pending[0])
		p.pending = append(p.pending[:0], p.pending[1:]...)
	}
	p.seq++
	p.st.Sent++
	p.pending = append(p.pending, sentProbe{id: m.TransactionID, at: now, size: len(m.Raw), seq: p.seq})
	return m.Raw
}

// nothing is an attribute that is left out.
type nothing struct{}

func (nothing) AddTo(*stun.Message) error { return nil }

// Handle takes a received answer. ok is false for what is no answer to a probe of this prober's, which the caller drops.
func (p *Prober) Handle(now time.Time, b []byte) (a Answer, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(b) < MinProbe || b[0] != 1 || b[1] != 1 || p.in.check(b) != nil {
		return Answer{}, false
	}
	i := 0
	for ; i < len(p.pending); i++ {
		if [stun.TransactionIDSize]byte(b[8:headerSize]) == p.pending[i].id {
			break
		}
	}
	if i == len(p.pending) {
		return Answer{}, false
	}
	sent := p.pending[i]
	p.pending = append(p.pending[:i], p.pending[i+1:]...)
	a = Answer{RTT: max(now.Sub(sent.at), 0), Size: sent.size, Late: sent.lost}
	var m stun.Message
	if stun.Decode(b, &m) == nil {
		a.Mapped, _ = MappedAddress(&m)
	}
	p.decideLocked(sent.seq, false)
	p.st.Answered++
	p.st.Unanswered = 0
	p.st.LastAnswer = now
	p.sampleLocked(a.RTT)
	return a, true
}

// sampleLocked smooths a round-trip time as TCP does (RFC 6298 §2).
func (p *Prober) sampleLocked(rtt time.Duration) {
	if p.st.MinRTT == 0 || rtt < p.st.MinRTT {
		p.st.MinRTT = rtt
	}
	if p.st.RTT == 0 {
		p.st.RTT, p.st.Deviation = rtt, rtt/2
		return
	}
	p.st.Deviation += ((p.st.RTT - rtt).Abs() - p.st.Deviation) / 4
	p.st.RTT += (rtt - p.st.RTT) / 8
}

// Expire counts probes older than timeout as lost and returns how many of them became so now. A late answer takes that back for up to
// 5 s.
func (p *Prober) Expire(now time.Time, timeout time.Duration) (lost int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	keep := p.pending[:0]
	for i := range p.pending {
		s := &p.pending[i]
		age := now.Sub(s.at)
		if !s.lost && age >= timeout {
			p.loseLocked(s)
			lost++
		}
		if age < max(forgetAfter, timeout) {
			keep = append(keep, *s)
		}
	}
	p.pending = keep
	return lost
}

func (p *Prober) loseLocked(s *sentProbe) {
	if s.lost {
		return
	}
	s.lost = true
	p.decideLocked(s.seq, true)
	// One that went before the last answered one is a gap, not silence.
	if s.at.After(p.st.LastAnswer) || p.st.LastAnswer.IsZero() {
		p.st.Unanswered++
	}
}

// decideLocked writes the fate of probe seq into the window. A probe may be decided again: lost, then answered late.
func (p *Prober) decideLocked(seq uint64, lost bool) {
	if seq > p.newest {
		shift := seq - p.newest
		if p.decided == 0 {
			shift = 0
		}
		// Younger probes than the last decided one that are still open count as answered until they are decided.
		if shift >= Window {
			p.history = 0
		} else {
			p.history <<= shift
		}
		p.decided = min(p.decided+int(min(max(shift, 1), Window)), Window)
		p.newest = seq
	}
	back := p.newest - seq
	if back >= Window {
		return
	}
	p.decided = max(p.decided, int(back)+1)
	if lost {
		p.history |= 1 << back
	} else {
		p.history &^= 1 << back
	}
}

// Timeout is after how long a probe on this path may be given up: the smoothed round-trip time and four deviations, within least and
// most.
func (p *Prober) Timeout(least, most time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.st.RTT == 0 {
		return most
	}
	return min(max(p.st.RTT+4*p.st.Deviation, least), most)
}

// Stats says what the probes told so far.
func (p *Prober) Stats() PathStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.st
	if p.decided > 0 {
		st.Loss = float64(bits.OnesCount64(p.history)) / float64(p.decided)
		st.Decided = p.decided
	}
	return st
}

// Defaults of a Responder's rate limit: room for probes every 20 ms from both the path machine's active checks and its candidates.
const (
	DefaultRate  = 100 // answers a second
	DefaultBurst = 50  // answers
)

// Responder answers the other end's probes. It does no I/O and keeps no clock. Its methods may be called concurrently.
type Responder struct {
	mu       sync.Mutex // guards everything below
	out, in  sealer
	rate     float64
	burst    float64
	tokens   float64
	refilled time.Time
	seen     *replays // nil: order does not matter
	answered uint64
	limited  uint64
	invalid  uint64
}

// NewResponder makes a responder with this end's keys that gives at most rate answers a second after a burst; 0 is the default.
func NewResponder(k Keys, rate, burst int) *Responder {
	if rate <= 0 {
		rate = DefaultRate
	}
	if burst <= 0 {
		burst = DefaultBurst
	}
	return &Responder{out: newSealer(k.Out), in: newSealer(k.In), rate: float64(rate), burst: float64(burst), tokens: float64(burst)}
}

// NewOrderedResponder makes a responder that answers each numbered probe once, and none that is older than the newest by replayWindow. A probe
// without a number it answers only as long as none with one came: an asker numbers all of its probes or none.
func NewOrderedResponder(k Keys, rate, burst int) *Responder {
	r := NewResponder(k, rate, burst)
	r.seen = new(replays)
	return r
}

// Respond returns the answer to a received request, or ok false: it is no probe with valid integrity, it is played back, or too many came. from, if valid,
// is told to the asker (a direct path's candidate). The caller owns the answer, which is never larger than the request by more than the
// address.
func (r *Responder) Respond(now time.Time, b []byte, from netip.AddrPort) (answer []byte, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !IsRequest(b) || r.in.check(b) != nil || r.seen != nil && !r.seen.first(probeNumber(b)) {
		r.invalid++
		return nil, false
	}
	if !r.refilled.IsZero() {
		r.tokens = min(r.tokens+max(now.Sub(r.refilled), 0).Seconds()*r.rate, r.burst)
	}
	r.refilled = now
	if r.tokens < 1 {
		r.limited++
		return nil, false
	}
	r.tokens--
	r.answered++
	var mapped stun.Setter = nothing{}
	if from.IsValid() {
		a := from.Addr().Unmap().As16()
		mapped = &stun.XORMappedAddress{IP: net.IP(a[:]), Port: int(from.Port())}
	}
	m := new(stun.Message)
	id := stun.NewTransactionIDSetter([stun.TransactionIDSize]byte(b[8:headerSize]))
	if err := m.Build(id, stun.BindingSuccess, mapped, &r.out); err != nil {
		panic(fmt.Sprintf("build probe answer: %v", err)) // no setter of ours fails
	}
	return m.Raw, true
}

// Counts returns how many probes were answered, dropped by the rate limit, and dropped for want of integrity or because they had
// come before.
func (r *Responder) Counts() (answered, limited, invalid uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answered, r.limited, r.invalid
}
