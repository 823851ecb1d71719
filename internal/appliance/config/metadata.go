package config

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// metadataURL is where clouds answer their machines, and nobody else: link-local, never by a proxy.
const metadataURL = "http://169.254.169.254"

// metadataTimeout bounds each question. A network that is no cloud's gives no answer at all.
const metadataTimeout = 3 * time.Second

// cloud is how one kind of metadata service is asked for the user-data.
type cloud struct {
	name    string
	method  string // of a first question whose answer goes into a header of the second; "" has none
	first   string
	ask     map[string]string // headers of the first
	carry   string            // header that carries the first's answer
	path    string
	headers map[string]string
	decode  func([]byte) ([]byte, error)
}

var clouds = []cloud{
	{ // IMDSv2: the token's PUT keeps requests out that somebody else's server was talked into
		name: "AWS", method: http.MethodPut, first: "/latest/api/token", ask: map[string]string{"X-aws-ec2-metadata-token-ttl-seconds": "60"},
		carry: "X-aws-ec2-metadata-token", path: "/latest/user-data",
	},
	{name: "Google", path: "/computeMetadata/v1/instance/attributes/user-data", headers: map[string]string{"Metadata-Flavor": "Google"}},
	{
		name: "Azure", path: "/metadata/instance/compute/userData?api-version=2021-01-01&format=text", headers: map[string]string{"Metadata": "true"},
		decode: func(b []byte) ([]byte, error) { return base64.StdEncoding.DecodeString(strings.TrimSpace(string(b))) },
	},
}

// Metadata asks the cloud that this machine runs in for its user-data, which is read as on a seed disk.
func Metadata(ctx context.Context) Found { return askClouds(ctx, metadataURL) }

func askClouds(ctx context.Context, base string) Found {
	client := &http.Client{
		Timeout:       metadataTimeout,
		Transport:     &http.Transport{Proxy: nil, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	f := Found{Source: "metadata"}
	var errs []error
	for _, c := range clouds {
		data, err := c.userData(ctx, client, base)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
			continue
		}
		f.Where = c.name
		f.Config, f.Notes, f.Err = cloudConfig(data)
		return f
	}
	f.Notes = []string{"metadata: no cloud answers at 169.254.169.254 with user-data (" + strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "; ") + ")"}
	return f
}

func (c cloud) userData(ctx context.Context, client *http.Client, base string) ([]byte, error) {
	headers := map[string]string{}
	if c.method != "" {
		token, err := get(ctx, client, c.method, base+c.first, c.ask)
		if err != nil {
			return nil, err
		}
		headers[c.carry] = strings.TrimSpace(string(token))
	}
	for k, v := range c.headers {
		headers[k] = v
	}
	b, err := get(ctx, client, http.MethodGet, base+c.path, headers)
	if err == nil && c.decode != nil {
		b, err = c.decode(b)
	}
	return b, err
}

func get(ctx context.Context, client *http.Client, method, url string, headers map[string]string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, errors.New("no answer") // the error would repeat the address
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxDocument+1))
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("answered %d", res.StatusCode)
	case len(b) > maxDocument:
		return nil, fmt.Errorf("answered more than %d bytes", maxDocument)
	}
	return b, nil
}
