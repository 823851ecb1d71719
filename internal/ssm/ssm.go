// Package ssm reads a daemon's settings from the Parameter Store of AWS Systems Manager, one parameter for each setting below a path:
//
//	/sallyway/eu/advertise-url    String        https://platform.example
//	/sallyway/eu/database         SecureString  postgres://…
//
// It needs ssm:GetParametersByPath for the path, and kms:Decrypt for the key of its secure strings.
//
// https://docs.aws.amazon.com/systems-manager/latest/APIReference/API_GetParametersByPath.html
package ssm

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"sallyway/internal/awsidentity"
)

// Limits of what is read.
const (
	maxAnswer   = 1 << 20 // bytes; a page has ten parameters of 8 KiB at most
	maxPages    = 50
	callTimeout = 10 * time.Second
	attempts    = 4
	firstPause  = 250 * time.Millisecond // doubled after each attempt
)

// Config says which store. The zero value is the region of the environment.
type Config struct {
	// Region of the store; empty is AWS_REGION or AWS_DEFAULT_REGION.
	Region string
	// Endpoint is its URL; empty is the region's public one. CAFile holds the authorities (PEM) of its certificate; empty is the system's.
	Endpoint, CAFile string
	// Find looks for this host's credentials: nil is awsidentity.Find.
	Find func(context.Context) (*awsidentity.Credentials, error)
	Now  func() time.Time // nil is time.Now

	pause time.Duration // zero is firstPause; for tests
}

var (
	goodPath   = regexp.MustCompile(`^(/[A-Za-z0-9_.-]+)+$`)
	goodRegion = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$`)
)

// Read returns the values of the parameters right below path by the last part of their names. None is an error, since a path with a typing
// error has none. No error tells a value.
func Read(ctx context.Context, path string, cfg Config) (map[string]string, error) {
	r, err := newReader(ctx, path, cfg)
	if err != nil {
		return nil, err
	}
	found := make(map[string]string)
	next := ""
	for range maxPages {
		p, err := r.page(ctx, next)
		if err != nil {
			return nil, fmt.Errorf("parameters below %s in %s: %w", r.path, r.region, err)
		}
		for _, q := range p.Parameters {
			name := strings.TrimPrefix(q.Name, r.path+"/")
			if name == "" || strings.Contains(name, "/") {
				return nil, fmt.Errorf("the parameter store answered %.100q, which does not lie below %s", q.Name, r.path)
			}
			found[name] = q.Value
		}
		if next = p.NextToken; next == "" {
			if len(found) == 0 {
				return nil, fmt.Errorf("there are no parameters right below %s in %s: see `aws ssm get-parameters-by-path --path %s --region %s`", r.path, r.region, r.path, r.region)
			}
			return found, nil
		}
	}
	return nil, fmt.Errorf("more than %d pages of parameters below %s: name a path of the platform's own", maxPages, r.path)
}

type reader struct {
	path, region, endpoint string
	client                 *http.Client
	credentials            *awsidentity.Credentials
	now                    func() time.Time
	pause                  time.Duration
}

func newReader(ctx context.Context, path string, cfg Config) (*reader, error) {
	r := &reader{
		path: strings.TrimSuffix(path, "/"), endpoint: strings.TrimSuffix(cfg.Endpoint, "/"), now: cfg.Now, pause: cmp.Or(cfg.pause, firstPause),
		region: cmp.Or(cfg.Region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION")),
	}
	if r.now == nil {
		r.now = time.Now
	}
	switch {
	case !goodPath.MatchString(r.path):
		return nil, fmt.Errorf("parameter path %.100q is not of the form /sallyway/eu", path)
	case r.region == "":
		return nil, errors.New("the region of the parameter store is not known: set AWS_REGION")
	case !goodRegion.MatchString(r.region):
		return nil, fmt.Errorf("AWS region %.40q is none: it looks like eu-central-1", r.region)
	}
	if r.endpoint == "" {
		r.endpoint = "https://ssm." + r.region + ".amazonaws.com"
		if strings.HasPrefix(r.region, "cn-") {
			r.endpoint += ".cn"
		}
	}
	if u, err := url.Parse(r.endpoint); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return nil, fmt.Errorf("endpoint of the parameter store %.100q is not https://HOST", r.endpoint)
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, TLSHandshakeTimeout: callTimeout, DisableKeepAlives: true,
	}
	if cfg.CAFile != "" {
		b, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("authorities of the parameter store: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("authorities of the parameter store: %s holds no certificate (PEM)", cfg.CAFile)
		}
	}
	r.client = &http.Client{Transport: transport, Timeout: callTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	find := cfg.Find
	if find == nil {
		find = func(ctx context.Context) (*awsidentity.Credentials, error) {
			return awsidentity.Find(ctx, awsidentity.Config{})
		}
	}
	var err error
	r.credentials, err = find(ctx)
	return r, err
}

// answer is a page.
type answer struct {
	Parameters []struct{ Name, Value string }
	NextToken  string
}

// refusal is what AWS says instead.
type refusal struct {
	Type    string `json:"__type"`
	Message string `json:"message"`
	status  int
}

func (e *refusal) Error() string {
	kind := e.Type[strings.LastIndexByte(e.Type, '#')+1:]
	remedy := ""
	if strings.HasPrefix(kind, "AccessDenied") {
		remedy = "; allow ssm:GetParametersByPath for the path, and kms:Decrypt for the key of its secure strings"
	}
	return fmt.Sprintf("status %d %.80s: %.300s%s", e.status, kind, e.Message, remedy)
}

// again says whether another try can help.
func (e *refusal) again() bool {
	return e.status >= http.StatusInternalServerError || e.status == http.StatusTooManyRequests || strings.Contains(e.Type, "Throttl")
}

// page reads one page, with another try after what passes.
func (r *reader) page(ctx context.Context, next string) (*answer, error) {
	pause := r.pause
	for n := 1; ; n++ {
		p, err := r.call(ctx, next)
		var no *refusal
		if err == nil || n == attempts || (errors.As(err, &no) && !no.again()) {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
		pause *= 2
	}
}

func (r *reader) call(ctx context.Context, next string) (*answer, error) {
	ask := map[string]any{"Path": r.path, "WithDecryption": true}
	if next != "" {
		ask["NextToken"] = next
	}
	body, err := json.Marshal(ask)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.endpoint+"/", strings.NewReader(string(body)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-amz-json-1.1")
	req.Header.Set("X-Amz-Target", "AmazonSSM.GetParametersByPath")
	r.credentials.Authorize(req, string(body), r.region, "ssm", r.now())
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		no := &refusal{status: resp.StatusCode}
		_ = json.Unmarshal(b, no) // a proxy's page says nothing; the status does
		return nil, no
	}
	p := new(answer)
	if err := json.Unmarshal(b, p); err != nil {
		return nil, errors.New("the answer is not what a parameter store says")
	}
	return p, nil
}
