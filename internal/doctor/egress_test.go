package doctor

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
	"sallyway/internal/egress"
	"sallyway/internal/identity"
)

// connectProxy is an HTTP proxy that leads every host to this one, on the port that is asked for, except for one that it refuses.
func connectProxy(t *testing.T, credentials string, refused uint16) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, port, err := net.SplitHostPort(r.Host)
		switch {
		case r.Method != http.MethodConnect || err != nil:
			http.Error(w, "CONNECT alone", http.StatusMethodNotAllowed)
			return
		case r.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(credentials)):
			w.Header().Set("Proxy-Authenticate", "Basic")
			http.Error(w, "who?", http.StatusProxyAuthRequired)
			return
		case port == netip.AddrPortFrom(netip.IPv4Unspecified(), refused).String()[len("0.0.0.0:"):]:
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		out, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
		if err != nil {
			http.Error(w, "no", http.StatusBadGateway)
			return
		}
		defer out.Close()
		w.WriteHeader(http.StatusOK)
		in, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer in.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(out, rw)
			_ = out.(*net.TCPConn).CloseWrite()
		}()
		_, _ = io.Copy(in, out)
		in.Close()
		<-done
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// unknown is a name that no resolver is even asked for: a label has 63 bytes at most (RFC 1035 §2.3.4).
var unknown = strings.Repeat("x", 64) + ".test"

// certificate is one of its own for an address.
func certificate(t *testing.T, ip net.IP) tls.Certificate {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "here"}, IPAddresses: []net.IP{ip}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestByProxy: with a proxy that resolves names, what TCP needs is well where this host knows no name at all; what is wrong with the proxy has a
// row with what to do.
func TestByProxy(t *testing.T) {
	const platformIP = "192.0.2.34"
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{certificate(t, net.ParseIP(platformIP))}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	port := netip.MustParseAddrPort(srv.Listener.Addr().String()).Port()
	ref := control.RelayRef{
		Node: identity.Node{Org: "acme", Kind: identity.Relay, ID: "r-1"}, Name: "fra-1", Host: unknown, Port: port, TLSPort: port,
		Roots: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
	platform := strings.Replace(srv.URL, "127.0.0.1", platformIP, 1)
	look := func(t *testing.T, proxy, user string, ref control.RelayRef, platform string) map[string]daemon.Check {
		t.Helper()
		dir := state(t, identity.Client, platform, identity.CertificateKeyHash(srv.Certificate()).String(), ref)
		file := filepath.Join(dir, "credentials")
		settings := map[string]string{"proxy": proxy, "source": egress.Flag, "credentials": file}
		b, err := json.Marshal(settings)
		if err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{file: user, filepath.Join(dir, egress.StateFile): string(b)} {
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return rows(t, dir)
	}
	t.Run("well", func(t *testing.T) {
		proxy := connectProxy(t, "ida:pw", 0)
		got := look(t, proxy, "ida:pw", ref, platform)
		want(t, got, egressRow, daemon.Pass, proxy, egress.Flag, "leads to "+platformIP)
		want(t, got, "platform from here", daemon.Pass, "answers in")
		want(t, got, "relay fra-1 by udp", daemon.Fail, "does not resolve on this host", "UDP")
		want(t, got, "DNS", daemon.Warn, "the proxy resolves")
		// The relay is reached, and here it is somebody else who answers.
		want(t, got, "relay fra-1 by tls", daemon.Fail, "who answers is not relay fra-1", "exempt the relay from TLS inspection")
	})
	t.Run("the wrong password", func(t *testing.T) {
		got := look(t, connectProxy(t, "ida:pw", 0), "ida:other", ref, platform)
		want(t, got, egressRow, daemon.Fail, "does not take user \"ida\"", "407", "correct user and password")
		want(t, got, "platform from here", daemon.Fail, "does not take user", "correct user and password")
		want(t, got, "relay fra-1 by tls", daemon.Fail, "does not take user", "correct user and password")
	})
	t.Run("a port that is refused", func(t *testing.T) {
		refused := ref
		refused.Port = 5349
		got := look(t, connectProxy(t, "ida:pw", refused.Port), "ida:pw", refused, platform)
		want(t, got, egressRow, daemon.Pass)
		want(t, got, "relay fra-1 by tls", daemon.Fail, "403", "allow CONNECT to "+unknown+":5349")
	})
	t.Run("a proxy that is gone", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		got := look(t, "http://"+l.Addr().String(), "ida:pw", ref, platform)
		want(t, got, egressRow, daemon.Fail, "refuses the connection", "--egress-proxy")
	})
	t.Run("a proxy that is not for the platform", func(t *testing.T) {
		got := look(t, connectProxy(t, "ida:pw", 0), "ida:pw", ref, srv.URL) // loopback
		want(t, got, egressRow, daemon.Pass, "not for the platform")
	})
	t.Run("credentials that all may read", func(t *testing.T) {
		dir := state(t, identity.Client, platform, "", ref)
		file := filepath.Join(dir, "credentials")
		if err := os.WriteFile(file, []byte("ida:pw"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(map[string]string{"proxy": "http://p:1", "credentials": file}) // strings
		if err := os.WriteFile(filepath.Join(dir, egress.StateFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		want(t, rows(t, dir), egressRow, daemon.Fail, "chmod 600", "--egress-proxy none")
	})
}
