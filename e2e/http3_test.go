package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyway/internal/lab"
)

// http3Page has a real HTTP/3 client fetch a page of a real HTTP/3 server through the laptop's TUN.
func http3Page(t *testing.T, s *lab.Site) {
	pc := must(s.Private.ListenUDP(at(lab.WebAddr, http3Port)))(t)
	cert, pool := selfSigned(t, lab.WebAddr.AsSlice())
	srv := &http3.Server{
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, lab.Pattern(1<<20)) }),
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{cert}}),
	}
	go func() { _ = srv.Serve(pc) }() // ends with Close
	defer srv.Close()

	local := must(s.Client.ListenUDP("0.0.0.0:0"))(t)
	transport := &quic.Transport{Conn: local}
	defer transport.Close()
	h3 := &http3.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool},
		Dial: func(ctx context.Context, addr string, tc *tls.Config, qc *quic.Config) (*quic.Conn, error) {
			to, err := net.ResolveUDPAddr("udp", addr)
			if err != nil {
				return nil, err
			}
			return transport.DialEarly(ctx, to, tc, qc)
		},
	}
	defer h3.Close()
	c := &http.Client{Transport: h3, Timeout: 20 * time.Second}
	resp := must(c.Get("https://" + at(lab.WebAddr, http3Port) + "/"))(t)
	defer resp.Body.Close()
	b := must(io.ReadAll(resp.Body))(t)
	if resp.ProtoMajor != 3 || len(b) != 1<<20 {
		t.Errorf("%s, %d bytes", resp.Proto, len(b))
	}
}

func selfSigned(t *testing.T, ip net.IP) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), IPAddresses: []net.IP{ip},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))(t)
	leaf := must(x509.ParseCertificate(der))(t)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}
