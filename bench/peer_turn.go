package bench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pion/turn/v5"
	"github.com/quic-go/quic-go"

	"sallyway/internal/lab"
	"sallyway/relay/udpio"
)

// The stand-in for TURN as it is commonly built: pion's server, and pion's client beside the private network with a stock
// QUIC listener on the relayed conn. The client dials the relayed address, and each of its TCP connections is a stream
// that begins with the port (2 bytes) of the private host. The ends are sub-commands of bench, so that each is a process on
// its host; TurnConfig.Dir passes the certificate and the relayed address from one to the other. With coturn's server in
// pion's place the ends are the same, and without any server the agent's socket is called by the client.

// TurnConfig is what an end of the stand-in is told.
type TurnConfig struct {
	Server netip.AddrPort // of TURN
	Client netip.Addr     // who may call the relayed address
	Target netip.Addr     // the private host
	Dir    string         // of relayed (an address), ca.crt, and node.crt with node.key
	Local  [2]uint16      // the client's ports on loopback: of iperf3 and of echo
}

// turnUser guards nothing: the stand-in lives in the lab.
const turnUser, turnRealm, turnSecret = "bench", "bench", "bench"

const (
	turnALPN  = "bench-turn"
	turnName  = "agent"
	turnBlock = 256 << 10 // bytes that are spliced at once
)

// startPion starts pion's server on the hub, and the two ends.
func startPion(ctx context.Context, l *lab.Lab) (way, error) {
	at := netip.AddrPortFrom(l.Addr(l.Relay2), turnHubPort)
	return turnWay(ctx, l, "pion", at, pionPorts, turnEnd{l.Relay2, "server"}, turnEnd{l.Gateway, "agent"}, turnEnd{l.Client, "client"})
}

// startQUICDirect starts the two ends without a server.
func startQUICDirect(ctx context.Context, l *lab.Lab) (way, error) {
	at := netip.AddrPortFrom(l.Addr(l.Gateway), turnHubPort)
	return turnWay(ctx, l, "direct", at, directPorts, turnEnd{l.Gateway, "listener"}, turnEnd{l.Client, "client"})
}

// turnEnd is a process of the stand-in: a sub-command of bench on a host.
type turnEnd struct {
	host *lab.Host
	name string
}

// turnWay starts the ends of a stand-in, one after the other is ready.
func turnWay(ctx context.Context, l *lab.Lab, kind string, server netip.AddrPort, local [2]uint16, ends ...turnEnd) (way, error) {
	w := way{addr: loopback, behind: lab.WebAddr, iperf: local[0], echo: local[1]}
	exe, err := os.Executable()
	if err != nil {
		return w, err
	}
	dir, err := peerDir(l.Gateway, "turn-"+kind)
	if err != nil {
		return w, err
	}
	ca, err := newAuthority()
	if err != nil {
		return w, err
	}
	cert, key, err := ca.issue(turnName, true)
	if err != nil {
		return w, err
	}
	if err := writeAll(dir, map[string]string{"ca.crt": ca.pem, "node.crt": cert, "node.key": key}); err != nil {
		return w, err
	}
	for _, end := range ends {
		p, err := end.host.Start(lab.Spec{Name: kind + "-" + end.name, Grace: 2 * time.Second, Args: []string{
			exe, "turn", end.name, "--server", server.String(), "--client", l.Addr(l.Client).String(), "--target", lab.WebAddr.String(), "--dir", dir,
			"--local", fmt.Sprintf("%d,%d", local[0], local[1]),
		}})
		if err != nil {
			return w, err
		}
		w.procs = append(w.procs, p)
		if err := p.WaitReady(ctx, 0, "^ready"); err != nil {
			return w, err
		}
	}
	return w, nil
}

// TurnServer is pion's server. It runs until ctx ends.
func TurnServer(ctx context.Context, cfg TurnConfig) error {
	conn, err := net.ListenPacket("udp4", cfg.Server.String())
	if err != nil {
		return err
	}
	// Large buffers, as an operator would give it. Each read and write stays one datagram.
	if _, _, err := udpio.New(conn.(*net.UDPConn), udpio.Config{NoOffload: true}); err != nil {
		return errors.Join(err, conn.Close())
	}
	host := cfg.Server.Addr()
	s, err := turn.NewServer(turn.ServerConfig{
		Realm: turnRealm,
		AuthHandler: func(a *turn.RequestAttributes) (string, []byte, bool) {
			return turnUser, turn.GenerateAuthKey(turnUser, turnRealm, turnSecret), a.Username == turnUser
		},
		PacketConnConfigs: []turn.PacketConnConfig{{
			PacketConn: conn,
			RelayAddressGenerator: &turn.RelayAddressGeneratorPortRange{
				RelayAddress: host.AsSlice(), Address: host.String(), MinPort: 50000, MaxPort: 65000, MaxRetries: 100,
			},
		}},
	})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	fmt.Println("ready", conn.LocalAddr())
	<-ctx.Done()
	return s.Close()
}

// allocate asks for a relayed conn. Closing the client ends it.
func allocate(cfg TurnConfig) (*turn.Client, net.PacketConn, error) {
	conn, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		return nil, nil, err
	}
	c, err := turn.NewClient(&turn.ClientConfig{
		STUNServerAddr: cfg.Server.String(), TURNServerAddr: cfg.Server.String(), Conn: conn,
		Username: turnUser, Password: turnSecret, Realm: turnRealm,
	})
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	if err := c.Listen(); err != nil {
		c.Close()
		return nil, nil, err
	}
	relayed, err := c.Allocate()
	if err != nil {
		c.Close()
	}
	return c, relayed, err
}

// TurnAgent takes streams on a relayed conn and connects each to the private host.
func TurnAgent(ctx context.Context, cfg TurnConfig) error {
	c, relayed, err := allocate(cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	// The lab's client has one of two addresses.
	for _, a := range []netip.Addr{cfg.Client, cfg.Client.Next()} {
		if err := c.CreatePermission(net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0))); err != nil {
			return err
		}
	}
	return serveStreams(ctx, cfg, relayed)
}

// TurnListener takes streams on a socket of its own and connects each to the private host: the agent without TURN.
func TurnListener(ctx context.Context, cfg TurnConfig) error {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(cfg.Server))
	if err != nil {
		return err
	}
	defer conn.Close()
	return serveStreams(ctx, cfg, conn)
}

// serveStreams is a QUIC listener on a conn, as quic-go makes it by itself.
func serveStreams(ctx context.Context, cfg TurnConfig, conn net.PacketConn) error {
	cert, err := tls.LoadX509KeyPair(filepath.Join(cfg.Dir, "node.crt"), filepath.Join(cfg.Dir, "node.key"))
	if err != nil {
		return err
	}
	tr := &quic.Transport{Conn: conn}
	defer tr.Close()
	ln, err := tr.Listen(&tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{turnALPN}, MinVersion: tls.VersionTLS13}, turnQUIC())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, "relayed"), []byte(conn.LocalAddr().String()), 0o600); err != nil {
		return err
	}
	fmt.Println("ready")
	// A client that is silent for so long may have lost the relay. The agent ends then, and whoever keeps it running gives it a new allocation.
	taking, silent := context.WithCancelCause(ctx)
	defer silent(nil)
	lost := func(err error) {
		var idle *quic.IdleTimeoutError
		if errors.As(err, &idle) {
			silent(err)
		}
	}
	for {
		session, err := ln.Accept(taking)
		if err != nil && ctx.Err() == nil && taking.Err() != nil {
			return context.Cause(taking)
		}
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		go func() {
			for {
				s, err := session.AcceptStream(ctx)
				if err != nil {
					lost(err)
					return
				}
				go serveStream(ctx, cfg.Target, s)
			}
		}()
	}
}

func serveStream(ctx context.Context, target netip.Addr, s *quic.Stream) {
	var port [2]byte
	if _, err := io.ReadFull(s, port[:]); err != nil {
		resetStream(s)
		return
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(target, binary.BigEndian.Uint16(port[:])).String())
	if err != nil {
		resetStream(s)
		return
	}
	splice(c.(*net.TCPConn), s)
}

// TurnClient listens on loopback and carries each connection to the agent.
func TurnClient(ctx context.Context, cfg TurnConfig) error {
	relayed, err := os.ReadFile(filepath.Join(cfg.Dir, "relayed"))
	if err != nil {
		return err
	}
	root, err := os.ReadFile(filepath.Join(cfg.Dir, "ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	session, err := quic.DialAddr(ctx, string(relayed), &tls.Config{RootCAs: roots, ServerName: turnName, NextProtos: []string{turnALPN}, MinVersion: tls.VersionTLS13}, turnQUIC())
	if err != nil {
		return err
	}
	var listeners []net.Listener
	for i, port := range [2]uint16{iperfPort, echoPort} {
		ln, err := net.Listen("tcp", netip.AddrPortFrom(loopback, cfg.Local[i]).String())
		if err != nil {
			return err
		}
		listeners = append(listeners, ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					s, err := session.OpenStreamSync(ctx)
					if err == nil {
						_, err = s.Write(binary.BigEndian.AppendUint16(nil, port))
					}
					if err != nil {
						c.Close()
						return
					}
					splice(c.(*net.TCPConn), s)
				}()
			}
		}()
	}
	fmt.Println("ready")
	select {
	case <-ctx.Done():
	case <-session.Context().Done():
		err = context.Cause(session.Context())
	}
	for _, ln := range listeners {
		ln.Close()
	}
	return errors.Join(err, session.CloseWithError(0, ""))
}

func turnQUIC() *quic.Config {
	return &quic.Config{
		KeepAlivePeriod: 5 * time.Second, MaxIncomingStreams: 4096,
		InitialStreamReceiveWindow: 4 << 20, MaxStreamReceiveWindow: 16 << 20,
		InitialConnectionReceiveWindow: 8 << 20, MaxConnectionReceiveWindow: 64 << 20,
	}
}

func resetStream(s *quic.Stream) {
	s.CancelRead(0)
	s.CancelWrite(0)
}

// splice carries both ways until both have ended, and passes half-closes on.
func splice(c *net.TCPConn, s *quic.Stream) {
	defer c.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{c}, s, make([]byte, turnBlock))
		if err == nil {
			err = c.CloseWrite()
		}
		if err != nil {
			resetStream(s)
			c.Close()
		}
	})
	wg.Go(func() {
		_, err := io.CopyBuffer(s, struct{ io.Reader }{c}, make([]byte, turnBlock))
		if err == nil {
			err = s.Close()
		}
		if err != nil {
			resetStream(s)
			c.Close()
		}
	})
	wg.Wait()
}

// ignoreEnd drops the error of something that ended because it was asked to.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
