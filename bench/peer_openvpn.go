package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"path/filepath"
	"time"

	"sallyway/internal/lab"
)

// startOpenVPN runs an OpenVPN server on the hub that passes packets between its two clients, and another on the first relay's host that they
// turn to when the first does not answer. The hub sees everything.
func startOpenVPN(_ context.Context, l *lab.Lab) (way, error) {
	w := way{addr: lab.DNSAddr, iperf: iperfPort, echo: echoPort, packets: true}
	program, err := lab.Program("openvpn")
	if err != nil {
		return w, err
	}
	ca, err := newAuthority()
	if err != nil {
		return w, err
	}
	hub, second := l.Addr(l.Relay2), l.Addr(l.Relay1)
	const common = "dev tun\nproto udp4\ndata-ciphers AES-256-GCM\npersist-key\npersist-tun\nverb 1\nkeepalive 5 30\n"
	server := func(at netip.Addr) string {
		return fmt.Sprintf("local %s\nport %d\ntopology subnet\nserver 10.77.3.0 255.255.255.0\nclient-to-client\nclient-config-dir ccd\nroute %s 255.255.255.255\ndh none\n",
			at, openvpnHubPort, lab.DNSAddr)
	}
	end := fmt.Sprintf("client\nremote %s %d\nremote %s %[2]d\nnobind\nremote-cert-tls server\n", hub, openvpnHubPort, second)
	for _, n := range []struct {
		host *lab.Host
		conf string
	}{{l.Relay2, server(hub)}, {l.Relay1, server(second)}, {l.Gateway, end}, {l.Client, end + fmt.Sprintf("route %s 255.255.255.255\n", lab.DNSAddr)}} {
		dir, err := peerDir(n.host, "openvpn")
		if err != nil {
			return w, err
		}
		serves := n.host == l.Relay2 || n.host == l.Relay1
		cert, key, err := ca.issue(n.host.Name, serves)
		if err != nil {
			return w, err
		}
		if serves {
			ccd, err := peerDir(n.host, filepath.Join("openvpn", "ccd"))
			if err != nil {
				return w, err
			}
			if err := writeAll(ccd, map[string]string{l.Gateway.Name: fmt.Sprintf("iroute %s 255.255.255.255\n", lab.DNSAddr)}); err != nil {
				return w, err
			}
		}
		conf := common + n.conf + "ca ca.crt\ncert node.crt\nkey node.key\n"
		if err := writeAll(dir, map[string]string{"node.conf": conf, "ca.crt": ca.pem, "node.crt": cert, "node.key": key}); err != nil {
			return w, err
		}
		p, err := n.host.Start(lab.Spec{Name: "openvpn-" + n.host.Name, Args: []string{program, "--cd", dir, "--config", "node.conf"}, Grace: 3 * time.Second})
		if err != nil {
			return w, err
		}
		w.procs = append(w.procs, p)
	}
	return w, nil
}

// authority is a certificate authority for one run.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  string
	next int64
}

// runValid is how long the certificates of a run are good.
const runValid = 24 * time.Hour

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(runValid),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{key: key, cert: cert, pem: pemText("CERTIFICATE", der), next: 2}, err
}

// issue returns a certificate and its key as PEM.
func (a *authority) issue(name string, server bool) (cert, key string, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	usage := x509.ExtKeyUsageClientAuth
	if server {
		usage = x509.ExtKeyUsageServerAuth
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(runValid),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	a.next++
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, k.Public(), a.key)
	if err != nil {
		return "", "", err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	return pemText("CERTIFICATE", der), pemText("PRIVATE KEY", secret), err
}

func pemText(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
