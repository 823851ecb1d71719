package leg

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"sallyway/internal/datagram"
)

// recorder writes down what a walker finds.
type recorder struct{ got []string }

func (r *recorder) data(number uint16, b datagram.Batch) {
	defer b.Release()
	var parts []string
	count := b.Count()
	for {
		p, ok := b.Next()
		if !ok {
			break
		}
		parts = append(parts, string(p))
	}
	if count != len(parts) {
		parts = append(parts, fmt.Sprintf("(count %d)", count))
	}
	r.got = append(r.got, fmt.Sprintf("%x:%s", number, strings.Join(parts, ",")))
}

func (r *recorder) control(c class, b []byte) {
	r.got = append(r.got, fmt.Sprintf("control %d %d", c, len(b)))
}
func (r *recorder) malformed() { r.got = append(r.got, "malformed") }

// cd is ChannelData with padding bytes behind.
func cd(number uint16, payload string, padding int) []byte {
	b := binary.BigEndian.AppendUint16(nil, number)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(append(b, payload...), bytes.Repeat([]byte{0xEE}, padding)...)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestWalk(t *testing.T) {
	stunMsg := append([]byte{0, 1, 0, 0, 0x21, 0x12, 0xA4, 0x42}, make([]byte, 12)...)
	record := append([]byte{23, 254, 253}, make([]byte, 5)...)
	for _, tt := range []struct {
		name    string
		in      []byte
		segment int
		want    []string
	}{
		{"one", cd(0x4000, "abcd", 0), 8, []string{"4000:abcd"}},
		{"a run with a short tail", join(cd(0x4001, "abcd", 0), cd(0x4001, "efgh", 0), cd(0x4001, "ij", 0)), 8, []string{"4001:abcd,efgh,ij"}},
		{
			"two channels", join(cd(0x4000, "abcd", 0), cd(0x4001, "efgh", 0), cd(0x4001, "ijkl", 0), cd(0x4000, "m", 0)), 8,
			[]string{"4000:abcd", "4001:efgh,ijkl", "4000:m"},
		},
		{
			"padded in the middle", join(cd(0x4000, "abcd", 0), cd(0x4000, "ef", 2), cd(0x4000, "ghij", 0)), 8,
			[]string{"4000:abcd", "4000:ef", "4000:ghij"},
		},
		{"padded tail", join(cd(0x4000, "abcd", 0), cd(0x4000, "e", 1)), 8, []string{"4000:abcd", "4000:e"}},
		{"empty payload", join(cd(0x4000, "", 4), cd(0x4000, "abcd", 0)), 8, []string{"4000:abcd"}},
		{"length beyond the datagram", join([]byte{0x40, 0, 0, 9, 1, 2, 3, 4}, cd(0x4000, "abcd", 0)), 8, []string{"malformed", "4000:abcd"}},
		{"reserved channel", cd(0x4FFF, "abcd", 0), 8, []string{"4fff:abcd"}},
		{"beyond the channels", cd(0x5000, "abcd", 0), 8, []string{"malformed"}},
		{"DTLS between", join(cd(0x4000, "abcd", 0), record, cd(0x4000, "efgh", 0)), 8, []string{"4000:abcd", "control 2 8", "4000:efgh"}},
		{"STUN", stunMsg, 20, []string{"control 1 20"}},
		{"QUIC", []byte{0xC0, 1, 2, 3}, 4, []string{"malformed"}},
		{"cut header", []byte{0x40, 0, 0}, 3, []string{"malformed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			owner := datagram.NewBuffer()
			var r recorder
			walk(tt.in, tt.segment, datagram.ECT0, owner, &r)
			if !reflect.DeepEqual(r.got, tt.want) {
				t.Errorf("got %q, want %q", r.got, tt.want)
			}
			owner.Release()
		})
	}
}

func TestWalkStream(t *testing.T) {
	stunMsg := append([]byte{1, 1, 0, 4, 0x21, 0x12, 0xA4, 0x42}, make([]byte, 16)...)
	for _, tt := range []struct {
		name string
		in   []byte
		want []string
		rest int
		err  bool
	}{
		{"nothing", nil, nil, 0, false},
		{"STUN", stunMsg, []string{"control 1 24"}, 0, false},
		{"part of STUN", stunMsg[:10], nil, 10, false},
		{"one", cd(0x4000, "abcd", 0), []string{"4000:abcd"}, 0, false},
		{"padded", join(cd(0x4000, "abc", 1), cd(0x4000, "defgh", 3)), []string{"4000:abc", "4000:defgh"}, 0, false},
		{"padding to come", cd(0x4000, "abc", 0), nil, 7, false},
		{
			"a run with a padded tail", join(cd(0x4000, "abcd", 0), cd(0x4000, "efgh", 0), cd(0x4000, "i", 3), cd(0x4000, "jklm", 0)),
			[]string{"4000:abcd,efgh,i", "4000:jklm"},
			0, false,
		},
		{"a larger one follows", join(cd(0x4000, "abcd", 0), cd(0x4000, "efghijkl", 0)), []string{"4000:abcd", "4000:efghijkl"}, 0, false},
		{
			"other channel, STUN, empty", join(cd(0x4000, "abcd", 0), cd(0x4001, "efgh", 0), stunMsg, cd(0x4001, "", 0), cd(0x4001, "i", 3)),
			[]string{"4000:abcd", "4001:efgh", "control 1 24", "4001:i"},
			0, false,
		},
		{"cut", join(cd(0x4000, "abcd", 0), cd(0x4000, "efgh", 0)[:6]), []string{"4000:abcd"}, 6, false},
		{"neither", join(cd(0x4000, "abcd", 0), []byte{22, 3, 3, 0, 0}), []string{"4000:abcd"}, 5, true},
		{"STUN too long", []byte{0, 1, 0xFF, 0xFC}, nil, 4, true},
		{"STUN of odd length", []byte{0, 1, 0, 3}, nil, 4, true},
		{"beyond the channels", cd(0x5000, "abcd", 0), nil, 8, true},
		{"larger than any buffer", []byte{0x40, 0, 0xFF, 0xFF}, nil, 4, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			owner := datagram.NewBuffer()
			defer owner.Release()
			var r recorder
			used, err := walkStream(tt.in, owner, &r)
			if !reflect.DeepEqual(r.got, tt.want) || (err != nil) != tt.err || len(tt.in)-used != tt.rest {
				t.Errorf("got %q, rest %d, %v; want %q, rest %d", r.got, len(tt.in)-used, err, tt.want, tt.rest)
			}
		})
	}
}

// payloads collects every payload per channel, in order, whatever the batches.
type payloads struct{ got []string }

func (p *payloads) data(number uint16, b datagram.Batch) {
	defer b.Release()
	n := b.Count()
	for {
		d, ok := b.Next()
		if !ok {
			break
		}
		n--
		p.got = append(p.got, fmt.Sprintf("%x %x", number, d))
	}
	if n != 0 {
		panic("Count and Next disagree")
	}
}

func (p *payloads) control(c class, b []byte) {
	if len(b) == 0 {
		panic("empty control")
	}
}
func (p *payloads) malformed() {}

// FuzzWalk holds the walker against one that looks at every datagram alone.
func FuzzWalk(f *testing.F) {
	f.Add(join(cd(0x4000, "abcd", 0), cd(0x4000, "ef", 2), cd(0x4001, "ghij", 0)), uint16(8))
	f.Add(join(cd(0x4000, "abcd", 0), cd(0x4000, "efgh", 0), cd(0x4000, "i", 0)), uint16(8))
	f.Add([]byte{0x40}, uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, segment uint16) {
		if segment == 0 || len(b) > datagram.MaxBatch {
			return
		}
		in := bytes.Clone(b)
		var want []string
		for rest := b; len(rest) > 0; {
			d := rest[:min(int(segment), len(rest))]
			rest = rest[len(d):]
			if len(d) > 4 && d[0]>>4 == 4 {
				if n := int(d[2])<<8 | int(d[3]); n > 0 && n <= len(d)-4 {
					want = append(want, fmt.Sprintf("%x %x", binary.BigEndian.Uint16(d), d[4:4+n]))
				}
			}
		}
		owner := datagram.NewBuffer()
		var p payloads
		walk(b, int(segment), 0, owner, &p)
		owner.Release()
		if !reflect.DeepEqual(p.got, want) {
			t.Errorf("got %q, want %q", p.got, want)
		}
		if !bytes.Equal(in, b) {
			t.Error("input was changed")
		}
	})
}

// FuzzWalkStream: a stream cut anywhere yields the same as the whole.
func FuzzWalkStream(f *testing.F) {
	f.Add(join(cd(0x4000, "abcd", 0), cd(0x4000, "ef", 2), cd(0x4001, "ghij", 0)), 9)
	f.Add(join(cd(0x4000, "abcd", 0), cd(0x4000, "efgh", 0), cd(0x4000, "i", 3)), 17)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		if cut < 0 || cut > len(b) || len(b) > datagram.MaxBatch {
			return
		}
		owner := datagram.NewBuffer()
		defer owner.Release()
		var whole, halves payloads
		usedWhole, errWhole := walkStream(b, owner, &whole)
		used, err := walkStream(b[:cut], owner, &halves)
		if err == nil {
			var more int
			more, err = walkStream(b[used:], owner, &halves)
			used += more
		}
		if usedWhole != used || (err != nil) != (errWhole != nil) || !reflect.DeepEqual(whole.got, halves.got) {
			t.Errorf("whole: %q %d %v; cut at %d: %q %d %v", whole.got, usedWhole, errWhole, cut, halves.got, used, err)
		}
	})
}
