package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// Service is a server of the lab's own on a host. It runs in the lab's process, on sockets of the host, until the lab ends.
type Service struct {
	Addr  netip.AddrPort
	calls atomic.Int64
}

// Calls is how many connections (UDP echo and DNS: datagrams, HTTP: requests) have come.
func (s *Service) Calls() int64 { return s.calls.Load() }

// URL is the service's URL.
func (s *Service) URL(path string) string { return "http://" + s.Addr.String() + path }

func serviceAt(a net.Addr) *Service {
	ap, _ := netip.ParseAddrPort(a.String()) // the text of a socket's address always parses
	return &Service{Addr: ap}
}

// Web serves a page on a TCP address:
//
//	GET  /          the page
//	GET  /bytes?n=N N bytes, see Pattern
//	POST /sum       SHA-256 of the body in hex, a space, and its length
//	GET  /from      the caller's address as the server sees it
func (h *Host) Web(addr, page string) (*Service, error) {
	ln, err := h.Listen(addr)
	if err != nil {
		return nil, err
	}
	s := serviceAt(ln.Addr())
	srv := &http.Server{Handler: s.Pages(page), ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }() // ends with its listener
	h.lab.onClose(func() { _ = srv.Close() })
	return s, nil
}

// Pages is what Web serves, for servers of other kinds.
func (s *Service) Pages(page string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		s.calls.Add(1)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, page)
	})
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "n is not a number of bytes", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.Copy(w, Pattern(n)) // a caller that went away
	})
	mux.HandleFunc("POST /sum", func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%s %d\n", hex.EncodeToString(sum.Sum(nil)), n)
	})
	mux.HandleFunc("GET /from", func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		fmt.Fprintln(w, r.RemoteAddr)
	})
	return mux
}

// Pattern is n bytes that do not compress and are the same each time.
func Pattern(n int64) io.Reader {
	return io.LimitReader(mrand.NewChaCha8([32]byte{'s', 'a', 'l', 'l', 'y'}), n)
}

// PatternSum is the SHA-256 of Pattern(n) in hex.
func PatternSum(n int64) string {
	sum := sha256.New()
	_, _ = io.Copy(sum, Pattern(n)) // neither end errs
	return hex.EncodeToString(sum.Sum(nil))
}

// each accepts connections and serves each on a goroutine, until the listener is closed.
func (s *Service) each(l *Lab, ln net.Listener, f func(*net.TCPConn)) {
	var mu sync.Mutex
	open := make(map[net.Conn]bool)
	l.onClose(func() {
		mu.Lock()
		defer mu.Unlock()
		for c := range open {
			c.Close()
		}
	})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.calls.Add(1)
			mu.Lock()
			open[c] = true
			mu.Unlock()
			go func() {
				f(c.(*net.TCPConn))
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			}()
		}
	}()
}

// Echo sends back what comes on TCP and closes its half when the peer closes theirs.
func (h *Host) Echo(addr string) (*Service, error) {
	ln, err := h.Listen(addr)
	if err != nil {
		return nil, err
	}
	s := serviceAt(ln.Addr())
	s.each(h.lab, ln, func(c *net.TCPConn) {
		_, _ = io.Copy(c, c) // the peer sees the end
	})
	return s, nil
}

// HalfClose reads TCP to the end and only then answers with SHA-256 and length of what came, as /sum does.
func (h *Host) HalfClose(addr string) (*Service, error) {
	ln, err := h.Listen(addr)
	if err != nil {
		return nil, err
	}
	s := serviceAt(ln.Addr())
	s.each(h.lab, ln, func(c *net.TCPConn) {
		sum := sha256.New()
		if n, err := io.Copy(sum, c); err == nil {
			fmt.Fprintf(c, "%s %d\n", hex.EncodeToString(sum.Sum(nil)), n)
		}
	})
	return s, nil
}

// EchoUDP sends datagrams back.
func (h *Host) EchoUDP(addr string) (*Service, error) {
	c, err := h.ListenUDP(addr)
	if err != nil {
		return nil, err
	}
	s := serviceAt(c.LocalAddr())
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				s.calls.Add(1)
				_, _ = c.WriteToUDPAddrPort(b[:n], from) // a datagram that is lost
			}
		}
	}()
	return s, nil
}

// Nameserver is a DNS server that knows a few names and counts who asked for what.
type Nameserver struct {
	Service
	zone  map[string][]dns.RR
	mu    sync.Mutex
	asked []string // guarded by mu
}

// DNS serves names over UDP and TCP. Records are lines of a zone file with full names, such as "db.corp.test. 60 A 10.20.0.11".
// Other names do not exist.
func (h *Host) DNS(addr string, records ...string) (*Nameserver, error) {
	n := &Nameserver{zone: make(map[string][]dns.RR)}
	for _, r := range records {
		rr, err := dns.NewRR(r)
		if err != nil {
			return nil, fmt.Errorf("record %q: %w", r, err)
		}
		name := strings.ToLower(rr.Header().Name)
		n.zone[name] = append(n.zone[name], rr)
	}
	pc, err := h.ListenUDP(addr)
	if err != nil {
		return nil, err
	}
	ln, err := h.Listen(pc.LocalAddr().String())
	if err != nil {
		return nil, err
	}
	n.Addr = serviceAt(pc.LocalAddr()).Addr
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: n}, {Listener: ln, Handler: n}} {
		go func() { _ = srv.ActivateAndServe() }() // ends with its socket
	}
	return n, nil
}

// ServeDNS answers a question. UDP answers that are too large for the asker are cut short, so that it asks again over TCP.
func (n *Nameserver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	n.calls.Add(1)
	m := new(dns.Msg).SetReply(q)
	if len(q.Question) == 1 {
		name, want := strings.ToLower(q.Question[0].Name), q.Question[0].Qtype
		n.mu.Lock()
		n.asked = append(n.asked, name)
		n.mu.Unlock()
		all, known := n.zone[name]
		if !known {
			m.Rcode = dns.RcodeNameError
		}
		for _, rr := range all {
			if t := rr.Header().Rrtype; t == want || t == dns.TypeCNAME || want == dns.TypeANY {
				m.Answer = append(m.Answer, rr)
			}
		}
	}
	if _, udp := w.LocalAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = int(o.UDPSize())
		}
		m.Truncate(size)
	}
	_ = w.WriteMsg(m) // an asker that went away
}

// Asked returns the names that were asked for and that end in suffix.
func (n *Nameserver) Asked(suffix string) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, a := range n.asked {
		if strings.HasSuffix(strings.TrimSuffix(a, "."), strings.TrimSuffix(suffix, ".")) {
			out = append(out, a)
		}
	}
	return out
}

// HTTPClient returns a client that works from the host and takes no names, only addresses.
func (h *Host) HTTPClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) { return h.Dial(ctx, network, addr) },
		},
		Timeout: time.Minute,
	}
}
