package awsauth_test

import (
	"errors"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyway/internal/awsidentity"
	"sallyway/internal/control"
	"sallyway/platform/awsauth"
	"sallyway/platform/awsauth/ststest"
)

const role = "arn:aws:sts::123456789012:assumed-role/relay-fra/i-0123"

// credentials are those of an access key in the environment.
func credentials(t *testing.T, secret string) *awsidentity.Credentials {
	t.Helper()
	env := map[string]string{"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE12345", "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": "session"}
	c, err := awsidentity.Find(t.Context(), awsidentity.Config{Getenv: func(k string) string { return env[k] }})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestVerify(t *testing.T) {
	sts := ststest.Start(t)
	sts.Set("AKIDEXAMPLE12345", ststest.User{Secret: "secret", Token: "session", ARN: role})
	v, err := awsauth.New(sts.Config())
	if err != nil {
		t.Fatal(err)
	}
	must := map[string]string{control.AWSNonceHeader: "nonce-1", control.AWSPlatformHeader: "https://platform.example"}
	for _, tc := range []struct {
		name   string
		secret string
		more   map[string]string // signed; nil is must
		at     time.Duration
		region string
		change func(s *control.AWSSigned)
		says   string // "" is success
		asks   bool   // STS
	}{
		{name: "good", asks: true},
		{name: "another secret", secret: "other", says: "SignatureDoesNotMatch", asks: true},
		{name: "another nonce", more: map[string]string{control.AWSNonceHeader: "nonce-2", control.AWSPlatformHeader: "https://platform.example"}, says: "x-sallyway-nonce is not"},
		{name: "another platform", more: map[string]string{control.AWSNonceHeader: "nonce-1", control.AWSPlatformHeader: "https://evil.example"}, says: "x-sallyway-platform is not"},
		{name: "no nonce", more: map[string]string{control.AWSPlatformHeader: "https://platform.example"}, says: "x-sallyway-nonce is not"},
		{name: "nonce not signed", more: map[string]string{control.AWSPlatformHeader: "https://platform.example"}, change: func(s *control.AWSSigned) { s.Headers[control.AWSNonceHeader] = "nonce-1" }, says: "x-sallyway-nonce is not signed"},
		{name: "nonce added to the list alone", more: map[string]string{control.AWSPlatformHeader: "https://platform.example"}, change: func(s *control.AWSSigned) {
			s.Headers[control.AWSNonceHeader] = "nonce-1"
			s.Headers["authorization"] = strings.Replace(s.Headers["authorization"], "x-sallyway-platform", "x-sallyway-nonce;x-sallyway-platform", 1)
		}, says: "SignatureDoesNotMatch", asks: true},
		{name: "another host", change: func(s *control.AWSSigned) { s.Endpoint = "https://sts.evil.example" }, says: "this platform asks"},
		{name: "a longer host", change: func(s *control.AWSSigned) { s.Endpoint += ".evil.example" }, says: "this platform asks"},
		{name: "another region", region: "us-west-2", says: "want sts in eu-central-1"},
		{name: "slow clock", at: -6 * time.Minute, says: "signed at"},
		{name: "fast clock", at: 6 * time.Minute, says: "signed at"},
		{name: "clock within the allowance", at: -4 * time.Minute, asks: true},
		{name: "a header of its own", change: func(s *control.AWSSigned) { s.Headers["x-forwarded-host"] = "x" }, says: "has a header"},
		{name: "a host header", change: func(s *control.AWSSigned) { s.Headers["host"] = "x" }, says: "has a header"},
		{name: "a line break", change: func(s *control.AWSSigned) { s.Headers["x-amz-security-token"] = "a\r\nHost: b" }, says: "no header may"},
		{name: "a large header", change: func(s *control.AWSSigned) { s.Headers["x-amz-security-token"] = strings.Repeat("a", 9<<10) }, says: "too large"},
		{name: "no authorization", change: func(s *control.AWSSigned) { delete(s.Headers, "authorization") }, says: "Signature Version 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.secret == "" {
				tc.secret = "secret"
			}
			if tc.more == nil {
				tc.more = must
			}
			if tc.region == "" {
				tc.region = v.Region()
			}
			s, err := credentials(t, tc.secret).Sign(v.Endpoint(), tc.region, tc.more, time.Now().Add(tc.at))
			if err != nil {
				t.Fatal(err)
			}
			if tc.change != nil {
				tc.change(&s)
			}
			before := sts.Asked.Load()
			id, err := v.Verify(t.Context(), s, maps.Clone(must))
			if asked := sts.Asked.Load() > before; asked != tc.asks {
				t.Errorf("asked STS: %v", asked)
			}
			var refused *awsauth.RefusedError
			switch {
			case tc.says == "" && (err != nil || id.ARN != role || id.Account != "123456789012"):
				t.Errorf("%+v %v", id, err)
			case tc.says != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), tc.says)):
				t.Errorf("%v, want %q", err, tc.says)
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	sts := ststest.Start(t)
	v, err := awsauth.New(sts.Config())
	if err != nil {
		t.Fatal(err)
	}
	good := ststest.Result(role)
	for _, tc := range []struct {
		name, body string
		status     int
		says       string
		temporary  bool
	}{
		{name: "redirect", status: 307, says: "redirect"},
		{name: "oversized", body: good + strings.Repeat(" ", 17<<10), says: "more than"},
		{name: "down", status: 503, says: "status 503", temporary: true},
		{name: "throttled", status: 429, says: "status 429", temporary: true},
		{name: "refused", status: 403, body: "<x><Error><Code>ExpiredToken</Code><Message>planted</Message></Error></x>", says: "ExpiredToken (status 403)"},
		{name: "not XML", body: "{}", says: "not the XML"},
		{name: "another namespace", body: strings.Replace(good, "2011-06-15", "2010-01-01", 1), says: "not the XML"},
		{name: "two ARNs", body: strings.Replace(good, "<UserId>", "<Arn>arn:aws:iam::123456789012:root</Arn><UserId>", 1), says: "not one ARN"},
		{name: "two results", body: strings.Replace(good, "<ResponseMetadata>", "<GetCallerIdentityResult></GetCallerIdentityResult><ResponseMetadata>", 1), says: "not the XML"},
		{name: "account of another", body: strings.Replace(good, "<Account>123456789012", "<Account>999999999999", 1), says: "do not go together"},
		{name: "something behind", body: good + good, says: "something follows"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if tc.status != 0 {
					w.Header().Set("Location", sts.URL+"/elsewhere")
					w.WriteHeader(tc.status)
				}
				_, _ = io.WriteString(w, tc.body)
			})
			sts.Answer.Store(&f)
			s, err := credentials(t, "secret").Sign(v.Endpoint(), v.Region(), nil, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			before := sts.Asked.Load()
			_, err = v.Verify(t.Context(), s, nil)
			if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "planted") || errors.Is(err, awsauth.ErrUnavailable) != tc.temporary {
				t.Errorf("%v, want %q", err, tc.says)
			}
			if n := sts.Asked.Load() - before; n != 1 {
				t.Errorf("%d requests: a redirect was followed", n)
			}
		})
	}
}

func TestRules(t *testing.T) {
	const acct = "123456789012"
	user := "arn:aws:iam::123456789012:user/ops/alice"
	for _, tc := range []struct {
		accounts, principal, arn string
		want                     bool
	}{
		{acct, "", role, true},
		{"999999999999", "", role, false},
		{"", "arn:aws:iam::123456789012:role/relay-fra", role, true},
		{"", "arn:aws:iam::123456789012:role/relay-*", role, true},
		{"", "arn:aws:iam::123456789012:role/*-fra", role, true},
		{"", "arn:aws:iam::123456789012:role/r*y*a", role, true},
		{"", "arn:aws:iam::123456789012:role/relay", role, false},
		{"", "arn:aws:iam::123456789012:role/relay-f", role, false},
		{"", "arn:aws:iam::123456789012:role/elay-*", role, false},
		{"", "arn:aws:iam::123456789012:role/relay-fra*fra", role, false},
		{"", "arn:aws:iam::123456789012:role/i-0123", role, false},
		{"", "arn:aws:iam::999999999999:role/relay-fra", role, false},
		{acct, "arn:aws:iam::*:role/relay-fra", role, true},
		{"999999999999", "arn:aws:iam::*:role/relay-fra", role, false},
		{"", "arn:aws:sts::123456789012:assumed-role/relay-fra/i-*", role, true},
		{"", "arn:aws:sts::123456789012:assumed-role/relay-fra/x", role, false},
		{"", "arn:aws:iam::123456789012:user/ops/*", user, true},
		{"", "arn:aws:iam::123456789012:role/*", user, false},
		{acct, "arn:*:iam::*:user/*", "arn:aws:iam::999999999999:user/:user/x", false},
		{"", "arn:aws-cn:iam::123456789012:role/relay-fra", role, false},
	} {
		r := &control.AWSRule{}
		if tc.accounts != "" {
			r.Accounts = []string{tc.accounts}
		}
		if tc.principal != "" {
			r.Principals = []string{tc.principal}
		}
		id := &awsauth.Identity{ARN: tc.arn, Account: strings.Split(tc.arn, ":")[4]}
		if err := awsauth.Allow(r, id); (err == nil) != tc.want {
			t.Errorf("%+v: %s: %v", r, tc.arn, err)
		}
	}
	for _, p := range []string{"*", "arn:aws:iam::*:role/x", "arn:aws:iam::123456789012:*", "arn:aws:s3:::bucket", "arn:aws:iam::123456789012:role/path/x", "arn:aws:sts::123456789012:role/x", ""} {
		if err := awsauth.CheckRule(&control.AWSRule{Principals: []string{p}}); err == nil {
			t.Errorf("rule %q is taken", p)
		}
	}
	if awsauth.CheckRule(&control.AWSRule{}) == nil || awsauth.CheckRule(&control.AWSRule{Accounts: []string{"12"}}) == nil {
		t.Error("a rule for nobody is taken")
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []awsauth.Config{{Endpoint: "http://sts.example"}, {Endpoint: "https://sts.example/x"}, {Endpoint: "https://u@sts.example"}, {Region: "x/../y"}, {CAFile: "/nowhere"}} {
		if _, err := awsauth.New(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
	for region, want := range map[string]string{"": "https://sts.us-east-1.amazonaws.com", "cn-north-1": "https://sts.cn-north-1.amazonaws.com.cn", "us-gov-west-1": "https://sts.us-gov-west-1.amazonaws.com"} {
		if v, err := awsauth.New(awsauth.Config{Region: region}); err != nil || v.Endpoint() != want {
			t.Errorf("%q: %v", region, err)
		}
	}
}
