package udpio

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyway/internal/datagram"
)

// Kernels refuse a segmented write for reasons of their own. What they refuse is sent one datagram at a time, whole and in order, and only a
// device that can not segment (EIO) ends the attempts.
func TestSenderFallsBack(t *testing.T) {
	for _, tc := range []struct {
		name    string
		errno   error
		refuse  int // how many segmented writes
		keepGSO bool
	}{
		{"a route without checksum offload, before Linux 6.11", unix.EIO, 1, false},
		{"more segments than it takes, or larger than the route's MTU", unix.EINVAL, 1, true},
		{"larger than the path's MTU", unix.EMSGSIZE, 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, in := senderPair(t, Config{})
			if !out.GSO() {
				t.Skip("this kernel has no UDP_SEGMENT")
			}
			s := out.NewSender()
			refused := 0
			s.do = func(fd uintptr) bool {
				// The first message for the kernel is the segment size, if there is one.
				if len(s.oob) > 0 && s.oob[12] == unix.UDP_SEGMENT && refused < tc.refuse {
					refused++
					s.err = tc.errno
					return true
				}
				return s.try(fd)
			}
			var sent []byte
			for i := range 3 {
				b := make([]byte, 20*1000+i)
				for j := range b {
					b[j] = byte(j*7 + i)
				}
				if err := s.Send(b, 1000, datagram.ECT0); err != nil {
					t.Fatal(err)
				}
				sent = append(sent, b...)
			}
			if refused != tc.refuse || out.GSO() != tc.keepGSO {
				t.Errorf("%d writes refused, GSO %v after", refused, out.GSO())
			}
			_ = in.UDPConn().SetReadDeadline(time.Now().Add(5 * time.Second))
			got, _, _, _ := readAll(t, in, len(sent))
			if string(got) != string(sent) {
				t.Error("what arrived is not what was sent")
			}
		})
	}
}
