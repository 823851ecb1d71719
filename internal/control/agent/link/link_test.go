package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyway/internal/control"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConfig(t *testing.T) {
	for _, tt := range []struct{ url, pin, want string }{
		{"platform.example", "", "https://host"},
		{"ftp://platform.example", "", "https://host"},
		{"https://", "", "https://host"},
		{"https://user:hunter2@platform.example", "", "only scheme, host, port"},
		{"https://platform.example/?a=b", "", "only scheme"},
		{"https://platform.example", "abc", "CA pin"},
	} {
		_, err := New(Config{URL: tt.url, Pin: tt.pin})
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("New(%q, %q): %v, want %q", tt.url, tt.pin, err, tt.want)
		}
	}
	for url, plain := range map[string]bool{
		"https://platform.example": false, "http://platform.example": true, "http://10.0.0.1:8080": true,
		"http://127.0.0.1:8080": false, "http://localhost:8080": false, "http://[::1]:8080": false,
	} {
		l, err := New(Config{URL: url})
		if err != nil || l.Plain() != plain {
			t.Errorf("%s: plain %v, %v", url, l.Plain(), err)
		}
	}
}

// serve starts a server and returns a link to it.
func serve(t *testing.T, h http.HandlerFunc) *Link {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	l, err := New(Config{URL: s.URL + "/", Timeout: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func TestAnswers(t *testing.T) {
	problem := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json; charset=utf-8")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	tests := []struct {
		name   string
		h      http.HandlerFunc
		kind   Kind // of an *Error; empty: a *Problem is wanted
		status int
		want   string
		remedy string
	}{
		{"problem", problem(403, `{"detail":"gateway office is disabled","code":"node_disabled","remedy":"enable it"}`), "", 403, "gateway office is disabled", "enable it"},
		{"parts", problem(422, `{"detail":"invalid","errors":[{"message":"is no port","location":"body.tcp"},{"message":"again"}]}`), "", 422, "invalid; body.tcp: is no port; again", ""},
		{"problem that is none", problem(502, `<html>bad gateway`), "", 502, "the platform answered 502 bad gateway", ""},
		{"plain error", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "secret internals", http.StatusInternalServerError)
		}, "", 500, "500 internal server error", ""},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://evil.example/x", http.StatusFound)
		}, NotPlatform, 0, "evil.example", "URL"},
		{"not JSON", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }, NotPlatform, 0, "not the platform's JSON", "URL"},
		{"silence", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, Timeout, 0, "did not answer within 300ms", "firewall"},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "{")
			panic(http.ErrAbortHandler)
		}, Broken, 0, "closed the connection", "cuts"},
		{"clock", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Date", "Mon, 02 Jan 2006 15:04:05 GMT")
			problem(401, `{"detail":"the assertion has expired"}`)(w, r)
		}, "", 401, "the platform's says 2006-01-02T15:04", "clock"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := serve(t, tt.h)
			var out map[string]any
			err := l.Do(t.Context(), Request{Method: "GET", Path: "/x"}, &out)
			var e *Error
			var p *Problem
			switch {
			case tt.kind != "" && (!errors.As(err, &e) || e.Kind != tt.kind):
				t.Fatalf("error %v (%T), want kind %s", err, err, tt.kind)
			case tt.kind == "" && (!errors.As(err, &p) || p.Status != tt.status):
				t.Fatalf("error %v (%T), want status %d", err, err, tt.status)
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "internals") {
				t.Errorf("error %q, want %q", err, tt.want)
			}
			if r := Remedy(err); !strings.Contains(r, tt.remedy) {
				t.Errorf("remedy %q, want %q", r, tt.remedy)
			}
		})
	}
}

func TestLargeAnswer(t *testing.T) {
	l := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		b := make([]byte, 1<<20)
		for range MaxBody>>20 + 2 {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})
	l.cfg.Timeout = 10 * time.Second
	if err := l.Do(t.Context(), Request{Method: "GET", Path: "/"}, nil); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("error %v", err)
	}
}

func TestCancellationPasses(t *testing.T) {
	l := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Do(ctx, Request{Method: "GET", Path: "/"}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestOldTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = &tls.Config{MaxVersion: tls.VersionTLS12}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	l, err := New(Config{URL: s.URL, Pin: identity.CertificateKeyHash(s.Certificate()).String()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var e *Error
	if err := l.Do(t.Context(), Request{Method: "GET", Path: "/"}, nil); !errors.As(err, &e) || e.Kind != TLS || !strings.Contains(e.Remedy, "TLS 1.3") {
		t.Errorf("error %v (%+v)", err, e)
	}
}

func TestTLSToPlainServer(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	l, err := New(Config{URL: "https" + strings.TrimPrefix(s.URL, "http")})
	if err != nil {
		t.Fatal(err)
	}
	var e *Error
	if err := l.Do(t.Context(), Request{Method: "GET", Path: "/"}, nil); !errors.As(err, &e) || e.Kind != TLS || !strings.Contains(e.Reason, "does not speak TLS") {
		t.Errorf("error %v (%+v)", err, e)
	}
}

// What is dialled in vain is named by step.
func TestDialErrors(t *testing.T) {
	for _, tt := range []struct {
		err  error
		kind Kind
	}{
		{&net.DNSError{Name: "platform.example", Err: "no such host"}, DNS},
		{&net.OpError{Op: "dial", Err: errors.New("odd")}, Connect},
		{context.DeadlineExceeded, Timeout},
		{errors.New("odd"), Connect},
		{&egress.Error{Kind: egress.Auth, Proxy: "http://p:1", Reason: "407", Remedy: "another password"}, Proxy},
	} {
		l, err := New(Config{URL: "https://platform.example", DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, tt.err }})
		if err != nil {
			t.Fatal(err)
		}
		var e *Error
		if err := l.Do(t.Context(), Request{Method: "GET", Path: "/", Bearer: "hunter2"}, nil); !errors.As(err, &e) || e.Kind != tt.kind || e.Remedy == "" || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("dial error %v: %v (%+v), want kind %s", tt.err, err, e, tt.kind)
		}
	}
}

// Who is given connections to use looks for no proxy in the environment: they may lead through one already, or are to lead through none.
func TestDialerBeatsTheEnvironment(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://192.0.2.80:3128") // net/http reads it once in a process
	var asked string
	l, err := New(Config{URL: "https://platform.example", DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
		asked = address
		return nil, errors.New("enough")
	}})
	if err != nil {
		t.Fatal(err)
	}
	if proxy := l.client.Transport.(*http.Transport).Proxy; proxy != nil {
		t.Error("the environment's proxy may be used")
	}
	if err := l.Do(t.Context(), Request{Method: "GET", Path: "/"}, nil); err == nil || asked != "platform.example:443" {
		t.Errorf("%s was dialled, %v", asked, err)
	}
}

func TestTemporary(t *testing.T) {
	for status, want := range map[int]bool{400: false, 401: false, 403: false, 409: false, 408: true, 429: true, 500: true, 503: true} {
		if got := (&Problem{Problem: control.Problem{Status: status}}).Temporary(); got != want {
			t.Errorf("status %d: temporary %v", status, got)
		}
	}
}
