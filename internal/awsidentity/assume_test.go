package awsidentity_test

import (
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyway/internal/awsidentity"
	"sallyway/platform/awsauth/ststest"
)

// TestAssume has profiles and pods lead to roles, which an STS gives to whoever has signed the request.
func TestAssume(t *testing.T) {
	const base, chained, pod = "arn:aws:iam::1:user/ops", "arn:aws:iam::1:role/first", "arn:aws:iam::1:role/pod"
	keys := ststest.Start(t)
	keys.Set("AKIDBASE", ststest.User{Secret: "hush1", ARN: base})
	keys.Set("AKIDINSTANCE", ststest.User{Secret: "hush3", Token: "t3", ARN: "arn:aws:sts::1:assumed-role/host/i-1"})
	sts := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		form, err := url.ParseQuery(string(body))
		refuse := func(why string) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, "<ErrorResponse><Error><Code>%s</Code><Message>no</Message></Error></ErrorResponse>", why)
		}
		action := form.Get("Action")
		switch {
		case err != nil || form.Get("DurationSeconds") != "900":
			refuse("ValidationError")
			return
		case action == "AssumeRoleWithWebIdentity":
			if form.Get("WebIdentityToken") != "from-the-cluster" || form.Get("RoleArn") != pod || r.Header.Get("Authorization") != "" {
				refuse("InvalidIdentityToken")
				return
			}
		case action == "AssumeRole":
			who, code := keys.Signed(r, body, "sts")
			if code != "" {
				refuse(code)
				return
			}
			if form.Get("RoleArn") == "arn:aws:iam::1:role/second" && (who != chained || form.Get("ExternalId") != "ours") {
				refuse("AccessDenied")
				return
			}
			// Whoever assumes the first role can sign with its keys from now on.
			keys.Set("AKIDASSUMED", ststest.User{Secret: "hush2", Token: "t2", ARN: form.Get("RoleArn")})
		}
		fmt.Fprintf(w, `<%sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%sResult><Credentials><AccessKeyId>AKIDASSUMED</AccessKeyId>
			<SecretAccessKey>hush2</SecretAccessKey><SessionToken>t2</SessionToken></Credentials></%sResult></%sResponse>`, action, action, action, action)
	}))
	defer sts.Close()
	metadata := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, map[string]string{
			"/latest/api/token":                               "session",
			"/latest/meta-data/iam/security-credentials/":     "host",
			"/latest/meta-data/iam/security-credentials/host": `{"Code":"Success","AccessKeyId":"AKIDINSTANCE","SecretAccessKey":"hush3","Token":"t3"}`,
		}[r.URL.Path])
	}))
	defer metadata.Close()

	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	token := write("token", "from-the-cluster\n")
	config := write("config", strings.ReplaceAll(`
[profile base]
aws_access_key_id = AKIDBASE
aws_secret_access_key = hush1
region = REGION
[profile first]
role_arn = arn:aws:iam::1:role/first
source_profile = base
region = REGION
[profile second]
role_arn = arn:aws:iam::1:role/second
source_profile = first
external_id = ours
role_session_name = relay-1
region = REGION
[profile foreign]
role_arn = arn:aws:iam::1:role/second
source_profile = base
region = REGION
[profile self]
role_arn = arn:aws:iam::1:role/first
source_profile = self
aws_access_key_id = AKIDBASE
aws_secret_access_key = hush1
region = REGION
[profile host]
role_arn = arn:aws:iam::1:role/first
credential_source = Ec2InstanceMetadata
region = REGION
[profile a]
role_arn = arn:aws:iam::1:role/first
source_profile = b
[profile b]
role_arn = arn:aws:iam::1:role/first
source_profile = a
[profile phone]
role_arn = arn:aws:iam::1:role/first
source_profile = base
mfa_serial = arn:aws:iam::1:mfa/ops
[profile vault]
credential_process = echo '{"Version":1,"AccessKeyId":"AKIDVAULT","SecretAccessKey":"hush4"}'
[profile ended]
credential_process = echo '{"Version":1,"AccessKeyId":"AKIDVAULT","SecretAccessKey":"hush4","Expiration":"2020-01-01T00:00:00Z"}'
[profile locked]
credential_process = echo the vault is locked >&2; exit 3
[profile sso]
sso_session = corp
[profile odd]
role_arn = arn:aws:iam::1:role/first
source_profile = base
region = evil.example/
`, "REGION", ststest.Region))
	for _, tc := range []struct {
		name string
		env  map[string]string
		want string // where they are from, or what the error says
	}{
		{"role", map[string]string{"AWS_PROFILE": "first"}, "profile first"},
		{"role by a role", map[string]string{"AWS_PROFILE": "second"}, "profile second"},
		{"role for another", map[string]string{"AWS_PROFILE": "foreign"}, "AccessDenied"},
		{"role by its own keys", map[string]string{"AWS_PROFILE": "self"}, "profile self"},
		{"role by the instance", map[string]string{"AWS_PROFILE": "host", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.URL}, "profile host"},
		{"role by an instance that is none", map[string]string{"AWS_PROFILE": "host", "AWS_EC2_METADATA_DISABLED": "true"}, "no credentials"},
		{"circle", map[string]string{"AWS_PROFILE": "a"}, "in a circle: a, b, a"},
		{"second factor", map[string]string{"AWS_PROFILE": "phone"}, "second factor"},
		{"program", map[string]string{"AWS_PROFILE": "vault"}, "profile vault"},
		{"program with old keys", map[string]string{"AWS_PROFILE": "ended"}, "ended at 2020"},
		{"program that fails", map[string]string{"AWS_PROFILE": "locked"}, "the vault is locked"},
		{"single sign-on", map[string]string{"AWS_PROFILE": "sso"}, "export-credentials"},
		{"region that is a host", map[string]string{"AWS_PROFILE": "odd"}, "is none"},
		{"web identity", map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ROLE_ARN": pod}, "the web identity"},
		{"web identity for another role", map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ROLE_ARN": chained}, "InvalidIdentityToken"},
		{"plain HTTP", map[string]string{"AWS_PROFILE": "first", "AWS_ENDPOINT_URL_STS": "http://sts.example"}, "not https"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			roots := x509.NewCertPool()
			roots.AddCert(sts.Certificate())
			c, err := awsidentity.Find(t.Context(), awsidentity.Config{Roots: roots, Getenv: func(k string) string {
				if v, ok := tc.env[k]; ok {
					return v
				}
				return map[string]string{"AWS_CONFIG_FILE": config, "AWS_ENDPOINT_URL_STS": sts.URL, "AWS_REGION": ststest.Region}[k]
			}})
			got := ""
			if err != nil {
				got = err.Error()
			} else {
				got = c.Source
			}
			if !strings.Contains(got, tc.want) || strings.Contains(got, "hush") {
				t.Errorf("%s, want %q", got, tc.want)
			}
		})
	}
}
