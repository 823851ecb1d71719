// Package syslog sends the audit chains of a platform to a syslog receiver: messages of RFC 5424 over TLS (RFC 5425), TCP with octet counting
// (RFC 6587) or UDP (RFC 5426). Every entry is sent at least once and in its chain's order, from the chain's beginning on; how far each got is kept in
// the store, so that a restart or another replica goes on there.
//
//	target, err := syslog.Parse("tls://logs.example:6514")
//	s := syslog.New(syslog.Config{Target: target, Registry: reg})
//	err = s.Run(ctx)
//
// Syslog knows no answer. Over TCP and TLS an entry counts as sent when the receiver's host has acknowledged its bytes; what the receiver lost after
// that, and any datagram, is lost.
package syslog

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Target is where messages go.
type Target struct {
	Network string // tls, tcp or udp
	Address string // host:port
	CAFile  string // authorities (PEM) of the receiver; "" is the system's
	text    string
}

// String is the target as it was given.
func (t Target) String() string { return t.text }

// defaultPort is that of RFC 5425 for TLS and of RFC 5426 for UDP; TCP has none of its own.
var defaultPort = map[string]string{"tls": "6514", "tcp": "601", "udp": "514"}

// Parse reads a target: tls://HOST[:PORT][?ca=FILE], tcp://HOST[:PORT], udp://HOST[:PORT].
func Parse(s string) (Target, error) {
	u, err := url.Parse(s)
	if err != nil || defaultPort[u.Scheme] == "" || u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" {
		return Target{}, fmt.Errorf("%.100q is no syslog receiver: use tls://HOST:6514, tcp://HOST:601 or udp://HOST:514", s)
	}
	t := Target{Network: u.Scheme, text: s}
	for k, v := range u.Query() {
		if k != "ca" || u.Scheme != "tls" || len(v) != 1 || v[0] == "" {
			return Target{}, fmt.Errorf("syslog receiver: %.40q is not understood; tls:// takes ?ca=FILE", k)
		}
		t.CAFile = v[0]
	}
	port := u.Port()
	if port == "" {
		port = defaultPort[u.Scheme]
	}
	t.Address = net.JoinHostPort(u.Hostname(), port)
	return t, nil
}

// Pacing.
const (
	lookEvery = time.Second
	atOnce    = 200 // entries
	firstWait = time.Second
	mostWait  = time.Minute
)

// Config is what a Sink needs.
type Config struct {
	Target   Target
	Registry *registry.Registry
	Log      *slog.Logger
	Metrics  prometheus.Registerer
	// Leads says whether this replica sends; nil is yes.
	Leads func() bool
}

// Sink sends to one receiver.
type Sink struct {
	cfg  Config
	host string
	tls  *tls.Config
	name string // under which the store knows it

	conn net.Conn // nil is none; only Run's

	mu    sync.Mutex
	state store.SinkState // guarded by mu
	saved bool            // whether the store has it; only Run's

	sent    prometheus.Counter
	failing prometheus.Gauge
}

// New makes a sink. Run sends.
func New(cfg Config) (*Sink, error) {
	if cfg.Leads == nil {
		cfg.Leads = func() bool { return true }
	}
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	labels := prometheus.Labels{"target": cfg.Target.String()}
	s := &Sink{
		cfg: cfg, host: host, name: "syslog " + cfg.Target.Network + "://" + cfg.Target.Address,
		sent:    prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyway_platform_audit_syslog_total", Help: "Audit entries that were sent to syslog.", ConstLabels: labels}),
		failing: prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyway_platform_audit_syslog_failing", Help: "1 while the syslog receiver takes nothing.", ConstLabels: labels}),
	}
	if cfg.Target.Network == "tls" {
		h, _, err := net.SplitHostPort(cfg.Target.Address)
		if err != nil {
			return nil, err
		}
		s.tls = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: h}
		if cfg.Target.CAFile != "" {
			pem, err := os.ReadFile(cfg.Target.CAFile)
			if err != nil {
				return nil, fmt.Errorf("authorities of the syslog receiver: %w", err)
			}
			s.tls.RootCAs = x509.NewCertPool()
			if !s.tls.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("authorities of the syslog receiver: no certificate in %s", cfg.Target.CAFile)
			}
		}
	}
	cfg.Metrics.MustRegister(s.sent, s.failing)
	return s, nil
}

// State is how it goes.
type State struct {
	Target string `json:"target"`
	store.SinkState
	Backlog int64 `json:"backlog"` // entries of all chains that are not sent
}

// State says how it goes, whichever replica sends.
func (s *Sink) State(ctx context.Context) (State, error) {
	out := State{Target: s.cfg.Target.String()}
	err := s.cfg.Registry.Store.View(ctx, func(tx store.Tx) error {
		st, err := tx.Sink(ctx, s.name)
		if err != nil {
			return err
		}
		out.SinkState, out.Backlog = *st, 0
		behind, err := tx.Behind(ctx, s.name)
		for _, c := range behind {
			out.Backlog += c.Seq - c.Done
		}
		return err
	})
	return out, err
}

// Run sends until ctx ends.
func (s *Sink) Run(ctx context.Context) error {
	defer s.hangUp()
	tries := 0
	for wait := time.Duration(0); ; {
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		wait = lookEvery
		if !s.cfg.Leads() {
			s.hangUp()
			continue
		}
		err := s.send(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.note(ctx, err)
		if err == nil {
			tries = 0
			continue
		}
		s.hangUp()
		wait = min(mostWait, firstWait<<min(tries, 10))
		wait += time.Duration((rand.Float64() - 0.5) / 2 * float64(wait))
		tries++
	}
}

// note keeps the state, and writes it down when it changed.
func (s *Sink) note(ctx context.Context, err error) {
	now := s.cfg.Registry.Now().UTC().Truncate(time.Microsecond)
	s.mu.Lock()
	before := s.state
	if err == nil {
		s.state.Failed, s.state.Problem = time.Time{}, ""
	} else {
		if s.state.Failed.IsZero() {
			s.state.Failed = now
		}
		s.state.Problem = err.Error()
	}
	state := s.state
	s.mu.Unlock()
	if err != nil {
		s.failing.Set(1)
		if before.Failed.IsZero() {
			s.cfg.Log.Error("the audit log is not sent to syslog, it is tried again", "target", s.cfg.Target.String(), "error", err)
		}
	} else {
		s.failing.Set(0)
		if !before.Failed.IsZero() {
			s.cfg.Log.Info("the audit log is sent to syslog again", "target", s.cfg.Target.String())
		}
	}
	if state == before && s.saved {
		return
	}
	if err := s.cfg.Registry.Store.Update(ctx, func(tx store.Tx) error {
		old, err := tx.Sink(ctx, s.name)
		if err != nil {
			return err
		}
		if state.Success.Before(old.Success) {
			state.Success = old.Success // of another replica, or of the process before
		}
		return tx.PutSink(ctx, s.name, &state)
	}); err == nil {
		s.saved = true
	}
}

// send sends what every chain has that the receiver has not got.
func (s *Sink) send(ctx context.Context) error {
	for {
		var behind []store.ChainHead
		if err := s.cfg.Registry.Store.View(ctx, func(tx store.Tx) (err error) {
			behind, err = tx.Behind(ctx, s.name)
			return err
		}); err != nil {
			return err
		}
		if len(behind) == 0 {
			return nil
		}
		for _, c := range behind { // each in turn, so that a long chain does not keep the others waiting
			if err := s.sendChain(ctx, c); err != nil || ctx.Err() != nil || !s.cfg.Leads() {
				return err
			}
		}
	}
}

func (s *Sink) sendChain(ctx context.Context, c store.ChainHead) error {
	var es []*store.AuditEntry
	if err := s.cfg.Registry.Store.View(ctx, func(tx store.Tx) (err error) {
		es, err = tx.Audit(ctx, c.Org, c.Done, atOnce)
		return err
	}); err != nil {
		return err
	}
	if len(es) == 0 {
		return fmt.Errorf("the audit chain of %s ends before its head: see `sallyway audit verify`", c.Org)
	}
	if err := s.write(ctx, c.Org, es); err != nil {
		return err
	}
	if err := s.cfg.Registry.Store.Update(ctx, func(tx store.Tx) error { return tx.PutCursor(ctx, s.name, c.Org, es[len(es)-1].Seq) }); err != nil {
		return err
	}
	s.sent.Add(float64(len(es)))
	s.mu.Lock()
	s.state.Success = s.cfg.Registry.Now().UTC().Truncate(time.Second)
	s.mu.Unlock()
	return nil
}

// write sends entries, and over a stream returns when the receiver's host has them all.
func (s *Sink) write(ctx context.Context, org string, es []*store.AuditEntry) error {
	if s.conn == nil {
		if err := s.connect(ctx); err != nil {
			return err
		}
	} else if gone(s.conn) {
		s.hangUp()
		if err := s.connect(ctx); err != nil {
			return err
		}
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	var b []byte
	for _, e := range es {
		m := Message(s.host, org, e)
		if s.cfg.Target.Network == "udp" {
			if _, err := s.conn.Write(m); err != nil {
				return err
			}
			continue
		}
		b = frame(b, m)
	}
	if s.cfg.Target.Network == "udp" {
		return nil
	}
	if _, err := s.conn.Write(b); err != nil {
		return err
	}
	return acknowledged(ctx, s.conn, writeTimeout)
}

func (s *Sink) connect(ctx context.Context) error {
	d := &net.Dialer{Timeout: connectTimeout}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var err error
	switch s.cfg.Target.Network {
	case "tls":
		s.conn, err = (&tls.Dialer{NetDialer: d, Config: s.tls}).DialContext(ctx, "tcp", s.cfg.Target.Address)
	default:
		s.conn, err = d.DialContext(ctx, s.cfg.Target.Network, s.cfg.Target.Address)
	}
	if err != nil {
		s.conn = nil // a nil pointer in an interface is none
	}
	return err
}

func (s *Sink) hangUp() {
	if s.conn != nil {
		_ = s.conn.Close() // what was not acknowledged is sent again
		s.conn = nil
	}
}

// gone says whether the receiver has closed a stream: it says nothing else, so that something to read is its end. A write would go into the void.
func gone(c net.Conn) bool {
	if _, ok := c.(*net.UDPConn); ok {
		return false
	}
	if c.SetReadDeadline(time.Now().Add(time.Millisecond)) != nil {
		return true
	}
	_, err := c.Read(make([]byte, 1))
	var timeout net.Error
	return err != nil && (errors.Is(err, io.EOF) || !errors.As(err, &timeout) || !timeout.Timeout())
}

// tcpOf is the connection below TLS, or the connection itself; nil when it is none of TCP.
func tcpOf(c net.Conn) *net.TCPConn {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	t, _ := c.(*net.TCPConn)
	return t
}
