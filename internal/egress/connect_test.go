package egress

import (
	"bytes"
	"io"
	"testing"
)

// FuzzAnswer: whatever a proxy answers, reading ends, within its bounds, and leaves what is behind the head.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\n\r\nSSH-2.0-x", "HTTP/1.0 200 Connection established\nA: b\n\nrest", "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\n\r\n", "HTTP/1.1 200 OK\r\n folded\r\n\r\n", "HTTP/1.1 999 \xff\x00\r\n:\r\n\r\n", "HTTP/1.1 200 OK\r\n\n", "HTTP/", "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		a, err := readAnswer(r)
		used := len(b) - r.Len()
		if used > maxInterim*maxHead {
			t.Fatalf("%d bytes read", used)
		}
		if err != nil {
			return
		}
		head := b[:used]
		if !bytes.HasSuffix(head, []byte("\n\r\n")) && !bytes.HasSuffix(head, []byte("\n\n")) {
			t.Fatalf("%q is no whole head", head)
		}
		if a.status < 100 || a.status > 999 || a.status/100 == 1 || len(a.reason) > maxReason {
			t.Fatalf("%+v", a)
		}
		// A reader that gives a byte at a time, as a slow line does, changes nothing.
		slow := &counted{Reader: bytes.NewReader(b)}
		again, err := readAnswer(slow)
		if err != nil || again.status != a.status || slow.n != used {
			t.Fatalf("%+v after %d bytes, %v", again, slow.n, err)
		}
		a.schemes()
	})
}

// counted gives a byte at a time.
type counted struct {
	io.Reader
	n int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b[:min(len(b), 1)])
	c.n += n
	return n, err
}
