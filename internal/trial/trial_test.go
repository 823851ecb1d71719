package trial

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func TestIsHost(t *testing.T) {
	for name, want := range map[string]bool{
		Host: true, "BENCH.Sallyway.invalid": true, Host + ".": true,
		"": false, "invalid": false, "x." + Host: false, Host + "..": false, "bench.sallyway.internal": false,
	} {
		if IsHost(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}

func TestLines(t *testing.T) {
	var b bytes.Buffer
	l := NewLines(&b, &b)
	want := Request{Op: OpConnect, Host: "10.0.3.7", Port: 5432}
	if err := l.Write(want); err != nil {
		t.Fatal(err)
	}
	var got Request
	if err := l.Read(&got); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if err := l.Read(&got); !errors.Is(err, io.EOF) {
		t.Errorf("%v at the end", err)
	}
	for _, bad := range []string{"{\n", "[]\n", `{"op":3}` + "\n", `{"port":70000}` + "\n", strings.Repeat("x", 2*maxLine) + "\n"} {
		if err := NewLines(strings.NewReader(bad), io.Discard).Read(&got); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

// FuzzLines: whatever a peer sends as a request is read or refused.
func FuzzLines(f *testing.F) {
	f.Add([]byte(`{"op":"stats"}` + "\n"))
	f.Add([]byte(`{"op":"connect","host":"db","port":5432}` + "\n{}\n"))
	f.Add([]byte("\x00\n[[[[\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := NewLines(bytes.NewReader(b), io.Discard)
		for range bytes.Count(b, []byte("\n")) + 2 {
			var r Request
			if err := l.Read(&r); errors.Is(err, io.EOF) {
				return
			} else if err == nil {
				if err := l.Write(r); err != nil {
					t.Fatalf("%+v was read and can not be written: %v", r, err)
				}
			}
		}
	})
}

func TestLoad(t *testing.T) {
	busy, total := parseStat("cpu  10 0 20 60 10 0 0 0 5 0\ncpu0 1 2 3\n")
	if busy != 30 || total != 100 {
		t.Errorf("%d of %d", busy, total)
	}
	for _, bad := range []string{"", "cpu\n", "cpu 1 2 3 4 5 6 7 x\n", "intr 1 2 3 4 5 6 7 8 9\n"} {
		if busy, total := parseStat(bad); busy != 0 || total != 0 {
			t.Errorf("%q: %d of %d", bad, busy, total)
		}
	}
	before := CPU{Process: time.Second, Cores: 4, HostBusy: 100, HostTotal: 1000}
	l := CPU{Process: 4 * time.Second, Cores: 4, HostBusy: 175, HostTotal: 1100}.Since(before, 2*time.Second)
	if l.Process != 1.5 || l.Host != 0.75 || l.Cores != 4 {
		t.Errorf("%+v", l)
	}
	if l := before.Since(before, 0); l.Process != 0 || l.Host != -1 {
		t.Errorf("nothing passed: %+v", l)
	}
	if c := ReadCPU(); c.Cores < 1 {
		t.Errorf("%+v", c)
	}
}
