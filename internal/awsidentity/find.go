package awsidentity

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Limits of what is read.
const (
	maxAnswer = 64 << 10 // bytes of an answer or file
	// hopTimeout is for one request: the services are on the host's own link, and where there are none nobody answers.
	hopTimeout = 2 * time.Second
)

// Where AWS serves credentials to containers and instances.
const (
	containerHost = "http://169.254.170.2"
	instanceHost  = "http://169.254.169.254"
)

// containerHosts may be named for a container's credentials over plain HTTP, besides loopback: ECS, and EKS in IPv4 and IPv6.
var containerHosts = []string{"169.254.170.2", "169.254.170.23", "fd00:ec2::23"}

// ErrNone says that the host has no AWS credentials in any of the places that are looked at.
var ErrNone = errors.New("no AWS credentials on this host: not in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, not in a shared profile, not from a container or an instance role")

// Config is for tests: the zero value is this host.
type Config struct {
	Getenv func(string) string // nil is os.Getenv
	Roots  *x509.CertPool      // of STS's certificate; nil is the system's
}

// Find looks for credentials in AWS's order: environment, web identity (EKS), shared profile (AWS_PROFILE; with the roles and programs that it
// names), container (ECS, EKS Pod Identity), instance role (IMDSv2). The first place that names some is taken, also when it is broken. It errs with ErrNone when there is none.
func Find(ctx context.Context, cfg Config) (*Credentials, error) {
	f := finder{getenv: cfg.Getenv, client: &http.Client{
		Timeout: hopTimeout,
		// No proxy: these services are on the host's link, and what they answer is secret.
		Transport:     &http.Transport{DialContext: (&net.Dialer{Timeout: hopTimeout}).DialContext, DisableKeepAlives: true, MaxResponseHeaderBytes: maxAnswer},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	f.sts = &http.Client{
		Timeout: stsTimeout, Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, MaxResponseHeaderBytes: maxAnswer},
		CheckRedirect: f.client.CheckRedirect,
	}
	if cfg.Roots != nil {
		f.sts.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: cfg.Roots, MinVersion: tls.VersionTLS12}
	}
	if f.getenv == nil {
		f.getenv = os.Getenv
	}
	for _, look := range []func(context.Context) (*Credentials, error){f.environment, f.webIdentity, f.profile, f.container, f.instance} {
		if c, err := look(ctx); err != nil || c != nil {
			return c, err
		}
	}
	return nil, ErrNone
}

type finder struct {
	getenv func(string) string
	client *http.Client // for services on the host's link
	sts    *http.Client
}

// usable refuses what can not stand in a header.
func usable(c *Credentials) (*Credentials, error) {
	for _, s := range []string{c.accessKey, c.secret, c.token} {
		if strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
			return nil, fmt.Errorf("%v: a key holds characters that none has", c)
		}
	}
	if c.accessKey == "" || c.secret == "" {
		return nil, fmt.Errorf("%v: access key or secret key is missing", c)
	}
	return c, nil
}

func (f *finder) environment(context.Context) (*Credentials, error) {
	c := &Credentials{f.getenv("AWS_ACCESS_KEY_ID"), f.getenv("AWS_SECRET_ACCESS_KEY"), f.getenv("AWS_SESSION_TOKEN"), "the environment"}
	if c.accessKey == "" && c.secret == "" {
		return nil, nil
	}
	return usable(c)
}

// profile reads the shared files and follows what the profile names: keys, a program that prints them, a role to assume.
func (f *finder) profile(ctx context.Context) (*Credentials, error) {
	name := f.getenv("AWS_PROFILE")
	if name != "" {
		return f.named(ctx, name, nil)
	}
	found, _, err := f.section("default")
	if err != nil || !leads(found) {
		return nil, err
	}
	return f.named(ctx, "default", nil)
}

// leads says whether a profile names credentials in any way.
func leads(found map[string]string) bool {
	for _, key := range []string{"aws_access_key_id", "aws_secret_access_key", "role_arn", "credential_process", "sso_session", "sso_start_url"} {
		if found[key] != "" {
			return true
		}
	}
	return false
}

// section reads a profile out of both files; that of credentials wins. A file that may not be read is passed over when nobody named it.
func (f *finder) section(name string) (found map[string]string, there bool, err error) {
	found = make(map[string]string)
	for _, file := range []struct{ path, fallback, section string }{
		{f.getenv("AWS_CONFIG_FILE"), "config", "profile " + name},
		{f.getenv("AWS_SHARED_CREDENTIALS_FILE"), "credentials", name}, // wins
	} {
		section := file.section
		if name == "default" {
			section = name // has no prefix in either file
		}
		path := file.path
		if path == "" {
			home := f.getenv("HOME")
			if home == "" {
				continue
			}
			path = filepath.Join(home, ".aws", file.fallback)
		}
		has, err := readSection(path, section, found)
		if err != nil && (file.path != "" || !errors.Is(err, fs.ErrPermission)) {
			return nil, false, fmt.Errorf("AWS credentials: %w", err)
		}
		there = there || has
	}
	return found, there, nil
}

// named resolves a profile. before are the profiles that led to it.
func (f *finder) named(ctx context.Context, name string, before []string) (*Credentials, error) {
	found, there, err := f.section(name)
	if err != nil {
		return nil, err
	}
	source := "profile " + name
	keys := &Credentials{found["aws_access_key_id"], found["aws_secret_access_key"], found["aws_session_token"], source}
	again := len(before) > 0 && before[len(before)-1] == name // a role whose source is its own profile's keys
	switch {
	case !there:
		return nil, fmt.Errorf("AWS profile %s is asked for, and the shared files do not have it", name)
	case len(before) >= maxChain || (!again && slices.Contains(before, name)):
		return nil, fmt.Errorf("AWS profiles lead in a circle: %s", strings.Join(append(before, name), ", "))
	case found["role_arn"] != "" && !again:
		return f.roleOf(ctx, name, found, before)
	case keys.accessKey != "" || keys.secret != "":
		return usable(keys)
	case found["credential_process"] != "":
		return f.process(ctx, found["credential_process"], source)
	case found["sso_session"] != "" || found["sso_start_url"] != "":
		return nil, fmt.Errorf("AWS profile %s gets its credentials by single sign-on, which is not followed here: put keys into the environment (aws configure export-credentials --profile %s), or use an instance role", name, name)
	}
	return nil, fmt.Errorf("AWS profile %s names no credentials: give it keys, a role_arn with its source, or a credential_process", name)
}

// roleOf assumes a profile's role.
func (f *finder) roleOf(ctx context.Context, name string, found map[string]string, before []string) (*Credentials, error) {
	r := role{
		arn: found["role_arn"], session: found["role_session_name"], externalID: found["external_id"], region: found["region"],
		tokenFile: found["web_identity_token_file"],
	}
	source := "profile " + name
	if found["mfa_serial"] != "" {
		return nil, fmt.Errorf("AWS %s wants a code of a second factor, which nobody is there to type: put keys into the environment, or use another profile", source)
	}
	if r.tokenFile != "" {
		return f.assume(ctx, r, nil, source)
	}
	var by *Credentials
	var err error
	switch from := found["credential_source"]; {
	case found["source_profile"] != "":
		by, err = f.named(ctx, found["source_profile"], append(before, name))
	case from == "Environment":
		by, err = f.environment(ctx)
	case from == "EcsContainer":
		by, err = f.container(ctx)
	case from == "Ec2InstanceMetadata":
		by, err = f.instance(ctx)
	default:
		err = fmt.Errorf("AWS %s has a role_arn, and neither source_profile, credential_source nor web_identity_token_file to assume it with", source)
	}
	if err == nil && by == nil {
		err = fmt.Errorf("AWS %s assumes its role by %s, where there are no credentials", source, found["credential_source"])
	}
	if err != nil {
		return nil, err
	}
	return f.assume(ctx, r, by, source)
}

// readSection adds the keys of a section of an INI file. A file that is not there has none.
func readSection(path, section string, into map[string]string) (there bool, err error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	in := false
	for s := bufio.NewScanner(io.LimitReader(file, maxAnswer)); s.Scan(); {
		line := s.Text()
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "" || trimmed[0] == '#' || trimmed[0] == ';' || line[0] == ' ' || line[0] == '\t': // indented: a nested setting
		case trimmed[0] == '[':
			name, _, _ := strings.Cut(trimmed[1:], "]")
			in = strings.Join(strings.Fields(name), " ") == section
			there = there || in
		case in:
			if key, value, ok := strings.Cut(trimmed, "="); ok {
				into[strings.ToLower(strings.TrimSpace(key))] = strings.TrimSpace(value)
			}
		}
	}
	return there, nil
}

// webIdentity assumes the role of a pod's service account (EKS), or of whatever else writes tokens of OIDC to a file.
func (f *finder) webIdentity(ctx context.Context) (*Credentials, error) {
	r := role{arn: f.getenv("AWS_ROLE_ARN"), session: f.getenv("AWS_ROLE_SESSION_NAME"), tokenFile: f.getenv("AWS_WEB_IDENTITY_TOKEN_FILE")}
	if r.tokenFile == "" {
		return nil, nil
	}
	if r.arn == "" {
		return nil, errors.New("AWS_WEB_IDENTITY_TOKEN_FILE is set without AWS_ROLE_ARN, the role that its token is good for")
	}
	return f.assume(ctx, r, nil, "the web identity")
}

// served is what containers and instances are answered.
type served struct {
	Code            string
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string
}

func (f *finder) container(ctx context.Context) (*Credentials, error) {
	at := f.getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI")
	if rel := f.getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"); rel != "" {
		at = containerHost + "/" + strings.TrimPrefix(rel, "/")
	}
	if at == "" {
		return nil, nil
	}
	u, err := url.Parse(at)
	if err != nil || u.Host == "" || u.User != nil {
		return nil, errors.New("AWS_CONTAINER_CREDENTIALS_FULL_URI is not a URL")
	}
	ip, err := netip.ParseAddr(u.Hostname())
	local := u.Hostname() == "localhost" || (err == nil && ip.IsLoopback()) || slices.Contains(containerHosts, u.Hostname())
	if u.Scheme != "https" && (u.Scheme != "http" || !local) {
		return nil, fmt.Errorf("AWS_CONTAINER_CREDENTIALS_FULL_URI: %s is not asked over plain HTTP", u.Host)
	}
	auth := f.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN")
	if file := f.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE: %w", err)
		}
		auth = strings.TrimSpace(string(b))
	}
	header := http.Header{}
	if auth != "" {
		header.Set("Authorization", auth)
	}
	return f.fetch(ctx, u.String(), header, "the container")
}

func (f *finder) fetch(ctx context.Context, at string, header http.Header, source string) (*Credentials, error) {
	body, status, err := f.ask(ctx, http.MethodGet, at, header)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	if err != nil {
		return nil, fmt.Errorf("AWS credentials from %s: %w", source, err)
	}
	var s served
	if err := json.Unmarshal(body, &s); err != nil || (s.Code != "" && s.Code != "Success") {
		return nil, fmt.Errorf("AWS credentials from %s: the answer holds none", source)
	}
	return usable(&Credentials{s.AccessKeyID, s.SecretAccessKey, s.Token, source})
}

// instance asks the metadata service, version 2: its session token needs a PUT, which no confused proxy makes.
func (f *finder) instance(ctx context.Context) (*Credentials, error) {
	if strings.EqualFold(f.getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		return nil, nil
	}
	host := instanceHost
	if at := f.getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT"); at != "" {
		host = strings.TrimSuffix(at, "/")
	}
	token, status, err := f.ask(ctx, http.MethodPut, host+"/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"60"}})
	if err != nil || status != http.StatusOK {
		return nil, nil // no instance of AWS
	}
	header := http.Header{"X-Aws-Ec2-Metadata-Token": {strings.TrimSpace(string(token))}}
	const roles = "/latest/meta-data/iam/security-credentials/"
	list, status, err := f.ask(ctx, http.MethodGet, host+roles, header)
	if err == nil && status == http.StatusNotFound {
		return nil, errors.New("this AWS instance has no role: attach an instance profile, or put keys into the environment")
	}
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	if err != nil {
		return nil, fmt.Errorf("AWS credentials from the instance role: %w", err)
	}
	role, _, _ := strings.Cut(strings.TrimSpace(string(list)), "\n")
	return f.fetch(ctx, host+roles+url.PathEscape(strings.TrimSpace(role)), header, "the instance role")
}

// ask makes a request and reads a bounded answer.
func (f *finder) ask(ctx context.Context, method, at string, header http.Header) ([]byte, int, error) {
	req, err := http.NewRequestWithContext(ctx, method, at, nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header = header
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return b, resp.StatusCode, err
}
