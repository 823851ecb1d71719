package update

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Patience with servers.
const (
	connectTimeout = 15 * time.Second
	answerTimeout  = 30 * time.Second
	stallTimeout   = 60 * time.Second // without a byte
	fetchTimeout   = 2 * time.Hour    // in all: 25 MB at 30 kbit/s
	maxRedirects   = 5
)

// source is where a signed manifest is, and an image beside it.
type source interface {
	manifest(ctx context.Context) ([]byte, error)
	image(ctx context.Context, m Manifest) (io.ReadCloser, error)
}

// open makes a source of a URL or a path.
func open(c *http.Client, from string) (source, error) {
	if strings.Contains(from, "://") {
		u, err := checkURL(from)
		if err != nil {
			return nil, err
		}
		return &web{client: c, url: u}, nil
	}
	return file(from), nil
}

// checkURL lets https through, and http to an address of a private network that is written as such: an operator's own server beside the appliance. What comes is
// signed either way; https keeps others from seeing and delaying it.
func checkURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("update: %.200q is no URL of a manifest", s)
	}
	if u.Scheme == "https" {
		return u, nil
	}
	if a, err := netip.ParseAddr(u.Hostname()); u.Scheme == "http" && err == nil && (a.Unmap().IsPrivate() || a.IsLoopback()) {
		return u, nil
	}
	return nil, fmt.Errorf("update: %.200q: use https (http is for addresses of private networks alone)", s)
}

// newClient trusts the machine's roots where roots is nil.
func newClient(roots *x509.CertPool) *http.Client {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: connectTimeout}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   connectTimeout,
		ResponseHeaderTimeout: answerTimeout,
		DisableKeepAlives:     true, // once a day
		ForceAttemptHTTP2:     true,
	}
	return &http.Client{Transport: t, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return errors.New("too many redirects")
		}
		if via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
			return errors.New("a redirect away from https")
		}
		_, err := checkURL(r.URL.String())
		return err
	}}
}

// web is a source on a server.
type web struct {
	client *http.Client
	url    *url.URL
}

func (w *web) get(ctx context.Context, u *url.URL) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		cancel()
		return nil, err
	}
	resp, err := w.client.Do(r)
	if err != nil {
		cancel()
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		cancel()
		return nil, fmt.Errorf("the server says %.60s", resp.Status)
	}
	b := &body{ReadCloser: resp.Body, cancel: cancel}
	b.stall = time.AfterFunc(stallTimeout, cancel)
	return b, nil
}

// body ends when nothing comes for a while.
type body struct {
	io.ReadCloser
	cancel context.CancelFunc
	stall  *time.Timer
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.stall.Reset(stallTimeout)
	return n, err
}

func (b *body) Close() error {
	b.stall.Stop()
	b.cancel()
	return b.ReadCloser.Close()
}

func (w *web) manifest(ctx context.Context) ([]byte, error) {
	b, err := w.get(ctx, w.url)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(io.LimitReader(b, maxManifest+1))
}

// image is beside the manifest, with the manifest's query if it has one.
func (w *web) image(ctx context.Context, m Manifest) (io.ReadCloser, error) {
	u := w.url.ResolveReference(&url.URL{Path: m.File, RawQuery: w.url.RawQuery})
	return w.get(ctx, u)
}

// file is a source on a disk: the manifest's path.
type file string

func (f file) manifest(context.Context) ([]byte, error) {
	m, err := os.Open(string(f))
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return io.ReadAll(io.LimitReader(m, maxManifest+1))
}

func (f file) image(_ context.Context, m Manifest) (io.ReadCloser, error) {
	return os.Open(filepath.Join(filepath.Dir(string(f)), m.File))
}
