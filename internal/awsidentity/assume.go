package awsidentity

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

const (
	// stsTimeout is for one request to STS, which may lie on another continent.
	stsTimeout = 10 * time.Second
	// processTimeout is for a credential_process, which may ask a person's vault.
	processTimeout = time.Minute
	// maxChain is how many profiles may lead to each other.
	maxChain = 5
	// sessionSeconds is the shortest life of an assumed role's credentials: they sign one request.
	sessionSeconds = "900"
	stsVersion     = "2011-06-15"
	defaultRegion  = "us-east-1"
)

// goodSession is what STS takes as the name of a session.
var (
	goodSession = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)
	goodRegion  = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$`)
)

// role is what is assumed.
type role struct {
	arn, session, externalID string
	region                   string // "" is the environment's
	tokenFile                string // of a web identity; "" is a role assumed by other credentials
}

// assume asks STS for a role's credentials: in the name of by, or with a web identity's token when by is nil.
func (f *finder) assume(ctx context.Context, r role, by *Credentials, source string) (*Credentials, error) {
	fail := func(err error) (*Credentials, error) {
		return nil, fmt.Errorf("AWS credentials from %s: assume %.200s: %w", source, r.arn, err)
	}
	region := cmp.Or(r.region, f.getenv("AWS_REGION"), f.getenv("AWS_DEFAULT_REGION"), defaultRegion)
	if !goodRegion.MatchString(region) {
		return fail(fmt.Errorf("region %.40q is none", region))
	}
	session := cmp.Or(r.session, "sallyway")
	if !goodSession.MatchString(session) {
		return fail(fmt.Errorf("session name %.80q has characters that STS refuses", session))
	}
	endpoint, err := stsEndpoint(f.getenv("AWS_ENDPOINT_URL_STS"), region)
	if err != nil {
		return fail(err)
	}
	form := url.Values{"Version": {stsVersion}, "RoleArn": {r.arn}, "RoleSessionName": {session}, "DurationSeconds": {sessionSeconds}}
	switch {
	case by == nil:
		token, err := readSmall(r.tokenFile)
		if err != nil {
			return fail(fmt.Errorf("web identity: %w", err))
		}
		form.Set("Action", "AssumeRoleWithWebIdentity")
		form.Set("WebIdentityToken", strings.TrimSpace(string(token)))
	default:
		form.Set("Action", "AssumeRole")
		if r.externalID != "" {
			form.Set("ExternalId", r.externalID)
		}
	}
	body := form.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint+"/", strings.NewReader(body))
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	if by != nil {
		by.Authorize(req, body, region, "sts", time.Now())
	}
	resp, err := f.sts.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fail(err)
	}
	if resp.StatusCode != http.StatusOK {
		var no struct {
			Error struct{ Code, Message string }
		}
		_ = xml.Unmarshal(b, &no) // a proxy's page says nothing; the status does
		return fail(fmt.Errorf("status %d %.80s %.300s", resp.StatusCode, no.Error.Code, no.Error.Message))
	}
	type keys struct {
		AccessKeyID     string `xml:"AccessKeyId"`
		SecretAccessKey string
		SessionToken    string
	}
	var got struct {
		Role keys `xml:"AssumeRoleResult>Credentials"`
		Web  keys `xml:"AssumeRoleWithWebIdentityResult>Credentials"`
	}
	if err := xml.Unmarshal(b, &got); err != nil {
		return fail(errors.New("the answer holds no credentials"))
	}
	k := got.Role
	if by == nil {
		k = got.Web
	}
	return usable(&Credentials{k.AccessKeyID, k.SecretAccessKey, k.SessionToken, source})
}

// stsEndpoint is the region's STS, or the one that AWS_ENDPOINT_URL_STS names: over TLS, or on this host.
func stsEndpoint(named, region string) (string, error) {
	if named == "" {
		suffix := ""
		if strings.HasPrefix(region, "cn-") {
			suffix = ".cn"
		}
		return "https://sts." + region + ".amazonaws.com" + suffix, nil
	}
	u, err := url.Parse(named)
	if err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return "", errors.New("AWS_ENDPOINT_URL_STS is not https://HOST")
	}
	a, err := netip.ParseAddr(u.Hostname())
	if local := err == nil && a.IsLoopback(); u.Scheme != "https" && (u.Scheme != "http" || !local) {
		return "", errors.New("AWS_ENDPOINT_URL_STS is not https://HOST")
	}
	return strings.TrimSuffix(named, "/"), nil
}

// readSmall reads a file of bounded size.
func readSmall(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxAnswer))
}

// process runs a profile's credential_process, as AWS's tools do: a command of the host's own configuration, by its shell.
func (f *finder) process(ctx context.Context, command, source string) (*Credentials, error) {
	fail := func(err error) (*Credentials, error) {
		return nil, fmt.Errorf("AWS credentials from credential_process of %s: %w", source, err)
	}
	ctx, cancel := context.WithTimeout(ctx, processTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fail(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &limited{w: &said, left: 300}
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	b, readErr := io.ReadAll(io.LimitReader(out, maxAnswer))
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return fail(fmt.Errorf("%w %s", err, strings.Join(strings.Fields(said.String()), " ")))
	}
	var got struct {
		Version                                   int
		AccessKeyID                               string `json:"AccessKeyId"`
		SecretAccessKey, SessionToken, Expiration string
	}
	if err := json.Unmarshal(b, &got); err != nil || got.Version != 1 {
		return fail(errors.New("it did not print credentials of version 1"))
	}
	if at, err := time.Parse(time.RFC3339, got.Expiration); err == nil && time.Now().After(at) {
		return fail(fmt.Errorf("what it printed ended at %v", at.UTC().Format(time.RFC3339)))
	}
	return usable(&Credentials{got.AccessKeyID, got.SecretAccessKey, got.SessionToken, source})
}

// limited keeps the first bytes that are written to it.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(l.left, len(p))
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}
