// Package awsauth finds out which AWS identity a node has: the node signs a request for sts:GetCallerIdentity (AWS Signature Version 4),
// the platform sends it to STS and reads the answer. The secret key stays on the node.
//
//	v, err := awsauth.New(awsauth.Config{Region: "eu-central-1"})
//	id, err := v.Verify(ctx, signed, map[string]string{"x-sallyway-nonce": nonce})
//	err = awsauth.Allow(rule, id)
//
// Only STS can check the signature, so everything else about the request is checked here before it is sent: where it goes (one URL, known
// from the configuration and never from the node), what it asks (the body is ours), the region, the time, and that every header which binds
// it to this platform is among the signed ones. Nothing that a node sends is sent on but these headers.
package awsauth

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"sallyway/internal/control"
)

// Limits of what nodes and STS send.
const (
	maxHeader   = 8 << 10  // bytes of one header: session tokens have 1 to 2 KiB
	maxHeaders  = 16 << 10 // bytes of all
	maxAnswer   = 16 << 10 // bytes: a real one has about 500
	timeout     = 10 * time.Second
	atOnce      = 8 // requests to STS
	dateFormat  = "20060102T150405Z"
	answerSpace = "https://sts.amazonaws.com/doc/2011-06-15/"
)

// MaxSkew is how far a node's clock may be from the platform's. AWS itself takes 15 minutes.
const MaxSkew = 5 * time.Minute

// DefaultRegion is the region whose STS is asked where none is configured.
const DefaultRegion = "us-east-1"

// ErrUnavailable says that STS did not answer, so that nothing is known about the identity: to try again.
var ErrUnavailable = errors.New("AWS STS does not answer")

// RefusedError says why a signed request proves nothing.
type RefusedError struct{ Reason, Remedy string }

// Error implements error.
func (e *RefusedError) Error() string { return e.Reason }

func refuse(remedy, format string, args ...any) error {
	return &RefusedError{fmt.Sprintf(format, args...), remedy}
}

// Config says which STS is asked. The zero value asks the one of DefaultRegion.
type Config struct {
	Region string // to which requests must be signed
	// Endpoint is the URL of STS, https://host[:port]: empty is the region's public one. It is the only one that is ever asked.
	Endpoint string
	// CAFile holds the authorities (PEM) of the endpoint's certificate: empty is the system's.
	CAFile string
	Now    func() time.Time // nil is time.Now
}

// Verifier asks STS. Methods may be called concurrently.
type Verifier struct {
	region   string
	endpoint *url.URL
	now      func() time.Time
	client   *http.Client
	slots    chan struct{} // one per request under way
}

var validRegion = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}$`)

// publicEndpoint is the STS of a region, by AWS's partitions.
func publicEndpoint(region string) string {
	suffix := "amazonaws.com"
	if strings.HasPrefix(region, "cn-") {
		suffix = "amazonaws.com.cn"
	}
	return "https://sts." + region + "." + suffix
}

// New checks a configuration. It asks nobody.
func New(cfg Config) (*Verifier, error) {
	if cfg.Region == "" {
		cfg.Region = DefaultRegion
	}
	if !validRegion.MatchString(cfg.Region) {
		return nil, fmt.Errorf("AWS region %.40q: want one such as %s", cfg.Region, DefaultRegion)
	}
	if cfg.Endpoint == "" {
		cfg.Endpoint = publicEndpoint(cfg.Region)
	}
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("AWS STS endpoint %.80q: want https://HOST[:PORT] without a path", cfg.Endpoint)
	}
	u.Path, u.Host = "", strings.TrimSuffix(strings.ToLower(u.Host), ":443")
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		b, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("authorities of the AWS STS endpoint: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("authorities of the AWS STS endpoint: %s holds no certificate in PEM", cfg.CAFile)
		}
	}
	v := &Verifier{region: cfg.Region, endpoint: u, now: cfg.Now, slots: make(chan struct{}, atOnce)}
	if v.now == nil {
		v.now = time.Now
	}
	v.client = &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: timeout}).DialContext, TLSClientConfig: tlsConfig,
			TLSHandshakeTimeout: timeout, MaxResponseHeaderBytes: maxAnswer, DisableKeepAlives: true, // seldom: no connection waits
		},
		// Whoever answers with a redirect is not STS.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return v, nil
}

// Endpoint is the URL of the STS that is asked, Region the region to sign for.
func (v *Verifier) Endpoint() string { return v.endpoint.String() }

// Region is the region to which requests must be signed.
func (v *Verifier) Region() string { return v.region }

// Identity is who signed, as STS says.
type Identity struct {
	Account string
	ARN     string // of a role's session: arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION
	UserID  string
}

// Verify checks a signed request and asks STS whose it is. must are headers, in lower case, that have to be signed with these values.
// Errors: *RefusedError, ErrUnavailable.
func (v *Verifier) Verify(ctx context.Context, signed control.AWSSigned, must map[string]string) (*Identity, error) {
	if err := v.check(signed, must); err != nil {
		return nil, err
	}
	select {
	case v.slots <- struct{}{}:
		defer func() { <-v.slots }()
	default:
		return nil, fmt.Errorf("%w: %d requests wait for it already", ErrUnavailable, atOnce)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, v.endpoint.String()+"/", strings.NewReader(control.AWSQuery))
	if err != nil {
		return nil, err
	}
	for name, value := range signed.Headers {
		req.Header.Set(name, value)
	}
	req.Header.Set("Accept", "application/xml")
	req.Header.Set("User-Agent", "sallyway")
	resp, err := v.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, v.endpoint.Host, errors.Unwrap(err)) // url.Error repeats the URL
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, v.endpoint.Host, err)
	}
	switch {
	case len(body) > maxAnswer:
		return nil, refuse("see that the platform's --aws-sts-endpoint is an STS", "%s answered more than %d bytes", v.endpoint.Host, maxAnswer)
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests:
		return nil, fmt.Errorf("%w: %s: status %d", ErrUnavailable, v.endpoint.Host, resp.StatusCode)
	case resp.StatusCode/100 == 3:
		return nil, refuse("see that the platform's --aws-sts-endpoint is an STS", "%s answered with a redirect (%d), which is not followed", v.endpoint.Host, resp.StatusCode)
	case resp.StatusCode != http.StatusOK:
		return nil, refuse("see the host's AWS credentials and clock: aws sts get-caller-identity", "AWS STS refused the host's identity: %s", reason(resp.StatusCode, body))
	}
	return parse(body)
}

// authorization is the header of SigV4 with one credential, in the one order that signers write.
var authorization = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([A-Za-z0-9]{16,128})/([0-9]{8})/([a-z0-9-]{1,40})/([a-z0-9-]{1,40})/aws4_request, ?SignedHeaders=([a-z0-9;-]{1,999}), ?Signature=[0-9a-f]{64}$`)

// check holds a signed request against everything that can be known without STS.
func (v *Verifier) check(s control.AWSSigned, must map[string]string) error {
	const again = "run the same version of Sallyway on node and platform"
	if s.Endpoint != v.endpoint.String() {
		return refuse(again, "the request is signed for %.80q, and this platform asks %s alone", s.Endpoint, v.endpoint)
	}
	total := 0
	for name, value := range s.Headers {
		_, ours := must[name]
		if !ours && !slices.Contains([]string{"authorization", "content-type", "x-amz-date", "x-amz-security-token"}, name) {
			return refuse(again, "the request has a header %.40q", name)
		}
		if total += len(name) + len(value); len(value) > maxHeader || total > maxHeaders {
			return refuse(again, "the request's headers are too large")
		}
		if strings.IndexFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
			return refuse(again, "header %s holds what no header may", name)
		}
	}
	if s.Headers["content-type"] != control.AWSContentType {
		return refuse(again, "the request's content type is not %s", control.AWSContentType)
	}
	m := authorization.FindStringSubmatch(s.Headers["authorization"])
	if m == nil {
		return refuse(again, "the authorization is not one of AWS Signature Version 4")
	}
	if m[4] != "sts" || m[3] != v.region {
		return refuse(again, "the request is signed for %s in %s, want sts in %s", m[4], m[3], v.region)
	}
	list := strings.Split(m[5], ";")
	if !slices.Contains(list, "host") {
		return refuse(again, "the request does not sign its host")
	}
	for name, want := range must {
		if got, there := s.Headers[name]; !there || got != want {
			return refuse(again, "header %s is not what was asked for", name)
		}
	}
	for name := range s.Headers {
		if name != "authorization" && !slices.Contains(list, name) {
			return refuse(again, "header %s is not signed", name)
		}
	}
	at, err := time.Parse(dateFormat, s.Headers["x-amz-date"])
	if err != nil || !strings.HasPrefix(s.Headers["x-amz-date"], m[2]) {
		return refuse(again, "the request's date is missing, or not the one it is signed for")
	}
	if skew := at.Sub(v.now()); skew.Abs() > MaxSkew {
		return refuse("set the clock of the host (or of the platform)", "the request was signed at %s, which is %v from the platform's clock", at.Format(time.RFC3339), skew.Abs().Round(time.Second))
	}
	return nil
}

// answer is STS's. Lists show what stands there twice.
type answer struct {
	XMLName xml.Name `xml:"GetCallerIdentityResponse"`
	Result  []struct {
		ARN     []string `xml:"Arn"`
		UserID  []string `xml:"UserId"`
		Account []string `xml:"Account"`
	} `xml:"GetCallerIdentityResult"`
}

var (
	validAccount = regexp.MustCompile(`^[0-9]{12}$`)
	validARN     = regexp.MustCompile(`^arn:(aws[a-z-]{0,20}):(iam|sts)::([0-9]{12}):([!-~]{1,600})$`)
	validUserID  = regexp.MustCompile(`^[!-~]{1,256}$`)
	validCode    = regexp.MustCompile(`^[A-Za-z]{1,60}$`)
)

// parse reads STS's answer to GetCallerIdentity.
func parse(body []byte) (*Identity, error) {
	bad := func(what string) error {
		return refuse("see that the platform's --aws-sts-endpoint is an STS", "the answer of STS is not understood: %s", what)
	}
	var a answer
	d := xml.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(&a); err != nil {
		return nil, bad("it is not the XML of GetCallerIdentity")
	}
	if t, err := d.Token(); err == nil {
		if c, text := t.(xml.CharData); !text || len(bytes.TrimSpace(c)) > 0 {
			return nil, bad("something follows it")
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return nil, bad("something follows it")
		}
	} else if !errors.Is(err, io.EOF) {
		return nil, bad("something follows it")
	}
	if a.XMLName.Space != answerSpace || len(a.Result) != 1 {
		return nil, bad("it is not the XML of GetCallerIdentity")
	}
	r := a.Result[0]
	if len(r.ARN) != 1 || len(r.Account) != 1 || len(r.UserID) != 1 {
		return nil, bad("it has not one ARN, account and user")
	}
	id := &Identity{Account: r.Account[0], ARN: r.ARN[0], UserID: r.UserID[0]}
	m := validARN.FindStringSubmatch(id.ARN)
	if m == nil || m[3] != id.Account || !validUserID.MatchString(id.UserID) {
		return nil, bad("its ARN, account and user do not go together")
	}
	return id, nil
}

// reason words an error of STS: its code alone, since the text repeats what was signed.
func reason(status int, body []byte) string {
	var e struct {
		Error struct {
			Code string `xml:"Code"`
		} `xml:"Error"`
	}
	if xml.Unmarshal(body, &e) == nil && validCode.MatchString(e.Error.Code) {
		return fmt.Sprintf("%s (status %d)", e.Error.Code, status)
	}
	return fmt.Sprintf("status %d", status)
}
