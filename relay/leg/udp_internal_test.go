package leg

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyway/internal/datagram"
	"sallyway/relay/udpio"
)

// told is an upcalls that writes down what it is told.
type told struct {
	suspected chan error
	dropped   int
	passed    int

	mu                   sync.Mutex // guards what follows
	sentData, unsentData uint64
	sentBytes            uint64
	err                  error
}

func (u *told) sent(datagrams, bytes uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sentData += datagrams
	u.sentBytes += bytes
}

func (u *told) unsent(datagrams uint64, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.unsentData += datagrams
	u.err = err
}

// sending returns the datagrams that were sent and that were not, the bytes of the former, and why the last one was not.
func (u *told) sending() (sent, unsent, bytes uint64, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.sentData, u.unsentData, u.sentBytes, u.err
}

func (u *told) message([]byte) {}
func (u *told) data(_ uint16, b datagram.Batch) {
	u.passed++
	b.Release()
}
func (u *told) malformed() { u.dropped++ }
func (u *told) suspect(err error) {
	select {
	case u.suspected <- err:
	default:
	}
}
func (u *told) broken(error) {}

// An ICMP refusal of an earlier datagram surfaces at the next send, which the kernel then leaves undone. It is reported, and what was to be
// sent is sent.
func TestRefusalLosesNothing(t *testing.T) {
	closed, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	addr := closed.LocalAddr().(*net.UDPAddr)
	closed.Close()
	nc, err := net.DialUDP("udp4", nil, addr)
	if err != nil {
		t.Fatal(err)
	}
	conn, _, err := udpio.New(nc, udpio.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	up := &told{suspected: make(chan error, 1)}
	u := &udpCarrier{conn: conn, tx: conn.NewSender(), up: up, plain: true, refusal: make(chan error, 1)}
	u.out = newGatherer(u.transmit, up)
	u.send(minChannel, []byte("refused"), 7, 0) // a lone datagram is sent by its caller
	if sent, _, _, err := up.sending(); sent != 1 {
		t.Fatal(err)
	}
	// On loopback the refusal is pending when send returns. Now somebody listens.
	open, err := net.ListenUDP("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	u.send(minChannel, []byte("after"), 5, 0)
	if sent, unsent, bytes, err := up.sending(); sent != 2 || unsent != 0 || bytes != 12 {
		t.Errorf("sent %d, %d bytes, unsent %d, %v", sent, bytes, unsent, err)
	}
	select {
	case err := <-up.suspected:
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("suspected for %v", err)
		}
	default:
		t.Error("the refusal was not reported")
	}
	b := make([]byte, 100)
	_ = open.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := open.Read(b); err != nil || string(b[4:n]) != "after" {
		t.Errorf("arrived %q, %v", b[:n], err)
	}
}

// ChannelData in the clear passes only on a leg whose credential asked for it, and STUN in the clear is believed nothing: the Unknown
// indication is a reason to ask.
func TestClearData(t *testing.T) {
	owner := datagram.NewBuffer()
	defer owner.Release()
	in := append(owner.B[:0], cd(minChannel, "abcd", 0)...)
	for _, plain := range []bool{false, true} {
		up := &told{suspected: make(chan error, 1)}
		u := &udpCarrier{plain: plain, up: up}
		walk(in, len(in), 0, owner, u)
		if (up.passed == 1) != plain || (up.dropped == 0) != plain {
			t.Errorf("plain %v: %d passed, %d dropped", plain, up.passed, up.dropped)
		}
		walk([]byte{0x0F, 0x12, 0, 0, 0x21, 0x12, 0xA4, 0x42, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 20, 0, owner, u)
		if len(up.suspected) != 0 {
			t.Error("another message was taken for Unknown")
		}
		unknown := []byte{byte(unknownType >> 8), byte(unknownType), 0, 0, 0x21, 0x12, 0xA4, 0x42, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
		walk(unknown, 20, 0, owner, u)
		if len(up.suspected) != 1 {
			t.Error("Unknown was ignored")
		}
	}
}
