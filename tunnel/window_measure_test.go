//go:build measure

package tunnel

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
)

// longWay is one end of a way on which every packet takes the same time and none is lost.
type longWay struct {
	net.PacketConn // for addresses and deadlines
	delay          time.Duration
	in             chan late
	over           chan struct{} // closed at the end
	peer           *longWay
	dropped        atomic.Int64
}

type late struct {
	due time.Time
	b   []byte
}

func (w *longWay) WriteTo(b []byte, _ net.Addr) (int, error) {
	select {
	case w.peer.in <- late{time.Now().Add(w.delay), append([]byte(nil), b...)}:
	default:
		w.dropped.Add(1)
	}
	return len(b), nil
}

func (w *longWay) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-w.in:
		time.Sleep(time.Until(p.due))
		return copy(b, p.b), w.peer.LocalAddr(), nil
	case <-w.over:
		return 0, nil, net.ErrClosed
	}
}

// blocked counts the frames by which a sender says that a window holds it up.
type blocked struct{ stream, conn atomic.Int64 }

func (c *blocked) SupportsSchemas(string) bool      { return true }
func (c *blocked) AddProducer() qlogwriter.Recorder { return c }
func (c *blocked) Close() error                     { return nil }
func (c *blocked) RecordEvent(e qlogwriter.Event) {
	sent, ok := e.(qlog.PacketSent)
	if !ok {
		return
	}
	for _, f := range sent.Frames {
		switch f.Frame.(type) {
		case *qlog.StreamDataBlockedFrame:
			c.stream.Add(1)
		case *qlog.DataBlockedFrame:
			c.conn.Add(1)
		}
	}
}

// TestWindows sends as fast as it can over 100 ms there and back, and tells what it reached and how often a window held it up:
//
//	go test -tags measure -run TestWindows -v ./tunnel
func TestWindows(t *testing.T) {
	const rtt, long = 100 * time.Millisecond, 5 * time.Second
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	var ends [2]*longWay
	for i := range ends {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ends[i] = &longWay{PacketConn: c, delay: rtt / 2, in: make(chan late, 100_000), over: over}
	}
	ends[0].peer, ends[1].peer = ends[1], ends[0]
	server, client := &quic.Transport{Conn: ends[0]}, &quic.Transport{Conn: ends[1]}
	cfg := quicConfig(5*time.Second, 30*time.Second)
	cfg.MaxIncomingStreams = 10
	ln, err := server.Listen(&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"x"}}, cfg)
	if err != nil {
		t.Fatal(err)
	}
	var got atomic.Int64
	go func() {
		c, err := ln.Accept(context.Background())
		if err != nil {
			return
		}
		str, err := c.AcceptStream(context.Background())
		if err != nil {
			return
		}
		b := make([]byte, largeBuffer)
		for err == nil {
			var n int
			n, err = str.Read(b)
			got.Add(int64(n))
		}
	}()
	var held blocked
	sending := quicConfig(5*time.Second, 30*time.Second)
	sending.Tracer = func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace { return &held }
	c, err := client.Dial(t.Context(), ends[0].LocalAddr(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"x"}}, sending)
	if err != nil {
		t.Fatal(err)
	}
	str, err := c.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(str, zeros{}) }()
	last := int64(0)
	for s := range int(long / time.Second) {
		time.Sleep(time.Second)
		n := got.Load()
		t.Logf("second %d: %d Mbit/s; held up by a stream's window %d times, by the connection's %d; %d packets found no room",
			s+1, (n-last)*8/1e6, held.stream.Load(), held.conn.Load(), ends[1].dropped.Load())
		last = n
	}
	_ = c.CloseWithError(0, "")
	close(over)
	_ = client.Close()
	_ = server.Close()
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }
