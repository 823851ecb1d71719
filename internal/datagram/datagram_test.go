package datagram

import (
	"bytes"
	"slices"
	"testing"
)

// all cuts a batch to its end and holds Count against what comes.
func all(t *testing.T, b *Batch) []string {
	t.Helper()
	var out []string
	for {
		left := b.Count()
		p, ok := b.Next()
		if ok != (left > 0) {
			t.Errorf("Count says %d, Next says %v", left, ok)
		}
		if !ok {
			return out
		}
		if cap(p) != len(p) {
			t.Errorf("payload %q can be appended to over the next datagram", p)
		}
		out = append(out, string(p))
	}
}

func TestBatchNext(t *testing.T) {
	for _, c := range []struct {
		name         string
		data         string
		stride, skip int
		want         []string
	}{
		{"nothing", "", 4, 0, nil},
		{"zero", "", 0, 0, nil},
		{"one", "abcd", 4, 0, []string{"abcd"}},
		{"one shorter than the stride", "ab", 4, 0, []string{"ab"}},
		{"three", "abcdefghijkl", 4, 0, []string{"abcd", "efgh", "ijkl"}},
		{"last is shorter", "abcdefg", 4, 0, []string{"abcd", "efg"}},
		{"skip", "..ab..cd", 4, 2, []string{"ab", "cd"}},
		{"skip, last is shorter", "..abc..d", 5, 2, []string{"abc", "d"}},
		{"skip, last is only a header", "..ab..", 4, 2, []string{"ab"}},
		{"skip, last is half a header", "..ab.", 4, 2, []string{"ab"}},
		{"only a header", "..", 4, 2, nil},
		{"stride of only a header", "....", 2, 2, nil},
		{"stride below the header", "....", 1, 2, nil},
		{"no stride", "abcd", 0, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := NewBatch([]byte(c.data), c.stride, c.skip, CE, nil)
			if b.ECN != CE {
				t.Errorf("ECN %d", b.ECN)
			}
			if got := b.Count(); got != len(c.want) {
				t.Errorf("Count = %d, want %d", got, len(c.want))
			}
			if got := all(t, &b); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if _, ok := b.Next(); ok {
				t.Error("Next after the end")
			}
		})
	}
}

// Whatever a leg makes of what it read: the payloads are what was in, in order, and Count tells how many come.
func FuzzBatch(f *testing.F) {
	f.Add([]byte("..ab..cd..e"), 4, 2)
	f.Add([]byte{}, 0, 0)
	f.Add([]byte("abc"), 1, 0)
	f.Add([]byte("abc"), -1, -5)
	f.Fuzz(func(t *testing.T, data []byte, stride, skip int) {
		if skip < 0 || stride < 0 || stride > MaxBatch || skip > MaxBatch {
			return
		}
		b := NewBatch(data, stride, skip, NotECT, nil)
		var want []byte
		for rest := data; stride > skip && len(rest) > skip; rest = rest[min(stride, len(rest)):] {
			want = append(want, rest[skip:min(stride, len(rest))]...)
		}
		if got := bytes.Join(bytesOf(all(t, &b)), nil); !bytes.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	})
}

func bytesOf(s []string) [][]byte {
	out := make([][]byte, len(s))
	for i := range s {
		out[i] = []byte(s[i])
	}
	return out
}

func TestReleaseCounts(t *testing.T) {
	buf := NewBuffer()
	if len(buf.B) != MaxBatch {
		t.Errorf("a buffer has %d bytes", len(buf.B))
	}
	refs := func() int32 { return buf.refs.Load() }
	buf.Retain()
	a, b := NewBatch(buf.B[:8], 4, 0, NotECT, buf), NewBatch(buf.B[8:12], 4, 0, NotECT, buf)
	if refs() != 2 {
		t.Fatalf("%d references, want the two that the batches took over", refs())
	}
	a.Release()
	if refs() != 1 || a.Data != nil || a.Count() != 0 {
		t.Errorf("%d references, batch %+v", refs(), a)
	}
	a.Release() // empty by now
	if refs() != 1 {
		t.Errorf("an empty batch released a reference: %d", refs())
	}
	var zero Batch
	zero.Release()
	buf.Retain()
	b.Release()
	if refs() != 1 {
		t.Fatalf("%d references", refs())
	}
	// Releasing more often than retaining is a bug of the caller, and would hand one buffer to two readers.
	buf.refs.Store(0) // without the pool, so that no other test gets the buffer
	defer func() {
		if recover() == nil {
			t.Error("a buffer is released twice in silence")
		}
	}()
	buf.Release()
}

func TestBatchDoesNotAllocate(t *testing.T) {
	var sum int
	if n := testing.AllocsPerRun(1000, func() {
		buf := NewBuffer()
		b := NewBatch(buf.B[:6000], 1404, 4, ECT0, buf)
		for range b.Count() {
			p, _ := b.Next()
			sum += len(p)
		}
		b.Release()
	}); n >= 1 { // a collection may empty the pool now and then
		t.Errorf("%v allocations a batch", n)
	}
	if sum == 0 {
		t.Error("nothing was cut")
	}
}
