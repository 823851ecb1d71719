package leg

import (
	"net"
	"os"
	"sync"
	"time"
)

// pipeDepth bounds the DTLS records that wait to be read; what comes when it is full is dropped, as a network would.
const pipeDepth = 64

// pipe is the net.PacketConn that DTLS runs on: what the leg's reader finds to be DTLS goes in by push, what DTLS writes goes to send.
type pipe struct {
	local, remote net.Addr
	send          func([]byte) error

	mu       sync.Mutex // guards what follows
	queue    [][]byte
	wake     chan struct{} // closed and replaced when a reader should look again
	deadline time.Time
	timer    *time.Timer
	closed   bool
}

var _ net.PacketConn = (*pipe)(nil)

func newPipe(local, remote net.Addr, send func([]byte) error) *pipe {
	return &pipe{local: local, remote: remote, send: send, wake: make(chan struct{})}
}

// push copies b into the queue.
func (p *pipe) push(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.queue) >= pipeDepth {
		return
	}
	p.queue = append(p.queue, append([]byte(nil), b...))
	p.wakeLocked()
}

func (p *pipe) wakeLocked() {
	close(p.wake)
	p.wake = make(chan struct{})
}

// ReadFrom implements net.PacketConn.
func (p *pipe) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		p.mu.Lock()
		wake := p.wake
		switch {
		case p.closed:
			p.mu.Unlock()
			return 0, nil, net.ErrClosed
		case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
			p.mu.Unlock()
			return 0, nil, os.ErrDeadlineExceeded
		case len(p.queue) > 0:
			n := copy(b, p.queue[0])
			p.queue = p.queue[1:]
			p.mu.Unlock()
			return n, p.remote, nil
		}
		p.mu.Unlock()
		<-wake
	}
}

// WriteTo implements net.PacketConn; there is only one place to write to.
func (p *pipe) WriteTo(b []byte, _ net.Addr) (int, error) {
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	return len(b), p.send(b)
}

// Close implements net.PacketConn.
func (p *pipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	p.queue = nil
	if p.timer != nil {
		p.timer.Stop()
	}
	p.wakeLocked()
	return nil
}

// SetReadDeadline implements net.PacketConn.
func (p *pipe) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	if p.closed {
		return net.ErrClosed
	}
	if d := time.Until(t); !t.IsZero() && d > 0 {
		p.timer = time.AfterFunc(d, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.wakeLocked()
		})
	}
	p.wakeLocked()
	return nil
}

// SetDeadline implements net.PacketConn; writes never block.
func (p *pipe) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetWriteDeadline implements net.PacketConn; writes never block.
func (p *pipe) SetWriteDeadline(time.Time) error { return nil }

// LocalAddr implements net.PacketConn.
func (p *pipe) LocalAddr() net.Addr { return p.local }
