//go:build linux

package backing

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Balancer spreads TCP connections over servers, one after the other; one that refuses is passed over.
type Balancer struct {
	l net.Listener

	mu      sync.Mutex
	servers []string // guarded by mu
	next    int      // guarded by mu
	conns   map[net.Conn]bool
}

// StartBalancer listens on a port of loopback until the test ends.
func StartBalancer(t testing.TB) *Balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &Balancer{l: l, conns: make(map[net.Conn]bool)}
	var all sync.WaitGroup
	all.Add(1)
	go func() {
		defer all.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Add(1)
			go func() {
				defer all.Done()
				b.carry(c)
			}()
		}
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		b.mu.Lock()
		for c := range b.conns {
			_ = c.Close()
		}
		b.conns = nil
		b.mu.Unlock()
		all.Wait()
	})
	return b
}

// Addr is where clients connect.
func (b *Balancer) Addr() string { return b.l.Addr().String() }

// Use spreads new connections over servers from now on.
func (b *Balancer) Use(servers ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.servers = servers
}

func (b *Balancer) keep(c net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conns == nil {
		return false
	}
	b.conns[c] = true
	return true
}

func (b *Balancer) forget(c net.Conn) {
	_ = c.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, c)
}

func (b *Balancer) dial() (net.Conn, error) {
	b.mu.Lock()
	servers, first := b.servers, b.next
	b.next++
	b.mu.Unlock()
	err := errors.New("no server")
	for i := range servers {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", servers[(first+i)%len(servers)], 2*time.Second); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// carry copies both ways until either end closes.
func (b *Balancer) carry(c net.Conn) {
	defer b.forget(c)
	if !b.keep(c) {
		return
	}
	s, err := b.dial()
	if err != nil {
		return
	}
	defer b.forget(s)
	if !b.keep(s) {
		return
	}
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{c, s}, {s, c}} {
		go func() {
			_, _ = io.Copy(way[0], way[1]) // either end closing is how it ends
			done <- struct{}{}
		}()
	}
	<-done
	_ = c.Close()
	_ = s.Close()
	<-done
}
