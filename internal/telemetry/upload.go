package telemetry

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Limits towards a collector.
const (
	maxAnswer  = 64 << 10               // bytes that are read of an answer
	firstRetry = 500 * time.Millisecond // doubled each time
	maxRetry   = 5 * time.Second
)

// uploader posts one signal to one URL (OTLP/HTTP, https://opentelemetry.io/docs/specs/otlp/#otlphttp). Nil is a signal that is off.
type uploader struct {
	url     string
	headers map[string]string
	gzip    bool
	timeout time.Duration
	client  *http.Client
}

var _ otlptrace.Client = (*uploader)(nil)

func newUploader(s Settings, signal, to string) (*uploader, error) {
	u := &uploader{url: to, headers: make(map[string]string), gzip: s.Gzip, timeout: cmp.Or(s.Timeout, defaultTimeout)}
	own := s.TraceHeaders
	if signal == "metrics" {
		own = s.MetricHeaders
	}
	for _, m := range []map[string]string{s.Headers, own} {
		for k, v := range m {
			u.headers[http.CanonicalHeaderKey(k)] = v
		}
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12} // collectors stand behind balancers of every age
	if s.CAFile != "" {
		b, err := os.ReadFile(s.CAFile)
		if err != nil {
			return nil, fmt.Errorf("authorities of the OTLP collector: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("authorities of the OTLP collector: %s holds no certificate (PEM)", s.CAFile)
		}
	}
	if s.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("client certificate for the OTLP collector: %w", err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	u.client = &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: cfg, TLSHandshakeTimeout: u.timeout,
			MaxIdleConnsPerHost: 1, IdleConnTimeout: 2 * time.Minute, MaxResponseHeaderBytes: 64 << 10,
		},
		// Headers may hold a key, which goes nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return u, nil
}

// where is the URL for the log.
func (u *uploader) where() string {
	if u == nil {
		return "off"
	}
	return u.url
}

func (u *uploader) close() {
	if u != nil {
		u.client.CloseIdleConnections()
	}
}

// Start implements otlptrace.Client.
func (u *uploader) Start(context.Context) error { return nil }

// Stop implements otlptrace.Client.
func (u *uploader) Stop(context.Context) error { return nil }

// UploadTraces implements otlptrace.Client. A message of type TracesData has the same bytes as an ExportTraceServiceRequest, whose package would
// bring gRPC.
func (u *uploader) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	return u.post(ctx, &tracepb.TracesData{ResourceSpans: spans})
}

// post sends a message, and again while the collector says that it may (429, 502, 503, 504) and the time for a request lasts.
func (u *uploader) post(ctx context.Context, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if u.gzip {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(body)
		if err = errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("compress: %w", err)
		}
		body = b.Bytes()
	}
	ctx, cancel := context.WithTimeout(ctx, u.timeout)
	defer cancel()
	for wait := firstRetry; ; wait = min(2*wait, maxRetry) {
		again, err := u.try(ctx, body)
		if err == nil || again < 0 {
			return err
		}
		t := time.NewTimer(max(wait, again))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// try sends once. With an error it returns how long the collector wants to be left alone, or a negative time when the same will not pass later.
func (u *uploader) try(ctx context.Context, body []byte) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.url, bytes.NewReader(body))
	if err != nil {
		return -1, err
	}
	for k, v := range u.headers {
		req.Header.Set(k, v)
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	if u.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	res, err := u.client.Do(req)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // the URL is in the log already
		}
		return 0, err // a collector that starts anew is there again soon
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer)) // so that the connection is used again
	switch res.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
		return 0, nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		s, _ := strconv.Atoi(res.Header.Get("Retry-After")) // none, or a date: our own time
		return time.Duration(max(s, 0)) * time.Second, fmt.Errorf("answered %s", res.Status)
	}
	return -1, fmt.Errorf("answered %s", res.Status)
}
