package reverse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/datagram"
	"sallyway/internal/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func f(payloads ...string) []byte {
	var b []byte
	for _, p := range payloads {
		b = appendFrames(b, []byte(p), max(len(p), 1))
	}
	return b
}

func TestNext(t *testing.T) {
	for _, c := range []struct {
		name   string
		in     []byte
		used   int
		stride int
		kind   Control
		bad    bool
	}{
		{"nothing", nil, 0, 0, 0, false},
		{"half a length", []byte{0}, 0, 0, 0, false},
		{"half a frame", []byte{0, 3, 'a'}, 0, 0, 0, false},
		{"one", f("abc"), 5, 5, 0, false},
		{"two alike", f("abc", "def"), 10, 5, 0, false},
		{"last is shorter", f("abc", "def", "g"), 13, 5, 0, false},
		{"a longer one is another run", f("a", "bcd"), 3, 3, 0, false},
		{"after a shorter one begins another run", f("abc", "d", "e"), 8, 5, 0, false},
		{"half of the second", f("abc", "def")[:8], 5, 5, 0, false},
		{"control", []byte{0, 0, 2, 0, 1, 'x'}, 3, 0, ControlPong, false},
		{"half a control", []byte{0, 0}, 0, 0, 0, false},
		{"control after a frame", append(f("abc"), 0, 0, 1), 5, 5, 0, false},
		{"largest", binary.BigEndian.AppendUint16(nil, MaxPayload), 0, 0, 0, false},
		{"too large", binary.BigEndian.AppendUint16(nil, MaxPayload+1), 0, 0, 0, true},
		{"too large after a good one", append(f("abc"), 0xff, 0xff), 5, 5, 0, false},
	} {
		run, kind, used, err := Next(c.in)
		if used != c.used || run.Stride != c.stride || kind != c.kind || (err != nil) != c.bad {
			t.Errorf("%s: run %q, kind %d, used %d, %v", c.name, run.Frames, kind, used, err)
		}
	}
}

// FuzzFrames: whatever comes, the parser neither fails nor makes anything up: runs and control frames together are the input, in order.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendFrames(nil, bytes.Repeat([]byte("abc"), 100), 7))
	f.Add([]byte{0, 0, 1, 0, 1, 'x', 0, 0, 2})
	f.Add([]byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []byte
		at := 0
		for {
			run, kind, used, err := Next(b[at:])
			if err != nil || used == 0 {
				break
			}
			if len(run.Frames) == 0 {
				got = append(got, 0, 0, byte(kind))
			} else {
				batch := datagram.NewBatch(run.Frames, run.Stride, frameHeader, datagram.NotECT, nil)
				if n := run.count(); n != uint64(batch.Count()) {
					t.Fatalf("%d frames, the batch has %d", n, batch.Count())
				}
				for p, ok := batch.Next(); ok; p, ok = batch.Next() {
					if len(p) == 0 || len(p) > MaxPayload {
						t.Fatalf("payload of %d bytes", len(p))
					}
					got = appendFrames(got, p, len(p))
				}
			}
			at += used
		}
		if !bytes.Equal(got, b[:at]) {
			t.Fatalf("% x became % x", b[:at], got)
		}
		_ = Frames(b, func(Run) {})
		_, _ = ParseOpen(b)
		_, _ = checkStrict(b, strictClient)
	})
}

func TestOpen(t *testing.T) {
	o := Open{Link: 7, Peer: identity.Node{Org: "acme", Kind: identity.Site, ID: "g-1"}}
	got, err := ParseOpen(o.Marshal())
	if err != nil || got != o {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{
		"", "{}", "[]", `{"link":1,"peer":{"org":"acme","kind":"gateway","id":"g-1"}}`, `{"link":1,"peer":{"org":"a b","kind":"client","id":"c"}}`,
		`{"link":1}` + strings.Repeat(" ", maxOpen),
	} {
		if o, err := ParseOpen([]byte(bad)); err == nil {
			t.Errorf("%.40q: %+v", bad, o)
		}
	}
	for version, slot := range map[string]int{ClientVersion(0): 0, ClientVersion(3): 3, "SSH-2.0-OpenSSH_9.9": 0, versionPrefix + "slot4": 0, versionPrefix + "slot": 0, versionPrefix + "slot12": 0} {
		if got := Slot(version); got != slot {
			t.Errorf("%s: %d", version, got)
		}
	}
}

func TestQueue(t *testing.T) {
	q := NewQueue(100)
	if n, err := q.Put(bytes.Repeat([]byte("x"), 200), 18); n != 5*18 || err != nil {
		t.Errorf("%d bytes fit into 100 with five headers, %v", n, err)
	}
	put := make(chan bool)
	go func() { put <- q.PutFrames(f("abc")) }()
	buf := make([]byte, 45)
	n, number, ok := q.Take(buf)
	if n != 40 || number != 0 || !ok {
		t.Errorf("%d bytes, number %d: want two whole frames", n, number)
	}
	if !<-put {
		t.Error("no room")
	}
	total := 0
	for total < 60+5 {
		n, number, ok = q.Take(buf)
		total += n
		if !ok || n > len(buf) {
			t.Fatal(n, ok)
		}
	}
	if total != 65 || number == 0 {
		t.Errorf("%d bytes, number %d", total, number)
	}
	q.PutControl(ControlPing)
	if n, _, _ := q.Take(buf); !bytes.Equal(buf[:n], []byte{0, 0, 1}) {
		t.Errorf("% x", buf[:n])
	}
	go q.Close()
	if _, _, ok := q.Take(buf); ok {
		t.Error("taken from a closed queue")
	}
	if _, err := q.Put([]byte("x"), 1); !errors.Is(err, net.ErrClosed) || q.PutFrames(f("a")) {
		t.Errorf("put into a closed queue: %v", err)
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	q := NewQueue(DefaultQueue)
	b, buf := make([]byte, 40*1400), make([]byte, MaxChunk)
	if n := testing.AllocsPerRun(1000, func() {
		if n, _ := q.Put(b, 1400); n != len(b) {
			t.Fatal("full")
		}
		for left := len(b) + 40*frameHeader; left > 0; {
			n, _, _ := q.Take(buf)
			left -= n
		}
	}); n >= 1 {
		t.Errorf("%v allocations a run", n)
	}
}

// TestBundleKeepsTheOrder: what is striped over channels of different speed comes out as it went in.
func TestBundleKeepsTheOrder(t *testing.T) {
	in, out := NewQueue(DefaultQueue), NewQueue(DefaultQueue)
	var mu sync.Mutex
	var got []byte
	sender := NewBundle(in, func([]byte, *datagram.Buffer) error { return nil }, nil)
	receiver := NewBundle(out, func(frames []byte, _ *datagram.Buffer) error {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, frames...)
		return nil
	}, nil)
	defer sender.Close()
	defer receiver.Close()
	for range Slots {
		a, b := net.Pipe()
		if err := sender.Add(slow{a}, func() {}); err != nil {
			t.Fatal(err)
		}
		if err := receiver.Add(b, func() {}); err != nil {
			t.Fatal(err)
		}
	}
	var want []byte
	for i := range 400 {
		frame := appendFrames(nil, binary.BigEndian.AppendUint32(nil, uint32(i)), 4)
		want = append(want, frame...)
		if !in.PutFrames(frame) {
			t.Fatal("closed")
		}
		if i%7 == 0 {
			time.Sleep(100 * time.Microsecond) // so that there are many chunks
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		mu.Lock()
		n := len(got)
		mu.Unlock()
		if n == len(want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d bytes", n, len(want))
		}
		time.Sleep(time.Millisecond)
	}
	if !bytes.Equal(got, want) {
		t.Error("out of order")
	}
	if in.number < 20 {
		t.Errorf("only %d chunks: the test shows nothing", in.number)
	}
	// One channel's end is the end of all.
	_ = sender.channels[0].Close()
	for name, b := range map[string]*Bundle{"sender": sender, "receiver": receiver} {
		select {
		case <-b.Done():
		case <-time.After(5 * time.Second):
			t.Errorf("the %s goes on", name)
		}
	}
}

// slow is a channel whose writes take a while, each another.
type slow struct{ net.Conn }

func (s slow) Write(b []byte) (int, error) {
	time.Sleep(time.Duration(rand.N(500)) * time.Microsecond)
	return s.Conn.Write(b)
}

// TestBundleRefuses: chunks that no sender of ours makes end the link.
func TestBundleRefuses(t *testing.T) {
	chunk := func(number uint32, size int, frames []byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, number)
		return append(binary.BigEndian.AppendUint16(b, uint16(size)), frames...)
	}
	good := f("abc")
	for name, bytes := range map[string][]byte{
		"twice":             append(chunk(0, 5, good), chunk(0, 5, good)...),
		"before":            append(chunk(0, 5, good), chunk(0xffffffff, 5, good)...),
		"empty":             chunk(0, 0, nil),
		"too large":         chunk(0, MaxChunk+1, nil),
		"half a frame":      chunk(0, 4, good[:4]),
		"a control frame":   chunk(0, 3, []byte{0, 0, 1}),
		"ends in a header":  chunk(0, 5, good)[:3],
		"ends in the chunk": chunk(0, 5, good)[:8],
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			bundle := NewBundle(NewQueue(100), func(frames []byte, _ *datagram.Buffer) error { return Frames(frames, func(Run) {}) }, nil)
			defer bundle.Close()
			if err := bundle.Add(b, func() {}); err != nil {
				t.Fatal(err)
			}
			go func() {
				_, _ = a.Write(bytes)
				_ = a.Close()
			}()
			select {
			case <-bundle.Done():
				if err := bundle.Err(); err == nil || errors.Is(err, io.EOF) {
					t.Errorf("%v", err)
				}
			case <-time.After(5 * time.Second):
				t.Error("it goes on")
			}
		})
	}
}

// TestStrictKeyExchange: a peer without it is not talked to (CVE-2023-48795), and nobody sends without end before it is known.
func TestStrictKeyExchange(t *testing.T) {
	kexInit := func(list string) []byte {
		payload := append([]byte{msgKexInit}, make([]byte, kexCookie)...)
		payload = binary.BigEndian.AppendUint32(payload, uint32(len(list)))
		payload = append(payload, list...)
		payload = append(payload, make([]byte, 60)...)
		b := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)))
		return append(append(b, 0), payload...)
	}
	good := "curve25519-sha256," + strictClient
	for _, c := range []struct {
		name string
		in   string
		ok   bool
	}{
		{"strict", "SSH-2.0-x\r\n" + string(kexInit(good)), true},
		{"after a greeting", "hello\r\nSSH-2.0-x\r\n" + string(kexInit(good)), true},
		{"not strict", "SSH-2.0-x\r\n" + string(kexInit("curve25519-sha256")), false},
		{"the server's word", "SSH-2.0-x\r\n" + string(kexInit("curve25519-sha256,"+strictServer)), false},
		{"part of a name", "SSH-2.0-x\r\n" + string(kexInit("x"+strictClient)), false},
		{"another message first", "SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x02" + strings.Repeat("\x00", 20), false},
		{"huge message", "SSH-2.0-x\r\n\x7f\xff\xff\xff\x04\x14" + strings.Repeat("\x00", 20), false},
		{"list beyond the message", "SSH-2.0-x\r\n\x00\x00\x00\x20\x04\x14" + strings.Repeat("\x00", 16) + "\x00\x00\xff\xff" + strings.Repeat("a", 20), false},
		{"no version", strings.Repeat("a", maxVersion+2), false},
		{"lines without end", strings.Repeat("a\n", maxVersion), false},
	} {
		for _, step := range []int{1, 7, 1 << 20} {
			a, b := net.Pipe()
			go func() {
				for rest := c.in; len(rest) > 0; {
					n := min(step, len(rest))
					if _, err := io.WriteString(a, rest[:n]); err != nil {
						break
					}
					rest = rest[n:]
				}
				a.Close()
			}()
			sc := NewStrictConn(b, true)
			got, err := io.ReadAll(sc)
			b.Close()
			if (err == nil && sc.checked) != c.ok {
				t.Errorf("%s in steps of %d: checked %v, %v", c.name, step, sc.checked, err)
			}
			if c.ok && string(got) != c.in {
				t.Errorf("%s: bytes are lost", c.name)
			}
			if c.name == "not strict" && !errors.Is(err, ErrNotStrict) {
				t.Errorf("%v", err)
			}
		}
	}
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		_, _ = io.WriteString(a, "SSH-2.0-x\r\n"+string(kexInit(good)))
		for {
			if _, err := a.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	}()
	sc := NewStrictConn(b, true)
	if n, err := io.Copy(io.Discard, sc); !errors.Is(err, errUnproven) || n > maxUnproven {
		t.Errorf("%d bytes before authentication, %v", n, err)
	}
	b.Close()
}
