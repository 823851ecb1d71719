package platform

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/registry"
)

// TestTokenRaceBelowTheLimiter spends one token a hundred times at once, each time with another key and from another source, past the
// limit of failures by source, which would keep most of the tries from the race.
func TestTokenRaceBelowTheLimiter(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop")
	const tries = 100
	requests := make([]control.EnrolRequest, tries)
	for i := range requests {
		key, err := identity.NewKey()
		must(t, err)
		m := &node{l: l, id: n.id, name: n.name, token: n.token, key: key}
		requests[i] = m.request()
	}
	var good, used atomic.Int32
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for i := range requests {
		wg.Go(func() {
			<-begin
			switch _, err := l.srv.Registry().Enrol(context.Background(), fmt.Sprintf("192.0.2.%d", i), requests[i]); {
			case err == nil:
				good.Add(1)
			case registry.Code(err) == control.CodeTokenUsed:
				used.Add(1)
			default:
				t.Errorf("try %d: %v", i, err)
			}
		})
	}
	close(begin)
	wg.Wait()
	if good.Load() != 1 || used.Load() != tries-1 {
		t.Errorf("%d enrolled, %d refused as used", good.Load(), used.Load())
	}
	ok := 0
	for _, e := range l.auditDirect("default") {
		if e.Action == "node.enrol" && e.Result == "ok" {
			ok++
		}
	}
	if ok != 1 {
		t.Errorf("%d enrolments in the audit", ok)
	}
}

// dialTLS opens a TLS connection to the platform as a stranger would.
func (l *lab) dialTLS(cfg *tls.Config) (*tls.Conn, error) {
	cfg.InsecureSkipVerify = true // who answers does not matter here
	return tls.Dial("tcp", l.srv.https.Addr().String(), cfg)
}

// TestServerLimits holds the HTTPS server against slow, old and greedy clients.
func TestServerLimits(t *testing.T) {
	t.Parallel()
	const patience = time.Second
	l := start(t, func(c *Config) { c.headerTimeout = patience })
	t.Run("slow clients are cut", func(t *testing.T) {
		overTLS := func() net.Conn {
			c, err := l.dialTLS(&tls.Config{})
			must(t, err)
			return c
		}
		bare, err := net.Dial("tcp", l.srv.https.Addr().String())
		must(t, err)
		began := time.Now()
		var wg sync.WaitGroup
		for name, c := range map[string]net.Conn{"no handshake": bare, "no request": overTLS(), "a header byte by byte": overTLS()} {
			wg.Go(func() {
				defer c.Close()
				end := make(chan struct{})
				if name == "a header byte by byte" { // so that only a deadline for all of it helps
					go func() {
						for _, b := range []byte("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + strings.Repeat("a", 1000)) {
							select {
							case <-end:
								return
							case <-time.After(200 * time.Millisecond):
							}
							if _, err := c.Write([]byte{b}); err != nil {
								return
							}
						}
					}()
				}
				if err := c.SetReadDeadline(began.Add(patience + 15*time.Second)); err != nil {
					t.Error(err)
				}
				if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s: the connection is open after %v (%q)", name, time.Since(began), b)
				}
				close(end)
			})
		}
		wg.Wait()
	})
	t.Run("large headers", func(t *testing.T) {
		c, err := l.dialTLS(&tls.Config{})
		must(t, err)
		defer c.Close()
		_, err = c.Write([]byte("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Large: " + strings.Repeat("a", 2*maxHeader)))
		must(t, err)
		b := make([]byte, 12)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "HTTP/1.1 431" {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("HTTP/2 streams", func(t *testing.T) {
		c, err := l.dialTLS(&tls.Config{NextProtos: []string{"h2"}})
		must(t, err)
		defer c.Close()
		must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, err = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // RFC 9113 §3.4: preface, empty SETTINGS
		must(t, err)
		head := make([]byte, 9)
		_, err = io.ReadFull(c, head)
		must(t, err)
		body := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		_, err = io.ReadFull(c, body)
		must(t, err)
		const settings, maxConcurrent = 4, 3
		streams := uint32(1 << 31)
		for ; head[3] == settings && len(body) >= 6; body = body[6:] {
			if binary.BigEndian.Uint16(body) == maxConcurrent {
				streams = binary.BigEndian.Uint32(body[2:])
			}
		}
		if streams > maxStreams {
			t.Errorf("%d streams at once", streams)
		}
	})
	t.Run("TLS 1.1", func(t *testing.T) {
		if c, err := l.dialTLS(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}); err == nil {
			c.Close()
			t.Error("accepted")
		}
	})
	t.Run("no tickets", func(t *testing.T) {
		for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			cache := tls.NewLRUClientSessionCache(4)
			for range 2 {
				c, err := l.dialTLS(&tls.Config{ClientSessionCache: cache, MinVersion: v, MaxVersion: v, ServerName: "localhost"})
				must(t, err)
				_, err = c.Write([]byte("GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
				must(t, err)
				_, err = io.ReadAll(c)
				must(t, err)
				if c.ConnectionState().DidResume {
					t.Errorf("version %#x resumes", v)
				}
				c.Close()
			}
		}
	})
}
