// Package awsidentity lets a node show which AWS identity its host has: it finds the host's credentials (environment, shared profile,
// container, instance role) and signs a request for sts:GetCallerIdentity with them, which the platform sends to STS. The secret stays here.
// What else a host asks of AWS in its own name is signed by Authorize.
//
//	c, err := awsidentity.Find(ctx, awsidentity.Config{})
//	signed, err := c.Sign(endpoint, region, map[string]string{"x-sallyway-nonce": nonce}, time.Now())
//
// AWS's own library would be 3.4 MB of every program for this one request.
package awsidentity

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	dateFormat = "20060102T150405Z"
)

// Credentials are AWS's. All but Source are secret or tell who asks: they are in no log.
type Credentials struct {
	accessKey, secret, token string
	// Source says where they were found.
	Source string
}

// String tells no secret.
func (c *Credentials) String() string { return "AWS credentials from " + c.Source }

// Sign signs a POST of control.AWSQuery to endpoint (https://host[:port]) with more headers, whose names are in lower case.
func (c *Credentials) Sign(endpoint, region string, more map[string]string, now time.Time) (control.AWSSigned, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return control.AWSSigned{}, fmt.Errorf("AWS STS endpoint %.80q is not https://HOST", endpoint)
	}
	headers := maps.Clone(more)
	if headers == nil {
		headers = make(map[string]string)
	}
	headers["content-type"] = control.AWSContentType
	headers["x-amz-date"] = now.UTC().Format(dateFormat)
	if c.token != "" {
		headers["x-amz-security-token"] = c.token
	}
	r := request{method: "POST", host: u.Host, path: "/", region: region, service: "sts", headers: headers, body: control.AWSQuery}
	headers["authorization"] = r.authorization(c)
	return control.AWSSigned{Endpoint: endpoint, Headers: headers}, nil
}

// Authorize signs a POST to the root of a service of AWS: it sets Host's, the date's and the credentials' headers beside those that req has,
// and all of them are signed. body is what req sends.
func (c *Credentials) Authorize(req *http.Request, body, region, service string, now time.Time) {
	req.Header.Set("X-Amz-Date", now.UTC().Format(dateFormat))
	if c.token != "" {
		req.Header.Set("X-Amz-Security-Token", c.token)
	}
	r := request{method: req.Method, host: req.URL.Host, path: "/", region: region, service: service, headers: make(map[string]string), body: body}
	for name := range req.Header {
		r.headers[strings.ToLower(name)] = req.Header.Get(name)
	}
	req.Header.Set("Authorization", r.authorization(c))
}

// request is what is signed. headers has the date, and all of it is signed.
type request struct {
	method, host, path, query string // path and query in canonical form
	region, service           string
	headers                   map[string]string // names in lower case
	body                      string
}

// canonical is the canonical request of SigV4 and the list of signed headers.
func (r *request) canonical() (text, signed string) {
	all := maps.Clone(r.headers)
	all["host"] = r.host
	names := slices.Sorted(maps.Keys(all))
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\n%s\n", r.method, r.path, r.query)
	for _, n := range names {
		fmt.Fprintf(&b, "%s:%s\n", n, strings.Join(strings.Fields(all[n]), " "))
	}
	signed = strings.Join(names, ";")
	fmt.Fprintf(&b, "\n%s\n%s", signed, digest(r.body))
	return b.String(), signed
}

// authorization is the header of that name.
func (r *request) authorization(c *Credentials) string {
	date := r.headers["x-amz-date"]
	scope := date[:8] + "/" + r.region + "/" + r.service + "/aws4_request"
	text, signed := r.canonical()
	key := []byte("AWS4" + c.secret)
	for _, part := range strings.Split(scope, "/") {
		key = mac(key, part)
	}
	signature := mac(key, algorithm+"\n"+date+"\n"+scope+"\n"+digest(text))
	return fmt.Sprintf("%s Credential=%s/%s, SignedHeaders=%s, Signature=%s", algorithm, c.accessKey, scope, signed, hex.EncodeToString(signature))
}

func digest(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func mac(key []byte, s string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(s))
	return m.Sum(nil)
}
