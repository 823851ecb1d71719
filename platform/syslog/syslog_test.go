package syslog

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var at = time.Date(2027, 3, 1, 12, 30, 0, 123456000, time.UTC)

func TestMessage(t *testing.T) {
	e := &store.AuditEntry{
		Seq: 7, At: at, Actor: `token:ad"min`, Action: "node.create", Object: "acme/client/c-1]", Result: "ok", Detail: []byte(`{"name":"back\\slash"}`), Hash: "ab12",
	}
	want := `<109>1 2027-03-01T12:30:00.123456Z host-1 sallyway - node.create [audit@32473 org="acme" seq="7" actor="token:ad\"min" action="node.create" ` +
		`object="acme/client/c-1\]" result="ok" hash="ab12" detail="{\"name\":\"back\\\\slash\"}"] ` + "\ufeff" + `node.create acme/client/c-1] by token:ad"min: ok`
	if got := string(Message("host-1", "acme", e)); got != want {
		t.Errorf("\n%s\nwant\n%s", got, want)
	}
	e.Result, e.Action, e.Object = "refused", strings.Repeat("a", 40)+"é x", "line\nbreak\x00"
	got := string(Message("", "acme", e))
	if !strings.HasPrefix(got, "<108>1 ") || !strings.Contains(got, "Z - sallyway - "+strings.Repeat("a", 32)+" [") || strings.ContainsAny(got, "\n\x00") {
		t.Errorf("%q", got)
	}
	e.Detail, e.Actor = []byte(strings.Repeat("é", 20_000)), strings.Repeat("]", 3000)
	if got := Message("h", "acme", e); len(got) > maxMessage || !utf8.Valid(got) {
		t.Errorf("%d bytes, valid %t", len(got), utf8.Valid(got))
	}
}

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"tls://logs.example": "tls logs.example:6514 ", "tls://logs.example:1234?ca=/etc/ca.pem": "tls logs.example:1234 /etc/ca.pem", "tcp://10.0.0.1": "tcp 10.0.0.1:601 ",
		"udp://[2001:db8::1]": "udp [2001:db8::1]:514 ",
		"logs.example":        "", "http://x": "", "tls://": "", "tcp://x?ca=y": "", "tls://x?a=b": "", "tls://u@x": "", "tls://x/path": "",
	} {
		got, err := Parse(in)
		if text := fmt.Sprint(got.Network, " ", got.Address, " ", got.CAFile); (err == nil) != (want != "") || err == nil && text != want {
			t.Errorf("%s: %q %v", in, text, err)
		}
	}
}

// receiver is a syslog receiver on a port that stays the same when it is closed and opened again.
type receiver struct {
	t    *testing.T
	tls  *tls.Config
	addr string

	mu   sync.Mutex
	l    net.Listener
	open []net.Conn
	got  []string // messages
	wg   sync.WaitGroup
}

func (r *receiver) listen() {
	r.t.Helper()
	if r.addr == "" {
		r.addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", r.addr)
	must(r.t, err)
	r.addr = l.Addr().String()
	if r.tls != nil {
		l = tls.NewListener(l, r.tls)
	}
	r.l = l
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.open = append(r.open, c)
			r.mu.Unlock()
			r.wg.Go(func() { r.read(c) })
		}
	})
}

// read takes frames of octet counting.
func (r *receiver) read(c net.Conn) {
	defer c.Close()
	b := bufio.NewReader(c)
	for {
		n, err := b.ReadString(' ')
		if err != nil {
			return
		}
		size, err := strconv.Atoi(strings.TrimSpace(n))
		if err != nil {
			r.t.Errorf("a frame begins with %q", n)
			return
		}
		m := make([]byte, size)
		if _, err := io.ReadFull(b, m); err != nil {
			return
		}
		r.mu.Lock()
		r.got = append(r.got, string(m))
		r.mu.Unlock()
	}
}

func (r *receiver) close() {
	_ = r.l.Close()
	r.mu.Lock()
	for _, c := range r.open {
		_ = c.Close()
	}
	r.open = nil
	r.mu.Unlock()
	r.wg.Wait()
}

var seqOf = regexp.MustCompile(`org="default" seq="(\d+)"`)

// seqs are the entries of the organization default that came, without doubles; an entry out of its order fails the test.
func (r *receiver) seqs() (last int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.got {
		f := seqOf.FindStringSubmatch(m)
		if f == nil {
			continue
		}
		n, _ := strconv.Atoi(f[1])
		if n > last+1 {
			r.t.Errorf("entry %d came after %d", n, last)
		}
		last = max(last, n)
	}
	return last
}

func newRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "test.db"))
	must(t, err)
	t.Cleanup(func() { must(t, st.Close()) })
	seal, err := pki.NewSealer(make([]byte, 32))
	must(t, err)
	reg := &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: slog.New(slog.DiscardHandler), Now: time.Now}
	_, err = reg.Bootstrap(t.Context())
	must(t, err)
	return reg
}

func happen(t *testing.T, reg *registry.Registry, n int) int {
	t.Helper()
	for range n {
		must(t, reg.Transact(t.Context(), func(c *registry.Change) error { return c.Record(t.Context(), registry.DefaultOrg, "a.b", "x", nil) }))
	}
	es, err := reg.Audit(t.Context(), registry.DefaultOrg, 0, 10_000)
	must(t, err)
	return len(es)
}

func run(t *testing.T, reg *registry.Registry, target string) (*Sink, func()) {
	t.Helper()
	to, err := Parse(target)
	must(t, err)
	s, err := New(Config{Target: to, Registry: reg, Log: reg.Log, Metrics: prometheus.NewRegistry()})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		must(t, <-done)
	})
	t.Cleanup(stop)
	return s, stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(until) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestStream: over TCP and TLS every entry comes in its order, also those of while the receiver, or the platform, was away.
func TestStream(t *testing.T) {
	for _, network := range []string{"tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			r := &receiver{t: t}
			query := ""
			if network == "tls" {
				web := httptest.NewUnstartedServer(nil)
				web.StartTLS()
				r.tls = &tls.Config{Certificates: web.TLS.Certificates}
				ca := filepath.Join(t.TempDir(), "ca.pem")
				must(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600))
				web.Close()
				query = "?ca=" + ca
			}
			r.listen()
			defer func() { r.close() }()
			s, stop := run(t, reg, network+"://"+r.addr+query)
			n := happen(t, reg, 3)
			eventually(t, "the first entries", func() bool { return r.seqs() == n })
			r.close()
			n = happen(t, reg, 300)
			eventually(t, "it fails and says so", func() bool {
				st, err := s.State(t.Context())
				return err == nil && st.Problem != "" && !st.Failed.IsZero() && st.Backlog >= 300
			})
			r.listen()
			eventually(t, "what waited", func() bool { return r.seqs() == n })
			eventually(t, "it says that all is well", func() bool {
				st, err := s.State(t.Context())
				return err == nil && st.Problem == "" && st.Failed.IsZero() && st.Backlog == 0 && !st.Success.IsZero()
			})
			stop()
			n = happen(t, reg, 5)
			r.mu.Lock()
			before := len(r.got)
			r.mu.Unlock()
			run(t, reg, network+"://"+r.addr+query)
			eventually(t, "what happened while nobody sent", func() bool { return r.seqs() == n })
			r.mu.Lock()
			defer r.mu.Unlock()
			if more := len(r.got) - before; more > 5 {
				t.Errorf("%d messages after a restart, want the 5 that are new", more)
			}
		})
	}
}

// TestDatagrams: a message is a datagram.
func TestDatagrams(t *testing.T) {
	reg := newRegistry(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer c.Close()
	run(t, reg, "udp://"+c.LocalAddr().String())
	b := make([]byte, 65536)
	must(t, c.SetReadDeadline(time.Now().Add(30*time.Second)))
	n, _, err := c.ReadFrom(b)
	must(t, err)
	if m := string(b[:n]); !strings.HasPrefix(m, "<109>1 ") || !strings.Contains(m, `seq="1"`) {
		t.Errorf("%q", m)
	}
}
